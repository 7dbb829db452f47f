"""Streams: faces that run through a UNet beside the picture, only to be attended to."""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Hashable
from typing import Any

from comfy.model_patcher import ModelPatcher
from torch import Tensor

from ...likeness.bank import Kept, MemoryBank
from .injection import Call

CHANNELS = 4

Weighed = tuple[Hashable, ...]


def digest(tensor: Tensor) -> str:
    """A name for what a tensor holds."""
    return hashlib.blake2b(tensor.float().cpu().contiguous().numpy().tobytes(), digest_size=16).hexdigest()


def latents(model: ModelPatcher, vae: Any, pictures: Tensor) -> Tensor:
    """Pictures [n, H, W, 3] in 0..1 as the model's latents [n, 4, H / 8, W / 8], float32 on the CPU.

    Raises ValueError where the VAE is not of this kind.
    """
    made = model.model.process_latent_in(vae.encode(pictures)).float().cpu()
    if made.ndim != 4 or made.shape[1] != CHANNELS:
        raise ValueError(
            f"got a VAE that makes {list(made.shape)} of {len(pictures)} faces; expected {CHANNELS} channels; "
            "connect the VAE of the model's own checkpoint"
        )
    return made


def remembered(bank: MemoryBank, key: Weighed, call: Call, make: Callable[[], Kept]) -> Kept:
    """What a bank holds under (weights, ...), or has made; nothing lasts where the weights change from step to step."""
    return make() if key[0] is None else bank.get(key, call.device, make)


def weights(model: ModelPatcher) -> Hashable:
    """The weights with which a model runs now: LoRAs may follow an apply node. None while hooks change them."""
    running = getattr(model.model, "current_patcher", None) or model
    return None if getattr(running, "current_hooks", None) else running.patches_uuid
