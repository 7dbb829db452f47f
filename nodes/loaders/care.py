"""What loaders put into the host's care: weights, and memory that gives way to what else needs it."""

from __future__ import annotations

import comfy.model_management
import torch
from comfy.model_patcher import ModelPatcher
from torch import nn

from ...likeness.bank import LIMIT, MemoryBank

DEFAULT = LIMIT


def bank_of(limit: int) -> MemoryBank:
    def free() -> int:
        return int(comfy.model_management.get_free_memory(torch.device("cpu")))  # pyright: ignore[reportArgumentType]

    return MemoryBank(limit, free)


def patcher_of(module: nn.Module) -> ModelPatcher:
    """A module for inference, which the host loads, offloads and frees."""
    return ModelPatcher(
        module.eval().requires_grad_(False),
        load_device=comfy.model_management.get_torch_device(),
        offload_device=comfy.model_management.unet_offload_device(),
    )


def encoder_of(module: nn.Module) -> ModelPatcher:
    """An encoder for inference, in single precision where half of it is slow or missing on its device."""
    mm = comfy.model_management
    device = mm.text_encoder_device()
    if mm.should_use_fp16(device) is False:
        module.float()
    return ModelPatcher(module.eval().requires_grad_(False), device, mm.text_encoder_offload_device())
