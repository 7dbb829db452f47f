"""The visible body in a portrait: shoulders, neck and clothes. Coordinates: head units below the chin, upright."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from .canvas import BLACK, WHITE, Canvas, Colour, mix_colours, smooth_line, smooth_outline
from .head import Head

GARMENT_COLOURS: dict[str, Colour] = {
    "red": (198, 52, 52), "blue": (54, 98, 176), "green": (62, 132, 84), "yellow": (236, 196, 74),
    "white": (240, 238, 232), "black": (46, 46, 54), "purple": (126, 76, 156), "orange": (232, 132, 52),
}  # fmt: skip


@dataclass(frozen=True)
class GarmentPiece:
    """A part of a garment, given by its right half, which is mirrored. A line if it has a width, in 1/128 of a head."""

    points: tuple[tuple[float, float], ...]
    tint: Colour  # mixed into the colour of the garment
    tint_share: float
    line_width: float = 0.0
    both_sides: bool = False  # two separate halves instead of one piece across the middle
    behind_neck: bool = False
    sharp_corners: bool = False


COLLAR_FLAP = GarmentPiece(
    ((0.38, 0.20), (0.56, 0.42), (0.26, 0.74), (0.02, 0.50)), WHITE, 0.25, both_sides=True, sharp_corners=True
)
HOODIE_FRONT = GarmentPiece(
    ((0.40, 0.16), (0.70, 0.22), (0.78, 0.52), (0.10, 0.80), (0.06, 0.60)), BLACK, 0.12, both_sides=True
)
GARMENTS: dict[str, tuple[GarmentPiece, ...]] = {
    "tee": (GarmentPiece(((0.0, 0.55), (0.24, 0.46), (0.42, 0.27)), BLACK, 0.22, line_width=12),),
    "jumper": (GarmentPiece(((0.0, 0.36), (0.42, 0.24), (0.46, 0.50), (0.0, 0.66)), WHITE, 0.12),),
    "shirt": (COLLAR_FLAP, GarmentPiece(((0.0, 0.5), (0.0, 6.0)), BLACK, 0.22, line_width=7)),
    "hoodie": (
        GarmentPiece(((0.0, -0.10), (0.62, 0.02), (0.80, 0.45)), BLACK, 0.22, behind_neck=True),
        HOODIE_FRONT,
        GarmentPiece(((0.16, 0.72), (0.18, 1.15)), WHITE, 1.0, line_width=6, both_sides=True),
    ),
}
SHOULDER_OUTLINE = ((0.30, 0.22), (0.70, 0.40), (1.30, 0.62), (1.62, 1.10), (1.78, 2.2), (1.90, 7.0))
SLEEVE_LINE = GarmentPiece(((1.16, 1.30), (1.22, 2.2), (1.24, 6.0)), BLACK, 0.30, line_width=8, both_sides=True)


def draw_body(canvas: Canvas, head: Head, label: int) -> None:
    """Shoulders and chest, down to the lower edge of the image."""
    right = np.array(SHOULDER_OUTLINE) + (0, head.chin_height)
    canvas.draw_shape(
        head.project_body(smooth_outline(np.concatenate((right, right[::-1] * (-1, 1))))),
        GARMENT_COLOURS[head.figure.colour],
        label,
    )
    _draw_piece(canvas, head, SLEEVE_LINE, label)


def draw_neck(canvas: Canvas, head: Head, skin: Colour, label: int) -> None:
    """The neck, from the head into the collar, with the shadow of the chin."""
    pieces, chin = GARMENTS[head.figure.clothes], head.chin_height
    for piece in pieces:
        if piece.behind_neck:
            _draw_piece(canvas, head, piece, label)
    half = 0.36 + 0.03 * head.person.face_width
    top = head.project_silhouette([(-half, 0.45 * chin), (half, 0.45 * chin)], -0.35)
    low = head.project_body([(half + 0.02, chin + 0.30), (0.0, chin + 0.52), (-half - 0.02, chin + 0.30)])
    canvas.draw_shape(np.concatenate((top, low)), mix_colours(skin, BLACK, 0.06), label)
    deep = head.project_silhouette([(0.0, chin + 0.16)]).clip(top.min(0), low.max(0))
    shadow = np.concatenate((top, 0.45 * top[1:] + 0.55 * low[:1], deep, 0.45 * top[:1] + 0.55 * low[2:]))
    canvas.draw_shade(shadow, mix_colours(skin, (70, 20, 20), 0.5), 0.45)
    for piece in pieces:
        if not piece.behind_neck:
            _draw_piece(canvas, head, piece, label)


def _draw_piece(canvas: Canvas, head: Head, piece: GarmentPiece, label: int) -> None:
    colour = mix_colours(GARMENT_COLOURS[head.figure.colour], piece.tint, piece.tint_share)
    right = np.array(piece.points) + (0, head.chin_height)
    left = right[::-1] * (-1, 1)
    for points in (left, right) if piece.both_sides else (np.concatenate((left, right[right[:, 0] > 0])),):
        if piece.line_width:
            canvas.draw_line(head.project_body(smooth_line(points)), colour, piece.line_width * head.figure.head_size)
        else:
            canvas.draw_shape(
                head.project_body(points if piece.sharp_corners else smooth_outline(points)), colour, label
            )
