"""Augmentation of image batches [n, 3, S, S] from -1 to 1: warping, blur, color jitter."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Generator, Tensor
from torch.nn.functional import affine_grid, grid_sample, interpolate

COLOR_JITTER = (0.12, 0.06)  # standard deviation of each channel's contrast and brightness


def warp_images(images: Tensor, theta: Tensor, padding_mode: str) -> Tensor:
    """Sample images by affine matrices `theta` [n, 2, 3], as grid_sample's; padding is "border" or "zeros"."""
    return grid_sample(images, affine_grid(theta, list(images.shape), False), "bilinear", padding_mode, False)


def blur_random_images(images: Tensor, generator: Generator, sizes: Sequence[int]) -> Tensor:
    """Blur half of the images, each through one of the `sizes` in pixels."""
    choices = torch.randint(2 * len(sizes), (len(images),), generator=generator)
    out = images.clone()
    for number, size in enumerate(sizes):
        out[choices == number] = blur_images(images[choices == number], size)
    return out


def blur_images(images: Tensor, size: int) -> Tensor:
    """Blur by downscaling to `size` x `size` pixels and upscaling."""
    small = interpolate(images, size=(size, size), mode="area")
    return interpolate(small, size=images.shape[-2:], mode="bilinear", align_corners=False)


def jitter_colors(images: Tensor, generator: Generator, strength: float) -> Tensor:
    """Change the contrast and brightness of each channel."""
    spread = torch.tensor(COLOR_JITTER)[:, None, None, None, None]
    gain, bias = strength * torch.randn(2, len(images), 3, 1, 1, generator=generator) * spread
    return images * (1 + gain) + bias
