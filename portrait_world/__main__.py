"""`python -m portrait_world train` makes all weights of Portrait World, `python -m portrait_world gate NAME` checks
them.

Both run in ComfyUI's Python; pipeline/run.py has the arguments.
"""

from __future__ import annotations

import sys

from tools import host

REQUIRED_MODULES = (*host.RUNTIME_MODULES, "accelerate", "tensorboard", "onnx", "webdataset", "PIL")


def main(arguments: list[str]) -> int:
    return host.run_module("portrait_world.pipeline.run", arguments, REQUIRED_MODULES)


if __name__ == "__main__":
    sys.exit(host.run_tool(main))
