"""A face except for its eyes: skin, nose, mouth, ears, age lines and marks."""

from __future__ import annotations

import numpy as np

from .canvas import BLACK, WHITE, Canvas, Colour, Points, make_ellipse, mix_colours, smooth_line, smooth_outline
from .eyes import draw_brow, draw_eye
from .features import AVERAGE_HALF_WIDTH, MOUTH_LIFT, NOSE_LIFT, SIDES, SKIN_COLOURS, FaceLayout
from .head import Head
from .head_surface import HeadSurface

# lip colour -> colour, its share over the skin
LIP_COLOURS: dict[str, tuple[Colour, float]] = {
    "natural": ((178, 84, 80), 0.42), "rose": ((222, 96, 116), 0.75), "berry": ((150, 34, 74), 0.85),
    "brick": ((186, 62, 42), 0.85),
}  # fmt: skip
THROAT_COLOUR, TEETH_COLOUR, EARRING_COLOUR = (92, 26, 34), (250, 246, 240), (234, 192, 76)
# ears -> half axes, height of the tip
EAR_SHAPES: dict[str, tuple[float, float, float]] = {
    "small": (0.09, 0.15, 0.0), "round": (0.14, 0.20, 0.0), "large": (0.22, 0.27, 0.02), "pointed": (0.13, 0.20, 0.24),
}  # fmt: skip
EAR_HEIGHT, EAR_DEPTH = 0.10, -0.26  # of the center of an ear
# age -> strength of the lines, whether the forehead has lines
AGE_LINES: dict[str, tuple[float, bool]] = {"smooth": (0.0, False), "lined": (0.62, False), "old": (1.0, True)}
# cheeks -> shape on the viewer's right, colour mixed into the skin, its share, opacity
CHEEK_SHAPES: dict[str, tuple[tuple[Points, Colour, float, float], ...]] = {
    "pale": (),
    "rosy": (
        (make_ellipse(0.42, 0.33, 0.19, 0.14), (226, 60, 60), 0.5, 0.28),
        (make_ellipse(0.42, 0.33, 0.125, 0.092), (226, 60, 60), 0.5, 0.30),
    ),
    "hollow": ((smooth_outline([(0.62, 0.22), (0.44, 0.40), (0.36, 0.62), (0.52, 0.52)]), (60, 20, 20), 0.42, 0.26),),
}
# On the viewer's right; mirrored on the left.
FRECKLE_POSITIONS = (
    (0.14, 0.22), (0.22, 0.28), (0.30, 0.23), (0.38, 0.29), (0.45, 0.23), (0.26, 0.35), (0.36, 0.36), (0.18, 0.15),
    (0.46, 0.33), (0.06, 0.17),
)  # fmt: skip
SCAR_POINTS, MOLE_POSITION = ((0.26, 0.20), (0.36, 0.24), (0.38, 0.36), (0.50, 0.42)), (0.33, 0.44)


def draw_face(surface: HeadSurface, layout: FaceLayout) -> None:
    """The face without beard (below the mouth in drawing order) and glasses (above the hair)."""
    skin = SKIN_COLOURS[surface.head.person.skin]
    _draw_cheeks(surface, skin)
    _draw_age_lines(surface, layout, skin)
    for side in SIDES:
        draw_eye(surface, layout, side)
        draw_brow(surface, layout, side)
    _draw_nose(surface, layout, skin)
    _draw_mark(surface, skin)


def draw_ears(canvas: Canvas, head: Head, label: int) -> None:
    """The ears, behind the face: the far one is hidden as the head turns."""
    skin, inside = (
        mix_colours(SKIN_COLOURS[head.person.skin], colour, share)
        for colour, share in ((BLACK, 0.04), ((150, 40, 30), 0.3))
    )
    wide, high, tip = EAR_SHAPES[head.person.ears]
    points = [(0.0, -high), (wide * 0.8, -high - tip), (wide, -high * 0.3), (wide * 0.6, high * 0.6), (0.0, high)]
    for side in SIDES:
        shape = smooth_outline(points) * (side, 1)
        canvas.draw_shape(
            head.project_silhouette(shape + (side * head.half_width * 0.97, EAR_HEIGHT), EAR_DEPTH), skin, label
        )
        canvas.draw_shade(
            head.project_silhouette(shape * (0.55, 0.6) + (side * head.half_width, EAR_HEIGHT), EAR_DEPTH), inside, 0.7
        )


def draw_earrings(canvas: Canvas, head: Head, label: int) -> None:
    if head.person.earrings == "none":
        return
    low = EAR_HEIGHT + 0.02 + EAR_SHAPES[head.person.ears][1]
    for side in SIDES:
        x = side * head.half_width * 1.04
        if head.person.earrings == "studs":
            canvas.draw_shape(
                head.project_silhouette(make_ellipse(x, low, 0.055, 0.055, 10), EAR_DEPTH), EARRING_COLOUR, label, 0.6
            )
        else:
            hoop = make_ellipse(x, low + 0.14, 0.11, 0.15)
            canvas.draw_stroke(
                head.project_silhouette(np.concatenate((hoop, hoop[:2])), EAR_DEPTH),
                EARRING_COLOUR,
                7.5 * head.figure.head_size,
                label,
            )


def _draw_cheeks(surface: HeadSurface, skin: Colour) -> None:
    person = surface.head.person
    for side in SIDES:
        for points, colour, share, opacity in CHEEK_SHAPES[person.cheeks]:
            surface.draw_shade(
                points * (side * surface.head.half_width / AVERAGE_HALF_WIDTH, 1),
                mix_colours(skin, colour, share),
                opacity,
            )
        for x, y in FRECKLE_POSITIONS if person.freckles == "some" else ():
            surface.draw_shade(make_ellipse(side * x, y, 0.021, 0.021, 8), mix_colours(skin, (130, 54, 20), 0.75), 0.95)


