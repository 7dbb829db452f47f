"""The worker: brings the pack and the host into this process, reads a config and trains. One process per device."""

from __future__ import annotations

import argparse
import importlib
import importlib.util
import os
import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
PACKAGE = "comfyui_likeness"


def bring() -> None:
    """The pack as a package and the host in front, without the repository's root: its `nodes` would hide the host's."""
    sys.path[:] = [os.environ["COMFYUI_PATH"], *(p for p in sys.path if Path(p or ".").resolve() != ROOT)]
    spec = importlib.util.spec_from_file_location(PACKAGE, ROOT / "__init__.py", submodule_search_locations=[str(ROOT)])
    assert spec is not None and spec.loader is not None
    sys.modules[PACKAGE] = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(sys.modules[PACKAGE])
    # torch's own attention, the one that is fast in both directions
    argv, sys.argv = sys.argv, [sys.argv[0], "--use-pytorch-cross-attention"]
    import torch

    if not torch.cuda.is_available():
        sys.argv.append("--cpu")
    import comfy.options

    comfy.options.enable_args_parsing()
    import comfy.cli_args  # noqa: F401  (reads sys.argv once)

    sys.argv = argv


def parse(words: list[str]) -> argparse.Namespace:
    parser = argparse.ArgumentParser(prog="python -m training", description=__doc__)
    parser.add_argument("what", help="vae, clip, unet, recogniser, decoupled, fused, omni_masked or omni_flow")
    parser.add_argument("--config", type=Path, required=True, help="a TOML file, as in training/configs")
    parser.add_argument("--folder", help="where the run lives, instead of the config's; it continues what is there")
    return parser.parse_args(words)


def main(words: list[str]) -> None:
    arguments = parse(words)
    bring()
    tasks = importlib.import_module(f"{PACKAGE}.training.tasks")
    tasks.train(arguments.what, arguments.config, arguments.folder)


if __name__ == "__main__":
    main(sys.argv[1:])
