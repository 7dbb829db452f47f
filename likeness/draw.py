"""Drawing on pictures, in plain torch: numbered boxes, InstantID's key points, maps of people and of attention."""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn.functional import interpolate, pad

from .spec import Face

Colour = tuple[float, float, float]
CHOSEN, FOUND, PLAIN = (0.2, 0.9, 0.3), (1.0, 0.6, 0.1), (1.0, 1.0, 1.0)
DARK = 0.15  # what is left of a picture behind a sign

# Five by seven pixels a sign, a row a string.
SIGNS = {
    "0": "01110 10001 10011 10101 11001 10001 01110",
    "1": "00100 01100 00100 00100 00100 00100 01110",
    "2": "01110 10001 00001 00110 01000 10000 11111",
    "3": "01110 10001 00001 00110 00001 10001 01110",
    "4": "00010 00110 01010 10010 11111 00010 00010",
    "5": "11111 10000 11110 00001 00001 10001 01110",
    "6": "00110 01000 10000 11110 10001 10001 01110",
    "7": "11111 00001 00010 00100 01000 01000 01000",
    "8": "01110 10001 10001 01110 10001 10001 01110",
    "9": "01110 10001 10001 01111 00001 00010 01100",
    ".": "00000 00000 00000 00000 00000 01100 01100",
    "-": "00000 00000 00000 11111 00000 00000 00000",
}

# InstantID: the points red, green, blue, yellow, magenta; every limb ends at the nose and has its outer point's colour.
KPS_COLOURS = ((1.0, 0.0, 0.0), (0.0, 1.0, 0.0), (0.0, 0.0, 1.0), (1.0, 1.0, 0.0), (1.0, 0.0, 1.0))
LIMBS = ((0, 2), (1, 2), (3, 2), (4, 2))
STICK, DIMMED, DOT = 4.0, 0.6, 10.0


# People on a map, by their number; more begin again.
PEOPLE: dict[str, Colour] = {
    "red": (0.90, 0.32, 0.25), "blue": (0.25, 0.55, 0.92), "green": (0.30, 0.75, 0.38), "yellow": (0.95, 0.75, 0.20),
    "violet": (0.62, 0.40, 0.85), "teal": (0.20, 0.75, 0.78), "pink": (0.95, 0.50, 0.70), "brown": (0.60, 0.45, 0.30),
}  # fmt: skip
NOBODY, SHARED = 0.22, 1.0

# From what is not looked at to what is looked at most, and how much of the picture that hides.
HEAT: tuple[Colour, ...] = (
    (0.05, 0.05, 0.35), (0.15, 0.45, 0.85), (0.2, 0.8, 0.4), (0.95, 0.85, 0.2), (0.9, 0.15, 0.1),
)  # fmt: skip
HEATED = 0.75


def _grid(height: int, width: int) -> Tensor:
    """The place of every pixel, [H, W, 2] as x, y."""
    y, x = torch.meshgrid(torch.arange(height), torch.arange(width), indexing="ij")
    return torch.stack((x, y), dim=-1).double()


def _paint(picture: Tensor, where: Tensor, colour: Colour) -> Tensor:
    return torch.where(where[..., None], torch.tensor(colour, dtype=picture.dtype), picture)


def text_mask(text: str, scale: int) -> Tensor:
    """A line of digits, dots and minus signs as a mask [7 * scale, ...]."""
    rows = [[int(bit) for sign in text for bit in f"{SIGNS[sign].split()[row]}0"] for row in range(7)]
    return torch.tensor(rows, dtype=torch.bool).repeat_interleave(scale, 0).repeat_interleave(scale, 1)


def mark(picture: Tensor, face: Face, text: str, colour: Colour) -> Tensor:
    """A picture [H, W, 3] with a face's box, its points, and a line of digits above, as far as there is room."""
    height, width = picture.shape[:2]
    thick = max(2, round(max(height, width) / 300))
    out, ink = picture.clone(), torch.tensor(colour, dtype=picture.dtype)
    x0, y0, x1, y1 = (round(value) for value in face.box.tolist())
    for left, top, right, bottom in (
        (x0 - thick, y0 - thick, x1 + thick, y0),
        (x0 - thick, y1, x1 + thick, y1 + thick),
        (x0 - thick, y0, x0, y1),
        (x1, y0, x1 + thick, y1),
    ):
        out[max(0, top) : max(0, bottom), max(0, left) : max(0, right)] = ink
    for x, y in face.kps.round().int().tolist():
        out[max(0, y - thick) : max(0, y + thick + 1), max(0, x - thick) : max(0, x + thick + 1)] = ink
    sign = _sign(text, thick + 1)
    above = y0 - thick - sign.shape[0]
    left, top = max(0, min(x0, width - sign.shape[1])), max(0, min(above, height - sign.shape[0]))
    _stamp(out, sign, left, top, colour)
    return out


