"""Imports the pack into this process, for modules that `python -m` starts in the repository's root."""

from __future__ import annotations

import importlib
import importlib.util
import os
import sys
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[1]
PACKAGE_NAME = "comfyui_likeness"


def import_pack(comfyui: bool = True) -> None:
    """Import the pack as the package `comfyui_likeness`, and the ComfyUI of COMFYUI_PATH unless told not to.

    The repository's root leaves `sys.path`: its `nodes` would hide ComfyUI's. A second call does nothing.
    """
    if PACKAGE_NAME in sys.modules:
        return
    sys.path[:] = [entry for entry in sys.path if Path(entry or ".").resolve() != ROOT]
    spec = importlib.util.spec_from_file_location(
        PACKAGE_NAME, ROOT / "__init__.py", submodule_search_locations=[str(ROOT)]
    )
    assert spec is not None and spec.loader is not None
    sys.modules[PACKAGE_NAME] = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(sys.modules[PACKAGE_NAME])
    if comfyui:
        _import_comfyui()


def _import_comfyui() -> None:
    sys.path.insert(0, os.environ["COMFYUI_PATH"])
    # PyTorch's attention is fast in both directions, and the one that PyTorch counts FLOPs of.
    argv, sys.argv = sys.argv, [sys.argv[0], "--use-pytorch-cross-attention"]
    import torch

    if not torch.cuda.is_available():
        sys.argv.append("--cpu")
    import comfy.options

    comfy.options.enable_args_parsing()
    import comfy.cli_args  # noqa: F401  (reads sys.argv once)

    sys.argv = argv


def import_pack_module(name: str, comfyui: bool = True) -> Any:
    """Import a module of the pack by its dotted name in the repository, such as `training.task_registry`."""
    import_pack(comfyui)
    return importlib.import_module(f"{PACKAGE_NAME}.{name}")
