"""Something small to train: a line through points, and coloured discs with captions. `python trainings.py` trains."""

from __future__ import annotations

import sys
import time
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from comfyui_likeness.training import loop
from comfyui_likeness.training.config import Run
from comfyui_likeness.training.data import View
from comfyui_likeness.training.task import Batch, Task
from safetensors.torch import save_file
from torch import Generator, Tensor, nn

COLOURS = {"red": (220, 40, 40), "green": (40, 180, 60), "blue": (50, 80, 230), "white": (240, 240, 240)}
PLACES = {"left": (0.5, 0.3), "right": (0.5, 0.7), "top": (0.3, 0.5), "middle": (0.5, 0.5)}
POINTS = torch.tensor([[-0.4, -0.4], [0.4, -0.4], [0.0, 0.0], [-0.3, 0.5], [0.3, 0.5]])  # of a disc, in its radius


class Line(Task):
    """Learns y = a x + b with noise, through a norm with buffers."""

    def __init__(self, seed: int = 0) -> None:
        super().__init__()
        torch.manual_seed(seed)
        self.net = nn.Sequential(nn.Linear(1, 8), nn.BatchNorm1d(8), nn.Tanh(), nn.Linear(8, 1))

    def batch(self, chance: Generator, size: int) -> Batch:
        x = torch.rand(size, 1, generator=chance)
        return {"x": x, "y": 3 * x - 1 + 0.1 * torch.randn(size, 1, generator=chance)}

    def forward(self, batch: Batch) -> dict[str, Tensor]:
        return {"square": (self.net(batch["x"]) - batch["y"]).square().mean()}

    def draw(self, chance: Generator) -> dict[str, Tensor]:
        grey = self.net(torch.linspace(0, 1, 16)[:, None]).expand(16, 16)[..., None].expand(16, 16, 3)
        return {"line": grey, "middle": self.net(torch.tensor([[0.5]]))[0, 0]}

    def save(self, folder: Path, notes: Mapping[str, Any]) -> None:
        save_file(self.state_dict(), folder / "line.safetensors", {key: str(value) for key, value in notes.items()})


class Slow(Line):
    """Takes its time, so that there is some to break it off."""

    def batch(self, chance: Generator, size: int) -> Batch:
        time.sleep(0.02)
        return super().batch(chance, size)


class Discs:
    """Discs in four colours at four places on 16 shades; a person is a disc with a stripe of a colour of its own."""

    people = 1000
    words: Sequence[str] = ("a", "disc", "at", "the", *COLOURS, *PLACES)

    def caption(self, number: int) -> str:
        colour, place = self._of(number)
        return f"a {colour} disc at the {place}"

    def picture(self, number: int, side: int) -> Tensor:
        colour, place = self._of(number)
        grid = torch.stack(torch.meshgrid(*[torch.linspace(0, 1, side)] * 2, indexing="ij"), dim=-1)
        inside = (grid - torch.tensor(PLACES[place])).norm(dim=-1) < 0.2
        picture = torch.full((side, side, 3), number // 16 % 16 * 8)
        picture[inside] = torch.tensor(COLOURS[colour])
        return picture.to(torch.uint8)

    def shown(self, number: int, side: int) -> View:
        """The disc is the face."""
        picture = self.picture(number, side)
        y, x = PLACES[self._of(number)[1]]
        middle = torch.tensor([x, y]) * (side - 1)
        radius = 0.2 * (side - 1)
        box = torch.cat((middle - radius, middle + radius))
        mask = torch.zeros(side, side, dtype=torch.bool)
        return View(picture, self.caption(number), middle + radius * POINTS, box, mask, torch.zeros(0, 7, 2))

    def face(self, person: int, number: int) -> Tensor:
        picture = self.picture(number, 112)
        picture[48:64] = torch.tensor([person * 89 % 256, person * 57 % 256, person * 23 % 256])
        return picture

    def _of(self, number: int) -> tuple[str, str]:
        return [*COLOURS][number % 4], [*PLACES][number // 4 % 4]


DISCS = Discs()


def run(folder: Path, **changes: Any) -> Run:
    settings: dict[str, Any] = {"steps": 12, "batch": 8, "rate": 0.01, "warmup": 2, "log_every": 1, "draw_every": 5}
    return Run(folder=str(folder), **{**settings, "save_every": 4, **changes})


def fit(make: Callable[[], Task], folder: Path, **changes: Any) -> tuple[Path, list[float]]:
    """Some steps; the folder of the files, and the losses."""
    some = run(folder, **{"steps": 2, "draw_every": 100, "save_every": 100, "rate": 1e-3, **changes})
    return loop.train(make, some, {}), list(values(folder).values())


def values(folder: Path, name: str = "loss") -> dict[int, float]:
    """What a run logged, by step; what was logged when it went on counts."""
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    found = {}
    for file in sorted((folder / "log").glob("events.*"), key=lambda path: path.stat().st_mtime_ns):
        events = EventAccumulator(str(file)).Reload()
        found |= {event.step: event.value for event in (events.Scalars(name) if name in events.scalars.Keys() else ())}
    return found


if __name__ == "__main__":
    loop.train(Slow, run(Path(sys.argv[1]), steps=int(sys.argv[2])), {})
