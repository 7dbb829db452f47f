"""A trained UNet in a wider one that says the same: every channel twice (Net2Net, Chen et al. 1511.05641, Sec. 2.3).

Where a copy is read, both copies together weigh what the one did, a little unevenly, so that they part in training.
"""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from itertools import pairwise

import torch
from torch import Generator, Tensor

UNEVEN = 0.1  # of a weight's own spread
MADE = ("0.in_layers.2.weight", "0.op.weight", "0.weight")  # where a block of the host's encoder makes its channels
READ = re.compile(r"output_blocks\.(\d+)\.0\.(in_layers\.0\.(weight|bias)|(in_layers\.2|skip_connection)\.weight)")

Tensors = Mapping[str, Tensor]


def widened(old: Tensors, new: Tensors, chance: Generator) -> dict[str, Tensor]:
    """The weights of a UNet `old` in the shapes of `new`, whose widths are once or twice those.

    Exact where all widths are twice as large. Otherwise groups of the norms that read two parts together shift, and a
    block that now keeps its width goes on without its `skip_connection`. Raises ValueError where the two are no such
    pair.
    """
    if any("skip_connection" not in key or key in new for key in old.keys() ^ new.keys()):
        raise ValueError("got a UNet of other blocks to begin with; expected one that differs in widths alone")
    return {key: _wider(key, old, new, chance) for key in new}


def _wider(key: str, old: Tensors, new: Tensors, chance: Generator) -> Tensor:
    weight = old[key].float()
    out, *read = new[key].shape
    along = 1 if weight.ndim > 1 else 0
    parts = list(zip(_parts(key, old, along), _parts(key, new, along), strict=True))
    if weight.ndim == 1:
        return torch.cat([_twice(part, 0, size) for part, size in _cut(weight, parts, 0)])
    twice = out == 2 * len(weight)
    weight = _twice(weight, 0, out)
    if key == "time_embed.0.weight" and read[0] == 2 * weight.shape[1]:
        # Of twice as many frequencies every second one is an old one.
        return torch.stack((weight, torch.zeros_like(weight)), dim=2).flatten(1)
    if twice and key.endswith("to_q.weight"):
        weight = weight / 2**0.5  # a head's products are divided by the root of its width, and are twice as many
    return torch.cat([_shared(part, size, chance) for part, size in _cut(weight, parts, 1)], dim=1)


def _parts(key: str, tensors: Tensors, along: int) -> list[int]:
    """Widths of what a weight reads: a block of the decoder reads the one before and, behind it, the encoder's."""
    size = tensors[key].shape[along]
    found = READ.fullmatch(key)
    if found is None:
        return [size]
    made = [len(tensors[f"input_blocks.{i}.{end}"]) for i in range(_blocks(tensors)) for end in MADE
            if f"input_blocks.{i}.{end}" in tensors]  # fmt: skip
    behind = made[-1 - int(found[1])]
    return [size - behind, behind]


def _blocks(tensors: Tensors) -> int:
    return 1 + max(int(key.split(".")[1]) for key in tensors if key.startswith("input_blocks."))


def _cut(weight: Tensor, parts: Sequence[tuple[int, int]], dim: int) -> list[tuple[Tensor, int]]:
    """The parts of a weight along a dimension, with their new widths."""
    ends = [0, *torch.tensor([before for before, _ in parts]).cumsum(0).tolist()]
    return [
        (weight.narrow(dim, at, end - at), size) for (at, end), (_, size) in zip(pairwise(ends), parts, strict=True)
    ]


def _twice(weight: Tensor, dim: int, size: int) -> Tensor:
    """Each row twice where the size is twice as large."""
    times, rest = divmod(size, weight.shape[dim])
    if rest or times not in (1, 2):
        raise ValueError(f"got {weight.shape[dim]} channels to widen to {size}; expected as many or half of them")
    return weight.repeat_interleave(times, dim)


def _shared(weight: Tensor, size: int, chance: Generator) -> Tensor:
    """A weight that reads each of its channels twice, one copy a little more than the other."""
    if size == weight.shape[1]:
        return weight
    more = UNEVEN * weight.std() * torch.randn(weight.shape, generator=chance)
    return _twice(weight, 1, size) / 2 + torch.stack((more, -more), dim=2).flatten(1, 2)
