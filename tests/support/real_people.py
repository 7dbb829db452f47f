"""Photos of synthetic people, and an analyzer of networks that are free to use, if `tools.real_photos` brought them."""

from __future__ import annotations

import importlib
import os
import shutil
import sys
from functools import lru_cache
from pathlib import Path

import numpy as np
import pytest
import torch
from comfyui_likeness.nodes.loaders import face_analyzer
from comfyui_likeness.nodes.loaders.face_analyzer import FaceAnalyzer
from comfyui_likeness.tools import real_photos
from PIL import Image
from torch import Tensor

# P003 resembles a known person.
PEOPLE = tuple(f"P{number:03d}" for number in (1, 2, 4, 5, 6, 7, 8, 9, 10))
PORTRAIT, SELFIE, FIGURE, STREET = "studio_portrait", "amateur_selfie", "studio_posture", "amateur_posture"
EXPRESSIONS = "emotions_sheet"  # 4 x 4 faces
VIEWS = "character_sheet"  # from all sides


@pytest.fixture(scope="session")
def free_pack(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with an ArcFace network alone, whose detector is MTCNN. Skips the test if there are no photos."""
    if not real_photos.has_photos():
        reason = "real photos and face networks are not installed: python -m tools.test brings them"
        if os.environ.get(real_photos.REQUIRED_VARIABLE) == "required":
            pytest.fail(f"{reason}, but {real_photos.REQUIRED_VARIABLE}=required")
        pytest.skip(reason)
    sys.path.append(str(real_photos.FOLDER))
    importlib.import_module("facenet_pytorch")
    sys.path.remove(str(real_photos.FOLDER))
    folder = tmp_path_factory.mktemp("packs") / "free"
    folder.mkdir()
    shutil.copy(real_photos.RECOGNIZER, folder)
    return folder


@pytest.fixture(scope="session")
def free_analyzer(free_pack: Path) -> FaceAnalyzer:
    return face_analyzer.open_model_pack(free_pack, "cpu")[0]


@lru_cache(maxsize=4)
def load_photo(person: str, kind: str) -> Tensor:
    """A photo of 0.9 to 1.1 megapixels, or a sheet of 4, float [H, W, 3] in 0..1."""
    with Image.open(real_photos.PEOPLE / person / "assets" / f"{kind}.jpg") as image:
        if kind not in (EXPRESSIONS, VIEWS):
            image.draft("RGB", (image.width // 2, image.height // 2))
        return torch.from_numpy(np.array(image.convert("RGB"))).float() / 255


def put_side_by_side(left: Tensor, right: Tensor) -> Tensor:
    """Two photos of the same height side by side."""
    return torch.cat((left, right), dim=1)
