"""Recognisers of faces: 112 x 112 pixels to 512 numbers, trained with ArcFace's margin (Deng et al. 1801.07698).

Two networks of different build: one is what identities are made with, the other, the judge, only measures.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Generator, Tensor, nn
from torch.nn.functional import cross_entropy, linear, normalize, one_hot

from ..task import Batch, Task
from . import disturb, onnx_file
from .source import Source, sheet, some

SIDE, VECTOR = 112, 512
OUTPUT = "vector"
TRIED = 32  # people of the check, each with two faces
MOVED = (0.05, 0.04, 0.05, 0.05)  # roll in radians, size, x and y in halves of the side
BLURS = (16, 24, 36, 56)  # pixels that remain of a blurred face's side


class Residual(nn.Module):
    """Two 3 x 3 convolutions before which features are normed, beside the way past them (He et al. 1603.05027).

    ReLU and not PReLU: that takes a CPU longer than the convolutions.
    """

    def __init__(self, ins: int, outs: int) -> None:
        super().__init__()
        self.body = nn.Sequential(
            nn.BatchNorm2d(ins), nn.Conv2d(ins, outs, 3, padding=1, bias=False), nn.BatchNorm2d(outs),
            nn.ReLU(), nn.Conv2d(outs, outs, 3, 2, 1, bias=False), nn.BatchNorm2d(outs),
        )  # fmt: skip
        self.past = nn.Sequential(nn.Conv2d(ins, outs, 1, 2, bias=False), nn.BatchNorm2d(outs))

    def forward(self, x: Tensor) -> Tensor:
        return self.body(x) + self.past(x)


class Separable(nn.Module):
    """A depthwise convolution in a wider space, and past it where the shape stays (Sandler et al. 1801.04381)."""

    def __init__(self, ins: int, outs: int, stride: int = 2) -> None:
        super().__init__()
        wide = 2 * ins
        self.body = nn.Sequential(
            nn.Conv2d(ins, wide, 1, bias=False), nn.BatchNorm2d(wide), nn.SiLU(),
            nn.Conv2d(wide, wide, 5, stride, 2, groups=wide, bias=False), nn.BatchNorm2d(wide), nn.SiLU(),
            nn.Conv2d(wide, outs, 1, bias=False), nn.BatchNorm2d(outs),
        )  # fmt: skip
        self.same = stride == 1 and ins == outs

    def forward(self, x: Tensor) -> Tensor:
        return self.body(x) + x if self.same else self.body(x)


class Places(nn.Module):
    """Weighs every place of every channel by itself and sums over places: [n, c, h, w] to [n, c]."""

    def __init__(self, channels: int, height: int, width: int) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.full((channels, height, width), 1 / (height * width)))

    def forward(self, x: Tensor) -> Tensor:
        return (x * self.weight).sum((2, 3))


def residual(width: int, depth: int, stride: int) -> list[nn.Module]:
    """Levels of residual blocks, each of half the side and up to eight times as wide."""
    widths = [width * min(2**i, 8) for i in range(depth + 1)]
    return [
        nn.Conv2d(3, width, 3, stride, 1, bias=False), nn.BatchNorm2d(width), nn.ReLU(),
        *(Residual(a, b) for a, b in zip(widths, widths[1:], strict=False)),
    ]  # fmt: skip


def separable(width: int, depth: int, stride: int) -> list[nn.Module]:
    """Levels of separable blocks, two each, the first of half the side."""
    widths = [width * min(2**i, 8) for i in range(depth + 1)]
    levels = [(Separable(a, b), Separable(b, b, 1)) for a, b in zip(widths[:-1], widths[1:], strict=True)]
    stem = [nn.Conv2d(3, width, 5, stride, 2, bias=False), nn.BatchNorm2d(width), nn.SiLU()]
    return [*stem, *(block for level in levels for block in level)]


NETWORKS: Mapping[str, Callable[[int, int, int], list[nn.Module]]] = {"residual": residual, "separable": separable}


@dataclass(frozen=True)
class Settings:
    """`people` in training; cosines are scaled by `scale`, the right person's angle grows by `margin` (radians).

    The first convolution reads every `stride`-th pixel. `disturb` is how much of `disturbed` faces bear.
    """

    file: str = "recogniser"
    network: str = "residual"
    width: int = 24
    depth: int = 4
    stride: int = 1
    people: int = 10000
    disturb: float = 1.0
    scale: float = 32.0
    margin: float = 0.4

    def __post_init__(self) -> None:
        if self.network not in NETWORKS:
            raise ValueError(f"got network = {self.network!r} in [task]; expected {' or '.join(NETWORKS)}")


class Recogniser(Task):
    """Loss: the cross entropy of whose face it is, by cosines with one direction for each person."""

    def __init__(self, settings: Settings, source: Source, seed: int) -> None:
        super().__init__()
        self.settings, self.source = settings, source
        if settings.people + TRIED > source.people:
            raise ValueError(
                f"got people = {settings.people} in [task]; expected at most {source.people - TRIED}, "
                f"as {TRIED} of the {source.people} that there are only check"
            )
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(seed)
            network: Any = build(settings)
            self.network: nn.Module = network.to(memory_format=torch.channels_last)
            self.people = nn.Parameter(torch.randn(settings.people, VECTOR) / VECTOR**0.5)

    def batch(self, chance: Generator, size: int) -> Batch:
        people = some(chance, size, self.settings.people)
        faces = disturbed(self._faces(people, chance), chance, self.settings.disturb)
        return {"faces": faces, "people": torch.tensor(people)}

    def forward(self, batch: Batch) -> dict[str, Tensor]:
        vectors = self.network(batch["faces"]).float()
        with torch.autocast(vectors.device.type, enabled=False):  # small angles need every digit of their cosines
            cosines = linear(normalize(vectors), normalize(self.people))
        return {"arcface": margin_loss(cosines, batch["people"], self.settings.scale, self.settings.margin)}

    def draw(self, chance: Generator) -> dict[str, Tensor]:
        """Two faces of people outside the training, their mean cosines, and how often the likest face is the other."""
        outside = torch.randperm(self.source.people - self.settings.people, generator=chance)[:TRIED]
        people = (outside + self.settings.people).tolist()
        first, second = (self._faces(people, chance).to(self.people.device) for _ in range(2))
        cosines = normalize(self.network(first)) @ normalize(self.network(second)).T
        right = torch.eye(TRIED, dtype=torch.bool, device=cosines.device)
        found = (cosines.argmax(1) == torch.arange(TRIED, device=cosines.device)).float().mean()
        faces = sheet(first[:8] / 2 + 0.5, second[:8] / 2 + 0.5)
        return {"faces": faces, "same": cosines[right].mean(), "other": cosines[~right].mean(), "found": found}

    def _faces(self, people: list[int], chance: Generator) -> Tensor:
        """A face of each of these people, from any picture of them."""
        numbers = some(chance, len(people))
        return read([self.source.face(person, number) for person, number in zip(people, numbers, strict=True)])

    def save(self, folder: Path, notes: Mapping[str, Any]) -> None:
        path, told = (
            folder / f"{self.settings.file}.onnx",
            onnx_file.metadata("recogniser", asdict(self.settings), notes),
        )
        many = {name: {0: "n"} for name in (onnx_file.INPUT, OUTPUT)}
        onnx_file.export(self.network, path, (1, 3, SIDE, SIDE), (OUTPUT,), told, many)


def build(settings: Settings) -> nn.Module:
    """The network: [n, 3, 112, 112] from -1 to 1 to raw vectors [n, 512]."""
    body = nn.Sequential(*NETWORKS[settings.network](settings.width, settings.depth, settings.stride))
    with torch.no_grad():
        _, *shape = body.eval()(torch.zeros(1, 3, SIDE, SIDE)).shape
    head = (Places(*shape), nn.Linear(shape[0], VECTOR, bias=False), nn.BatchNorm1d(VECTOR))
    return nn.Sequential(body, *head).train()


def read(faces: list[Tensor]) -> Tensor:
    """Faces as the network reads them, by insightface's numbers: uint8 [112, 112, 3] each to [n, 3, 112, 112]."""
    return (torch.stack(faces).movedim(-1, 1).float() - 127.5) / 127.5


