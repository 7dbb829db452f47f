"""All training tasks by name."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

from . import trainer
from .adaface import composition_distillation, face_distillation, teacher
from .adapters import decoupled, flashface, fused, infinite_id
from .base_models import clip_pair, face_detector, face_recognizer, unet, vae
from .config import RunConfig, parse_config_table, read_config_tables
from .data.image_source import ImageSource, open_source
from .omni_id import flow_stage, masked_stage
from .task import Task

# name -> its config class, and the task class, which takes the config, the image source and the seed
TASKS: Mapping[str, tuple[type[Any], Callable[[Any, ImageSource, int], Task]]] = {
    "vae": (vae.VAEConfig, vae.VAETask),
    "clip": (clip_pair.CLIPConfig, clip_pair.CLIPPair),
    "unet": (unet.UNetConfig, unet.TextToImage),
    "recogniser": (face_recognizer.RecognizerConfig, face_recognizer.FaceRecognizer),
    "detector": (face_detector.DetectorConfig, face_detector.FaceDetector),
    "decoupled": (decoupled.DecoupledConfig, decoupled.DecoupledTask),
    "fused": (fused.FusedKVConfig, fused.FusedKVTask),
    "infinite_id": (infinite_id.InfiniteIDConfig, infinite_id.InfiniteIDTask),
    "flashface": (flashface.FlashFaceConfig, flashface.FlashFaceTask),
    "arc2face": (teacher.Arc2FaceConfig, teacher.Arc2FaceTask),
    "adaface": (face_distillation.FaceDistillationConfig, face_distillation.FaceDistillationTask),
    "adaface_compose": (
        composition_distillation.CompositionDistillationConfig,
        composition_distillation.CompositionDistillationTask,
    ),
    "omni_masked": (masked_stage.MaskedStageConfig, masked_stage.MaskedStageTask),
    "omni_flow": (flow_stage.FlowStageConfig, flow_stage.FlowStageTask),
}


def read_task_config(task_name: str, config_file: Path) -> tuple[RunConfig, Any]:
    """Read the run config and the task's config from a file. Raises ValueError if either is wrong."""
    if task_name not in TASKS:
        raise ValueError(f"got {task_name!r}; expected one of {', '.join(TASKS)}, which can be trained")
    tables = read_config_tables(config_file)
    run = parse_config_table(RunConfig, tables["run"], "run")
    return run, parse_config_table(TASKS[task_name][0], tables["task"], "task")


def train_task(
    task_name: str, config_file: Path, folder: str | None = None, on_step: Callable[[int], None] | None = None
) -> Path:
    """Train as a config file says, in `folder` if given. Returns the folder of the files that it writes.

    `on_step` gets the number of finished steps, in place of a progress bar.
    """
    run, task_config = read_task_config(task_name, config_file)
    run = run if folder is None else replace(run, folder=folder)
    task_type = TASKS[task_name][1]
    return trainer.run_training(
        lambda: task_type(task_config, open_source(run.data), run.seed), run, asdict(task_config), on_step
    )
