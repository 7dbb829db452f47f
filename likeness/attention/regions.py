"""Regions: where in the image each person may appear, and which queries of a layer that allows.

A region is a mask [B, H, W] of the image, 0 to 1, or None for all of it. A mask of another size is stretched to the
image. With B above 1 each image of a batch has its own mask; the masks repeat if the batch has more images. Where an
image's mask is black, the person is absent from it.
"""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
from torch import Tensor
from torch.nn.functional import avg_pool2d, interpolate

from ..spec import Identity, People, Person

OUTSIDE_MODES = ("all", "none")
MIN_CELL_COVERAGE = 0.5
MAX_ASPECT_RATIO_MISMATCH = 1.05  # of mask and image, above which the user is warned


def convert_to_people(identity_or_people: Identity | People) -> People:
    """The value of an `identity` socket as people: a single identity may appear everywhere, at strength 1."""
    return (Person(identity_or_people),) if isinstance(identity_or_people, Identity) else identity_or_people


def check_mask(mask: Tensor, subject: str) -> Tensor:
    """A mask as [B, H, W] in 0..1, the one check of every MASK input. `subject` says what the mask is for.

    Raises ValueError if it holds no image, is not finite or of another shape.
    """
    mask = mask.detach().float().cpu()
    mask = mask[None] if mask.ndim == 2 else mask
    if mask.ndim != 3 or not mask.numel():
        raise ValueError(
            f"connect a MASK: got a mask of shape {list(mask.shape)} for {subject}; expected [images, height, width] "
            "of at least one image and pixel"
        )
    if not mask.isfinite().all():
        raise ValueError(f"make the mask again: got a mask for {subject} with NaN or infinity; expected 0 to 1")
    return mask.clamp(0, 1)


def check_region(mask: Tensor, person_name: str) -> Tensor:
    """A mask as the region [B, H, W] of a person, who is absent from images whose mask is black.

    Raises ValueError if the mask is black in all images, and where `check_mask` does.
    """
    mask = check_mask(mask, repr(person_name))
    if not mask.any():
        raise ValueError(
            f"make the mask white where {person_name!r} may appear, or leave it unconnected for the full image: got a "
            f"black mask{f' for all {len(mask)} images' if len(mask) > 1 else ''}; expected a person in it"
        )
    return mask


def find_absent_images(mask: Tensor) -> list[int]:
    """The images, from 0, whose mask is black: there the person is absent."""
    return (~(mask > 0).flatten(1).any(1)).nonzero().flatten().tolist()


def compute_coverage(mask: Tensor, height: int, width: int) -> Tensor:
    """The covered area of each cell of a latent grid: [B, H, W] -> [B, height * width], 0 to 1."""
    return interpolate(mask[:, None], (height, width), mode="area").flatten(1)


def find_inside_queries(mask: Tensor, height: int, width: int) -> Tensor:
    """The queries of a layer inside a region: [B, H, W] -> bool [B, height * width].

    A cell is inside if at least half of it is covered. Of a region too small for that, the cells covered most are; of a
    black mask, none.
    """
    coverage = compute_coverage(mask, height, width)
    largest = coverage.amax(dim=1, keepdim=True)
    return (coverage >= largest.clamp(max=MIN_CELL_COVERAGE)) & (coverage > 0)


def is_region_too_small(mask: Tensor, height: int, width: int) -> bool:
    """Whether a region covers less than half of every cell of a latent grid, in at least one image that has it."""
    largest = compute_coverage(mask, height, width).amax(dim=1)
    return bool(((largest > 0) & (largest < MIN_CELL_COVERAGE)).any())


def compute_visible_queries(
    regions: Sequence[Tensor | None], height: int, width: int, outside: str = "all"
) -> list[Tensor]:
    """The queries that may see each identity's keys: bool [B, height * width], one per region (fused KV, Eq. 7).

    A query inside another identity's mask may not see it; a query outside all masks sees all identities, one inside two
    masks neither. With `outside` "none" an identity is only visible inside its own mask, if it has one. No query sees
    an identity whose own mask is black in that image.
    """
    inside = [None if mask is None else find_inside_queries(mask, height, width) for mask in regions]
    everywhere = torch.ones(1, height * width, dtype=torch.bool)
    visible: list[Tensor] = []
    for i, own in enumerate(inside):
        others = [other for j, other in enumerate(inside) if j != i and other is not None]
        queries = own if outside == "none" and own is not None else everywhere
        if own is not None and not (present := own.any(dim=1, keepdim=True)).all():
            queries = queries & present
        for other in others:
            num_images = math.lcm(len(queries), len(other))
            queries = repeat_for_images(queries, num_images) & ~repeat_for_images(other, num_images)
        visible.append(queries)
    return visible


