"""Puts the parts of all processes together and writes the document."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch

from ..base import unet
from . import document, stack
from .rows import ROWS


def finish(folder: Path, steps: int, files: Sequence[Path]) -> Path:
    """The page, written from what processes left in files and from what was measured before on the same weights."""
    stack.register()
    places = {row.file: stack.place(row.file) for row in ROWS.values() if row.file}
    adapters = {file: stack.shipped(path) for file, path in places.items() if path is not None}
    made = document.Made({**unet.SAMPLING, "steps": steps}, stack.base(), adapters)
    shares = [torch.load(file, weights_only=True) for file in files]
    pictures: dict[str, dict[int, Any]] = {}
    for share in shares:
        for key, people in share["pictures"].items():
            pictures.setdefault(key, {}).update(people)
    photos = {number: shown for share in shares for number, shown in share["photos"].items()}
    document.strips(folder, pictures, photos)
    rows = document.merged(document.read(folder, made), [share["values"] for share in shares])
    return document.write(folder, made, rows)
