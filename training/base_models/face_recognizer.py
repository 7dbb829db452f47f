"""Face recognizers: 112 x 112 pixels to embeddings [512], trained with ArcFace's margin (Deng et al. 1801.07698).

There are two different networks, so that the recognizer for evaluation differs from the one that makes identities.
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

from ..data.image_source import ImageSource, make_image_grid, random_indices
from ..task import Batch, Task
from . import augmentation, onnx_export

FACE_SIZE, EMBEDDING_SIZE = 112, 512
OUTPUT_NAME = "vector"
NUM_CHECK_PEOPLE = 32  # validation people among the samples, with two faces each
WARP_STD = (0.05, 0.04, 0.05, 0.05)  # standard deviations: roll in radians, size, x and y in halves of the resolution
BLUR_SIZES = (16, 24, 36, 56)  # pixels


class ResidualBlock(nn.Module):
    """Two 3 x 3 convolutions after batch norms, and a projected skip connection (He et al. 1603.05027).

    ReLU, since PReLU takes longer than the convolutions on a CPU.
    """

    def __init__(self, in_channels: int, out_channels: int) -> None:
        super().__init__()
        self.body = nn.Sequential(
            nn.BatchNorm2d(in_channels), nn.Conv2d(in_channels, out_channels, 3, padding=1, bias=False),
            nn.BatchNorm2d(out_channels), nn.ReLU(),
            nn.Conv2d(out_channels, out_channels, 3, 2, 1, bias=False), nn.BatchNorm2d(out_channels),
        )  # fmt: skip
        self.past = nn.Sequential(nn.Conv2d(in_channels, out_channels, 1, 2, bias=False), nn.BatchNorm2d(out_channels))

    def forward(self, x: Tensor) -> Tensor:
        return self.body(x) + self.past(x)


class SeparableBlock(nn.Module):
    """An inverted residual block (Sandler et al. 1801.04381): a depthwise convolution on expanded channels, with a skip
    connection if the shape stays."""

    def __init__(self, in_channels: int, out_channels: int, stride: int = 2) -> None:
        super().__init__()
        expanded = 2 * in_channels
        self.body = nn.Sequential(
            nn.Conv2d(in_channels, expanded, 1, bias=False), nn.BatchNorm2d(expanded), nn.SiLU(),
            nn.Conv2d(expanded, expanded, 5, stride, 2, groups=expanded, bias=False), nn.BatchNorm2d(expanded),
            nn.SiLU(),
            nn.Conv2d(expanded, out_channels, 1, bias=False), nn.BatchNorm2d(out_channels),
        )  # fmt: skip
        self.has_skip = stride == 1 and in_channels == out_channels

    def forward(self, x: Tensor) -> Tensor:
        return self.body(x) + x if self.has_skip else self.body(x)


class SpatialPooling(nn.Module):
    """Weighted sum over positions, with a learned weight per channel and position: [n, c, h, w] to [n, c]."""

    def __init__(self, channels: int, height: int, width: int) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.full((channels, height, width), 1 / (height * width)))

    def forward(self, x: Tensor) -> Tensor:
        return (x * self.weight).sum((2, 3))


def build_residual_layers(width: int, depth: int, stride: int) -> list[nn.Module]:
    """`depth` residual blocks, each halving the resolution and doubling the width, up to 8 times `width`."""
    widths = [width * min(2**i, 8) for i in range(depth + 1)]
    return [
        nn.Conv2d(3, width, 3, stride, 1, bias=False), nn.BatchNorm2d(width), nn.ReLU(),
        *(ResidualBlock(a, b) for a, b in zip(widths, widths[1:], strict=False)),
    ]  # fmt: skip


def build_separable_layers(width: int, depth: int, stride: int) -> list[nn.Module]:
    """`depth` pairs of separable blocks, each halving the resolution and doubling the width, up to 8 times `width`."""
    widths = [width * min(2**i, 8) for i in range(depth + 1)]
    pairs = [(SeparableBlock(a, b), SeparableBlock(b, b, 1)) for a, b in zip(widths[:-1], widths[1:], strict=True)]
    stem = [nn.Conv2d(3, width, 5, stride, 2, bias=False), nn.BatchNorm2d(width), nn.SiLU()]
    return [*stem, *(block for pair in pairs for block in pair)]


NETWORKS: Mapping[str, Callable[[int, int, int], list[nn.Module]]] = {
    "residual": build_residual_layers,
    "separable": build_separable_layers,
}


@dataclass(frozen=True)
class RecognizerConfig:
    """Training uses `num_people` people. Cosines are multiplied by `scale`; `margin` is in radians.

    `stride` is that of the first convolution. `augmentation_strength` scales `augment_faces`. `file` is the name of the
    output file without its extension.
    """

    file: str = "recogniser"
    network: str = "residual"
    width: int = 24
    depth: int = 4
    stride: int = 1
    num_people: int = 10000
    augmentation_strength: float = 1.0
    scale: float = 32.0
    margin: float = 0.4

    def __post_init__(self) -> None:
        if self.network not in NETWORKS:
            raise ValueError(f"got network = {self.network!r} in [task]; expected {' or '.join(NETWORKS)}")


class FaceRecognizer(Task):
    """Loss: ArcFace's, the cross entropy over cosines with one embedding per person."""

    def __init__(self, settings: RecognizerConfig, source: ImageSource, seed: int) -> None:
        super().__init__()
        self.settings, self.source = settings, source
        if settings.num_people + NUM_CHECK_PEOPLE > source.num_people:
            raise ValueError(
                f"got num_people = {settings.num_people} in [task]; expected at most "
                f"{source.num_people - NUM_CHECK_PEOPLE} of the {source.num_people} people in the data, since "
                f"{NUM_CHECK_PEOPLE} are kept for validation; lower it or add people"
            )
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(seed)
            network: Any = build_recognizer(settings)
            self.network: nn.Module = network.to(memory_format=torch.channels_last)
            self.people = nn.Parameter(torch.randn(settings.num_people, EMBEDDING_SIZE) / EMBEDDING_SIZE**0.5)

    def make_batch(self, generator: Generator, batch_size: int) -> Batch:
        people = random_indices(generator, batch_size, self.settings.num_people)
        faces = augment_faces(self._load_faces(people, generator), generator, self.settings.augmentation_strength)
        return {"faces": faces, "people": torch.tensor(people)}

    def forward(self, batch: Batch) -> dict[str, Tensor]:
        embeddings = self.network(batch["faces"]).float()
        with torch.autocast(embeddings.device.type, enabled=False):  # small angles need precise cosines
            cosines = linear(normalize(embeddings), normalize(self.people))
        return {"arcface": margin_loss(cosines, batch["people"], self.settings.scale, self.settings.margin)}

    def make_samples(self, generator: Generator) -> dict[str, Tensor]:
        """Two faces of each validation person: mean cosines of the same and of other people, and top-1 accuracy."""
        num_outside = self.source.num_people - self.settings.num_people
        outside = torch.randperm(num_outside, generator=generator)[:NUM_CHECK_PEOPLE]
        people = (outside + self.settings.num_people).tolist()
        first, second = (self._load_faces(people, generator).to(self.people.device) for _ in range(2))
        cosines = normalize(self.network(first)) @ normalize(self.network(second)).T
        same = torch.eye(NUM_CHECK_PEOPLE, dtype=torch.bool, device=cosines.device)
        found = (cosines.argmax(1) == torch.arange(NUM_CHECK_PEOPLE, device=cosines.device)).float().mean()
        faces = make_image_grid(first[:8] / 2 + 0.5, second[:8] / 2 + 0.5)
        return {"faces": faces, "same": cosines[same].mean(), "other": cosines[~same].mean(), "found": found}

    def _load_faces(self, people: list[int], generator: Generator) -> Tensor:
        """A face of each person, from a random image."""
        numbers = random_indices(generator, len(people))
        return normalize_faces(
            [self.source.load_aligned_face(person, number) for person, number in zip(people, numbers, strict=True)]
        )

    def save_model(self, folder: Path, notes: Mapping[str, Any]) -> None:
        path = folder / f"{self.settings.file}.onnx"
        metadata = onnx_export.build_onnx_metadata("recogniser", asdict(self.settings), notes)
        dynamic_axes = {name: {0: "n"} for name in (onnx_export.INPUT_NAME, OUTPUT_NAME)}
        onnx_export.export_onnx(
            self.network, path, (1, 3, FACE_SIZE, FACE_SIZE), (OUTPUT_NAME,), metadata, dynamic_axes
        )


