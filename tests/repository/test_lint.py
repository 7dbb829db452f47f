"""ruff (lint and format) and pyright report nothing; pyright treats import cycles as errors."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

if sys.version_info >= (3, 11):
    import tomllib
else:
    import tomli as tomllib

ROOT = Path(__file__).resolve().parents[2]


def run_module(*words: str | Path) -> subprocess.CompletedProcess[str]:
    return subprocess.run([sys.executable, "-m", *words], capture_output=True, text=True, cwd=ROOT)


def run_pyright(folder: Path, include: list[Path]) -> tuple[list[str], int]:
    """Run pyright on `include` with the repository's settings and ComfyUI's modules; return errors and file count."""
    settings = tomllib.loads((ROOT / "pyproject.toml").read_text())["tool"]["pyright"]
    # pyright only accepts paths relative to the folder of its config.
    settings |= {
        "include": [os.path.relpath(path, folder) for path in include],
        "extraPaths": [os.environ["COMFYUI_PATH"], str(ROOT)],
    }
    config = folder / "pyrightconfig.json"
    config.write_text(json.dumps(settings | {"reportMissingImports": "error"}))
    done = json.loads(run_module("pyright", "--outputjson", "--project", config, "--pythonpath", sys.executable).stdout)
    found = [
        f"{d['file']}: {d['message']} ({d.get('rule')})" for d in done["generalDiagnostics"] if d["severity"] == "error"
    ]
    return found, done["summary"]["filesAnalyzed"]


def test_ruff():
    done = run_module("ruff", "check", "--no-cache", "--output-format=concise", ".")
    assert done.returncode == 0, done.stdout + done.stderr


def test_ruff_format():
    done = run_module("ruff", "format", "--no-cache", "--check", ".")
    assert done.returncode == 0, done.stdout + done.stderr


@pytest.mark.parametrize(
    ("file", "source", "rule"),
    [
        ("nodes/identity.py", "import folder_paths\n", "TID251"),
        ("nodes/identity.py", "from nodes.types import Face\n", "TID251"),
        ("tools/host.py", "from tools import server\n", "TID251"),
        ("nodes/identity.py", "def f(a) -> None: ...\n", "ANN001"),
        ("nodes/identity.py", "def f(a: int): ...\n", "ANN201"),
    ],
)
def test_ruff_knows_the_house_rules(file: str, source: str, rule: str):
    command = [sys.executable, "-m", "ruff", "check", "--no-cache", "--stdin-filename", file, "-"]
    done = subprocess.run(command, input=source, capture_output=True, text=True, cwd=ROOT)
    assert done.returncode == 1 and rule in done.stdout


def test_pyright(tmp_path):
    settings = tomllib.loads((ROOT / "pyproject.toml").read_text())["tool"]["pyright"]
    found, files = run_pyright(tmp_path, [ROOT / name for name in settings["include"]])
    assert not found, "\n".join(found)
    assert files >= sum(len(list((ROOT / name).rglob("*.py"))) for name in ("likeness", "nodes"))


def test_pyright_sees_circles_and_wrong_types(tmp_path):
    pack = tmp_path / "pack"
    pack.mkdir()
    (pack / "__init__.py").write_text("")
    one = "import folder_paths\n\nfrom . import two\n\nx: int = two.y\nz: int = folder_paths.models_dir\n"
    (pack / "one.py").write_text(one)
    (pack / "two.py").write_text("from . import one\n\ny: int = one.x\n")
    found = "\n".join(run_pyright(tmp_path, [pack])[0])
    assert "reportImportCycles" in found and "reportAssignmentType" in found
    assert "reportMissingImports" not in found
