"""Trains one task from a config file, inside ComfyUI's Python: one process per device."""

from __future__ import annotations

import argparse
import sys
from pathlib import Path

from tools.import_pack import import_pack_module


def parse_train_arguments(argv: list[str]) -> argparse.Namespace:
    parser = argparse.ArgumentParser(prog="python -m training", description=__doc__)
    parser.add_argument("task", help="what to train, such as vae; an unknown name lists all tasks")
    parser.add_argument("--config", type=Path, required=True, help="TOML file, see training/configs")
    parser.add_argument("--folder", help="run folder, instead of the config's; resumes the run found there")
    return parser.parse_args(argv)


def main(argv: list[str]) -> None:
    arguments = parse_train_arguments(argv)
    task_registry = import_pack_module("training.task_registry")
    task_registry.train_task(arguments.task, arguments.config, arguments.folder)


if __name__ == "__main__":
    main(sys.argv[1:])
