"""Hair and beards of Portrait World: tables of shapes in head units, and the order in which they are put on."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from .canvas import BLACK, WHITE, Canvas, Colour, Points, bow, mix, ring, smooth
from .head import Head
from .surface import Surface

COLOURS: dict[str, Colour] = {
    "black": (38, 32, 36), "brown": (84, 56, 40), "chestnut": (134, 76, 44), "ginger": (198, 98, 40),
    "blond": (232, 196, 112), "grey": (148, 146, 150), "white": (238, 234, 228), "blue": (62, 108, 190),
    "pink": (226, 112, 160),
}  # fmt: skip


TOP = -0.95  # of what hangs behind
Edge = tuple[tuple[float, float], ...]


@dataclass(frozen=True)
class Cut:
    """How hair stands off the skull, in head units: above, at the sides, how far down; what hangs behind."""

    top: float
    side: float
    down: float = 0.0
    length: float = 0.0  # of what hangs behind, from the eyes
    width: float = 0.0  # of its end, in half widths of the face
    curls: int = 0  # bumps along the outline
    bump: float = 0.0
    lean: float = 0.0  # the top leans to the right


CUTS: dict[str, Cut | None] = {
    "bald": None,
    "buzz": Cut(0.05, 0.03, -0.10),
    "short": Cut(0.18, 0.07, 0.02),
    "quiff": Cut(0.38, 0.04, -0.05, lean=0.16),
    "curly": Cut(0.26, 0.16, 0.12, curls=9, bump=0.06),
    "afro": Cut(0.52, 0.50, 0.42, length=0.55, width=1.35, curls=15, bump=0.04),
    "bob": Cut(0.18, 0.15, 0.30, length=0.92, width=1.28),
    "long": Cut(0.15, 0.10, 0.25, length=1.85, width=1.22),
    "wavy": Cut(0.22, 0.16, 0.30, length=1.60, width=1.42, curls=7, bump=0.09),
    "bun": Cut(0.12, 0.05, 0.02),
    "pigtails": Cut(0.12, 0.07, 0.05),
    "mohawk": Cut(0.03, 0.01, -0.16),
    "ponytail": Cut(0.15, 0.06, 0.04),
}

# fringe -> where the hair ends on the forehead, from the viewer's left to right; x in half widths of the face
FRINGES: dict[str, tuple[tuple[float, float], ...]] = {
    "none": ((-0.80, -0.42), (-0.48, -0.64), (0.0, -0.70), (0.48, -0.64), (0.80, -0.42)),
    "straight": ((-0.86, -0.30), (-0.45, -0.36), (0.0, -0.38), (0.45, -0.36), (0.86, -0.30)),
    "swept": ((-0.76, -0.52), (-0.46, -0.72), (-0.12, -0.60), (0.34, -0.42), (0.88, -0.26)),
    "parted": ((-0.88, -0.16), (-0.56, -0.38), (0.0, -0.82), (0.56, -0.38), (0.88, -0.16)),
    "peak": ((-0.78, -0.40), (-0.52, -0.70), (0.0, -0.52), (0.52, -0.70), (0.78, -0.40)),
}

# Tufts that some cuts have besides, as ellipses: middle and half axes. Behind the head, and before it.
TUFTS: dict[str, tuple[tuple[float, float, float, float], ...]] = {
    "bun": ((0.0, -1.30, 0.32, 0.27),),
    "pigtails": ((-1.08, 0.30, 0.22, 0.58), (1.08, 0.30, 0.22, 0.58)),
    "ponytail": ((0.88, -0.62, 0.30, 0.26), (1.06, 0.08, 0.19, 0.66)),
}
# Along the edge of the hair: how far from the middle, how wide, of what tint.
STRANDS = ((0.86, 6.4, (WHITE, 0.22)), (0.94, 3.2, (BLACK, 0.25)), (0.78, 3.2, (BLACK, 0.20)))
CREST = ((-0.20, -0.62), (-0.26, -1.00), (-0.16, -1.46), (0.0, -1.56), (0.16, -1.46), (0.26, -1.00), (0.20, -0.62))


def colour(head: Head) -> Colour:
    return COLOURS[head.person.hair_colour]


def _wavy(points: Points, cut: Cut) -> Points:
    """An outline with the cut's bumps."""
    if not cut.curls:
        return points
    t = np.linspace(0, 2 * np.pi * cut.curls, len(points), endpoint=False)
    return points * (1 + cut.bump * np.abs(np.sin(t / 2))[:, None] - cut.bump / 2)


