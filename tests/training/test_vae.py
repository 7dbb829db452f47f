"""The VAE: it learns, from crops; the edge loss and the KL divergence."""

from __future__ import annotations

import math
from pathlib import Path

import pytest
import torch
from comfyui_likeness.training.base_models import vae
from comfyui_likeness.training.data import image_source
from comfyui_likeness.training.task import make_generator
from support.toy_tasks import DISC_WORLD, train_few_steps
from torch import nn


def test_the_vae_learns(tmp_path: Path) -> None:
    _, losses = train_few_steps(
        lambda: vae.VAETask(vae.VAEConfig(resolution=16), DISC_WORLD, 0),
        tmp_path,
        steps=12,
        batch_size=4,
        warmup_steps=0,
    )
    assert losses[-1] < 0.9 * losses[0]


def test_batches_are_crops_of_the_images() -> None:
    task = vae.VAETask(vae.VAEConfig(resolution=64, crop_size=32), DISC_WORLD, 0)
    batch = task.make_batch(make_generator(5), 3)
    assert batch["images"].shape == (3, 3, 32, 32) and batch["noise"].shape == (3, 4, 4, 4)
    images = image_source.load_images(DISC_WORLD, image_source.random_indices(make_generator(5), 3), 64)
    crops = images.unfold(2, 32, 1).unfold(3, 32, 1).flatten(2, 3)  # all that there are
    for crop, all_crops in zip(batch["images"], crops.transpose(1, 2), strict=True):
        assert (all_crops == crop).flatten(1).all(1).any()


def test_edge_loss_and_kl_divergence() -> None:
    image = image_source.load_images(DISC_WORLD, [5], 32)
    blurred = nn.functional.avg_pool2d(image, 5, 1, 2)
    assert vae.edge_loss(image, image) == 0 and vae.edge_loss(image + 0.1, image).item() < 1e-6
    assert vae.edge_loss(blurred, image) > 0.01
    normal = torch.randn(4, 4, 32, 32, generator=make_generator(1))
    assert vae.kl_divergence(normal).item() == pytest.approx(0, abs=1e-3)
    wide, shifted = vae.kl_divergence(2 * normal).item(), vae.kl_divergence(normal + 1).item()
    assert wide == pytest.approx(0.5 * (4 - 1 - math.log(4)), rel=0.05) and shifted == pytest.approx(0.5, rel=0.05)
