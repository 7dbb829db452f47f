"""What there is to train, by name."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

from . import loop
from .adaface import compose, inverter, teacher
from .adapters import decoupled, flashface, fused, infinite_id
from .base import clip, detector, recogniser, unet, vae
from .base.source import Source, find
from .config import Run, read, tables
from .omni_id import flow, masked
from .task import Task

# name -> its settings, and what makes it of these, the data and the seed
TASKS: Mapping[str, tuple[type[Any], Callable[[Any, Source, int], Task]]] = {
    "vae": (vae.Settings, vae.Vae),
    "clip": (clip.Settings, clip.ClipPair),
    "unet": (unet.Settings, unet.TextToImage),
    "recogniser": (recogniser.Settings, recogniser.Recogniser),
    "detector": (detector.Settings, detector.Detector),
    "decoupled": (decoupled.Settings, decoupled.Decoupled),
    "fused": (fused.Settings, fused.Fused),
    "infinite_id": (infinite_id.Settings, infinite_id.InfiniteID),
    "flashface": (flashface.Settings, flashface.FlashFace),
    "arc2face": (teacher.Settings, teacher.Teacher),
    "adaface": (inverter.Settings, inverter.FaceDistillation),
    "adaface_compose": (compose.Settings, compose.CompositionDistillation),
    "omni_masked": (masked.Settings, masked.Masked),
    "omni_flow": (flow.Settings, flow.Flow),
}


def settings(what: str, file: Path) -> tuple[Run, Any]:
    """How to train, and what, of a config file. Raises ValueError where one of them is not to be had."""
    if what not in TASKS:
        raise ValueError(f"got {what!r}; expected one of {', '.join(TASKS)}, which can be trained")
    told = tables(file)
    return read(Run, told["run"], "run"), read(TASKS[what][0], told["task"], "task")


def train(what: str, file: Path, folder: str | None = None) -> Path:
    """Train what a config file says, in `folder` where it is given; the folder of the files that it makes."""
    run, about = settings(what, file)
    run = run if folder is None else replace(run, folder=folder)
    return loop.train(lambda: TASKS[what][1](about, find(run.data), run.seed), run, asdict(about))