def disturbed(faces: Tensor, chance: Generator, much: float) -> Tensor:
    """Faces [n, 3, 112, 112] as detectors cut them and generators paint them: moved, blurred, of another light.

    With `much` of 1: shifts of 3 pixels, 3 degrees and 4 % (one standard deviation), half of them blurred.
    """
    if not much:
        return faces
    n = len(faces)
    roll, size, x, y = (much * torch.randn(4, n, generator=chance) * torch.tensor(MOVED)[:, None]).unbind()
    cos, sin = roll.cos() * (1 + size), roll.sin() * (1 + size)
    theta = torch.stack((torch.stack((cos, -sin, x), 1), torch.stack((sin, cos, y), 1)), 1)
    moved = disturb.moved(faces, theta, "border")
    return disturb.lit(disturb.blurred(moved, chance, BLURS), chance, much)


def margin_loss(cosines: Tensor, people: Tensor, scale: float, margin: float) -> Tensor:
    """Eq. 3: the angle to the right person [n, people] counts as larger by `margin` (radians)."""
    angles = cosines.clamp(-1 + 1e-6, 1 - 1e-6).acos()
    added = angles + margin * one_hot(people, cosines.shape[1])
    # Beyond pi a larger angle would be a nearer one.
    return cross_entropy(scale * added.clamp(max=math.pi).cos(), people)
