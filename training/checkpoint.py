"""Checkpoints of a run: all that a step depends on, but for the chance, which follows from the seed and the step."""

from __future__ import annotations

import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch

PATTERN = "step-{:08d}.pt"


def find(folder: Path) -> Path | None:
    """The newest checkpoint of a run's folder."""
    return max(folder.glob("step-*.pt"), default=None)


def write(folder: Path, step: int, state: Mapping[str, Any], keep: int) -> Path:
    """Write a checkpoint whole or not at all, and remove all but the `keep` newest."""
    folder.mkdir(parents=True, exist_ok=True)
    path = folder / PATTERN.format(step)
    part = folder / f".part.{path.name}"
    torch.save({"step": step, **state}, part)
    os.replace(part, path)
    for old in sorted(folder.glob("step-*.pt"))[:-keep]:
        old.unlink()
    return path


def read(path: Path, settings: Mapping[str, Any]) -> dict[str, Any]:
    """A checkpoint, on the CPU. Raises ValueError where its run had other settings than these."""
    try:
        state = torch.load(path, map_location="cpu", weights_only=True)
    except Exception as error:
        why = str(error).splitlines()[0]
        raise ValueError(f"got {path}, which cannot be read ({why}); expected a checkpoint; remove it") from error
    told = state["settings"]
    other = [
        f"{key} = {told.get(key)!r} instead of {settings.get(key)!r}"
        for key in sorted({*told, *settings})
        if told.get(key) != settings.get(key)
    ]
    if other:
        raise ValueError(
            f"got {path} of a run with {', '.join(other)}; expected the config's own settings; "
            "give the other run another folder"
        )
    return state
