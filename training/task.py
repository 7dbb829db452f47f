"""What the trainer trains: a module that makes its batches, computes its losses and samples, and saves its files."""

from __future__ import annotations

import hashlib
from abc import abstractmethod
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Generator, Tensor, nn

Batch = dict[str, Any]


class Task(nn.Module):
    """`forward` returns a batch's losses by name; their sum is minimized.

    All randomness comes from the CPU generator that `make_batch` gets, so a step is the same on any machine and after
    an interruption. `make_batch` runs in data loader workers and must not use a device.
    """

    @abstractmethod
    def make_batch(self, generator: Generator, batch_size: int) -> Batch:
        """The inputs of one step: tensors on the CPU, numbers and texts."""

    @abstractmethod
    def forward(self, batch: Batch) -> dict[str, Tensor]: ...

    def learning_rate_scale(self, name: str) -> float:
        """The factor on the learning rate of the parameter `name`."""
        return 1.0

    @abstractmethod
    def make_samples(self, generator: Generator) -> dict[str, Tensor]:
        """Samples that show the progress, by name: scalars [] and images [H, W, 3] from 0 to 1."""

    @abstractmethod
    def save_model(self, folder: Path, notes: Mapping[str, Any]) -> None:
        """Write the files that ComfyUI or the pack loads; the training `notes` go into their metadata."""


def make_generator(*numbers: int) -> Generator:
    """An independent generator for each tuple of numbers, such as (seed, step, process)."""
    digest = hashlib.sha256(",".join(map(str, numbers)).encode()).digest()
    return Generator().manual_seed(int.from_bytes(digest[:8], "little") >> 1)


def init_weights(module: nn.Module, seed: int, gain: float = 1.0, zero_init: Iterable[str] = ()) -> None:
    """Initialize a ComfyUI module, which leaves its weights undefined: normal by fan-in, norms 1, biases 0.

    Parameters whose names end with one of `zero_init` start at 0, so that their residual branch starts as the identity.
    """
    generator = make_generator(seed)
    endings = tuple(zero_init)
    for name, value in module.named_parameters():
        with torch.no_grad():
            if value.is_meta:
                continue
            if value.ndim < 2:
                value.fill_(1.0 if name.endswith("weight") else 0.0)
            elif endings and name.endswith(endings):
                value.zero_()
            else:
                scale = 0.02 if "embedding" in name else gain / value[0].numel() ** 0.5
                value.copy_(torch.randn(value.shape, generator=generator) * scale)
        value.requires_grad_(True)
