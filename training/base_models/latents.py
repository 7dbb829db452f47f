"""VAE latents of training images, encoded once and cached: on two cores, encoding costs more than a UNet step."""

from __future__ import annotations

import hashlib
import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save_file
from torch import Tensor, nn
from tqdm import tqdm

from ..data.image_source import ImageSource, load_images

IMAGES_PER_FILE = 64


def encode_latents(autoencoder: nn.Module, images: Tensor) -> Tensor:
    """Encode images [n, 3, H, W] from 0 to 1 to latents [n, c, H / 8, W / 8], on the images' device."""
    network: Any = autoencoder.to(images.device)
    return network.encode(images * 2 - 1)


@torch.no_grad()
def encode_latents_bf16(autoencoder: nn.Module, images: Tensor) -> Tensor:
    """The same in bfloat16 if the device supports it: several times faster there, ten times slower on other CPUs."""
    module: Any = autoencoder
    supported = images.device.type != "cpu" or torch.ops.mkldnn._is_mkldnn_bf16_supported()
    with torch.autocast(images.device.type, torch.bfloat16, enabled=supported):
        return encode_latents(module.to(memory_format=torch.channels_last), images).float()


def decode_latents(autoencoder: nn.Module, latents: Tensor) -> Tensor:
    """Decode latents to images [n, 3, H, W] from 0 to 1."""
    network: Any = autoencoder.to(latents.device)
    return (network.decode(latents) / 2 + 0.5).clamp(0, 1)


def cache_latents(
    source: ImageSource, vae_file: Path, autoencoder: nn.Module, resolution: int, count: int, aspect_ratio: float = 1.0
) -> Tensor:
    """The latents of a source's first `count` images, float16 [count, c, resolution / 8, width / 8].

    They are cached next to the VAE's file. The folder's name is a hash of that file and of the first and last image,
    which distinguishes sources, and a source from the same one with more images.
    """
    ends = load_images(source, (0, count - 1), resolution, aspect_ratio).numpy().tobytes()
    digest = hashlib.sha256(vae_file.read_bytes() + ends).hexdigest()[:8]
    device = torch.accelerator.current_accelerator(check_available=True) or torch.device("cpu")

    def encode(numbers: range) -> Tensor:
        return encode_latents_bf16(autoencoder, load_images(source, numbers, resolution, aspect_ratio).to(device))

    return cache_tensors(vae_file.parent / f"latents-{digest}-{resolution}", count, encode)


def cache_tensors(folder: Path, count: int, compute: Callable[[range], Tensor]) -> Tensor:
    """The rows that `compute` returns for the first `count` numbers, cached in a folder; floats as float16.

    Each file of the cache is written as soon as it is computed, so that an interrupted run continues. The last file
    may hold rows beyond `count`.
    """
    folder.mkdir(exist_ok=True)
    found = []
    for first in tqdm(range(0, count, IMAGES_PER_FILE), desc=folder.name):
        file = folder / f"{first:08d}.safetensors"
        if not file.is_file():
            with torch.no_grad():
                rows = compute(range(first, first + IMAGES_PER_FILE)).cpu().contiguous()
            part = file.with_name(f".part.{os.getpid()}.{file.name}")
            save_file({"kept": rows.half() if rows.is_floating_point() else rows}, part)
            os.replace(part, file)
        found += load_file(file).values()  # a single tensor
    return torch.cat(found)[:count]
