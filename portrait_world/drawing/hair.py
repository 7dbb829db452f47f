"""Hair and beards: tables of shapes in head units, and how they are drawn."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from .canvas import BLACK, WHITE, Canvas, Colour, Points, make_ellipse, mix_colours, smooth_line, smooth_outline
from .head import Head
from .head_surface import HeadSurface

HAIR_COLOURS: dict[str, Colour] = {
    "black": (38, 32, 36), "brown": (84, 56, 40), "chestnut": (134, 76, 44), "ginger": (198, 98, 40),
    "blond": (232, 196, 112), "grey": (148, 146, 150), "white": (238, 234, 228), "blue": (62, 108, 190),
    "pink": (226, 112, 160),
}  # fmt: skip


BACK_HAIR_TOP = -0.95
BeardEdge = tuple[tuple[float, float], ...]


@dataclass(frozen=True)
class Haircut:
    """A haircut in head units: distance of the hair from the skull, its length, and the hair behind the head."""

    top_height: float
    side_width: float
    side_length: float = 0.0
    back_length: float = 0.0  # of the hair behind the head, from the eyes down
    back_width: float = 0.0  # at its lower end, in half widths of the face
    num_curls: int = 0  # bumps along the outline
    curl_height: float = 0.0
    top_lean: float = 0.0  # shift of the top to the right


HAIRCUTS: dict[str, Haircut | None] = {
    "bald": None,
    "buzz": Haircut(0.05, 0.03, -0.10),
    "short": Haircut(0.18, 0.07, 0.02),
    "quiff": Haircut(0.38, 0.04, -0.05, top_lean=0.16),
    "curly": Haircut(0.26, 0.16, 0.12, num_curls=9, curl_height=0.06),
    "afro": Haircut(0.52, 0.50, 0.42, back_length=0.55, back_width=1.35, num_curls=15, curl_height=0.04),
    "bob": Haircut(0.18, 0.15, 0.30, back_length=0.92, back_width=1.28),
    "long": Haircut(0.15, 0.10, 0.25, back_length=1.85, back_width=1.22),
    "wavy": Haircut(0.22, 0.16, 0.30, back_length=1.60, back_width=1.42, num_curls=7, curl_height=0.09),
    "bun": Haircut(0.12, 0.05, 0.02),
    "pigtails": Haircut(0.12, 0.07, 0.05),
    "mohawk": Haircut(0.03, 0.01, -0.16),
    "ponytail": Haircut(0.15, 0.06, 0.04),
}

# fringe -> the hairline on the forehead, from the viewer's left to right; x in half widths of the face
FRINGE_LINES: dict[str, tuple[tuple[float, float], ...]] = {
    "none": ((-0.80, -0.42), (-0.48, -0.64), (0.0, -0.70), (0.48, -0.64), (0.80, -0.42)),
    "straight": ((-0.86, -0.30), (-0.45, -0.36), (0.0, -0.38), (0.45, -0.36), (0.86, -0.30)),
    "swept": ((-0.76, -0.52), (-0.46, -0.72), (-0.12, -0.60), (0.34, -0.42), (0.88, -0.26)),
    "parted": ((-0.88, -0.16), (-0.56, -0.38), (0.0, -0.82), (0.56, -0.38), (0.88, -0.16)),
    "peak": ((-0.78, -0.40), (-0.52, -0.70), (0.0, -0.52), (0.52, -0.70), (0.78, -0.40)),
}

# Additional ellipses of some haircuts behind the head: center and half axes.
HAIR_TUFTS: dict[str, tuple[tuple[float, float, float, float], ...]] = {
    "bun": ((0.0, -1.30, 0.32, 0.27),),
    "pigtails": ((-1.08, 0.30, 0.22, 0.58), (1.08, 0.30, 0.22, 0.58)),
    "ponytail": ((0.88, -0.62, 0.30, 0.26), (1.06, 0.08, 0.19, 0.66)),
}
# Lines along the edge of the hair: scale towards the center, width, tint.
STRAND_LINES = ((0.86, 6.4, (WHITE, 0.22)), (0.94, 3.2, (BLACK, 0.25)), (0.78, 3.2, (BLACK, 0.20)))
MOHAWK_OUTLINE = (
    (-0.20, -0.62),
    (-0.26, -1.00),
    (-0.16, -1.46),
    (0.0, -1.56),
    (0.16, -1.46),
    (0.26, -1.00),
    (0.20, -0.62),
)


def get_hair_colour(head: Head) -> Colour:
    return HAIR_COLOURS[head.person.hair_colour]


def _add_curls(points: Points, cut: Haircut) -> Points:
    """The outline with the bumps of the haircut's curls."""
    if not cut.num_curls:
        return points
    t = np.linspace(0, 2 * np.pi * cut.num_curls, len(points), endpoint=False)
    return points * (1 + cut.curl_height * np.abs(np.sin(t / 2))[:, None] - cut.curl_height / 2)


