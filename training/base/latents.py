"""Latents of pictures, made once and kept: encoding a picture costs two cores more than a step of the UNet."""

from __future__ import annotations

import hashlib
import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from comfy.taesd.taesd import TAESD
from safetensors.torch import load_file, save_file
from torch import Tensor
from tqdm import tqdm

from .source import Source, pictures

PIECE = 64  # pictures of one file


def encode(autoencoder: TAESD, seen: Tensor) -> Tensor:
    """Pictures [n, 3, H, W] from 0 to 1 to the VAE's latents [n, 4, H / 8, W / 8], on the pictures' device."""
    return autoencoder.to(seen.device).encode(seen * 2 - 1)


@torch.no_grad()
def quickly(autoencoder: TAESD, seen: Tensor) -> Tensor:
    """The same in bfloat16, several times as fast on a CPU that knows it; on others that is ten times as slow."""
    module: Any = autoencoder
    known = seen.device.type != "cpu" or torch.ops.mkldnn._is_mkldnn_bf16_supported()
    with torch.autocast(seen.device.type, torch.bfloat16, enabled=known):
        return encode(module.to(memory_format=torch.channels_last), seen).float()


def decode(autoencoder: TAESD, latents: Tensor) -> Tensor:
    """Latents to pictures [n, 3, H, W] from 0 to 1."""
    return (autoencoder.to(latents.device).decode(latents) / 2 + 0.5).clamp(0, 1)


def pool(source: Source, vae: Path, autoencoder: TAESD, side: int, count: int) -> Tensor:
    """The latents of a source's first `count` pictures, float16 [count, 4, side / 8, side / 8].

    They are kept beside the VAE's file, under a hash of it and of the first and the last picture, which tell one
    source from another, and from the same with more in it.
    """
    ends = b"".join(source.picture(number, side).contiguous().numpy().tobytes() for number in (0, count - 1))
    digest = hashlib.sha256(vae.read_bytes() + ends).hexdigest()[:8]
    device = torch.accelerator.current_accelerator(check_available=True) or torch.device("cpu")

    def make(numbers: range) -> Tensor:
        return quickly(autoencoder, pictures(source, numbers, side).to(device))

    return kept(vae.parent / f"latents-{digest}-{side}", count, make)


def kept(folder: Path, count: int, make: Callable[[range], Tensor]) -> Tensor:
    """What `make` gives of the first `count` numbers, float16 or whole numbers, made once and kept in a folder.

    That is done in pieces, so that what was made before an interruption is there; the last piece goes beyond `count`.
    """
    folder.mkdir(exist_ok=True)
    found = []
    for first in tqdm(range(0, count, PIECE), desc=folder.name):
        file = folder / f"{first:08d}.safetensors"
        if not file.is_file():
            with torch.no_grad():
                made = make(range(first, first + PIECE)).cpu().contiguous()
            part = file.with_name(f".part.{os.getpid()}.{file.name}")
            save_file({"kept": made.half() if made.is_floating_point() else made}, part)
            os.replace(part, file)
        found += load_file(file).values()  # of one tensor
    return torch.cat(found)[:count]
