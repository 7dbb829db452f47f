"""Fixtures: a models folder with stand-in face packs, and an analyzer."""

from __future__ import annotations

from pathlib import Path

import folder_paths
import pytest
from comfyui_likeness.nodes.loaders import face_analyzer, files
from comfyui_likeness.tools.standins import build


@pytest.fixture
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """An empty models folder for ComfyUI, without shipped weights."""
    monkeypatch.setattr(files, "SHIPPED_WEIGHTS", tmp_path / "weights")
    monkeypatch.setattr(folder_paths, "models_dir", str(tmp_path))
    monkeypatch.setattr(folder_paths, "folder_names_and_paths", {})
    monkeypatch.setattr(folder_paths, "filename_list_cache", {})
    files.register_model_folders()
    for name in files.MODEL_FOLDERS:
        (tmp_path / name).mkdir()
    return tmp_path


@pytest.fixture(scope="session")
def packs(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The folder of the stand-in face packs."""
    base = tmp_path_factory.mktemp("base")
    build.write_standins(base, [])
    return base / "models" / "insightface" / "models"


@pytest.fixture
def models(folder: Path, packs: Path) -> Path:
    """A copy of the stand-in face packs for one test, which may change it."""
    target_folder = folder / "insightface" / "models"
    for file in packs.rglob("*.onnx"):
        target = target_folder / file.relative_to(packs)
        target.parent.mkdir(parents=True, exist_ok=True)
        target.write_bytes(file.read_bytes())
    return target_folder


@pytest.fixture
def analyzer(models: Path) -> face_analyzer.FaceAnalyzer:
    return face_analyzer.load_face_analyzer("buffalo_l", "cpu")[0]
