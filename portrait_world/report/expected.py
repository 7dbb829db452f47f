"""Claims of the papers and of the project about rows of the report, and tests of them against the measurements.

A claim is data, a test is a pure function. A claim with a missing row is neither confirmed nor refuted.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

from torch import Tensor

from ..evaluation import metrics


@dataclass(frozen=True)
class Claim:
    """A statement about one metric of some rows.

    `test` is a key of CLAIM_TESTS, `threshold` its parameter. `attempts`: what was tried; shown if the claim fails.
    """

    text: str
    test: str
    row_keys: Sequence[str]
    metric: str = "similarity"
    threshold: float = 0.0
    attempts: str = ""


@dataclass(frozen=True)
class Verdict:
    """Whether a claim holds (None if a row is missing), and the means that were compared."""

    holds: bool | None
    numbers: str


def _above(intervals: Sequence[metrics.MeanInterval], threshold: float) -> bool:
    """The first mean exceeds the second by the threshold or more, and the intervals do not overlap."""
    first, second = intervals
    return first.mean - second.mean >= threshold and first.low > second.high


def _rising(intervals: Sequence[metrics.MeanInterval], threshold: float) -> bool:
    return all(after.mean - before.mean > threshold for before, after in zip(intervals, intervals[1:], strict=False))


def _falling(intervals: Sequence[metrics.MeanInterval], threshold: float) -> bool:
    return _rising(intervals[::-1], threshold)


def _lowest(intervals: Sequence[metrics.MeanInterval], threshold: float) -> bool:
    return all(other.mean - intervals[0].mean > threshold for other in intervals[1:])


def _at_least(intervals: Sequence[metrics.MeanInterval], threshold: float) -> bool:
    return all(interval.mean >= threshold for interval in intervals)


ClaimTest = Callable[[Sequence[metrics.MeanInterval], float], bool]
CLAIM_TESTS: Mapping[str, ClaimTest] = {
    "above": _above, "rising": _rising, "falling": _falling, "lowest": _lowest, "at least": _at_least,
}  # fmt: skip


def check_claim(claim: Claim, values: Mapping[str, Mapping[str, Tensor]]) -> Verdict:
    """Test a claim. `values`: by row and metric, one value per person, [n]."""
    missing = [key for key in claim.row_keys if claim.metric not in values.get(key, {})]
    if missing:
        return Verdict(None, f"without {', '.join(missing)}")
    intervals = [metrics.compute_bootstrap_interval(values[key][claim.metric]) for key in claim.row_keys]
    holds = CLAIM_TESTS[claim.test](intervals, claim.threshold)
    return Verdict(holds, ", ".join(f"{interval.mean:.3f}" for interval in intervals))
