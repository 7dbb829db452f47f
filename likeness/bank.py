"""What was kept of a stream, in the computer's memory: bounded, least recently used out, gone when memory is short."""

from __future__ import annotations

from collections.abc import Callable, Hashable, Mapping
from typing import Any

import torch
from torch import Tensor

Kept = Mapping[Any, Tensor]

LIMIT = 1 << 30  # bytes
RESERVE = 1 << 30  # what is left to others


class MemoryBank:
    """Groups of tensors by what they depend on. `free` says how many bytes of memory the computer has left."""

    def __init__(self, limit: int = LIMIT, free: Callable[[], int] | None = None) -> None:
        self.limit, self._free = limit, free
        self._kept: dict[Hashable, Kept] = {}

    def get(self, key: Hashable, device: torch.device, make: Callable[[], Kept]) -> Kept:
        """What is kept under `key`, on `device`; made and kept if it is not there."""
        kept = self._kept.pop(key, None)
        if kept is None:
            made = make()
            self._keep(key, made)
            return made
        self._kept[key] = kept  # the last used is the last to go
        return {name: tensor.to(device, non_blocking=True) for name, tensor in kept.items()}

    def _keep(self, key: Hashable, made: Kept) -> None:
        size = _bytes(made)
        if size > self.limit:
            return
        while self._kept and self.bytes + size > self.limit:
            self._kept.pop(next(iter(self._kept)))
        if self._free is not None and self._free() < size + RESERVE:
            self.clear()
            return
        self._kept[key] = {name: tensor.to("cpu") for name, tensor in made.items()}

    @property
    def bytes(self) -> int:
        return sum(_bytes(kept) for kept in self._kept.values())

    def clear(self) -> None:
        self._kept.clear()

    def __contains__(self, key: Hashable) -> bool:
        return key in self._kept

    def __len__(self) -> int:
        return len(self._kept)

    def __deepcopy__(self, memo: dict[int, Any]) -> MemoryBank:
        return self  # hosts that deep-copy a model's options must not copy tensors with them


def _bytes(kept: Kept) -> int:
    return sum(tensor.numel() * tensor.element_size() for tensor in kept.values())
