"""Faces: finding them through sizes, choosing one, aligning and cropping it, and saying what is wrong with it.

Alignment is ArcFace's five-point similarity as insightface crops it; detectors and recognisers are handed in.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import partial

import torch
from torch import Tensor
from torch.nn.functional import conv2d, cosine_similarity, grid_sample, interpolate, pad

from .spec import FACE_SIZES, Face

Detect = Callable[[Tensor, int], Sequence[Face]]  # uint8 RGB [H, W, 3], side of the detector's square input
Embed = Callable[[Tensor, Face], Tensor]  # uint8 RGB [H, W, 3], one of its faces -> [512]

# From the usual size down, as large faces are found in small pictures; then up, for small faces in large photos.
DETECTION_SIZES = (640, 512, 448, 384, 320, 256, 192, 1024)
MARGIN = 0.5  # what a tight crop is widened by, as a part of its longer side, on every side
HEAD = 512  # pixels of a stored crop
HEAD_SCALE = 2.0  # its side, in sides of the face's box

# Left eye, right eye, nose, left and right corner of the mouth in ArcFace's crop of 112 pixels.
ARCFACE = ((38.2946, 51.6963), (73.5318, 51.5014), (56.0252, 71.7366), (41.5493, 92.3655), (70.7299, 92.2041))

# The same points in FFHQ's crop of 512 pixels, as facexlib aligns; it shrinks photos to 1024 pixels first.
FFHQ = (
    (192.98138, 239.94708), (318.90277, 240.1936), (256.63416, 314.01935), (201.26117, 371.41043),
    (313.08905, 371.15118),
)  # fmt: skip
FFHQ_SIZE, FFHQ_PHOTO = 512, 1024
FFHQ_BORDER = (132 / 255, 133 / 255, 135 / 255)  # RGB, where the photo ends
# What of that crop is face and hair, at a guess: the middle, the half axes and the softness of an ellipse, in pixels.
ELLIPSE, AXES, SOFT = (256.0, 242.0), (164.0, 238.0), 24.0
GREY = (0.299, 0.587, 0.114)

BLURRED = 60.0  # variance of the Laplacian of the 112 crop, in grey levels squared
SMALL = 64  # pixels; ArcFace reads 112
TURNED = 35.0  # degrees


def template(size: int) -> Tensor:
    """Where the five points lie in an aligned crop: [5, 2] pixels.

    Sizes divisible by 112 keep the tight framing; others, divisible by 128, keep the scale and show more below and at
    the sides, as insightface has it. Raises ValueError on any other size.
    """
    points = torch.tensor(ARCFACE, dtype=torch.float64)
    if size % 112 == 0:
        return points * (size / 112)
    if size % 128 == 0:
        return points * (size / 128) + torch.tensor([8 * size / 128, 0.0], dtype=torch.float64)
    raise ValueError(f"got a face crop of {size} pixels; expected a multiple of 112 or 128")


def similarity(source: Tensor, target: Tensor) -> Tensor:
    """The least-squares similarity that takes points [n, 2] to points [n, 2], as [2, 3] float64 (Umeyama 1991)."""
    source, target = source.double(), target.double()
    a, b = source - source.mean(0), target - target.mean(0)
    u, s, vh = torch.linalg.svd(b.T @ a / len(a))
    sign = torch.ones(2, dtype=torch.float64)
    sign[1] = torch.sign(torch.linalg.det(u) * torch.linalg.det(vh))
    rotation = u @ torch.diag(sign) @ vh
    scale = (s * sign).sum() / a.square().sum(1).mean()
    return torch.cat((scale * rotation, (target.mean(0) - scale * rotation @ source.mean(0))[:, None]), dim=1)


def warp(photo: Tensor, matrix: Tensor, size: int) -> Tensor:
    """Sample a photo [H, W, 3] through a source-to-crop matrix [2, 3]: [size, size, 3], bilinear, black outside."""
    height, width = photo.shape[:2]
    linear = torch.linalg.inv(matrix[:, :2].double())
    grid = torch.arange(size, dtype=torch.float64)
    at = torch.stack(torch.meshgrid(grid, grid, indexing="xy"), dim=-1) - matrix[:, 2].double()
    at = at @ linear.T  # pixels of the photo, [size, size, 2]
    normed = (2 * at + 1) / torch.tensor([width, height], dtype=torch.float64) - 1
    out = grid_sample(photo.movedim(-1, 0)[None].double(), normed[None], "bilinear", "zeros", align_corners=False)
    return out[0].movedim(0, -1).to(photo.dtype if photo.is_floating_point() else torch.float32)


def align(photo: Tensor, kps: Tensor, size: int) -> Tensor:
    """The aligned face [size, size, 3] of a photo [H, W, 3] in 0..1."""
    return warp(photo, similarity(kps, template(size)), size)


def shrink(photo: Tensor, scale: float) -> Tensor:
    """A photo [H, W, 3] at `scale` of its size, below 1; sampling far apart pixels would alias."""
    moved = photo.movedim(-1, 0)[None]
    return interpolate(moved, scale_factor=scale, mode="bilinear", antialias=True)[0].movedim(0, -1)


def align_ffhq(photo: Tensor, kps: Tensor) -> Tensor:
    """The face as facexlib aligns it, the whole head: [512, 512, 3] of a photo [H, W, 3] in 0..1, grey outside.

    facexlib fits the similarity robustly; here it is the least-squares one.
    """
    scale = FFHQ_PHOTO / max(photo.shape[:2])
    if scale < 1:
        photo, kps = shrink(photo, scale), (kps + 0.5) * scale - 0.5
    border = torch.tensor(FFHQ_BORDER, dtype=photo.dtype)
    return warp(photo - border, similarity(kps, torch.tensor(FFHQ)), FFHQ_SIZE) + border


def ellipse() -> Tensor:
    """What of an FFHQ crop is face and hair, at a guess: [512, 512, 1], 0 to 1."""
    at = torch.arange(FFHQ_SIZE)
    x, y = ((at - middle) / axis for middle, axis in zip(ELLIPSE, AXES, strict=True))
    inside = 1 - (x[None, :] ** 2 + y[:, None] ** 2).sqrt()  # in parts of the half axis
    return (inside * min(AXES) / SOFT + 0.5).clamp(0, 1)[..., None]


def grey_on_white(photo: Tensor, kps: Tensor) -> Tensor:
    """PuLID's picture of a face: [512, 512, 3], the FFHQ crop in grey, and all that is not face or hair white.

    The authors cut by a face parser's classes. None is at hand, so an ellipse stands in for it.
    """
    grey = (align_ffhq(photo, kps) @ torch.tensor(GREY, dtype=photo.dtype))[..., None]
    mask = ellipse().to(grey.dtype)
    return (grey * mask + (1 - mask)).expand(-1, -1, 3)


# How each crop of an aligned face is cut from a photo [H, W, 3] in 0..1 with the five points [5, 2].
CUTS: Mapping[str, Callable[[Tensor, Tensor], Tensor]] = {
    **{name: partial(align, size=size) for name, size in FACE_SIZES.items()},
    "ffhq512": grey_on_white,
}


def pixels(photo: Tensor) -> Tensor:
    """A photo in 0..1 as uint8."""
    return (photo.clamp(0, 1) * 255).round().to(torch.uint8)


def head(photo: Tensor, face: Face, sides: float = HEAD_SCALE) -> tuple[Tensor, Face]:
    """The head with a margin: uint8 [HEAD, HEAD, 3], and the face in its pixels.

    A square of `sides` times the box's longer side around it, black where the photo ends, so that every aligned crop
    can be cut from it.
    """
    low, high = face.box[:2].double(), face.box[2:].double()
    side = float((high - low).max()) * sides
    corner, scale = (low + high) / 2 - side / 2, HEAD / side
    if scale < 1:
        photo = shrink(photo, scale)
    reach = min(scale, 1.0)
    matrix = torch.eye(2, 3, dtype=torch.float64) * (scale / reach)
    matrix[:, 2] = -corner * scale + (1 - reach) / 2  # places count from pixels' middles, shrinking from their edges
    crop = pixels(warp(photo, matrix, HEAD))
    box, kps = (((points.view(-1, 2).double() - corner) * scale).float() for points in (face.box, face.kps))
    return crop, Face(box.flatten(), kps, face.score)


def whole(photo: Tensor) -> Face:
    """A picture that is a face crop already: the box is the picture, the points lie where ArcFace's crop has them."""
    height, width = photo.shape[:2]
    side = min(height, width)
    corner = torch.tensor([(width - side) / 2, (height - side) / 2])
    kps = template(112).float() * (side / 112) + corner
    return Face(torch.tensor([0.0, 0.0, float(width), float(height)]), kps, 0.0)


