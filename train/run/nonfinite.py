"""What a step learned from whose loss or gradient is not finite, written into the run to be looked at.

runs/NAME/nonfinite/step_000012.jsonl   one row per completion: prompt, completion, rewards/NAME, advantage, length,
                                        stop_reason, and the token ids of both with the sampler's log-probabilities
                   /step_000012.yaml    the config of that step
"""

import json
import math
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import yaml

from models.checkpoint_failures import failure_reason
from models.tokenizer import Tokenizer
from train.batch import Groups, completion_table
from train.config import PolicyConfig, resolved
from train.console import print_plain
from train.processes import is_first
from train.run.files import write_jsonl, write_whole

NONFINITE = "nonfinite"


def write_batch(
    config: PolicyConfig,
    step: int,
    prompts: Sequence[Any],
    tokenizer: Tokenizer,
    groups: Groups,
    names: Sequence[str],
    advantages_PG: np.ndarray,
) -> Path | None:
    """Writes the batch of a step; returns the file, or None, said in a line, if the disk does not take it.

    Args:
      config: of the run.
      step: the number of the step, from 1.
      tokenizer: the policy's.
      prompts, groups, names, advantages_PG: as for `train.batch.completion_table`.
    """
    file = Path(config.output_dir) / NONFINITE / f"step_{step:06d}.jsonl"
    if not is_first():
        return file
    tokens_PGT, logprobs_PGT, lengths_PG, _ = map(np.asarray, groups.rollout)
    texts_PG = tokenizer.decode(tokens_PGT, lengths_PG)
    table = completion_table(prompts, texts_PG, groups, names, advantages_PG)
    P, G = lengths_PG.shape
    table["prompt_tokens"] = [groups.prompt_PS[p][: groups.lengths_P[p]].tolist() for p in range(P) for _ in range(G)]
    for name, array_PGT in (("tokens", tokens_PGT), ("sampled_logprobs", logprobs_PGT)):
        table[name] = [array_PGT[p, g, : lengths_PG[p, g]].tolist() for p in range(P) for g in range(G)]
    rows = [dict(zip(table, row, strict=True)) for row in zip(*table.values(), strict=True)]
    try:
        write_jsonl(file, [{name: _as_json(value) for name, value in row.items()} for row in rows])
        plain = json.loads(json.dumps(resolved(config)))
        write_whole(file.with_suffix(".yaml"), yaml.safe_dump(plain, sort_keys=False))
    except OSError as error:  # what is not finite is the news, not the disk
        print_plain(
            f"{file}: the batch of step {step} could not be written ({failure_reason(error.__cause__ or error)})"
        )
        return None
    return file


def _as_json(value: Any) -> Any:
    """JSON has no NaN and no infinity: they are written as text, which says which it was."""
    if isinstance(value, list):
        return [_as_json(item) for item in value]
    return str(value) if isinstance(value, float) and not math.isfinite(value) else value
