"""What is measured of pictures, from vectors alone: likeness as FlashFace has it (arXiv 2403.17008, Sec. 4.1), CLIP.

A vector of zeros stands for a picture without a face: it is like nobody, its cosines are 0. All sums run in float64.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from ..likeness.sphere import units
from .task import chance

DRAWS, LEVEL = 2000, 0.95  # of the bootstrap


class Spread(NamedTuple):
    """A mean and the ends of its interval."""

    mean: float
    low: float
    high: float


def cosines(seen: Tensor, wanted: Tensor) -> Tensor:
    """Of each picture [p, d] to one direction [d], or to one of its own [p, d]: [p]."""
    return (units(seen.double()) * units(wanted.double())).sum(-1)


def direction(vectors: Tensor) -> Tensor:
    """Where the vectors [n, d] of one person point: the mean of their directions, [d]. Their lengths do not count."""
    return units(units(vectors.double()).mean(0))


def nearest(seen: Tensor, references: Tensor) -> Tensor:
    """Sim_ref: of each picture [p, d] the largest cosine to any reference [n, d], [p]; 0 where there is no face."""
    made = units(seen.double())
    return (made @ units(references.double()).T).amax(1) * made.any(1)


def paste(ref: Tensor, target: Tensor) -> Tensor:
    """Paste = Sim_ref - Sim_target: how far a face is a copy of a reference rather than the person as asked for."""
    return ref - target


def lost(seen: Tensor) -> Tensor:
    """1 for each picture [p, d] without a face, [p]."""
    return (~seen.any(-1)).double()


def adherence(seen: Tensor, texts: Tensor) -> tuple[Tensor, Tensor]:
    """Picture i [p, d] against text i of [q, d], q >= p: their cosine, and 1 where no other text is as near; [p] each.

    Texts behind the p-th were asked of no picture here and count as wrong answers.
    """
    return cosines(seen, texts[: len(seen)]), likest(seen, texts, torch.arange(len(seen)))


def likest(seen: Tensor, texts: Tensor, asked: Tensor) -> Tensor:
    """1 for each picture [p, d] that is nearest to the one of the texts [q, d] that was asked for, `asked` [p]; [p]."""
    return ((units(seen.double()) @ units(texts.double()).T).argmax(1) == asked).double()


class Assignment(NamedTuple):
    """Of pictures of two people, [p] each: cosines to the right and the other person, averaged over both; who is who.

    `right` is 1 where each half is more like its own person than like the other.
    """

    own: Tensor
    swapped: Tensor
    right: Tensor
    lost: Tensor  # the part of the halves without a face


def assignment(seen: Tensor, wanted: Tensor) -> Assignment:
    """Faces of both halves [p, 2, d] against the directions [2, d] of who was asked for there."""
    table = units(seen.double()) @ units(wanted.double()).T  # [p, half, person]
    own, swapped = table.diagonal(dim1=1, dim2=2), table.flip(2).diagonal(dim1=1, dim2=2)
    return Assignment(own.mean(1), swapped.mean(1), (own > swapped).all(1).double(), lost(seen).mean(1))


def interval(values: Tensor, seed: int = 0) -> Spread:
    """The mean of [n], one value for each person, and its 95% bootstrap interval: people are drawn with replacement."""
    values = values.double()
    drawn = torch.randint(len(values), (DRAWS, len(values)), generator=chance(seed))
    ends = values[drawn].mean(1).quantile(torch.tensor([(1 - LEVEL) / 2, (1 + LEVEL) / 2], dtype=torch.float64))
    return Spread(float(values.mean()), *ends.tolist())
