"""Checkpoints of a run: the whole training state except random numbers, which follow from the seed and the step."""

from __future__ import annotations

import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch

CHECKPOINT_NAME = "step-{:08d}.pt"


def find_checkpoint(folder: Path) -> Path | None:
    """The newest checkpoint in a run's folder."""
    return max(folder.glob("step-*.pt"), default=None)


def read_step_number(path: Path) -> int:
    """The number of steps after which a checkpoint was written, from its name."""
    return int(path.stem.removeprefix("step-"))


def write_checkpoint(folder: Path, step: int, state: Mapping[str, Any], keep_newest: int) -> Path:
    """Write a checkpoint atomically and delete all but the `keep_newest` newest."""
    folder.mkdir(parents=True, exist_ok=True)
    path = folder / CHECKPOINT_NAME.format(step)
    part = folder / f".part.{path.name}"
    torch.save({"step": step, **state}, part)
    os.replace(part, path)
    for old in sorted(folder.glob("step-*.pt"))[:-keep_newest]:
        old.unlink()
    return path


def read_checkpoint(path: Path, settings: Mapping[str, Any]) -> dict[str, Any]:
    """Load a checkpoint to the CPU. Raises ValueError if its run had settings other than these."""
    try:
        state = torch.load(path, map_location="cpu", weights_only=True)
    except Exception as error:
        reason = str(error).splitlines()[0]
        raise ValueError(f"got {path}, which cannot be read ({reason}); expected a checkpoint; remove it") from error
    saved = state["settings"]
    differences = [
        f"{key} = {saved.get(key)!r} instead of {settings.get(key)!r}"
        for key in sorted({*saved, *settings})
        if saved.get(key) != settings.get(key)
    ]
    if differences:
        raise ValueError(
            f"got {path} of a run with {', '.join(differences)}; expected the config's own settings; "
            "use another folder for the new run"
        )
    return state