def build_recognizer(settings: RecognizerConfig) -> nn.Module:
    """The network: [n, 3, 112, 112] from -1 to 1 to raw embeddings [n, 512]."""
    body = nn.Sequential(*NETWORKS[settings.network](settings.width, settings.depth, settings.stride))
    with torch.no_grad():
        _, *shape = body.eval()(torch.zeros(1, 3, FACE_SIZE, FACE_SIZE)).shape
    head = (SpatialPooling(*shape), nn.Linear(shape[0], EMBEDDING_SIZE, bias=False), nn.BatchNorm1d(EMBEDDING_SIZE))
    return nn.Sequential(body, *head).train()


def normalize_faces(faces: list[Tensor]) -> Tensor:
    """Normalize faces as insightface does: uint8 [112, 112, 3] each to [n, 3, 112, 112]."""
    return (torch.stack(faces).movedim(-1, 1).float() - 127.5) / 127.5


def augment_faces(faces: Tensor, generator: Generator, strength: float) -> Tensor:
    """Warp, blur and color-jitter faces [n, 3, 112, 112], like imprecise detections and generated images.

    At `strength` 1 the standard deviations are 3 pixels, 3 degrees and 4 %, and half of the faces are blurred.
    """
    if not strength:
        return faces
    n = len(faces)
    roll, size, x, y = (strength * torch.randn(4, n, generator=generator) * torch.tensor(WARP_STD)[:, None]).unbind()
    cos, sin = roll.cos() * (1 + size), roll.sin() * (1 + size)
    theta = torch.stack((torch.stack((cos, -sin, x), 1), torch.stack((sin, cos, y), 1)), 1)
    warped = augmentation.warp_images(faces, theta, "border")
    blurred = augmentation.blur_random_images(warped, generator, BLUR_SIZES)
    return augmentation.jitter_colors(blurred, generator, strength)


def margin_loss(cosines: Tensor, people: Tensor, scale: float, margin: float) -> Tensor:
    """Eq. 3: `margin` (radians) is added to the angle to the right person; cosines [n, people], people [n]."""
    angles = cosines.clamp(-1 + 1e-6, 1 - 1e-6).acos()
    with_margin = angles + margin * one_hot(people, cosines.shape[1])
    # Beyond pi the cosine would rise again.
    return cross_entropy(scale * with_margin.clamp(max=math.pi).cos(), people)
