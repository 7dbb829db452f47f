"""What the loop trains: a module that knows its data, its losses, how to show itself and what file it becomes."""

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
    """Called with a batch it gives its losses by name; their sum is what falls.

    All chance comes from the generator that `batch` gets, on the CPU: a step is the same step on any machine, and
    whether or not the run was broken off before it. `batch` runs in workers and must not touch a device.
    """

    @abstractmethod
    def batch(self, chance: Generator, size: int) -> Batch:
        """What one step reads: tensors on the CPU, numbers and texts."""

    @abstractmethod
    def forward(self, batch: Batch) -> dict[str, Tensor]: ...

    def share(self, name: str) -> float:
        """What part of a run's rate the parameter of that name learns at."""
        return 1.0

    @abstractmethod
    def draw(self, chance: Generator) -> dict[str, Tensor]:
        """What shows how far it is, by name: numbers [] and pictures [H, W, 3] from 0 to 1."""

    @abstractmethod
    def save(self, folder: Path, notes: Mapping[str, Any]) -> None:
        """Write the files that the host or the pack reads; `notes` say how they were trained."""


def chance(*numbers: int) -> Generator:
    """A generator of its own for each tuple of numbers, such as (seed, step, process)."""
    digest = hashlib.sha256(",".join(map(str, numbers)).encode()).digest()
    return Generator().manual_seed(int.from_bytes(digest[:8], "little") >> 1)


def start(module: nn.Module, seed: int, gain: float = 1.0, silent: Iterable[str] = ()) -> None:
    """First weights for a module of the host, which leaves them undefined: normal by fan-in, norms 1, biases 0.

    Parameters whose names end with one of `silent` begin at 0, so that what they belong to begins as the identity.
    """
    generator = chance(seed)
    endings = tuple(silent)
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