def repeat_for_images(tensor: Tensor, num_images: int) -> Tensor:
    """[B, ...] for `num_images` images: a single one serves all, several are repeated in order."""
    return tensor if len(tensor) in (1, num_images) else tensor[torch.arange(num_images) % len(tensor)]


def feather_mask(mask: Tensor, pixels: int) -> Tensor:
    """A region [B, H, W] whose edge falls from 1 to 0 over `pixels` on either side."""
    if pixels <= 0:
        return mask
    for _ in range(2):  # two box blurs make a tent filter
        mask = avg_pool2d(mask[:, None], 2 * (pixels // 2) + 1, 1, pixels // 2, count_include_pad=False)[:, 0]
    return mask


def rasterize_boxes(boxes: Tensor, height: int, width: int) -> Tensor:
    """Boxes [n, 4] of x0, y0, x1, y1 in pixels as masks [n, H, W] with antialiased edges."""
    x, y = torch.arange(width).float(), torch.arange(height).float()
    x0, y0, x1, y1 = (edge[:, None] for edge in boxes.float().unbind(1))
    across = (torch.minimum(x + 1, x1) - torch.maximum(x, x0)).clamp(0, 1)
    down = (torch.minimum(y + 1, y1) - torch.maximum(y, y0)).clamp(0, 1)
    return down[:, :, None] * across[:, None, :]


def _assign_nearest(masks: Tensor, centers: Tensor) -> Tensor:
    """A pixel in several regions belongs to the one with the nearest centre."""
    n, height, width = masks.shape
    y, x = torch.meshgrid(torch.arange(height) + 0.5, torch.arange(width) + 0.5, indexing="ij")
    distance = (x - centers[:, 0, None, None]) ** 2 + (y - centers[:, 1, None, None]) ** 2
    nearest = torch.where(masks > 0, distance, torch.inf).argmin(dim=0)
    return masks * (nearest == torch.arange(n)[:, None, None])


def _assign_first(masks: Tensor, centers: Tensor) -> Tensor:
    """Later regions lose what earlier ones cover."""
    uncovered = torch.cat((torch.ones_like(masks[:1]), (1 - masks).cumprod(dim=0)[:-1]))
    return masks * uncovered


def _share_overlap(masks: Tensor, centers: Tensor) -> Tensor:
    """Overlapping regions share their pixels."""
    return masks / masks.sum(dim=0).clamp(min=1)


# Which of several regions a pixel belongs to: masks [n, H, W] and their centres [n, 2] as x, y -> masks [n, H, W].
OVERLAP_RULES = {"exclusive": _assign_nearest, "priority": _assign_first, "soft": _share_overlap}


def make_box_regions(boxes: Tensor, height: int, width: int, feather: int, overlap: str) -> Tensor:
    """Regions [n, H, W] of boxes [n, 4] in pixels, with feathered edges; `overlap` is a key of OVERLAP_RULES."""
    masks = OVERLAP_RULES[overlap](rasterize_boxes(boxes, height, width), (boxes[:, :2] + boxes[:, 2:]).float() / 2)
    return feather_mask(masks, feather)


def sort_left_to_right(boxes: Tensor) -> Tensor:
    """Boxes [n, 4] sorted by the x of their centres."""
    return boxes[(boxes[:, 0] + boxes[:, 2]).argsort(stable=True)]


def parse_boxes(text: str) -> Tensor:
    """Boxes [n, 4] from lines `left, top, right, bottom`, as fractions of the image, 0 to 1. Raises ValueError."""
    boxes = []
    for line in filter(None, (line.strip() for line in text.replace(";", "\n").splitlines())):
        try:
            x0, y0, x1, y1 = (float(part) for part in line.split(","))
        except ValueError:
            x0 = y0 = x1 = y1 = -1.0
        if not (0 <= x0 < x1 <= 1 and 0 <= y0 < y1 <= 1):
            raise ValueError(
                f"got the box {line!r}; expected left, top, right, bottom as fractions of the image, 0 to 1, "
                "like 0.1, 0.2, 0.4, 0.9; one box per line, from left to right"
            )
        boxes.append((x0, y0, x1, y1))
    return torch.tensor(boxes).view(-1, 4)
