"""Merges the results of all worker processes and writes the page."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import torch
from torch import Tensor

from ...training.base_models import unet
from . import demo_stack, document
from .rows import REPORT_ROWS


def finish_report(folder: Path, steps: int, share_files: Sequence[Path]) -> Path:
    """Write the page from the workers' files and from earlier measurements with the same weights; its path."""
    demo_stack.register_adapter_folders()
    paths = {row.file: demo_stack.find_adapter_file(row.file) for row in REPORT_ROWS.values() if row.file}
    adapters = {file: demo_stack.describe_weights_file(path) for file, path in paths.items() if path is not None}
    setup = document.ReportSetup({**unet.SAMPLING_OPTIONS, "steps": steps}, demo_stack.list_base_weights(), adapters)
    shares = [torch.load(file, weights_only=True) for file in share_files]
    images: dict[str, dict[int, Tensor]] = {}
    for share in shares:
        for key, people in share["images"].items():
            images.setdefault(key, {}).update(people)
    photos = {number: batch for share in shares for number, batch in share["photos"].items()}
    document.save_image_strips(folder, images, photos)
    previous = document.read_measurements(folder, setup)
    rows = document.merge_measurements(previous, [share["values"] for share in shares])
    return document.write_report(folder, setup, rows)
