"""`python -m training.build_dataset FOLDER OUT` makes shards from photos, in ComfyUI's Python; see build.py."""

from __future__ import annotations

import sys

from tools import host

REQUIRED_MODULES = (*host.RUNTIME_MODULES, "PIL", "scipy", "tqdm", "webdataset")


def run_build_worker(arguments: list[str]) -> int:
    return host.run_module("training.build_dataset.build", arguments, REQUIRED_MODULES)


if __name__ == "__main__":
    sys.exit(host.run_tool(run_build_worker))
