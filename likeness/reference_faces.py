"""FlashFace's photos (arXiv 2403.17008, Sec. 3.2, and its demo's code): each face boxed, levelled, squared on black.

The demo cuts with Pillow; its arithmetic is done here in tensors, bit for bit, as the network was trained on it.
"""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
from torch import Tensor

from .identity import pictured
from .spec import Identity

SIDE = 224  # pixels of a reference
FIXED = 16  # bits behind the point of Pillow's affine transform
PRECISION = 22  # bits behind the point of its resizing


def crop(photo: Tensor, box: Tensor, eyes: Tensor) -> Tensor:
    """A face of a photo, uint8 [H, W, 3] -> [h, w, 3]: its box, without a margin, turned until the eyes are level.

    `box` [4] is x0, y0, x1, y1, `eyes` [2, 2] the left and the right one as the viewer sees them; black outside.
    """
    x0, y0, x1, y1 = (int(edge) for edge in box.double().round())
    cut = photo.new_zeros(max(y1 - y0, 1), max(x1 - x0, 1), 3)
    height, width = photo.shape[:2]
    top, left, bottom, right = max(y0, 0), max(x0, 0), min(y1, height), min(x1, width)
    if bottom > top and right > left:
        cut[top - y0 : bottom - y0, left - x0 : right - x0] = photo[top:bottom, left:right]
    across, down = (eyes[1] - eyes[0]).double().tolist()
    return rotate(cut, math.degrees(math.atan2(down, abs(across))))


def rotate(picture: Tensor, degrees: float) -> Tensor:
    """Turn [h, w, 3] counter-clockwise about its centre: same size, nearest neighbour, black corners."""
    if degrees == 0:
        return picture
    height, width = picture.shape[:2]
    angle = -math.radians(degrees % 360)
    cos, sin = round(math.cos(angle), 15), round(math.sin(angle), 15)
    x, y = width / 2, height / 2
    rows = ((cos, sin, cos * -x + sin * -y + x), (-sin, cos, -sin * -x + cos * -y + y))
    right, below = torch.arange(width), torch.arange(height)[:, None]
    columns, lines = ((_fixed(c + a / 2 + b / 2) + right * _fixed(a) + below * _fixed(b)) >> FIXED for a, b, c in rows)
    inside = (columns >= 0) & (columns < width) & (lines >= 0) & (lines < height)
    turned = picture[lines.clamp(0, height - 1), columns.clamp(0, width - 1)]
    return turned * inside[..., None].to(turned.dtype)


def _fixed(value: float) -> int:
    return math.floor(value * (1 << FIXED) + 0.5)


def square(picture: Tensor, side: int = SIDE) -> Tensor:
    """uint8 [h, w, 3] -> [side, side, 3]: the longer side fills it, the shorter is centred on black."""
    height, width = picture.shape[:2]
    scale = side / max(height, width)
    h, w = max(round(height * scale), 1), max(round(width * scale), 1)
    out = picture.new_zeros(side, side, 3)
    top, left = (side - h) // 2, (side - w) // 2
    out[top : top + h, left : left + w] = _resize(_resize(picture, w, 1), h, 0)
    return out


def _resize(picture: Tensor, size: int, axis: int) -> Tensor:
    """Bicubic along one axis of [h, w, 3], to uint8, wider where it shrinks."""
    if picture.shape[axis] == size:
        return picture
    weights = _bicubic(picture.shape[axis], size)
    moved = picture.movedim(axis, 0).long()
    sums = (weights @ moved.flatten(1)).unflatten(1, moved.shape[1:]) + (1 << (PRECISION - 1))
    return (sums >> PRECISION).clamp(0, 255).to(torch.uint8).movedim(0, axis)


def _bicubic(before: int, after: int) -> Tensor:
    """What each pixel takes of each: [after, before] fixed-point numbers."""
    scale = before / after
    reach = max(scale, 1.0)
    middle = (torch.arange(after, dtype=torch.float64)[:, None] + 0.5) * scale
    first = (middle - 2 * reach + 0.5).trunc().clamp(min=0)
    last = (middle + 2 * reach + 0.5).trunc().clamp(max=before)
    at = torch.arange(before, dtype=torch.float64)
    x = ((at - middle + 0.5) * (1 / reach)).abs()
    near, far = (1.5 * x - 2.5) * x * x + 1, (((x - 5) * x + 8) * x - 4) * -0.5
    weights = torch.where(x < 1, near, torch.where(x < 2, far, torch.zeros_like(x)))
    weights = weights * ((at >= first) & (at < last))
    weights = weights / weights.cumsum(1)[:, -1:] * (1 << PRECISION)  # summed from the left, as Pillow does
    return (weights + 0.5 * weights.sign()).trunc().long()


def references(identity: Identity, side: int = SIDE) -> Tensor:
    """The faces of an identity as the reference net was trained on them: uint8 [n, side, side, 3] RGB.

    Faces of weight 0 are left out. Raises ValueError where none is left, or where the identity holds no pictures.
    """
    crops, kept = pictured(identity)
    return torch.stack([square(crop(crops[i], identity.box[i], identity.kps[i][:2]), side) for i in kept])


def position(box: Sequence[float], width: int, height: int) -> Tensor:
    """A box x0, y0, x1, y1 in parts of the picture as FlashFace's face position: 0 or 1, [height // 8, width // 8].

    The square of the box's longer side from its upper left corner; all 0 for a box of no size.
    """
    x0, y0, x1, y1 = (int(edge * size) for edge, size in zip(box, (width, height, width, height), strict=True))
    side = max(x1 - x0, y1 - y0)
    mask = torch.zeros(height, width)
    mask[y0 : y0 + side, x0 : x0 + side] = 1
    return mask[::8, ::8]
