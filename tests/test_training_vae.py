"""The VAE's losses: pixels, edges, moments, and pictures and latents made smaller together (EQ-VAE)."""

from __future__ import annotations

import math
from pathlib import Path

import pytest
import torch
from comfyui_likeness.training.base import source, vae
from comfyui_likeness.training.task import chance
from safetensors.torch import load_file
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


def test_smaller_latents_are_asked_to_be_smaller_pictures() -> None:
    plain, scaled = (vae.Vae(vae.Settings(side=32, scaled=weight), DISCS, 0) for weight in (0.0, 2.0))
    batch = plain.batch(chance(5), 3)
    assert "scaled" not in plain(batch)
    batch["smaller"][:] = 2
    found = scaled({**batch, "noise": torch.zeros_like(batch["noise"])})["scaled"]
    asked = vae.smaller(batch["pictures"], 16)
    made = scaled.vae.decode(vae.smaller(scaled.vae.encode(batch["pictures"] * 2 - 1), 2)) / 2 + 0.5
    squares, edges = 4 * (made - asked).square().mean(), 0.3 * vae.edges(made, asked)
    assert found.item() == pytest.approx(2 * ((made - asked).abs().mean() + squares + edges).item(), rel=1e-4)
    assert vae.smaller(batch["pictures"], 32).equal(batch["pictures"])


def test_sizes_of_smaller_pictures_are_between_half_and_whole() -> None:
    batch = vae.Vae(vae.Settings(side=64), DISCS, 0).batch(chance(5), 200)
    assert set(batch["smaller"].tolist()) == {4, 5, 6, 7}


def test_inner_layers_alone_are_trained(tmp_path: Path) -> None:
    model, _ = fit(lambda: vae.Vae(vae.Settings(side=32, scaled=1.0, inner=True), DISCS, 0), tmp_path, batch=2)
    before = vae.Vae(vae.Settings(side=32), DISCS, 0).vae.state_dict()
    after = load_file(model / vae.FILE)
    changed = {tuple(key.split(".")[:2]) for key, value in after.items() if not value.equal(before[key].half())}
    inner = {"taesd_encoder": ("10", "11", "12", "13", "14"), "taesd_decoder": ("1", "3", "4", "5")}
    assert changed == {(half, layer) for half, layers in inner.items() for layer in layers}
