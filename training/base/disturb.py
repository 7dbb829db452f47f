"""What pictures of faces bear before networks read them: moved, blurred, of another light. All [n, 3, S, S]."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Generator, Tensor
from torch.nn.functional import affine_grid, grid_sample, interpolate

LIT = (0.12, 0.06)  # of each channel: contrast and brightness, in halves of white


def moved(pictures: Tensor, theta: Tensor, beyond: str) -> Tensor:
    """Pictures sampled where `theta` [n, 2, 3] says, in halves of their side; `beyond` them "border" or "zeros"."""
    return grid_sample(pictures, affine_grid(theta, list(pictures.shape), False), "bilinear", beyond, False)


def blurred(pictures: Tensor, chance: Generator, sides: Sequence[int]) -> Tensor:
    """Half of the pictures, each with as many pixels left as one of `sides` says."""
    which = torch.randint(2 * len(sides), (len(pictures),), generator=chance)
    out = pictures.clone()
    for number, side in enumerate(sides):
        out[which == number] = blur(pictures[which == number], side)
    return out


def blur(pictures: Tensor, side: int) -> Tensor:
    """Pictures made small and large again."""
    small = interpolate(pictures, size=(side, side), mode="area")
    return interpolate(small, size=pictures.shape[-2:], mode="bilinear", align_corners=False)


def lit(pictures: Tensor, chance: Generator, much: float) -> Tensor:
    """Pictures from -1 to 1 of another contrast and brightness, each channel of its own."""
    spread = torch.tensor(LIT)[:, None, None, None, None]
    gain, bias = much * torch.randn(2, len(pictures), 3, 1, 1, generator=chance) * spread
    return pictures * (1 + gain) + bias
