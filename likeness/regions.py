"""Regions: where in the picture each person may appear, and what that means to the queries of a layer.

A region is a mask [B, H, W] of the picture, 0 to 1, or None for all of it. It is stretched over the picture whatever
its own shape. With B above 1 each picture of a batch has its own; further pictures begin again with the first.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor
from torch.nn.functional import avg_pool2d, interpolate

from .spec import Identity, People, Person

OUTSIDE = ("all", "none")
HALF = 0.5
ASPECT = 1.05  # shapes of mask and picture that are further apart are worth a word


def everyone(given: Identity | People) -> People:
    """What an `identity` socket brings, as people: a lone identity may appear everywhere, at full strength."""
    return (Person(given),) if isinstance(given, Identity) else given


def check(mask: Tensor, name: str) -> Tensor:
    """A mask as a region [B, H, W] in 0..1. Raises ValueError where it is empty, not finite or of another shape."""
    mask = mask.detach().float().cpu()
    mask = mask[None] if mask.ndim == 2 else mask
    if mask.ndim != 3:
        raise ValueError(
            f"got a mask of shape {list(mask.shape)} for {name!r}; expected [pictures, height, width]; connect a MASK"
        )
    if not mask.isfinite().all():
        raise ValueError(f"got a mask for {name!r} with NaN or infinity; expected 0 to 1; make the mask again")
    empty = [i + 1 for i, one in enumerate(mask) if not bool((one > 0).any())]
    if empty:
        raise ValueError(
            f"got an empty mask for {name!r} (picture {empty[0]} of {len(mask)}); expected some white where the person "
            "shall be; paint it, or leave the mask unconnected for the whole picture"
        )
    return mask.clamp(0, 1)


def cover(mask: Tensor, height: int, width: int) -> Tensor:
    """How much of each cell of a layer a region covers: [B, H, W] -> [B, height * width], by area."""
    return interpolate(mask[:, None], (height, width), mode="area").flatten(1)


def inside(mask: Tensor, height: int, width: int) -> Tensor:
    """Which queries of a layer lie in a region: [B, H, W] -> bool [B, height * width].

    A cell does where at least half of it is covered; of a region too small for that, those cells covered most.
    """
    share = cover(mask, height, width)
    most = share.amax(dim=1, keepdim=True)
    return share >= most.clamp(max=HALF)


def vanishes(mask: Tensor, height: int, width: int) -> bool:
    """Whether a region, in one picture or more, is too small to cover half of any cell of such a layer."""
    return bool((cover(mask, height, width).amax(dim=1) < HALF).any())


def visible(regions: Sequence[Tensor | None], height: int, width: int, outside: str = "all") -> list[Tensor]:
    """Which queries may see each identity's keys: bool [B, height * width], one per region (Fusion, Eq. 7).

    A query inside another identity's mask may not; one outside every mask sees all, one inside two masks neither. With
    `outside` "none", an identity is seen inside its own mask alone. One without a mask has none to be inside of.
    """
    within = [None if mask is None else inside(mask, height, width) for mask in regions]
    everywhere = torch.ones(1, height * width, dtype=torch.bool)
    seen: list[Tensor] = []
    for i, own in enumerate(within):
        others = [other for j, other in enumerate(within) if j != i and other is not None]
        may = own if outside == "none" and own is not None else everywhere
        for other in others:
            may = may & ~for_rows(other, max(len(may), len(other)))
        seen.append(may)
    return seen


def for_rows(tensor: Tensor, rows: int) -> Tensor:
    """[B, ...] for so many pictures: one serves all, several begin again behind the last."""
    return tensor if len(tensor) in (1, rows) else tensor[torch.arange(rows) % len(tensor)]


def feathered(mask: Tensor, pixels: int) -> Tensor:
    """A region [B, H, W] whose edge runs from 1 to 0 over `pixels` on either side."""
    if pixels <= 0:
        return mask
    for _ in range(2):  # a box blur twice is a tent
        mask = avg_pool2d(mask[:, None], 2 * (pixels // 2) + 1, 1, pixels // 2, count_include_pad=False)[:, 0]
    return mask


def rectangles(boxes: Tensor, height: int, width: int) -> Tensor:
    """Boxes [n, 4] of x0, y0, x1, y1 in pixels as masks [n, H, W]: a pixel counts as far as it is covered."""
    x, y = torch.arange(width).float(), torch.arange(height).float()
    x0, y0, x1, y1 = (edge[:, None] for edge in boxes.float().unbind(1))
    across = (torch.minimum(x + 1, x1) - torch.maximum(x, x0)).clamp(0, 1)
    down = (torch.minimum(y + 1, y1) - torch.maximum(y, y0)).clamp(0, 1)
    return down[:, :, None] * across[:, None, :]


def _exclusive(masks: Tensor, centres: Tensor) -> Tensor:
    """A pixel of several regions goes to the one whose centre is nearest."""
    n, height, width = masks.shape
    y, x = torch.meshgrid(torch.arange(height) + 0.5, torch.arange(width) + 0.5, indexing="ij")
    away = (x - centres[:, 0, None, None]) ** 2 + (y - centres[:, 1, None, None]) ** 2
    nearest = torch.where(masks > 0, away, torch.inf).argmin(dim=0)
    return masks * (nearest == torch.arange(n)[:, None, None])


def _priority(masks: Tensor, centres: Tensor) -> Tensor:
    """What an earlier region covers, a later one loses."""
    before = torch.cat((torch.ones_like(masks[:1]), (1 - masks).cumprod(dim=0)[:-1]))
    return masks * before


def _soft(masks: Tensor, centres: Tensor) -> Tensor:
    """Regions share what they both cover."""
    return masks / masks.sum(dim=0).clamp(min=1)


# What becomes of a pixel that several regions cover: [n, H, W] and the middle of each [n, 2] as x, y -> [n, H, W].
OVERLAPS = {"exclusive": _exclusive, "priority": _priority, "soft": _soft}


def lay_out(boxes: Tensor, height: int, width: int, feather: int, overlap: str) -> Tensor:
    """Regions [n, H, W] of boxes [n, 4] in pixels, with feathered edges and an overlap rule of OVERLAPS."""
    masks = OVERLAPS[overlap](rectangles(boxes, height, width), (boxes[:, :2] + boxes[:, 2:]).float() / 2)
    return feathered(masks, feather)


def left_to_right(boxes: Tensor) -> Tensor:
    """Boxes [n, 4] in the order of their middles."""
    return boxes[(boxes[:, 0] + boxes[:, 2]).argsort(stable=True)]


def parse_boxes(text: str) -> Tensor:
    """One box a line, `left, top, right, bottom` in parts of the picture, 0 to 1: [n, 4]. Raises ValueError."""
    boxes = []
    for line in filter(None, (line.strip() for line in text.replace(";", "\n").splitlines())):
        try:
            x0, y0, x1, y1 = (float(part) for part in line.split(","))
        except ValueError:
            x0 = y0 = x1 = y1 = -1.0
        if not (0 <= x0 < x1 <= 1 and 0 <= y0 < y1 <= 1):
            raise ValueError(
                f"got the box {line!r}; expected left, top, right, bottom in parts of the picture, 0 to 1, as "
                "0.1, 0.2, 0.4, 0.9; one box a line, from left to right"
            )
        boxes.append((x0, y0, x1, y1))
    return torch.tensor(boxes).view(-1, 4)
