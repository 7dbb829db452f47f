"""A random generator with the same numbers on every machine: it uses only `random.Random.random`, which Python keeps
stable."""

from __future__ import annotations

import random
from bisect import bisect
from collections.abc import Mapping, Sequence
from itertools import accumulate
from typing import TypeVar

T = TypeVar("T")


class PortableRandom:
    """The random numbers of one seed, a non-negative integer."""

    def __init__(self, seed: int) -> None:
        self._random = random.Random(seed)

    def uniform(self, low: float, high: float) -> float:
        return low + (high - low) * self._random.random()

    def randrange(self, end: int) -> int:
        """An integer from 0 to `end` - 1."""
        return int(self._random.random() * end)

    def choice(self, values: Sequence[T]) -> T:
        return values[self.randrange(len(values))]

    def weighted_choice(self, values: Mapping[T, float]) -> T:
        """One of the keys, with probabilities proportional to the values."""
        ends = list(accumulate(values.values()))
        return list(values)[min(bisect(ends, self.uniform(0, ends[-1])), len(ends) - 1)]
