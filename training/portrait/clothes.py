"""Shoulders, neck and clothes: what of a body is in a portrait. Head units from the chin down, upright."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from .canvas import BLACK, WHITE, Canvas, Colour, bow, mix, smooth
from .head import Head

COLOURS: dict[str, Colour] = {
    "red": (198, 52, 52), "blue": (54, 98, 176), "green": (62, 132, 84), "yellow": (236, 196, 74),
    "white": (240, 238, 232), "black": (46, 46, 54), "purple": (126, 76, 156), "orange": (232, 132, 52),
}  # fmt: skip


@dataclass(frozen=True)
class Piece:
    """A part of a garment: its right half, mirrored to the left; a line where it has a width, in 1/128 of a head."""

    points: tuple[tuple[float, float], ...]
    tint: Colour  # what is mixed into the cloth, and how much of it
    share: float
    width: float = 0.0
    twice: bool = False  # one on either side, not one across the middle
    behind: bool = False  # the neck
    sharp: bool = False  # corners stay corners


FLAP = Piece(((0.38, 0.20), (0.56, 0.42), (0.26, 0.74), (0.02, 0.50)), WHITE, 0.25, twice=True, sharp=True)
FRONT = Piece(((0.40, 0.16), (0.70, 0.22), (0.78, 0.52), (0.10, 0.80), (0.06, 0.60)), BLACK, 0.12, twice=True)
GARMENTS: dict[str, tuple[Piece, ...]] = {
    "tee": (Piece(((0.0, 0.55), (0.24, 0.46), (0.42, 0.27)), BLACK, 0.22, width=12),),
    "jumper": (Piece(((0.0, 0.36), (0.42, 0.24), (0.46, 0.50), (0.0, 0.66)), WHITE, 0.12),),
    "shirt": (FLAP, Piece(((0.0, 0.5), (0.0, 6.0)), BLACK, 0.22, width=7)),
    "hoodie": (
        Piece(((0.0, -0.10), (0.62, 0.02), (0.80, 0.45)), BLACK, 0.22, behind=True),
        FRONT,
        Piece(((0.16, 0.72), (0.18, 1.15)), WHITE, 1.0, width=6, twice=True),
    ),
}
SHOULDERS = ((0.30, 0.22), (0.70, 0.40), (1.30, 0.62), (1.62, 1.10), (1.78, 2.2), (1.90, 7.0))
SLEEVE = Piece(((1.16, 1.30), (1.22, 2.2), (1.24, 6.0)), BLACK, 0.30, width=8, twice=True)


def body(canvas: Canvas, head: Head, label: int) -> None:
    """Shoulders and chest, below the picture's edge."""
    right = np.array(SHOULDERS) + (0, head.chin)
    canvas.shape(head.body(smooth(np.concatenate((right, right[::-1] * (-1, 1))))), COLOURS[head.figure.colour], label)
    _put(canvas, head, SLEEVE, label)


def neck(canvas: Canvas, head: Head, skin: Colour, label: int) -> None:
    """The neck, from below the turned head down into the collar, in the chin's shadow."""
    pieces, chin = GARMENTS[head.figure.clothes], head.chin
    for piece in pieces:
        if piece.behind:
            _put(canvas, head, piece, label)
    half = 0.36 + 0.03 * head.person.face_width
    top = head.rim([(-half, 0.45 * chin), (half, 0.45 * chin)], -0.35)
    low = head.body([(half + 0.02, chin + 0.30), (0.0, chin + 0.52), (-half - 0.02, chin + 0.30)])
    canvas.shape(np.concatenate((top, low)), mix(skin, BLACK, 0.06), label)
    deep = head.rim([(0.0, chin + 0.16)]).clip(top.min(0), low.max(0))
    shadow = np.concatenate((top, 0.45 * top[1:] + 0.55 * low[:1], deep, 0.45 * top[:1] + 0.55 * low[2:]))
    canvas.shade(shadow, mix(skin, (70, 20, 20), 0.5), 0.45)
    for piece in pieces:
        if not piece.behind:
            _put(canvas, head, piece, label)


def _put(canvas: Canvas, head: Head, piece: Piece, label: int) -> None:
    hue = mix(COLOURS[head.figure.colour], piece.tint, piece.share)
    right = np.array(piece.points) + (0, head.chin)
    left = right[::-1] * (-1, 1)
    for points in (left, right) if piece.twice else (np.concatenate((left, right[right[:, 0] > 0])),):
        if piece.width:
            canvas.line(head.body(bow(points)), hue, piece.width * head.figure.size)
        else:
            canvas.shape(head.body(points if piece.sharp else smooth(points)), hue, label)
