"""FlashFace's reference images (arXiv 2403.17008, Sec. 3.2, and the code of its demo): each face is cropped to its box,
rotated until the eyes are level, and padded to a square on black.

The demo crops with Pillow. This reproduces Pillow's arithmetic bit for bit in tensors, since the network was trained on
it.
"""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
from torch import Tensor

from ..identity.merge import get_weighted_crops
from ..spec import Identity

REFERENCE_SIZE = 224  # side of a reference image in pixels
AFFINE_FRACTION_BITS = 16  # fractional bits of Pillow's affine transform
RESIZE_FRACTION_BITS = 22  # fractional bits of Pillow's resize


def crop_reference_face(photo: Tensor, box: Tensor, eyes: Tensor) -> Tensor:
    """Crop a face without a margin and rotate it until the eyes are level: uint8 [H, W, 3] -> [h, w, 3].

    `box` [4] is x0, y0, x1, y1; `eyes` [2, 2] are the left and the right eye as the viewer sees them; black outside.
    """
    x0, y0, x1, y1 = (int(edge) for edge in box.double().round())
    crop = photo.new_zeros(max(y1 - y0, 1), max(x1 - x0, 1), 3)
    height, width = photo.shape[:2]
    top, left, bottom, right = max(y0, 0), max(x0, 0), min(y1, height), min(x1, width)
    if bottom > top and right > left:
        crop[top - y0 : bottom - y0, left - x0 : right - x0] = photo[top:bottom, left:right]
    across, down = (eyes[1] - eyes[0]).double().tolist()
    return rotate_image(crop, math.degrees(math.atan2(down, abs(across))))


def rotate_image(image: Tensor, degrees: float) -> Tensor:
    """Rotate [h, w, 3] counterclockwise about its center: same size, nearest neighbor, black corners."""
    if degrees == 0:
        return image
    height, width = image.shape[:2]
    angle = -math.radians(degrees % 360)
    cos, sin = round(math.cos(angle), 15), round(math.sin(angle), 15)
    x, y = width / 2, height / 2
    rows = ((cos, sin, cos * -x + sin * -y + x), (-sin, cos, -sin * -x + cos * -y + y))
    x_out, y_out = torch.arange(width), torch.arange(height)[:, None]
    x_in, y_in = (
        (_to_fixed_point(c + a / 2 + b / 2) + x_out * _to_fixed_point(a) + y_out * _to_fixed_point(b))
        >> AFFINE_FRACTION_BITS
        for a, b, c in rows
    )
    inside = (x_in >= 0) & (x_in < width) & (y_in >= 0) & (y_in < height)
    rotated = image[y_in.clamp(0, height - 1), x_in.clamp(0, width - 1)]
    return rotated * inside[..., None].to(rotated.dtype)


def _to_fixed_point(value: float) -> int:
    return math.floor(value * (1 << AFFINE_FRACTION_BITS) + 0.5)


def fit_to_square(image: Tensor, size: int = REFERENCE_SIZE) -> Tensor:
    """Resize the longer side to `size` and center the image on a black square: uint8 [h, w, 3] -> [size, size, 3]."""
    height, width = image.shape[:2]
    scale = size / max(height, width)
    h, w = max(round(height * scale), 1), max(round(width * scale), 1)
    out = image.new_zeros(size, size, 3)
    top, left = (size - h) // 2, (size - w) // 2
    out[top : top + h, left : left + w] = _resize_axis(_resize_axis(image, w, 1), h, 0)
    return out


def _resize_axis(image: Tensor, size: int, axis: int) -> Tensor:
    """Bicubic resize along one axis of [h, w, 3] to uint8, antialiased when downscaling."""
    if image.shape[axis] == size:
        return image
    weights = _bicubic_weights(image.shape[axis], size)
    moved = image.movedim(axis, 0).long()
    sums = (weights @ moved.flatten(1)).unflatten(1, moved.shape[1:]) + (1 << (RESIZE_FRACTION_BITS - 1))
    return (sums >> RESIZE_FRACTION_BITS).clamp(0, 255).to(torch.uint8).movedim(0, axis)


def _bicubic_weights(old_size: int, new_size: int) -> Tensor:
    """Weights of the input pixels in each output pixel: fixed-point [new_size, old_size]."""
    scale = old_size / new_size
    filter_scale = max(scale, 1.0)
    center = (torch.arange(new_size, dtype=torch.float64)[:, None] + 0.5) * scale
    first = (center - 2 * filter_scale + 0.5).trunc().clamp(min=0)
    last = (center + 2 * filter_scale + 0.5).trunc().clamp(max=old_size)
    pixels = torch.arange(old_size, dtype=torch.float64)
    x = ((pixels - center + 0.5) * (1 / filter_scale)).abs()
    near, far = (1.5 * x - 2.5) * x * x + 1, (((x - 5) * x + 8) * x - 4) * -0.5
    weights = torch.where(x < 1, near, torch.where(x < 2, far, torch.zeros_like(x)))
    weights = weights * ((pixels >= first) & (pixels < last))
    # cumsum, because Pillow sums from the left
    weights = weights / weights.cumsum(1)[:, -1:] * (1 << RESIZE_FRACTION_BITS)
    return (weights + 0.5 * weights.sign()).trunc().long()


def make_reference_faces(identity: Identity, size: int = REFERENCE_SIZE) -> Tensor:
    """The faces of an identity as the reference net was trained on them: uint8 [n, size, size, 3] RGB.

    Faces of weight 0 are ignored. Raises ValueError if none is left, or if the identity has no face crops.
    """
    crops, indices = get_weighted_crops(identity)
    return torch.stack(
        [fit_to_square(crop_reference_face(crops[i], identity.box[i], identity.kps[i][:2]), size) for i in indices]
    )


def make_face_position_mask(box: Sequence[float], width: int, height: int) -> Tensor:
    """FlashFace's face position mask [height // 8, width // 8], 0 or 1, of a box x0, y0, x1, y1 relative to the image.

    The mask is a square of the box's longer side at its upper left corner; all 0 for an empty box.
    """
    x0, y0, x1, y1 = (int(edge * size) for edge, size in zip(box, (width, height, width, height), strict=True))
    side = max(x1 - x0, y1 - y0)
    mask = torch.zeros(height, width)
    mask[y0 : y0 + side, x0 : x0 + side] = 1
    return mask[::8, ::8]
