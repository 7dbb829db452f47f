"""`python -m training TASK --config FILE` trains in ComfyUI's Python; see train.py for the arguments.

For several devices or machines, start the worker in ComfyUI's Python with COMFYUI_PATH set:
`torchrun --nproc-per-node 8 -m training.train TASK --config FILE`. All machines need access to the run's folder.
"""

from __future__ import annotations

import sys

from tools import host

REQUIRED_MODULES = (*host.RUNTIME_MODULES, "accelerate", "tensorboard", "onnx")


def run_train_worker(arguments: list[str]) -> int:
    return host.run_module("training.train", arguments, REQUIRED_MODULES)


if __name__ == "__main__":
    sys.exit(host.run_tool(run_train_worker))
