"""A cache of reference features in main memory: bounded, least recently used out, emptied when memory is short."""

from __future__ import annotations

from collections.abc import Callable, Hashable, Mapping
from typing import Any

import torch
from torch import Tensor

CachedTensors = Mapping[Any, Tensor]

DEFAULT_CACHE_BYTES = 1 << 30
RESERVED_MEMORY_BYTES = 1 << 30  # of free memory, which the cache never uses


class ReferenceFeatureCache:
    """Groups of tensors by what they depend on. `get_free_memory` returns the free main memory in bytes."""

    def __init__(self, max_bytes: int = DEFAULT_CACHE_BYTES, get_free_memory: Callable[[], int] | None = None) -> None:
        self.max_bytes, self._get_free_memory = max_bytes, get_free_memory
        self._entries: dict[Hashable, CachedTensors] = {}

    def get_or_compute(
        self, key: Hashable, device: torch.device, compute: Callable[[], CachedTensors]
    ) -> CachedTensors:
        """The tensors under `key`, on `device`; computed and stored if they are not cached."""
        cached = self._entries.pop(key, None)
        if cached is None:
            computed = compute()
            self._store(key, computed)
            return computed
        self._entries[key] = cached  # now the most recently used
        return {name: tensor.to(device, non_blocking=True) for name, tensor in cached.items()}

    def _store(self, key: Hashable, tensors: CachedTensors) -> None:
        size = _count_bytes(tensors)
        if size > self.max_bytes:
            return
        while self._entries and self.size_bytes + size > self.max_bytes:
            self._entries.pop(next(iter(self._entries)))
        if self._get_free_memory is not None and self._get_free_memory() < size + RESERVED_MEMORY_BYTES:
            self.clear()
            return
        self._entries[key] = {name: tensor.to("cpu") for name, tensor in tensors.items()}

    @property
    def size_bytes(self) -> int:
        return sum(_count_bytes(tensors) for tensors in self._entries.values())

    def clear(self) -> None:
        self._entries.clear()

    def __contains__(self, key: Hashable) -> bool:
        return key in self._entries

    def __len__(self) -> int:
        return len(self._entries)

    def __deepcopy__(self, memo: dict[int, Any]) -> ReferenceFeatureCache:
        return self  # ComfyUI versions that deep-copy a model's options must not copy the tensors


def _count_bytes(tensors: CachedTensors) -> int:
    return sum(tensor.numel() * tensor.element_size() for tensor in tensors.values())
