"""A models folder with stand-in face packs: a plugin of fixtures."""

from __future__ import annotations

from pathlib import Path

import folder_paths
import pytest
from comfyui_likeness.nodes.loaders import face_analyzer, files
from comfyui_likeness.tools import standins


@pytest.fixture
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A models folder of its own for the host, beside which nothing ships."""
    monkeypatch.setattr(files, "SHIPPED", tmp_path / "weights")
    monkeypatch.setattr(folder_paths, "models_dir", str(tmp_path))
    monkeypatch.setattr(folder_paths, "folder_names_and_paths", {})
    monkeypatch.setattr(folder_paths, "filename_list_cache", {})
    files.register()
    for name in files.FOLDERS:
        (tmp_path / name).mkdir()
    return tmp_path


@pytest.fixture(scope="session")
def packs(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The folder of the stand-in packs."""
    base = tmp_path_factory.mktemp("base")
    standins.make(base, [])
    return base / "models" / "insightface" / "models"


@pytest.fixture
def models(folder: Path, packs: Path) -> Path:
    """Where this test's packs lie: the stand-ins, to be added to or spoilt."""
    place = folder / "insightface" / "models"
    for file in packs.rglob("*.onnx"):
        target = place / file.relative_to(packs)
        target.parent.mkdir(parents=True, exist_ok=True)
        target.write_bytes(file.read_bytes())
    return place


@pytest.fixture
def analyzer(models: Path) -> face_analyzer.FaceAnalyzer:
    return face_analyzer.load("buffalo_l", "cpu")[0]
