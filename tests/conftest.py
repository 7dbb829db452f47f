"""Imports the pack as the package `comfyui_likeness`, and the ComfyUI of COMFYUI_PATH on the CPU; shared fixtures."""

from __future__ import annotations

import importlib.util
import os
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[1]
PACKAGE_NAME = "comfyui_likeness"

pytest_plugins = ["support.analyzers", "support.real_people", "support.server_fixtures"]

# The pack's own `nodes` must not hide the host's `nodes.py`.
sys.path[:] = [entry for entry in sys.path if Path(entry or ".").resolve() != ROOT]


def _import_pack() -> None:
    spec = importlib.util.spec_from_file_location(
        PACKAGE_NAME, ROOT / "__init__.py", submodule_search_locations=[str(ROOT)]
    )
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    sys.modules[PACKAGE_NAME] = module
    spec.loader.exec_module(module)


def _import_comfyui() -> None:
    host = os.environ.get("COMFYUI_PATH")
    if not host:
        raise pytest.UsageError("COMFYUI_PATH names no ComfyUI: run `python -m tools.test`, or set it")
    sys.path.insert(0, host)
    argv, sys.argv = sys.argv, [sys.argv[0], "--cpu"]
    import comfy.options

    comfy.options.enable_args_parsing()
    import comfy.cli_args  # noqa: F401  (reads sys.argv once)

    sys.argv = argv


_import_pack()
_import_comfyui()


def pytest_report_header() -> str:
    import comfyui_version
    import torch

    return f"ComfyUI {comfyui_version.__version__}, torch {torch.__version__}"
