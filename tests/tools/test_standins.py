"""Stand-ins can be built where the pack was copied to without its tests, as tools.server copies it."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
from comfyui_likeness.tools import server
from comfyui_likeness.tools.standins import build, models

ROOT = Path(__file__).resolve().parents[2]
# One file for each function that reads a layout.
FILES = ("ip-adapter-faceid_sd15.bin", "xlabs_flux_ip_adapter_v2.safetensors", "pulid_v1.1.safetensors")


def test_standins_are_built_without_the_tests_folder(tmp_path: Path) -> None:
    assert "tests" in server.COPY_EXCLUDES
    shutil.copytree(ROOT / "tools", tmp_path / "pack" / "tools", ignore=shutil.ignore_patterns(*server.COPY_EXCLUDES))
    command = [sys.executable, "-m", "tools.standins.build", str(tmp_path / "base"), *FILES]
    result = subprocess.run(command, cwd=tmp_path / "pack", env=dict(os.environ), capture_output=True, text=True)
    assert result.returncode == 0, result.stderr
    for name in FILES:
        assert (tmp_path / "base" / "models" / build.STANDIN_FILES[name][0] / name).stat().st_size > 0


@pytest.mark.parametrize("name", sorted(set(build.ADAPTER_LAYOUTS.values())))
def test_layouts_of_adapters_exist(name: str) -> None:
    assert models.LAYOUT_FOLDER.is_relative_to(ROOT / "tools") and models.read_layout(name)