def _draw_age_lines(surface: HeadSurface, layout: FaceLayout, skin: Colour) -> None:
    """Age lines: beside the mouth, below the eyes, on the forehead."""
    deep, forehead = AGE_LINES[surface.head.person.age]
    folds = (
        (
            (layout.nose_half_width + 0.05, layout.nose_height),
            (layout.nose_half_width + 0.15, layout.nose_height + 0.12),
            (layout.mouth_half_width + 0.07, layout.mouth_height),
        ),
        ((layout.eye_offset - 0.13, 0.15), (layout.eye_offset, 0.195), (layout.eye_offset + 0.14, 0.14)),
    )
    for fold in folds if deep else ():
        for side in SIDES:
            surface.draw_stroke(
                smooth_line(fold) * (side, 1), mix_colours(skin, (110, 40, 30), 0.46 * deep), 4.6 * deep
            )
    for y in (-0.50, -0.42) if forehead else ():
        surface.draw_stroke(
            smooth_line([(-0.3, y), (0, y - 0.03), (0.3, y)]), mix_colours(skin, (60, 20, 20), 0.42), 4.0
        )


def _draw_nose(surface: HeadSurface, layout: FaceLayout, skin: Colour) -> None:
    """The bridge, shaded on the side away from the turn, wings, nostrils, a lit tip."""
    dark, shaded_side = mix_colours(skin, (90, 24, 20), 0.46), -1 if surface.head.figure.yaw >= 0 else 1
    tip_lift = surface.head.person.nose_tip
    tip, wing = layout.nose_height + 0.03 * tip_lift, layout.nose_half_width
    bridge = smooth_outline(
        [(0.05, -0.02), (0.045, 0.14), (wing * 0.8, tip - 0.06), (wing, tip + 0.02), (0.0, tip + 0.01), (0.01, 0.14)]
    )
    surface.draw_shade(bridge * (shaded_side, 1), dark, 0.42, np.interp(bridge[:, 1], (0.0, tip), (0.02, 0.16)))
    base = [(-wing, tip - 0.03), (-wing * 0.86, tip + 0.045), (-wing * 0.35, tip + 0.035)]
    base += [(0.0, tip + 0.065 + 0.03 * tip_lift), *((-x, y) for x, y in reversed(base))]
    surface.draw_line(smooth_line(base), mix_colours(skin, (70, 18, 18), 0.62), 6.0, 0.13)
    for side in SIDES:
        surface.draw_shape(make_ellipse(side * wing * 0.48, tip + 0.035, wing * 0.24, 0.017, 8), dark, 0.13)
    surface.draw_shade(
        make_ellipse(0.0, tip - 0.045, wing * 0.42, 0.05, 10), mix_colours(skin, WHITE, 0.6), 0.5, NOSE_LIFT
    )


def draw_mouth(surface: HeadSurface, layout: FaceLayout) -> None:
    """Lips, with a line between them or, if the mouth is open, the throat and the upper teeth."""
    colour, share = LIP_COLOURS[surface.head.person.lip_colour]
    lip, expression = mix_colours(SKIN_COLOURS[surface.head.person.skin], colour, share), layout.expression
    full, half = 0.068 + 0.030 * surface.head.person.lips, layout.mouth_half_width
    top, bottom = (
        layout.mouth_height + 0.35 * expression.mouth_corner_lift - 0.25 * expression.mouth_opening,
        layout.mouth_height + 0.35 * expression.mouth_corner_lift + 0.75 * expression.mouth_opening,
    )

    def make_curve(*inner: tuple[float, float]) -> Points:
        """A symmetric curve between the corners of the mouth; `inner`: right half, x in half widths of the mouth."""
        right = [*((x * half, y) for x, y in inner), (half, layout.mouth_corner_height)]
        return smooth_line([*((-x, y) for x, y in reversed(right) if x), *right])

    upper = make_curve((0.0, top - full * 0.7), (0.16, top - full), (0.45, top - full * 0.75))
    under = make_curve((0.0, bottom + full * 1.3), (0.5, bottom + full * 0.9))
    surface.draw_shape(np.concatenate((upper, under[::-1])), lip, MOUTH_LIFT, outline_scale=0.5)
    seam = make_curve((0.0, top + 0.01), (0.4, top))
    if not expression.mouth_opening:
        surface.draw_line(seam, mix_colours(lip, (50, 10, 16), 0.65), 5.4, MOUTH_LIFT)
        return
    low = make_curve((0.0, bottom + 0.01), (0.5, bottom))
    surface.draw_shape(np.concatenate((seam, low[::-1])) * (0.94, 1), THROAT_COLOUR, MOUTH_LIFT, outline_scale=0.3)
    if expression.mouth_width_scale > 1:
        teeth = np.concatenate((seam * (0.86, 1), (seam * (0.80, 1) + (0, 0.35 * expression.mouth_opening))[::-1]))
        surface.draw_shape(teeth, TEETH_COLOUR, MOUTH_LIFT)


def _draw_mark(surface: HeadSurface, skin: Colour) -> None:
    mark_side, _, kind = surface.head.person.mark.partition(" ")
    side = -1 if mark_side == "left" else 1
    if kind == "mole":
        surface.draw_shape(
            make_ellipse(side * MOLE_POSITION[0], MOLE_POSITION[1], 0.042, 0.042, 10),
            mix_colours(skin, (40, 16, 12), 0.85),
        )
    if kind == "scar":
        for colour, share, width in (((150, 30, 50), 0.75, 10.0), ((255, 210, 205), 0.7, 4.0)):
            surface.draw_stroke(smooth_line(SCAR_POINTS) * (side, 1), mix_colours(skin, colour, share), width, 0.01)