@dataclass(frozen=True)
class Search:
    """What `find_faces` found, left to right, and what it tried, for the report."""

    faces: tuple[Face, ...]
    tried: tuple[str, ...]


def find_faces(photo: Tensor, detect: Detect, sizes: Sequence[int] = DETECTION_SIZES) -> Search:
    """The faces of a photo, float [H, W, 3] in 0..1: at the first detector size that shows any, left to right.

    Where no size does, the photo gets a margin, as detectors miss faces that fill the picture, and all are tried again.
    """
    plain = pixels(photo)
    margin = round(max(photo.shape[:2]) * MARGIN)
    wide = pad(plain.movedim(-1, 0), (margin,) * 4, value=127).movedim(0, -1)
    tried: list[str] = []
    for picture, offset, note in ((plain, 0, ""), (wide, margin, " with a margin")):
        for size in sizes:
            tried.append(f"{size}{note}")
            found = [_moved(face, -offset) for face in detect(picture, size)]
            if found:
                return Search(tuple(sorted(found, key=lambda face: float(face.box[0] + face.box[2]))), tuple(tried))
    return Search((), tuple(tried))


def _moved(face: Face, by: float) -> Face:
    return Face(face.box + by, face.kps + by, face.score)


def _largest(faces: Sequence[Face]) -> int:
    areas = [float((face.box[2:] - face.box[:2]).prod()) for face in faces]
    return areas.index(max(areas))


