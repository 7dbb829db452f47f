"""A narrow SCRFD (Guo et al. 2105.04714) in insightface's layout: strides 8, 16 and 32, two anchors per grid cell.

For each anchor the network predicts a score, the distances to the left, top, right and bottom of a face's box and the
offsets of its five key points, both in strides. A face [7, 2] is two box corners and five key points, in pixels.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor, nn
from torch.nn.functional import interpolate, softplus
from torchvision.ops import nms

STRIDES, ANCHORS_PER_CELL = (8, 16, 32), 2
SMALLEST_ANCHOR = 16.0  # pixels; each anchor is larger than the one before by sqrt(2)
OUTPUT_WIDTHS = {"score": 1, "bbox": 4, "kps": 10}
INITIAL_SCORE_LOGIT = -4.0  # initial bias of the scores: faces are rare
SCORE_THRESHOLD, NMS_IOU = 0.5, 0.4  # insightface's


class AnchorPredictions(NamedTuple):
    """Predictions per anchor: score logits [n, a], box distances [n, a, 4], key point offsets [n, a, 10]."""

    scores: Tensor
    boxes: Tensor
    points: Tensor


class Anchors(NamedTuple):
    """In the order of the outputs: by stride, row, column, size."""

    centers: Tensor  # [a, 2]: x and y in pixels
    strides: Tensor  # [a]
    sizes: Tensor  # [a], pixels


def make_anchors(resolution: int) -> Anchors:
    """The anchors of a square image, centered on the pixels that strided convolutions see: 0, 8, 16, ..."""
    levels = []
    for level, stride in enumerate(STRIDES):
        grid = torch.arange(resolution // stride) * float(stride)
        y, x = torch.meshgrid(grid, grid, indexing="ij")
        centers = torch.stack((x, y), -1).view(-1, 2).repeat_interleave(ANCHORS_PER_CELL, 0)
        sizes = SMALLEST_ANCHOR * 2 ** ((ANCHORS_PER_CELL * level + torch.arange(ANCHORS_PER_CELL)) / 2)
        levels.append(
            (centers, torch.full((len(centers),), float(stride)), sizes.repeat(len(centers) // ANCHORS_PER_CELL))
        )
    return Anchors(*map(torch.cat, zip(*levels, strict=True)))


def build_conv(in_channels: int, out_channels: int, stride: int = 1) -> nn.Sequential:
    return nn.Sequential(
        nn.Conv2d(in_channels, out_channels, 3, stride, 1, bias=False), nn.BatchNorm2d(out_channels), nn.ReLU()
    )


def build_head(width: int) -> nn.Sequential:
    """The prediction head of one stride: scores, boxes and key points."""
    layers = nn.Sequential(
        build_conv(width, width), nn.Conv2d(width, ANCHORS_PER_CELL * sum(OUTPUT_WIDTHS.values()), 3, 1, 1)
    )
    nn.init.constant_(layers.get_parameter("1.bias")[:ANCHORS_PER_CELL], INITIAL_SCORE_LOGIT)
    return layers


class ResidualBlock(nn.Module):
    """Two convolutions with a skip connection."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.body = nn.Sequential(build_conv(width, width), *list(build_conv(width, width))[:2])

    def forward(self, x: Tensor) -> Tensor:
        return (x + self.body(x)).relu()


class SCRFD(nn.Module):
    """Images [n, 3, S, S], normalized as (x - 127.5) / 128, to AnchorPredictions."""

    def __init__(self, width: int) -> None:
        super().__init__()
        fine, wide = 3 * width, 4 * width
        self.stem = nn.Sequential(build_conv(3, width, 2), build_conv(width, 2 * width, 2))
        self.levels = nn.ModuleList(
            [
                nn.Sequential(build_conv(2 * width, fine, 2), ResidualBlock(fine)),
                nn.Sequential(build_conv(fine, wide, 2), ResidualBlock(wide)),
                build_conv(wide, wide, 2),
            ]
        )
        self.beside = nn.ModuleList([nn.Conv2d(ins, fine, 1) for ins in (fine, wide, wide)])
        self.heads = nn.ModuleList([build_head(fine) for _ in STRIDES])

    def forward(self, images: Tensor) -> AnchorPredictions:
        x, features = self.stem(images), []
        for level in self.levels:
            x = level(x)
            features.append(x)
        pyramid, coarse = [], None
        for x, lateral in zip(reversed(features), reversed(self.beside), strict=True):
            x = lateral(x)
            coarse = x if coarse is None else x + interpolate(coarse, scale_factor=2.0)
            pyramid.insert(0, coarse)
        outputs = [self._split_outputs(head(x)) for head, x in zip(self.heads, pyramid, strict=True)]
        scores, boxes, points = map(torch.cat, zip(*outputs, strict=True), (1,) * len(OUTPUT_WIDTHS))
        return AnchorPredictions(scores[..., 0], softplus(boxes), points)

    @staticmethod
    def _split_outputs(x: Tensor) -> tuple[Tensor, ...]:
        """Split one stride's outputs [n, channels, h, w] by kind: [n, its anchors, width] each."""
        parts = x.permute(0, 2, 3, 1).split([ANCHORS_PER_CELL * width for width in OUTPUT_WIDTHS.values()], dim=-1)
        return tuple(
            part.reshape(x.shape[0], -1, width) for part, width in zip(parts, OUTPUT_WIDTHS.values(), strict=True)
        )


class ExportedSCRFD(nn.Module):
    """insightface's nine outputs for one image: scores, boxes, key points of each stride, [anchors, width]."""

    OUTPUT_NAMES = tuple(f"{kind}_{stride}" for kind in OUTPUT_WIDTHS for stride in STRIDES)

    def __init__(self, network: SCRFD, resolution: int) -> None:
        super().__init__()
        self.network = network
        self.anchor_counts = [ANCHORS_PER_CELL * (resolution // stride) ** 2 for stride in STRIDES]

    def forward(self, image: Tensor) -> tuple[Tensor, ...]:
        predictions = self.network(image)
        kinds = (predictions.scores.sigmoid()[0, :, None], predictions.boxes[0], predictions.points[0])
        return tuple(part for kind in kinds for part in kind.split(self.anchor_counts))


def decode_faces(boxes: Tensor, points: Tensor, anchor_grid: Anchors) -> Tensor:
    """Decode predictions to faces [..., a, 7, 2]."""
    corners = torch.stack((-boxes[..., :2], boxes[..., 2:]), -2)
    offsets = torch.cat((corners, points.unflatten(-1, (5, 2))), -2)
    return offsets * anchor_grid.strides[:, None, None] + anchor_grid.centers[:, None]


def select_faces(predictions: AnchorPredictions, anchor_grid: Anchors) -> list[tuple[Tensor, Tensor]]:
    """The faces [k, 7, 2] and scores [k] of each image, highest score first, selected as in insightface."""
    selected = []
    for scores, decoded in zip(
        predictions.scores.sigmoid(), decode_faces(predictions.boxes, predictions.points, anchor_grid), strict=True
    ):
        likely = scores >= SCORE_THRESHOLD
        kept = nms(decoded[likely, :2].flatten(1), scores[likely], NMS_IOU)
        selected.append((decoded[likely][kept], scores[likely][kept]))
    return selected
