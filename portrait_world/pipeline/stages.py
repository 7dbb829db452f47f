"""The stages in order, each with what it takes on one CPU core; a finished stage is not run again."""

from __future__ import annotations

import json
from abc import abstractmethod
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from ...training import checkpoint, task_registry
from .. import paint_shards
from .gates import GATES

ROOT = Path(__file__).resolve().parents[2]
RUNS_FOLDER = ROOT / "artifacts" / "portrait_world"
CONFIGS_FOLDER = ROOT / "portrait_world" / "configs"

ReportProgress = Callable[[float], None]  # takes the finished fraction of the stage


@dataclass(frozen=True)
class Stage:
    """`minutes` on one core, for the time left."""

    name: str
    minutes: float

    @abstractmethod
    def measure_progress(self) -> float:
        """The finished fraction, from what is on disk."""

    @abstractmethod
    def run(self, report: ReportProgress) -> None:
        """Go on from there to the end. Raises ValueError if what follows would be in vain."""


@dataclass(frozen=True)
class PaintStage(Stage):
    """Shards of the train split; `name` is their folder."""

    first_person: int
    num_people: int
    images_per_person: int = 1
    people_per_image: int = 1

    @property
    def _people(self) -> range:
        return range(self.first_person, self.first_person + self.num_people)

    def measure_progress(self) -> float:
        files = [path for _, path in paint_shards.list_shards(RUNS_FOLDER / self.name, self._people)]
        return sum(path.exists() for path in files) / len(files)

    def run(self, report: ReportProgress) -> None:
        album = {
            "split": "train", "images_per_person": self.images_per_person, "people_per_image": self.people_per_image,
        }  # fmt: skip
        paint_shards.paint_shards(RUNS_FOLDER / self.name, self._people, album, report=report)


@dataclass(frozen=True)
class TrainStage(Stage):
    """A training run; `name` is its config."""

    task: str = ""  # of task_registry, if the config has another name

    @property
    def _run(self) -> Any:
        return task_registry.read_task_config(self.task or self.name, self._config)[0]

    @property
    def _config(self) -> Path:
        return CONFIGS_FOLDER / f"{self.name}.toml"

    def measure_progress(self) -> float:
        run = self._run
        if any((ROOT / run.folder / "model").glob("*.*")):
            return 1.0
        newest = checkpoint.find_checkpoint(ROOT / run.folder)
        # The files are written after the last checkpoint.
        return 0.0 if newest is None else min(0.999, checkpoint.read_step_number(newest) / run.steps)

    def run(self, report: ReportProgress) -> None:
        steps = self._run.steps
        task_registry.train_task(self.task or self.name, self._config, on_step=lambda step: report(step / steps))


@dataclass(frozen=True)
class GateStage(Stage):
    """A gate; `name` is its name in GATES. What it found is kept until a file that it measures changes."""

    depends_on: tuple[str, ...] = ()  # runs whose files it measures

    @property
    def _record(self) -> Path:
        return RUNS_FOLDER / "gates" / f"{self.name}.json"

    def measure_progress(self) -> float:
        files = [file for run in self.depends_on for file in (RUNS_FOLDER / run / "model").glob("*.*")]
        is_current = self._record.exists() and all(
            file.stat().st_mtime <= self._record.stat().st_mtime for file in files
        )
        return 1.0 if is_current else 0.0

    def run(self, report: ReportProgress) -> None:
        figures = GATES[self.name].measure(RUNS_FOLDER)
        GATES[self.name].require(figures)
        self._record.parent.mkdir(parents=True, exist_ok=True)
        self._record.write_text(json.dumps(figures) + "\n", encoding="utf-8")


# Omni-ID's Table 2: every encoder is trained in both stages, and has its own adapter.
OMNI_ID_VARIANTS = ("3_1", "3_5", "3_8", "8_8", "mask_85", "mask_99", "flow")

STAGES: tuple[Stage, ...] = (
    PaintStage("people/albums/start", 11, first_person=0, num_people=3000, images_per_person=6),
    TrainStage("vae", 75),
    PaintStage("people/albums/rest", 18, first_person=3000, num_people=5000, images_per_person=6),
    TrainStage("judge", 30, task="recogniser"),
    GateStage("reconstruction", 1, depends_on=("vae", "judge")),
    PaintStage("pairs", 8, first_person=0, num_people=8000, people_per_image=2),
    PaintStage("people/singles", 25, first_person=8000, num_people=42000),
    TrainStage("unet", 600),
    GateStage("one_step", 2, depends_on=("vae", "judge", "unet")),
    GateStage("base", 4, depends_on=("vae", "judge", "unet")),
    TrainStage("detector", 15),
    TrainStage("recogniser", 20),
    TrainStage("clip", 80),
    PaintStage("views", 12, first_person=0, num_people=2000, images_per_person=10),
    TrainStage("omni_masked", 60),
    TrainStage("omni_flow", 40),
    GateStage("encoders", 4, depends_on=("judge", "recogniser", "clip", "omni_flow")),
    TrainStage("decoupled_arcface", 40, task="decoupled"),
    TrainStage("decoupled_image", 40, task="decoupled"),
    TrainStage("fused", 60),
    TrainStage("flashface", 80),
    TrainStage("infinite_id", 50),
    TrainStage("omni_adapter", 40, task="decoupled"),
    TrainStage("arc2face", 60),
    TrainStage("adaface", 60),
    TrainStage("adaface_compose", 40),
    # For comparisons in the report alone.
    TrainStage("decoupled_as_fused", 40, task="decoupled"),
    TrainStage("infinite_id_plain", 50, task="infinite_id"),
    TrainStage("flashface_encoder", 80, task="flashface"),
    TrainStage("flashface_both", 80, task="flashface"),
    TrainStage("omni_adapter_masked", 30, task="decoupled"),
    *(
        TrainStage(f"{run}_{variant}", minutes, task=task)
        for variant in OMNI_ID_VARIANTS
        for run, task, minutes in (
            ("omni_masked", "omni_masked", 30), ("omni_flow", "omni_flow", 40), ("omni_adapter", "decoupled", 15),
        )
    ),
)  # fmt: skip
