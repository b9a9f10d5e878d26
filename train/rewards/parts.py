"""Scores the groups of a batch as they end: functions while other groups are sampled, reward models at the end."""

from collections.abc import Callable, Sequence
from typing import Any

import numpy as np

from models.slots import Part
from models.tokenizer import Prompt, Tokenizer
from train.processes import share
from train.rewards import Rewards, completion_ids
from train.rewards.functions import Scored
from train.rewards.logged import Columns, logged_columns, place_rows


class PartScores:
    """The rewards of a batch. Each process scores its share of the prompts, however they are spread over the parts.

    Functions begin with the groups of each part at once. Reward models need the devices, which sample while there are
    more parts, and score full batches of `batch_prompts`: they wait for all groups.

    Args:
      prompts, columns: of all P prompts, on every process.
    """

    def __init__(
        self, rewards: Rewards, tokenizer: Tokenizer, prompts: Sequence[Prompt], columns: dict[str, list[Any]]
    ) -> None:
        own = share(len(prompts))
        self._rewards, self._tokenizer, self._first = rewards, tokenizer, own.start
        self._prompts, self._columns = prompts[own], {name: values[own] for name, values in columns.items()}
        self._texts_PG: list[list[str]] = [[]] * len(self._prompts)
        self._pending: list[tuple[np.ndarray, dict[str, Callable[[], Scored]]]] = []
        self._columns_PG: Columns = {}

    def add(self, part: Part) -> None:
        """Decodes this process' completions of a part, and begins to score them by the functions."""
        rows = part.prompts_P - self._first
        order = [i for i in np.argsort(rows) if 0 <= rows[i] < len(self._prompts)]
        if not order:
            return
        tokens_PGT, lengths_PG, rows = part.rollout.tokens_PGT[order], part.rollout.lengths_PG[order], rows[order]
        texts_PG, ids_PG = self._tokenizer.decode(tokens_PGT, lengths_PG), completion_ids(tokens_PGT, lengths_PG)
        prompts = [self._prompts[row] for row in rows]
        columns = {name: [values[row] for row in rows] for name, values in self._columns.items()}
        for row, texts_G in zip(rows, texts_PG, strict=True):
            self._texts_PG[row] = texts_G
        self._pending.append((rows, self._rewards.start(prompts, texts_PG, columns, ids_PG)))

    def of_all(self) -> np.ndarray:
        """Returns `rewards_PGR` of all P prompts, on every process, when all parts were added."""
        return self._rewards.with_models(self._finish, self._prompts, self._texts_PG)

    def columns(self) -> Columns:
        """Returns what functions have logged for each completion, logged/NAME/COLUMN [P][G], on every process."""
        return self._rewards.gather_columns(self._columns_PG, len(self._prompts), len(self._texts_PG[0]))

    def _finish(self) -> dict[str, np.ndarray]:
        """Waits for the functions, and puts the parts together."""
        scores_PG: dict[str, np.ndarray] = {}
        for rows, pending in self._pending:
            scored = {name: wait() for name, wait in pending.items()}
            for name, each in scored.items():
                shape = (len(self._prompts), each.rewards_PG.shape[1])
                scores_PG.setdefault(name, np.full(shape, np.nan, each.rewards_PG.dtype))[rows] = each.rewards_PG
            place_rows(self._columns_PG, logged_columns(scored), rows.tolist(), len(self._prompts))
        return scores_PG
