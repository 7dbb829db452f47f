"""Banks as loaders make them: they give way to what else needs the computer's memory."""

from __future__ import annotations

import comfy.model_management
import torch

from ...likeness.bank import LIMIT, MemoryBank

DEFAULT = LIMIT


def bank_of(limit: int) -> MemoryBank:
    def free() -> int:
        return int(comfy.model_management.get_free_memory(torch.device("cpu")))  # pyright: ignore[reportArgumentType]

    return MemoryBank(limit, free)
