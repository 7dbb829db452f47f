"""SCRFD (Guo et al. 2105.04714), narrow, in insightface's layout: strides 8, 16 and 32, two anchors at each place.

An anchor is a place and a size. Of each the network says a score, the distances to the left, top, right and bottom of a
face's box and the ways to its five points, both in strides. A face is two corners and five points, [7, 2] pixels.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor, nn
from torch.nn.functional import interpolate, softplus
from torchvision.ops import nms

STRIDES, ANCHORS = (8, 16, 32), 2
SMALLEST = 16.0  # pixels, the size of the first anchor; each is larger than the one before by the root of 2
KINDS = {"score": 1, "bbox": 4, "kps": 10}
RARE = -4.0  # logit of a face, at first
SCORE, OVERLAP = 0.5, 0.4  # insightface's: the least score of a face, the most that two boxes share


class Found(NamedTuple):
    """What the network says of each anchor: logits [n, a], distances [n, a, 4], points [n, a, 10]."""

    scores: Tensor
    boxes: Tensor
    points: Tensor


class Anchors(NamedTuple):
    """In the order of the outputs: by stride, row by row, sizes within a place."""

    middles: Tensor  # [a, 2]: x and y in pixels
    strides: Tensor  # [a]
    sizes: Tensor  # [a], pixels


def anchors(side: int) -> Anchors:
    """Those of a square picture. Places are the pixels that strided convolutions look at: 0, 8, 16, ..."""
    found = []
    for level, stride in enumerate(STRIDES):
        grid = torch.arange(side // stride) * float(stride)
        y, x = torch.meshgrid(grid, grid, indexing="ij")
        middles = torch.stack((x, y), -1).view(-1, 2).repeat_interleave(ANCHORS, 0)
        sizes = SMALLEST * 2 ** ((ANCHORS * level + torch.arange(ANCHORS)) / 2)
        found.append((middles, torch.full((len(middles),), float(stride)), sizes.repeat(len(middles) // ANCHORS)))
    return Anchors(*map(torch.cat, zip(*found, strict=True)))


def conv(ins: int, outs: int, stride: int = 1) -> nn.Sequential:
    return nn.Sequential(nn.Conv2d(ins, outs, 3, stride, 1, bias=False), nn.BatchNorm2d(outs), nn.ReLU())


def head(width: int) -> nn.Sequential:
    """What tells everything of one stride. Faces are rare, at first."""
    layers = nn.Sequential(conv(width, width), nn.Conv2d(width, ANCHORS * sum(KINDS.values()), 3, 1, 1))
    nn.init.constant_(layers.get_parameter("1.bias")[:ANCHORS], RARE)
    return layers


class Residual(nn.Module):
    """Two convolutions beside the way past them."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.body = nn.Sequential(conv(width, width), *list(conv(width, width))[:2])

    def forward(self, x: Tensor) -> Tensor:
        return (x + self.body(x)).relu()


class Scrfd(nn.Module):
    """Pictures [n, 3, side, side], as insightface makes them of bytes by (x - 127.5) / 128, to Found."""

    def __init__(self, width: int) -> None:
        super().__init__()
        fine, wide = 3 * width, 4 * width
        self.stem = nn.Sequential(conv(3, width, 2), conv(width, 2 * width, 2))
        self.levels = nn.ModuleList(
            [
                nn.Sequential(conv(2 * width, fine, 2), Residual(fine)),
                nn.Sequential(conv(fine, wide, 2), Residual(wide)),
                conv(wide, wide, 2),
            ]
        )
        self.beside = nn.ModuleList([nn.Conv2d(ins, fine, 1) for ins in (fine, wide, wide)])
        self.heads = nn.ModuleList([head(fine) for _ in STRIDES])

    def forward(self, pictures: Tensor) -> Found:
        x, seen = self.stem(pictures), []
        for level in self.levels:
            x = level(x)
            seen.append(x)
        merged, coarse = [], None
        for x, beside in zip(reversed(seen), reversed(self.beside), strict=True):
            x = beside(x)
            coarse = x if coarse is None else x + interpolate(coarse, scale_factor=2.0)
            merged.insert(0, coarse)
        rows = [self._rows(head(x)) for head, x in zip(self.heads, merged, strict=True)]
        scores, boxes, points = map(torch.cat, zip(*rows, strict=True), (1,) * len(KINDS))
        return Found(scores[..., 0], softplus(boxes), points)

    @staticmethod
    def _rows(x: Tensor) -> tuple[Tensor, ...]:
        """Of one stride [n, channels, h, w]: by kind, [n, anchors of it, width]."""
        parts = x.permute(0, 2, 3, 1).split([ANCHORS * width for width in KINDS.values()], dim=-1)
        return tuple(part.reshape(x.shape[0], -1, width) for part, width in zip(parts, KINDS.values(), strict=True))


class Exported(nn.Module):
    """Nine outputs, as insightface has them of one picture: scores, boxes, points of each stride, [anchors, width]."""

    NAMES = tuple(f"{kind}_{stride}" for kind in KINDS for stride in STRIDES)

    def __init__(self, network: Scrfd, side: int) -> None:
        super().__init__()
        self.network = network
        self.counts = [ANCHORS * (side // stride) ** 2 for stride in STRIDES]

    def forward(self, picture: Tensor) -> tuple[Tensor, ...]:
        found = self.network(picture)
        whole = (found.scores.sigmoid()[0, :, None], found.boxes[0], found.points[0])
        return tuple(part for kind in whole for part in kind.split(self.counts))


def decode(boxes: Tensor, points: Tensor, at: Anchors) -> Tensor:
    """Faces [..., a, 7, 2] of what the network says."""
    corners = torch.stack((-boxes[..., :2], boxes[..., 2:]), -2)
    ways = torch.cat((corners, points.unflatten(-1, (5, 2))), -2)
    return ways * at.strides[:, None, None] + at.middles[:, None]


def faces(found: Found, at: Anchors) -> list[tuple[Tensor, Tensor]]:
    """Of each picture its faces [k, 7, 2] and their scores [k], the surest first, as insightface chooses them."""
    out = []
    for scores, decoded in zip(found.scores.sigmoid(), decode(found.boxes, found.points, at), strict=True):
        sure = scores >= SCORE
        kept = nms(decoded[sure, :2].flatten(1), scores[sure], OVERLAP)
        out.append((decoded[sure][kept], scores[sure][kept]))
    return out
