"""All that training and its report measure of pictures; what nodes measure, too, is theirs or in likeness/measures.py.

A vector of zeros stands for a picture without a face: it is like nobody, its cosines are 0. All sums run in float64.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from ..likeness.measures import cosines, direction, lost, nearest, paste
from ..likeness.sphere import units
from ..nodes.evaluate import psnr, ssim
from .task import chance

__all__ = [
    "Assignment", "Spread", "adherence", "assignment", "cosines", "direction", "frechet", "interval", "lost", "nearest",
    "paste", "psnr", "ssim",
]  # fmt: skip

DRAWS, LEVEL = 2000, 0.95  # of the bootstrap


class Spread(NamedTuple):
    """A mean and the ends of its interval."""

    mean: float
    low: float
    high: float


def frechet(seen: Tensor, real: Tensor) -> float:
    """The Frechet distance of two sets of features [n, d] and [m, d] as normal distributions (FID, arXiv 1706.08500).

    FID proper has Inception's features, which are not at hand: give those of a CLIP tower, and compare such numbers
    with each other alone. Where n or m is not well above d they are too high. The root is taken as torchmetrics does
    it. Raises ValueError on fewer than two of either.
    """
    if min(len(seen), len(real)) < 2:
        raise ValueError(f"got {len(seen)} and {len(real)} pictures; expected two or more of each; measure more")
    means = [rows.double().mean(0) for rows in (seen, real)]
    a, b = (torch.atleast_2d(rows.double().T.cov()) for rows in (seen, real))
    root = torch.linalg.eigvals(a @ b).sqrt().real.sum()
    return float((means[0] - means[1]).square().sum() + a.trace() + b.trace() - 2 * root)


def adherence(seen: Tensor, texts: Tensor, asked: Tensor) -> tuple[Tensor, Tensor]:
    """Pictures [p, d] against the one of the texts [q, d] that was asked for, `asked` [p]: their cosine, and 1 where no
    other text is as near; [p] each."""
    return cosines(seen, texts[asked]), likest(seen, texts, asked)


def likest(seen: Tensor, texts: Tensor, asked: Tensor) -> Tensor:
    """1 for each picture [p, d] that is nearest to the one of the texts [q, d] that was asked for, `asked` [p]; [p]."""
    return ((units(seen.double()) @ units(texts.double()).T).argmax(1) == asked).double()


class Assignment(NamedTuple):
    """Of pictures of two people, [p] each: cosines to the right and the other person, averaged over both; who is who.

    `assigned` is 1 where both halves have a face, and together are likelier to be as asked than the other way round;
    `right`, where each half alone says so.
    """

    own: Tensor
    swapped: Tensor
    assigned: Tensor
    right: Tensor
    lost: Tensor  # the part of the halves without a face


def assignment(seen: Tensor, wanted: Tensor) -> Assignment:
    """Faces of both halves [p, 2, d] against the directions [2, d] of who was asked for there."""
    table = units(seen.double()) @ units(wanted.double()).T  # [p, half, person]
    own, swapped = table.diagonal(dim1=1, dim2=2), table.flip(2).diagonal(dim1=1, dim2=2)
    right, missing = (own > swapped).all(1), lost(seen).mean(1)
    own, swapped = own.mean(1), swapped.mean(1)
    return Assignment(own, swapped, ((own > swapped) & (missing == 0)).double(), right.double(), missing)


def interval(values: Tensor, seed: int = 0) -> Spread:
    """The mean of [n], one value for each person, and its 95% bootstrap interval: people are drawn with replacement."""
    values = values.double()
    drawn = torch.randint(len(values), (DRAWS, len(values)), generator=chance(seed))
    ends = values[drawn].mean(1).quantile(torch.tensor([(1 - LEVEL) / 2, (1 + LEVEL) / 2], dtype=torch.float64))
    return Spread(float(values.mean()), *ends.tolist())
