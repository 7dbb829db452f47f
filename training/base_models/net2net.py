"""Net2WiderNet for the UNet: duplicates channels so that the wider network computes the same function (Chen et al.
1511.05641, Sec. 2.3).

The weights that read a duplicated channel are split between both copies, slightly unevenly, so that the copies diverge
in training.
"""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from itertools import pairwise

import torch
from torch import Generator, Tensor

COPY_NOISE_SCALE = 0.1  # of the weight's standard deviation
# The weights that set the output width of a block of ComfyUI's UNet encoder.
OUTPUT_WEIGHT_SUFFIXES = ("0.in_layers.2.weight", "0.op.weight", "0.weight")
INPUT_WEIGHT_PATTERN = re.compile(
    r"output_blocks\.(\d+)\.0\.(in_layers\.0\.(weight|bias)|(in_layers\.2|skip_connection)\.weight)"
)

StateDict = Mapping[str, Tensor]


def widen_unet(old: StateDict, new: StateDict, generator: Generator) -> dict[str, Tensor]:
    """Widen the weights of the UNet `old` to the shapes of `new`, whose widths are equal or doubled.

    Exact if all widths are doubled. Otherwise the groups of norms over concatenated inputs shift, and a block whose
    width no longer changes loses its `skip_connection`. Raises ValueError if the architectures differ otherwise.
    """
    if any("skip_connection" not in key or key in new for key in old.keys() ^ new.keys()):
        raise ValueError("got a UNet of other blocks in init_from; expected one that differs only in its widths")
    return {key: _widen_weight(key, old, new, generator) for key in new}


def _widen_weight(key: str, old: StateDict, new: StateDict, generator: Generator) -> Tensor:
    weight = old[key].float()
    out_width, *in_widths = new[key].shape
    dim = 1 if weight.ndim > 1 else 0
    parts = list(zip(_input_widths(key, old, dim), _input_widths(key, new, dim), strict=True))
    if weight.ndim == 1:
        return torch.cat([_repeat_channels(part, 0, size) for part, size in _split_weight(weight, parts, 0)])
    is_doubled = out_width == 2 * len(weight)
    weight = _repeat_channels(weight, 0, out_width)
    if key == "time_embed.0.weight" and in_widths[0] == 2 * weight.shape[1]:
        # Every second one of twice as many frequencies is an old one.
        return torch.stack((weight, torch.zeros_like(weight)), dim=2).flatten(1)
    if is_doubled and key.endswith("to_q.weight"):
        weight = weight / 2**0.5  # attention divides by the root of the head's width, and the dot product doubles
    return torch.cat([_share_channels(part, size, generator) for part, size in _split_weight(weight, parts, 1)], dim=1)


def _input_widths(key: str, tensors: StateDict, dim: int) -> list[int]:
    """The widths of a weight's concatenated inputs: a decoder block reads the previous block and an encoder block."""
    size = tensors[key].shape[dim]
    match = INPUT_WEIGHT_PATTERN.fullmatch(key)
    if match is None:
        return [size]
    encoder_widths = [
        len(tensors[f"input_blocks.{i}.{suffix}"])
        for i in range(_count_input_blocks(tensors))
        for suffix in OUTPUT_WEIGHT_SUFFIXES
        if f"input_blocks.{i}.{suffix}" in tensors
    ]
    skip_width = encoder_widths[-1 - int(match[1])]
    return [size - skip_width, skip_width]


def _count_input_blocks(tensors: StateDict) -> int:
    return 1 + max(int(key.split(".")[1]) for key in tensors if key.startswith("input_blocks."))


def _split_weight(weight: Tensor, parts: Sequence[tuple[int, int]], dim: int) -> list[tuple[Tensor, int]]:
    """Split a weight along a dimension by `parts` of (old width, new width); each with its new width."""
    ends = [0, *torch.tensor([old_width for old_width, _ in parts]).cumsum(0).tolist()]
    return [
        (weight.narrow(dim, start, end - start), new_width)
        for (start, end), (_, new_width) in zip(pairwise(ends), parts, strict=True)
    ]


def _repeat_channels(weight: Tensor, dim: int, size: int) -> Tensor:
    """Repeat each row if `size` is twice as large."""
    times, rest = divmod(size, weight.shape[dim])
    if rest or times not in (1, 2):
        raise ValueError(f"got {weight.shape[dim]} channels to widen to {size}; expected the same number or half of it")
    return weight.repeat_interleave(times, dim)


def _share_channels(weight: Tensor, size: int, generator: Generator) -> Tensor:
    """Split the weight of each input channel between its two copies, slightly unevenly."""
    if size == weight.shape[1]:
        return weight
    noise = COPY_NOISE_SCALE * weight.std() * torch.randn(weight.shape, generator=generator)
    return _repeat_channels(weight, 1, size) / 2 + torch.stack((noise, -noise), dim=2).flatten(1, 2)