def labelled(picture: Tensor, text: str) -> Tensor:
    """A picture [H, W, 3] with a line of digits in its upper left corner, as far as there is room."""
    out = picture.clone()
    _stamp(out, _sign(text, max(1, round(picture.shape[0] / 112))), 0, 0, PLAIN)
    return out


def _sign(text: str, scale: int) -> Tensor:
    """A line of digits with a margin, as a mask."""
    return pad(text_mask(text, scale), (scale, 0, scale, scale))


def _stamp(out: Tensor, sign: Tensor, left: int, top: int, colour: Colour) -> None:
    """Write a sign into a picture, on dark."""
    sign = sign[: out.shape[0] - top, : out.shape[1] - left, None]
    patch = out[top : top + sign.shape[0], left : left + sign.shape[1]]
    patch.copy_(torch.where(sign, torch.tensor(colour, dtype=out.dtype), patch * DARK))


def key_points(faces: list[Tensor], height: int, width: int) -> Tensor:
    """Five points [5, 2] per face on black, [H, W, 3], as InstantID's own drawing has them."""
    at, out = _grid(height, width), torch.zeros(height, width, 3)
    for points in (p.double() for p in faces):
        for outer, nose in LIMBS:
            a, b = points[outer], points[nose]
            length = float((b - a).norm())
            if length:
                along = (b - a) / length
                offset = at - (a + b) / 2
                u, v = offset @ along, offset @ torch.stack((-along[1], along[0]))
                out = _paint(out, (u / (length / 2)) ** 2 + (v / STICK) ** 2 <= 1, KPS_COLOURS[outer])
    out = out * DIMMED
    for points in faces:
        for point, colour in zip(points.double(), KPS_COLOURS, strict=True):
            out = _paint(out, (at - point).norm(dim=-1) <= DOT, colour)
    return out


def colour(number: int) -> str:
    """The name of a person's colour, by the person's number from 0."""
    return list(PEOPLE)[number % len(PEOPLE)]


def ownership(covers: list[Tensor | None], height: int, width: int) -> Tensor:
    """Who owns which cell, [height, width, 3]: everyone's cover [height, width] in a colour, None for everywhere.

    Dark where nobody is, white where several are. People who may be everywhere own no cell.
    """
    out, total = torch.full((height, width, 3), NOBODY), torch.zeros(height, width, 1)
    for number, cover in enumerate(covers):
        if cover is not None:
            out = out + cover[..., None] * (torch.tensor(PEOPLE[colour(number)]) - NOBODY)
            total = total + cover[..., None]
    several = (total - 1).clamp(0, 1)
    return (out * (1 - several) + SHARED * several).clamp(0, 1)


def heated(pictures: Tensor, heat: Tensor) -> Tensor:
    """Pictures [n, H, W, 3] under what is looked at in them, [n, h, w], relative to the most in any: [n, H, W, 3]."""
    share = (heat / heat.max().clamp(min=torch.finfo(heat.dtype).tiny))[:, None]
    share = interpolate(share, pictures.shape[1:3], mode="bilinear").movedim(1, -1)
    place = share * (len(HEAT) - 1)
    colours, low = torch.tensor(HEAT), place.long().clamp(max=len(HEAT) - 2)[..., 0]
    colour = torch.lerp(colours[low], colours[low + 1], place - low[..., None])
    grey = pictures.mean(-1, keepdim=True)
    return torch.lerp(grey.expand_as(pictures), colour, HEATED * share.sqrt())


def enlarged(picture: Tensor, height: int, width: int) -> Tensor:
    """A small picture [h, w, 3] as large squares, [height, width, 3]."""
    return interpolate(picture.movedim(-1, 0)[None], (height, width), mode="nearest-exact")[0].movedim(0, -1)


def shrink(picture: Tensor, longest: int = 1024) -> tuple[Tensor, float]:
    """A picture [h, w, 3] whose longer side is at most `longest` pixels, and by what its places are to be scaled."""
    scale = min(1.0, longest / max(picture.shape[:2]))
    if scale == 1:
        return picture, scale
    size = [max(1, round(side * scale)) for side in picture.shape[:2]]
    moved = picture.movedim(-1, 0)[None].float()
    return interpolate(moved, size, mode="bilinear", antialias=True)[0].movedim(0, -1), scale


def letterbox(pictures: list[Tensor]) -> Tensor:
    """Pictures of any sizes [h, w, 3] as one batch [n, H, W, 3], each in the middle, on black."""
    height, width = max(p.shape[0] for p in pictures), max(p.shape[1] for p in pictures)
    out = torch.zeros(len(pictures), height, width, 3)
    for canvas, picture in zip(out, pictures, strict=True):
        top, left = (height - picture.shape[0]) // 2, (width - picture.shape[1]) // 2
        canvas[top : top + picture.shape[0], left : left + picture.shape[1]] = picture
    return out.clamp(0, 1)
