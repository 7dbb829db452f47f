"""`python -m training WHAT --config FILE`: trains, in the host's Python; see run.py for its arguments.

With several devices or machines start the worker itself, in the host's Python and with COMFYUI_PATH set:
`torchrun --nproc-per-node 8 -m training.run WHAT ...`. All machines need the run's folder.
"""

from __future__ import annotations

import sys

from tools import host

NEEDS = (*host.RUNTIME_MODULES, "accelerate", "tensorboard", "onnx")


def work(arguments: list[str]) -> int:
    return host.start("training.run", arguments, NEEDS)


if __name__ == "__main__":
    sys.exit(host.main(work))
