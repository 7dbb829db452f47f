"""What papers and the project claim of the rows, and whether the numbers bear it out: a claim is data, a test is pure.

A claim is of one measure of some rows, by their keys; without all of them it is neither true nor false.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

from torch import Tensor

from .. import metrics


@dataclass(frozen=True)
class Claim:
    """`how` is a key of TESTS, `by` its number; `tried` says what was done where it does not come out."""

    text: str
    how: str
    rows: Sequence[str]
    measure: str = "similarity"
    by: float = 0.0
    tried: str = ""


@dataclass(frozen=True)
class Verdict:
    """Whether a claim holds, None where a row is missing, and the numbers that say so."""

    holds: bool | None
    told: str


def _above(found: Sequence[metrics.Spread], by: float) -> bool:
    """The first is above the second by so much, and their intervals do not meet."""
    first, second = found
    return first.mean - second.mean >= by and first.low > second.high


def _rising(found: Sequence[metrics.Spread], by: float) -> bool:
    return all(after.mean - before.mean > by for before, after in zip(found, found[1:], strict=False))


def _falling(found: Sequence[metrics.Spread], by: float) -> bool:
    return _rising(found[::-1], by)


def _lowest(found: Sequence[metrics.Spread], by: float) -> bool:
    return all(other.mean - found[0].mean > by for other in found[1:])


def _least(found: Sequence[metrics.Spread], by: float) -> bool:
    return all(one.mean >= by for one in found)


Test = Callable[[Sequence[metrics.Spread], float], bool]
TESTS: Mapping[str, Test] = {
    "above": _above, "rising": _rising, "falling": _falling, "lowest": _lowest, "least": _least,
}  # fmt: skip


def verdict(claim: Claim, values: Mapping[str, Mapping[str, Tensor]]) -> Verdict:
    """Of one value a person [n] by row and measure."""
    missing = [key for key in claim.rows if claim.measure not in values.get(key, {})]
    if missing:
        return Verdict(None, f"without {', '.join(missing)}")
    found = [metrics.interval(values[key][claim.measure]) for key in claim.rows]
    return Verdict(TESTS[claim.how](found, claim.by), ", ".join(f"{one.mean:.3f}" for one in found))
