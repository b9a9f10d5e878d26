"""The order in which the rows of one or more sources are drawn: a pure function of seed and step, so a run resumes.

Without weights all rows are one data set, and every epoch is a permutation of it. With weights, each slot of the stream
of rows belongs to a source that the weights alone fix, and the r-th slot of a source takes the r-th row of its own
stream, every epoch of which is a permutation of its rows. Batches cut the stream, whatever their size.

Slots are given out by Webster's method: the next one goes to the source with the least (2 c + 1) / w, of c slots that
it has and its weight w. Of the first m slots a source of share p among K has m p, give or take (1 + K p) / 2.
"""

import heapq
import math
from collections.abc import Iterator, Sequence
from fractions import Fraction
from itertools import islice
from typing import Any

import numpy as np

from train.config import DataConfig
from train.data.rows import batch_indices, permuted


class Mix:
    """Sources whose rows stand one behind the other.

    Args:
      names: of the sources.
      sizes: numbers of rows.
      weights: how often the rows of each are drawn, relative to the others'; None: as often as it has rows.

    Raises:
      ValueError: a source with a weight has no row.
    """

    def __init__(self, names: Sequence[str], sizes: Sequence[int], weights: Sequence[float] | None = None) -> None:
        self.names, self.sizes = names, sizes
        self._starts = np.cumsum([0, *sizes])
        self._weights = None if weights is None else _whole_numbers(weights)
        empty = next((name for name, size in zip(names, sizes, strict=True) if not size), None)
        if weights is not None and empty is not None:
            raise ValueError(
                f"data.train: {empty} has a weight, but no row to train on (rows that are held out, dropped or too "
                f"long are left out before); leave the source out, or keep some of its rows"
            )

    def __len__(self) -> int:
        return int(self._starts[-1])

    def indices(self, count: int, seed: int, step: int, attempt: int = 0) -> list[int]:
        """Returns the row indices of batch number `step`, of `count` rows; each attempt has permutations of its own."""
        if self._weights is None:
            return batch_indices(len(self), count, seed, step, attempt)
        slots = list(self._slots(step * count, count))
        rows = np.zeros(count, int)
        for source in {source for source, _ in slots}:
            places = [place for place, (owner, _) in enumerate(slots) if owner == source]
            own = permuted(self.sizes[source], [slots[place][1] for place in places], seed, attempt, source)
            rows[places] = self._starts[source] + own
        return rows.tolist()

    @classmethod
    def of_rows(cls, data: DataConfig, owners: Sequence[int]) -> "Mix":
        """Returns the mix of a config's sources, given the number of each row's source, in ascending order."""
        sizes = np.bincount(np.asarray(owners, int), minlength=len(data.sources)).tolist()
        return cls([str(source.name) for source in data.sources], sizes, data.weights)

    def first(self, count: int) -> list[int]:
        """Returns the indices of the first `count` rows of each source."""
        return [
            start + i for start, size in zip(self._starts, self.sizes, strict=False) for i in range(min(count, size))
        ]

    def sources(self, indices: Sequence[int]) -> np.ndarray:
        """Returns the number of the source of each row."""
        return np.searchsorted(self._starts, indices, side="right") - 1

    def metrics(self, indices: Sequence[int], drawn: int) -> dict[str, float]:
        """Returns data/NAME/frac and data/NAME/epoch of several sources: their shares of a batch, and their passes.

        Args:
          drawn: rows that the run has drawn so far.
        """
        if len(self.names) < 2:
            return {}
        shares = np.bincount(self.sources(indices), minlength=len(self.names)) / len(indices)
        passes = [drawn / len(self)] * len(self.names)
        if self._weights is not None:
            passes = [slots / size for slots, size in zip(self._counts(drawn), self.sizes, strict=True)]
        metrics = {f"data/{name}/frac": float(share) for name, share in zip(self.names, shares, strict=True)}
        return metrics | {f"data/{name}/epoch": value for name, value in zip(self.names, passes, strict=True)}

    def _slots(self, start: int, count: int) -> Iterator[tuple[int, int]]:
        """Yields the source of each slot from `start` on, and how many slots it has before."""
        taken = self._counts(start)
        for source in islice(self._next_sources(taken), count):
            yield source, taken[source]
            taken[source] += 1

    def _counts(self, slots: int) -> list[int]:
        """Returns how many of the first slots each source has."""
        weights = self._weights or []
        total, certain = sum(weights), max(slots - len(weights), 0)
        # the slots with (2 c + 1) / w <= 2 certain / total: of each source what its share rounds to, together too few
        counts = [(2 * certain * weight + total) // (2 * total) if certain else 0 for weight in weights]
        for source in islice(self._next_sources(counts), slots - sum(counts)):
            counts[source] += 1
        return counts

    def _next_sources(self, counts: Sequence[int]) -> Iterator[int]:
        """Yields the sources of all further slots, given how many slots each has."""
        weights = self._weights or []
        common = math.lcm(*weights)
        strides = [2 * common // weight for weight in weights]
        queue = [(count * strides[source] + strides[source] // 2, source) for source, count in enumerate(counts)]
        heapq.heapify(queue)
        while True:
            due, source = queue[0]
            yield source
            heapq.heapreplace(queue, (due + strides[source], source))


def join_sources(parts: Sequence[Sequence[Any]]) -> tuple[list[Any], list[int]]:
    """Returns the rows of all sources, one behind the other, and the number of each row's source."""
    owners = [number for number, part in enumerate(parts) for _ in part]
    return [row for part in parts for row in part], owners


def numbered(setting: str, number: int, data: DataConfig) -> str:
    """Returns the user's name for one of the sources: data.train[1], or data.train where there is one."""
    return setting if len(data.sources) == 1 else f"{setting}[{number}]"


def _whole_numbers(weights: Sequence[float]) -> list[int]:
    """Returns whole numbers in the weights' proportions, exactly as they are written: 0.7 is 7 / 10."""
    exact = [Fraction(str(weight)) for weight in weights]
    common = math.lcm(*(weight.denominator for weight in exact))
    return [int(weight * common) for weight in exact]
