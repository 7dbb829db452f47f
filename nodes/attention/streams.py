"""Streams: rows that run through a UNet beside the picture's own, only to be attended to: faces, or the text alone."""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Hashable
from typing import Any

import torch
from comfy.model_patcher import ModelPatcher
from torch import Tensor

from ...likeness.bank import Kept, MemoryBank
from .injection import Call

CHANNELS = 4
# A stream of the text alone: none; the picture's own latent, beside it inside each call; or a latent of its own from
# the same noise, beside the picture's for the whole run. The later one serves those who want an earlier one too.
NO_TEXT, SHARED, OWN = STREAMS = ("", "shared", "own")

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


def beside(
    noise: Tensor,
    latent: Tensor,
    sampler: Any,
    sigmas: Tensor,
    mask: Tensor | None = None,
    callback: Any = None,
    *rest: Any,
    **kwargs: Any,
) -> tuple[tuple[Any, ...], dict[str, Any]]:
    """The arguments of a run with a text stream's rows behind the picture's, of which callbacks hear nothing."""
    rows = len(noise)

    def twice(tensor: Tensor | None) -> Tensor | None:
        return tensor if tensor is None or len(tensor) != rows else torch.cat((tensor, tensor))

    def shown(step: int, x0: Any, x: Any, total: int) -> Any:
        return callback(step, x0 if x0 is None else x0[:rows], x[:rows], total)

    if "latent_shapes" in kwargs:
        kwargs = {**kwargs, "latent_shapes": [torch.Size((2 * n, *size)) for n, *size in kwargs["latent_shapes"]]}
    heard = None if callback is None else shown
    return (twice(noise), twice(latent), sampler, sigmas, twice(mask), heard, *rest), kwargs


def within(given: Any, rows: int, index: Tensor, leave: Any) -> Any:
    """The arguments of a model's call with further rows in each tensor of so many rows; `leave` is left alone."""
    if given is leave:
        return given
    if isinstance(given, Tensor):
        return given[index] if given.ndim and len(given) == rows else given
    if isinstance(given, (list, tuple)):
        return type(given)(within(one, rows, index, leave) for one in given)
    if isinstance(given, dict):
        return {key: within(one, rows, index, leave) for key, one in given.items()}
    return given