def behind(canvas: Canvas, head: Head, label: int) -> None:
    """What hangs behind the head: before anything else of it is drawn."""
    cut, hue = CUTS[head.person.hair], mix(colour(head), BLACK, 0.18)
    for x, y, wide, high in TUFTS.get(head.person.hair, ()):
        canvas.shape(head.rim(smooth(ring(x, y, wide, high, 10)), -0.5), hue, label)
    if cut is None or not cut.length:
        return
    half, end = head.half + cut.side, cut.length
    low = head.half * cut.width
    right = [(0.55 * half, TOP), (half, -0.45), (half * 1.04, 0.1), (low, 0.6 * end), (low * 0.96, end)]
    points = [(0.0, TOP - 0.1), *right, (0.0, end + 0.04), *((-x, y) for x, y in reversed(right))]
    canvas.shape(head.rim(_wavy(smooth(points), cut), -0.30), hue, label)


def before(canvas: Canvas, head: Head, label: int) -> None:
    """What lies over the forehead and around the skull: after the face."""
    cut, hue = CUTS[head.person.hair], colour(head)
    if cut is None:
        return
    line = np.array(FRINGES[head.person.fringe]) * (head.half, 1)
    edge = head.place(bow(line), 0.02)
    points = np.concatenate((head.rim(_over(head, cut)), edge[::-1]))
    if head.person.hair == "mohawk":
        canvas.shade(points, hue, 0.28)
        canvas.shape(head.rim(smooth(CREST)), hue, label)
        return
    below = head.place(bow(line * (0.97, 1) + (0, 0.09)))
    canvas.shade(np.concatenate((edge, below[::-1])), BLACK, 0.16)
    canvas.shape(points, hue, label)
    _strands(canvas, head, _over(head, cut), hue)


def _over(head: Head, cut: Cut) -> Points:
    """The outer edge of the hair, from the viewer's left side over the top to the right: head units."""
    half = head.half
    right = [
        (0.36 * half + cut.lean, -0.97 - cut.top),
        (0.82 * half + cut.side * 0.7 + cut.lean, -0.78 - cut.top * 0.6),
        (half + cut.side, -0.36),
        (half + cut.side * 0.9, cut.down),
    ]
    left = [(-x + 2 * cut.lean * (y < -0.7), y) for x, y in reversed(right)]
    inner = (0.95 * half, cut.down + 0.03)
    points = _wavy(bow([*left, *right]), cut)
    return np.concatenate(([(-inner[0], inner[1])], points, [inner]))


def _strands(canvas: Canvas, head: Head, over: Points, hue: Colour) -> None:
    """A shine and a few strands that follow the hair's edge."""
    middle = over[len(over) // 5 : -len(over) // 5]
    for share, width, tint in STRANDS:
        canvas.line(head.rim(middle * share), mix(hue, *tint), width * head.figure.size)


# beard -> outer and inner edge on the viewer's right, from the middle outwards, and how dense; x in half widths of the
# face, y from the mouth (0) to the chin (1)
JAW = ((0.0, 1.00), (0.36, 0.92), (0.72, 0.52), (0.93, 0.0), (1.0, -0.75))
CHIN = ((0.0, 1.24), (0.40, 1.14), (0.76, 0.62), (0.95, 0.0), (1.0, -0.75))
BEARDS: dict[str, tuple[Edge, Edge, float]] = {
    "stubble": (JAW, ((0.0, -0.34), (0.36, -0.32), (0.66, -0.46), (0.98, -0.80)), 0.34),
    "full": (CHIN, ((0.0, -0.36), (0.34, -0.32), (0.62, -0.20), (0.86, -0.80)), 1.0),
    "chin curtain": (CHIN, ((0.0, 0.66), (0.36, 0.56), (0.72, 0.0), (0.88, -0.75)), 1.0),
    "goatee": (
        ((0.0, 1.26), (0.22, 1.12), (0.36, 0.60), (0.42, 0.10), (0.40, -0.20)),
        ((0.0, -0.36), (0.22, -0.34), (0.40, -0.20)),
        1.0,
    ),
    "moustache": (
        ((0.0, -0.08), (0.22, -0.08), (0.44, 0.06), (0.60, 0.0)),
        ((0.0, -0.36), (0.18, -0.36), (0.40, -0.20), (0.60, 0.0)),
        1.0,
    ),
}  # fmt: skip


def beard(on: Surface, mouth: float, label: int) -> None:
    """The beard, which the mouth lies on and which is of the face. `mouth`: its height."""
    head = on.head
    if head.person.beard == "none":
        return
    outer, inner, opacity = BEARDS[head.person.beard]
    scale = (head.half * (0.94 + 0.08 * head.person.jaw), head.chin - mouth)
    low, high = (np.array(edge) * scale + (0, mouth) for edge in (outer, inner))
    low, high = (bow(np.concatenate((edge[:0:-1] * (-1, 1), edge))) for edge in (low, high))
    points, hue = np.concatenate((low, high[::-1])), mix(colour(head), BLACK, 0.1)
    if opacity < 1:
        on.shade(points, hue, opacity)
    else:
        on.shape(points, hue, 0.02, 0.6, label)
