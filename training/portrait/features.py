"""Where the features of a face are: what a person's measures and an expression make of them. In head units."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from .canvas import Colour, Points
from .head import Head

SIDES = (-1, 1)  # the viewer's left and right
USUAL = 0.76  # half the width of a usual face
NOSE_LIFT, MOUTH_LIFT = 0.20, 0.03  # how far the nose's tip and the mouth stand off the surface

SKINS: dict[str, Colour] = {
    "porcelain": (250, 226, 212), "rose": (244, 204, 188), "peach": (238, 188, 156), "olive": (216, 174, 128),
    "tan": (202, 148, 104), "caramel": (172, 116, 78), "brown": (130, 82, 56), "dark": (88, 56, 42),
}  # fmt: skip


@dataclass(frozen=True)
class Look:
    """What an expression does: to the brows, the lids (times), the mouth's corners, its opening and width (times)."""

    lift: float = 0.0
    frown: float = 0.0  # the inner ends of the brows go down
    lid: float = 1.0
    corner: float = 0.0
    open: float = 0.0
    wide: float = 1.0


LOOKS: dict[str, Look] = {
    "neutral": Look(corner=0.03),
    "smiling": Look(lift=0.01, lid=0.86, corner=0.085, wide=1.18),
    "laughing": Look(lift=0.04, lid=0.58, corner=0.09, open=0.19, wide=1.24),
    "sad": Look(lift=0.01, frown=-0.075, lid=0.80, corner=-0.075, wide=0.92),
    "surprised": Look(lift=0.10, lid=1.30, open=0.20, wide=0.72),
    "angry": Look(lift=-0.03, frown=0.095, lid=0.78, corner=-0.05, wide=0.96),
}


@dataclass(frozen=True)
class Features:
    """Where one person's features are under one expression."""

    gap: float  # of each eye from the middle
    eye: float  # times the usual size
    nose: float  # height of its tip
    wing: float  # half its width
    mouth: float  # height
    half: float  # half the mouth's width
    look: Look

    @property
    def corner(self) -> float:
        """The height of the mouth's corners."""
        return self.mouth - self.look.corner


def features(head: Head) -> Features:
    who, look = head.person, LOOKS[head.figure.expression]
    scale = head.half / USUAL
    return Features(
        gap=(0.315 + 0.042 * who.eye_gap) * scale,
        eye=(1.24 + 0.20 * who.eye_size) * scale**0.5,
        nose=0.36 * head.chin + 0.06 * who.nose_length,
        wing=(0.115 + 0.045 * who.nose_width) * scale,
        mouth=0.635 * head.chin + 0.03 * who.nose_length,
        half=(0.235 + 0.058 * who.mouth_width) * scale * look.wide,
        look=look,
    )


def key_points(head: Head) -> Points:
    """Left eye, right eye, tip of the nose, left and right corner of the mouth, in fine pixels: [5, 2]."""
    f = features(head)
    eyes = head.place([(side * f.gap, 0.0) for side in SIDES])
    corners = head.place([(side * f.half, f.corner) for side in SIDES], MOUTH_LIFT)
    return np.concatenate((eyes, head.place([(0.0, f.nose)], NOSE_LIFT), corners))
