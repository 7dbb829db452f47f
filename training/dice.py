"""Chance that falls alike on every machine: all of it from `random.Random.random`, whose sequence Python keeps."""

from __future__ import annotations

import random
from bisect import bisect
from collections.abc import Mapping, Sequence
from itertools import accumulate
from typing import TypeVar

T = TypeVar("T")


class Dice:
    """What is drawn for one seed, any integer from 0."""

    def __init__(self, seed: int) -> None:
        self._random = random.Random(seed)

    def between(self, low: float, high: float) -> float:
        return low + (high - low) * self._random.random()

    def below(self, end: int) -> int:
        """One of 0 to `end` - 1."""
        return int(self._random.random() * end)

    def pick(self, values: Sequence[T]) -> T:
        return values[self.below(len(values))]

    def weigh(self, values: Mapping[T, float]) -> T:
        """One of the keys, as often as its value says relative to the others."""
        ends = list(accumulate(values.values()))
        return list(values)[min(bisect(ends, self.between(0, ends[-1])), len(ends) - 1)]
