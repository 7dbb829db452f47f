"""Reference faces are cropped, rotated and padded bit-identically to the official demo, which uses Pillow."""

from __future__ import annotations

import random
from dataclasses import replace
from typing import Any

import numpy as np
import pytest
import torch
from comfyui_likeness.likeness.faces import reference_faces
from PIL import Image
from safetensors.torch import load_file
from support.flashface_models import FLASHFACE_CASES, make_flashface_identity
from support.golden import DETERMINISTIC_WEIGHTS, GOLDEN_FOLDER
from torch import Tensor

SIZES = ((1, 1), (1, 90), (300, 7), (224, 224), (117, 223), (500, 333), (48, 60))


def noise(height: int, width: int) -> Tensor:
    generator = torch.Generator().manual_seed(height * 1000 + width)
    return torch.randint(0, 256, (height, width, 3), generator=generator, dtype=torch.uint8)


def same(got: Tensor, wanted: Image.Image) -> bool:
    return np.array_equal(got.numpy(), np.asarray(wanted))


@pytest.mark.parametrize("case", FLASHFACE_CASES["face_crop_cases"], ids=lambda case: case["id"])
def test_crops_match_the_official_code(case: dict[str, Any]) -> None:
    about = case["image"]
    photo = (
        (127.5 + 40 * DETERMINISTIC_WEIGHTS.tensor(about["tensor"], about["shape"]))
        .round()
        .clamp(0, 255)
        .to(torch.uint8)
    )
    wanted = load_file(GOLDEN_FOLDER / "flashface" / case["outputs"]["file"])
    crop = reference_faces.crop_reference_face(photo, torch.tensor(case["bbox"]), torch.tensor(case["eyes"]))
    assert torch.equal(crop, wanted["crop"])
    assert torch.equal(reference_faces.fit_to_square(crop), wanted["square"])


@pytest.mark.parametrize("case", FLASHFACE_CASES["mask_cases"], ids=lambda case: str(case["bbox"]))
def test_position_masks_match_the_official_code(case: dict[str, Any]) -> None:
    width, height = case["image_size"]
    wanted = torch.zeros(case["latent_size"])
    if case["rect"]:
        y0, y1, x0, x1 = case["rect"]
        wanted[y0:y1, x0:x1] = 1
    assert torch.equal(reference_faces.make_face_position_mask(case["bbox"], width, height), wanted)


@pytest.mark.parametrize("size", SIZES, ids=str)
def test_rotation_matches_pillow(size: tuple[int, int]) -> None:
    image, rng = noise(*size), random.Random(1)
    for degrees in (0.0, 90.0, -90.0, *(rng.uniform(-90, 90) for _ in range(20))):
        wanted = Image.fromarray(image.numpy()).rotate(degrees)
        assert same(reference_faces.rotate_image(image, degrees), wanted), degrees


@pytest.mark.parametrize("size", SIZES, ids=str)
def test_resizing_matches_pillow(size: tuple[int, int]) -> None:
    image, (height, width) = noise(*size), size
    scale = 224 / max(size)
    h, w = max(round(height * scale), 1), max(round(width * scale), 1)
    wanted = Image.new("RGB", (224, 224))
    resized = Image.fromarray(image.numpy())
    for step in ((w, height), (w, h)):  # newer Pillow versions choose the order; the demo's resized the width first
        resized = resized.resize(step, Image.Resampling.BICUBIC)
    wanted.paste(resized, ((224 - w) // 2, (224 - h) // 2))
    assert same(reference_faces.fit_to_square(image), wanted)


def test_boxes_outside_the_photo_are_black() -> None:
    box, eyes = torch.tensor([400.0, 400, 450, 460]), torch.tensor([[410.0, 420], [430, 420]])
    crop = reference_faces.crop_reference_face(noise(100, 100), box, eyes)
    assert crop.shape == (60, 50, 3) and not crop.any()


def test_faces_of_weight_0_are_ignored() -> None:
    identity = make_flashface_identity(3)
    images = reference_faces.make_reference_faces(identity)
    assert images.shape == (3, 224, 224, 3) and images.dtype == torch.uint8
    fewer = reference_faces.make_reference_faces(replace(identity, weight=torch.tensor([1.0, 0.0, 2.0])))
    assert torch.equal(fewer, images[[0, 2]])


def test_identities_without_crops_are_rejected() -> None:
    with pytest.raises(ValueError, match="include_crops"):
        reference_faces.make_reference_faces(replace(make_flashface_identity(), crop=None))
    with pytest.raises(ValueError, match="weight 0"):
        reference_faces.make_reference_faces(replace(make_flashface_identity(2), weight=torch.zeros(2)))
