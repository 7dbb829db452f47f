"""Reference faces are cut, turned and squared as the authors' demo does it with Pillow, bit for bit."""

from __future__ import annotations

import random
from dataclasses import replace
from typing import Any

import numpy as np
import pytest
import torch
from comfyui_likeness.likeness import reference_faces
from flashfaces import CASES, person
from golden import GOLDEN, WEIGHTS
from PIL import Image
from safetensors.torch import load_file
from torch import Tensor

SIZES = ((1, 1), (1, 90), (300, 7), (224, 224), (117, 223), (500, 333), (48, 60))


def noise(height: int, width: int) -> Tensor:
    generator = torch.Generator().manual_seed(height * 1000 + width)
    return torch.randint(0, 256, (height, width, 3), generator=generator, dtype=torch.uint8)


def same(got: Tensor, wanted: Image.Image) -> bool:
    return np.array_equal(got.numpy(), np.asarray(wanted))


@pytest.mark.parametrize("case", CASES["face_crop_cases"], ids=lambda case: case["id"])
def test_the_official_crops(case: dict[str, Any]) -> None:
    about = case["image"]
    photo = (127.5 + 40 * WEIGHTS.tensor(about["tensor"], about["shape"])).round().clamp(0, 255).to(torch.uint8)
    wanted = load_file(GOLDEN / "flashface" / case["outputs"]["file"])
    crop = reference_faces.crop(photo, torch.tensor(case["bbox"]), torch.tensor(case["eyes"]))
    assert torch.equal(crop, wanted["crop"])
    assert torch.equal(reference_faces.square(crop), wanted["square"])


@pytest.mark.parametrize("case", CASES["mask_cases"], ids=lambda case: str(case["bbox"]))
def test_the_official_positions(case: dict[str, Any]) -> None:
    width, height = case["image_size"]
    wanted = torch.zeros(case["latent_size"])
    if case["rect"]:
        y0, y1, x0, x1 = case["rect"]
        wanted[y0:y1, x0:x1] = 1
    assert torch.equal(reference_faces.position(case["bbox"], width, height), wanted)


@pytest.mark.parametrize("size", SIZES, ids=str)
def test_turning_is_pillows(size: tuple[int, int]) -> None:
    picture, numbers = noise(*size), random.Random(1)
    for degrees in (0.0, 90.0, -90.0, *(numbers.uniform(-90, 90) for _ in range(20))):
        wanted = Image.fromarray(picture.numpy()).rotate(degrees)
        assert same(reference_faces.rotate(picture, degrees), wanted), degrees


@pytest.mark.parametrize("size", SIZES, ids=str)
def test_squaring_is_pillows(size: tuple[int, int]) -> None:
    picture, (height, width) = noise(*size), size
    scale = 224 / max(size)
    h, w = max(round(height * scale), 1), max(round(width * scale), 1)
    wanted = Image.new("RGB", (224, 224))
    sized = Image.fromarray(picture.numpy())
    for step in ((w, height), (w, h)):  # newer Pillows choose which side goes first; the demo's took the width
        sized = sized.resize(step, Image.Resampling.BICUBIC)
    wanted.paste(sized, ((224 - w) // 2, (224 - h) // 2))
    assert same(reference_faces.square(picture), wanted)


def test_a_box_outside_the_photo_is_black() -> None:
    box, eyes = torch.tensor([400.0, 400, 450, 460]), torch.tensor([[410.0, 420], [430, 420]])
    crop = reference_faces.crop(noise(100, 100), box, eyes)
    assert crop.shape == (60, 50, 3) and not crop.any()


def test_every_face_of_some_weight_is_shown() -> None:
    who = person(3)
    pictures = reference_faces.references(who)
    assert pictures.shape == (3, 224, 224, 3) and pictures.dtype == torch.uint8
    fewer = reference_faces.references(replace(who, weight=torch.tensor([1.0, 0.0, 2.0])))
    assert torch.equal(fewer, pictures[[0, 2]])


def test_an_identity_without_pictures_is_told_what_to_do() -> None:
    with pytest.raises(ValueError, match="include_crops"):
        reference_faces.references(replace(person(), crop=None))
    with pytest.raises(ValueError, match="weight 0"):
        reference_faces.references(replace(person(2), weight=torch.zeros(2)))