def draw_back_hair(canvas: Canvas, head: Head, label: int) -> None:
    """The hair behind the head; drawn before the head."""
    cut, colour = HAIRCUTS[head.person.hair], mix_colours(get_hair_colour(head), BLACK, 0.18)
    for x, y, wide, high in HAIR_TUFTS.get(head.person.hair, ()):
        canvas.draw_shape(
            head.project_silhouette(smooth_outline(make_ellipse(x, y, wide, high, 10)), -0.5), colour, label
        )
    if cut is None or not cut.back_length:
        return
    half, end = head.half_width + cut.side_width, cut.back_length
    low = head.half_width * cut.back_width
    right = [(0.55 * half, BACK_HAIR_TOP), (half, -0.45), (half * 1.04, 0.1), (low, 0.6 * end), (low * 0.96, end)]
    points = [(0.0, BACK_HAIR_TOP - 0.1), *right, (0.0, end + 0.04), *((-x, y) for x, y in reversed(right))]
    canvas.draw_shape(head.project_silhouette(_add_curls(smooth_outline(points), cut), -0.30), colour, label)


def draw_front_hair(canvas: Canvas, head: Head, label: int) -> None:
    """The hair over the forehead and around the skull; drawn after the face."""
    cut, colour = HAIRCUTS[head.person.hair], get_hair_colour(head)
    if cut is None:
        return
    line = np.array(FRINGE_LINES[head.person.fringe]) * (head.half_width, 1)
    edge = head.project_onto_face(smooth_line(line), 0.02)
    points = np.concatenate((head.project_silhouette(_hair_outline(head, cut)), edge[::-1]))
    if head.person.hair == "mohawk":
        canvas.draw_shade(points, colour, 0.28)
        canvas.draw_shape(head.project_silhouette(smooth_outline(MOHAWK_OUTLINE)), colour, label)
        return
    below = head.project_onto_face(smooth_line(line * (0.97, 1) + (0, 0.09)))
    canvas.draw_shade(np.concatenate((edge, below[::-1])), BLACK, 0.16)
    canvas.draw_shape(points, colour, label)
    _draw_strands(canvas, head, _hair_outline(head, cut), colour)


def _hair_outline(head: Head, cut: Haircut) -> Points:
    """The outer edge of the hair in head units, from the viewer's left over the top to the right."""
    half = head.half_width
    right = [
        (0.36 * half + cut.top_lean, -0.97 - cut.top_height),
        (0.82 * half + cut.side_width * 0.7 + cut.top_lean, -0.78 - cut.top_height * 0.6),
        (half + cut.side_width, -0.36),
        (half + cut.side_width * 0.9, cut.side_length),
    ]
    left = [(-x + 2 * cut.top_lean * (y < -0.7), y) for x, y in reversed(right)]
    inner = (0.95 * half, cut.side_length + 0.03)
    points = _add_curls(smooth_line([*left, *right]), cut)
    return np.concatenate(([(-inner[0], inner[1])], points, [inner]))


def _draw_strands(canvas: Canvas, head: Head, outline: Points, colour: Colour) -> None:
    """A highlight and a few strands along the edge of the hair."""
    middle = outline[len(outline) // 5 : -len(outline) // 5]
    for share, width, tint in STRAND_LINES:
        canvas.draw_line(
            head.project_silhouette(middle * share), mix_colours(colour, *tint), width * head.figure.head_size
        )


# beard -> outer and inner edge on the viewer's right, from the middle outwards, and opacity; x in half widths of the
# face, y from the mouth (0) to the chin (1)
JAW_EDGE = ((0.0, 1.00), (0.36, 0.92), (0.72, 0.52), (0.93, 0.0), (1.0, -0.75))
CHIN_EDGE = ((0.0, 1.24), (0.40, 1.14), (0.76, 0.62), (0.95, 0.0), (1.0, -0.75))
BEARD_SHAPES: dict[str, tuple[BeardEdge, BeardEdge, float]] = {
    "stubble": (JAW_EDGE, ((0.0, -0.34), (0.36, -0.32), (0.66, -0.46), (0.98, -0.80)), 0.34),
    "full": (CHIN_EDGE, ((0.0, -0.36), (0.34, -0.32), (0.62, -0.20), (0.86, -0.80)), 1.0),
    "chin curtain": (CHIN_EDGE, ((0.0, 0.66), (0.36, 0.56), (0.72, 0.0), (0.88, -0.75)), 1.0),
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


def draw_beard(surface: HeadSurface, mouth_height: float, label: int) -> None:
    """The beard, drawn below the mouth and labelled as face. `mouth_height`: y of the mouth."""
    head = surface.head
    if head.person.beard == "none":
        return
    outer, inner, opacity = BEARD_SHAPES[head.person.beard]
    scale = (head.half_width * (0.94 + 0.08 * head.person.jaw), head.chin_height - mouth_height)
    low, high = (np.array(edge) * scale + (0, mouth_height) for edge in (outer, inner))
    low, high = (smooth_line(np.concatenate((edge[:0:-1] * (-1, 1), edge))) for edge in (low, high))
    points, colour = np.concatenate((low, high[::-1])), mix_colours(get_hair_colour(head), BLACK, 0.1)
    if opacity < 1:
        surface.draw_shade(points, colour, opacity)
    else:
        surface.draw_shape(points, colour, 0.02, 0.6, label)
