"""Toy tasks and data: a line to fit, and an image source of colored discs with captions.

`python toy_tasks.py FOLDER STEPS` trains.
"""

from __future__ import annotations

import sys
import time
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from comfyui_likeness.training import trainer
from comfyui_likeness.training.config import RunConfig
from comfyui_likeness.training.data.clusters import AnnotatedImage
from comfyui_likeness.training.task import Batch, Task
from safetensors.torch import save_file
from torch import Generator, Tensor, nn

COLORS = {"red": (220, 40, 40), "green": (40, 180, 60), "blue": (50, 80, 230), "white": (240, 240, 240)}
DISC_POSITIONS = {"left": (0.5, 0.3), "right": (0.5, 0.7), "top": (0.3, 0.5), "middle": (0.5, 0.5)}
DISC_KEY_POINTS = torch.tensor(
    [[-0.4, -0.4], [0.4, -0.4], [0.0, 0.0], [-0.3, 0.5], [0.3, 0.5]]
)  # relative to the radius


class LineTask(Task):
    """Learns y = a x + b from noisy points, with a batch norm."""

    def __init__(self, seed: int = 0) -> None:
        super().__init__()
        torch.manual_seed(seed)
        self.net = nn.Sequential(nn.Linear(1, 8), nn.BatchNorm1d(8), nn.Tanh(), nn.Linear(8, 1))

    def make_batch(self, generator: Generator, batch_size: int) -> Batch:
        x = torch.rand(batch_size, 1, generator=generator)
        return {"x": x, "y": 3 * x - 1 + 0.1 * torch.randn(batch_size, 1, generator=generator)}

    def forward(self, batch: Batch) -> dict[str, Tensor]:
        return {"square": (self.net(batch["x"]) - batch["y"]).square().mean()}

    def make_samples(self, generator: Generator) -> dict[str, Tensor]:
        grey = self.net(torch.linspace(0, 1, 16)[:, None]).expand(16, 16)[..., None].expand(16, 16, 3)
        return {"line": grey, "middle": self.net(torch.tensor([[0.5]]))[0, 0]}

    def save_model(self, folder: Path, notes: Mapping[str, Any]) -> None:
        save_file(self.state_dict(), folder / "line.safetensors", {key: str(value) for key, value in notes.items()})


class SlowLineTask(LineTask):
    """Slow enough to be interrupted."""

    def make_batch(self, generator: Generator, batch_size: int) -> Batch:
        time.sleep(0.02)
        return super().make_batch(generator, batch_size)


class DiscWorld:
    """Discs of four colors at four positions on 16 shades of grey; a face adds a colored stripe."""

    num_people = 1000
    caption_words: Sequence[str] = ("a", "disc", "at", "the", *COLORS, *DISC_POSITIONS)

    def load_caption(self, number: int) -> str:
        color, position = self._describe(number)
        return f"a {color} disc at the {position}"

    def load_detailed_captions(self, number: int) -> Sequence[str]:
        return [f"{self.load_caption(number)}, {word}" for word in ("left", "right")]

    def load_image(self, number: int, resolution: int, aspect_ratio: float = 1.0) -> Tensor:
        if aspect_ratio != 1:
            return self.load_image(number, resolution).repeat(1, 2, 1)[:, : round(resolution * aspect_ratio)]
        color, position = self._describe(number)
        grid = torch.stack(torch.meshgrid(*[torch.linspace(0, 1, resolution)] * 2, indexing="ij"), dim=-1)
        inside = (grid - torch.tensor(DISC_POSITIONS[position])).norm(dim=-1) < 0.2
        image = torch.full((resolution, resolution, 3), number // 16 % 16 * 8)
        image[inside] = torch.tensor(COLORS[color])
        return image.to(torch.uint8)

    def load_annotated_image(self, number: int, resolution: int, aspect_ratio: float = 1.0) -> AnnotatedImage:
        """The disc is the face."""
        image = self.load_image(number, resolution, aspect_ratio)
        y, x = DISC_POSITIONS[self._describe(number)[1]]
        center = torch.tensor([x, y]) * (resolution - 1)
        radius = 0.2 * (resolution - 1)
        box = torch.cat((center - radius, center + radius))
        mask = torch.zeros(image.shape[:2], dtype=torch.bool)
        return AnnotatedImage(
            image, self.load_caption(number), center + radius * DISC_KEY_POINTS, box, mask, torch.zeros(0, 7, 2)
        )

    def load_aligned_face(self, person: int, number: int) -> Tensor:
        image = self.load_image(number, 112)
        image[48:64] = torch.tensor([person * 89 % 256, person * 57 % 256, person * 23 % 256])
        return image

    def _describe(self, number: int) -> tuple[str, str]:
        return [*COLORS][number % 4], [*DISC_POSITIONS][number // 4 % 4]


DISC_WORLD = DiscWorld()


def make_run_config(folder: Path, **changes: Any) -> RunConfig:
    settings: dict[str, Any] = {
        "steps": 12, "batch_size": 8, "learning_rate": 0.01, "warmup_steps": 2, "log_every": 1, "sample_every": 5,
    }  # fmt: skip
    return RunConfig(folder=str(folder), **{**settings, "save_every": 4, **changes})


def train_few_steps(make_task: Callable[[], Task], folder: Path, **changes: Any) -> tuple[Path, list[float]]:
    """Train a few steps. Returns the folder of the task's files, and the losses."""
    settings = {"steps": 2, "sample_every": 100, "save_every": 100, "learning_rate": 1e-3, **changes}
    model_folder = trainer.run_training(make_task, make_run_config(folder, **settings), {})
    return model_folder, list(read_logged_values(folder).values())


def read_logged_values(folder: Path, tag: str = "loss") -> dict[int, float]:
    """The logged values by step; those of the resumed run count."""
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    values = {}
    for file in sorted((folder / "log").glob("events.*"), key=lambda path: path.stat().st_mtime_ns):
        events = EventAccumulator(str(file)).Reload()
        values |= {event.step: event.value for event in (events.Scalars(tag) if tag in events.scalars.Keys() else ())}
    return values


if __name__ == "__main__":
    trainer.run_training(SlowLineTask, make_run_config(Path(sys.argv[1]), steps=int(sys.argv[2])), {})
