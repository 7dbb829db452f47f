"""The VAE learns, from squares of pixels, by differences of pixels and edges and by moments."""

from __future__ import annotations

import math
from pathlib import Path

import pytest
import torch
from comfyui_likeness.training.base import source, vae
from comfyui_likeness.training.task import chance
from torch import nn
from trainings import DISCS, fit


def test_the_vae_learns(tmp_path: Path) -> None:
    _, losses = fit(lambda: vae.Vae(vae.Settings(side=16), DISCS, 0), tmp_path, steps=12, batch=4, warmup=0)
    assert losses[-1] < 0.9 * losses[0]


def test_squares_of_pixels_are_learnt_from() -> None:
    vae_ = vae.Vae(vae.Settings(side=64, crop=32), DISCS, 0)
    batch = vae_.batch(chance(5), 3)
    assert batch["pictures"].shape == (3, 3, 32, 32) and batch["noise"].shape == (3, 4, 4, 4)
    whole = source.pictures(DISCS, source.some(chance(5), 3), 64)
    places = whole.unfold(2, 32, 1).unfold(3, 32, 1).flatten(2, 3)  # every square there is
    for square, all_squares in zip(batch["pictures"], places.transpose(1, 2), strict=True):
        assert (all_squares == square).flatten(1).all(1).any()


def test_edges_tell_a_blurred_picture_and_moments_a_wide_latent() -> None:
    picture = source.pictures(DISCS, [5], 32)
    blurred = nn.functional.avg_pool2d(picture, 5, 1, 2)
    assert vae.edges(picture, picture) == 0 and vae.edges(picture + 0.1, picture).item() < 1e-6
    assert vae.edges(blurred, picture) > 0.01
    normal = torch.randn(4, 4, 32, 32, generator=chance(1))
    assert vae.moments(normal).item() == pytest.approx(0, abs=1e-3)
    wide, shifted = vae.moments(2 * normal).item(), vae.moments(normal + 1).item()
    assert wide == pytest.approx(0.5 * (4 - 1 - math.log(4)), rel=0.05) and shifted == pytest.approx(0.5, rel=0.05)