# How to choose among the faces of a photo, which are numbered from left to right.
PICKS: Mapping[str, Callable[[Sequence[Face]], int]] = {
    "largest": _largest,
    "leftmost": lambda faces: 0,
    "rightmost": lambda faces: len(faces) - 1,
}
NTH, ALIKE, WHOLE = "nth", "most alike", "whole photo"


def likeness(photo: Tensor, face: Face, embed: Embed, target: Tensor) -> float:
    """The cosine, -1..1, of a face's embedding and `target` [512]."""
    return float(cosine_similarity(embed(pixels(photo), face).double(), target.double(), dim=0))


def most_alike(photo: Tensor, faces: Sequence[Face], embed: Embed, target: Tensor) -> int:
    """The face whose embedding points most like `target` [512]."""
    cosines = [likeness(photo, face, embed, target) for face in faces]
    return cosines.index(max(cosines))


def sharpness(photo: Tensor, face: Face) -> float:
    """Variance of the Laplacian of the aligned face, in grey levels squared: low is blurred."""
    grey = align(photo.float(), face.kps, 112) @ torch.tensor(GREY) * 255
    kernel = torch.tensor([[0.0, 1, 0], [1, -4, 1], [0, 1, 0]])[None, None]
    return float(conv2d(grey[None, None], kernel).var())


def pose(face: Face) -> tuple[float, float, float]:
    """Rough yaw, pitch and roll of a face in degrees, read off the five points; 0 is straight ahead.

    The nose's place between the eyes and mouth corners tells yaw and pitch, the line of the eyes roll.
    """
    left, right, nose, mouth_left, mouth_right = face.kps.double()
    eyes, mouth = (left + right) / 2, (mouth_left + mouth_right) / 2
    across, down = right - left, mouth - eyes
    width, height = float(across.norm()) or 1.0, float(down.norm()) or 1.0
    roll = math.degrees(math.atan2(float(across[1]), float(across[0])))
    middle = (eyes + mouth) / 2
    yaw = math.degrees(math.asin(_unit(2 * float((nose - middle) @ across) / width**2)))
    expected = 0.49  # of the way from the eyes to the mouth, in ArcFace's template
    pitch = math.degrees(math.asin(_unit(2 * (float((nose - eyes) @ down) / height**2 - expected))))
    return yaw, pitch, roll


def _unit(value: float) -> float:
    return max(-1.0, min(1.0, value))


def describe(photo: Tensor, face: Face) -> str:
    """One line for the report: size, score, sharpness, pose, and what is wrong with the face."""
    yaw, pitch, roll = pose(face)
    sharp = sharpness(photo, face)
    wrong = [
        text
        for bad, text in (
            (face.size < SMALL, f"small (under {SMALL} pixels)"),
            (sharp < BLURRED, "blurred"),
            (max(abs(yaw), abs(pitch)) > TURNED, "turned away"),
        )
        if bad
    ]
    found = f"score {face.score:.2f}, " if face.score else ""
    turned = f"yaw {yaw:.0f}, pitch {pitch:.0f}, roll {roll:.0f} degrees"
    mind = f"; mind: {', '.join(wrong)}" if wrong else ""
    return f"{found}{face.size:.0f} pixels, sharpness {sharp:.0f}, {turned}{mind}"
