"""ruff and pyright find nothing; import circles are errors to pyright."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

if sys.version_info >= (3, 11):
    import tomllib
else:
    import tomli as tomllib

ROOT = Path(__file__).resolve().parents[1]


def run(*words: str | Path) -> subprocess.CompletedProcess[str]:
    return subprocess.run([sys.executable, "-m", *words], capture_output=True, text=True, cwd=ROOT)


def pyright(folder: Path, include: list[Path]) -> tuple[list[str], int]:
    """Check `include` under the repository's own settings, with the host in sight: what it found, in how many files."""
    settings = tomllib.loads((ROOT / "pyproject.toml").read_text())["tool"]["pyright"]
    # Only paths relative to the settings' own folder are heeded.
    settings |= {
        "include": [os.path.relpath(path, folder) for path in include],
        "extraPaths": [os.environ["COMFYUI_PATH"], str(ROOT)],
    }
    config = folder / "pyrightconfig.json"
    config.write_text(json.dumps(settings | {"reportMissingImports": "error"}))
    done = json.loads(run("pyright", "--outputjson", "--project", config, "--pythonpath", sys.executable).stdout)
    found = [
        f"{d['file']}: {d['message']} ({d.get('rule')})" for d in done["generalDiagnostics"] if d["severity"] == "error"
    ]
    return found, done["summary"]["filesAnalyzed"]


def test_ruff():
    done = run("ruff", "check", "--no-cache", "--output-format=concise", ".")
    assert done.returncode == 0, done.stdout + done.stderr


def test_pyright(tmp_path):
    settings = tomllib.loads((ROOT / "pyproject.toml").read_text())["tool"]["pyright"]
    found, files = pyright(tmp_path, [ROOT / name for name in settings["include"]])
    assert not found, "\n".join(found)
    assert files >= len(list((ROOT / "likeness").glob("*.py"))) + len(list((ROOT / "nodes").rglob("*.py")))


def test_pyright_sees_circles_and_wrong_types(tmp_path):
    pack = tmp_path / "pack"
    pack.mkdir()
    (pack / "__init__.py").write_text("")
    one = "import folder_paths\n\nfrom . import two\n\nx: int = two.y\nz: int = folder_paths.models_dir\n"
    (pack / "one.py").write_text(one)
    (pack / "two.py").write_text("from . import one\n\ny: int = one.x\n")
    found = "\n".join(pyright(tmp_path, [pack])[0])
    assert "reportImportCycles" in found and "reportAssignmentType" in found
    assert "reportMissingImports" not in found
