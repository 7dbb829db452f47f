"""Eyes, brows and glasses."""

from __future__ import annotations

import numpy as np

from .canvas import BLACK, WHITE, Colour, Points, make_ellipse, mix_colours, smooth_line, smooth_outline
from .features import SIDES, SKIN_COLOURS, FaceLayout
from .hair import get_hair_colour
from .head_surface import HeadSurface

IRIS_COLOURS: dict[str, Colour] = {
    "brown": (112, 66, 32), "hazel": (166, 120, 48), "green": (70, 146, 84), "blue": (58, 126, 208),
    "grey": (138, 152, 164), "black": (36, 26, 24),
}  # fmt: skip
EYEBALL_COLOUR, PUPIL_COLOUR, LASH_COLOUR = (252, 250, 246), (14, 12, 16), (24, 16, 18)
IRIS_RADIUS, IRIS_INNER_SHARE = 0.092, 0.82  # in head units; the fraction of the radius inside the dark rim

# eyes -> half width, height above and below the center, drop of the outer corner
EYE_SHAPES: dict[str, tuple[float, float, float, float]] = {
    "round": (0.150, 0.125, 0.100, 0.0),
    "almond": (0.175, 0.105, 0.068, -0.012),
    "narrow": (0.180, 0.066, 0.046, -0.010),
    "drooping": (0.168, 0.092, 0.084, 0.045),
}
# brows -> heights at the inner end, the middle and the outer end
BROW_HEIGHTS: dict[str, tuple[float, float, float]] = {
    "straight": (-0.205, -0.215, -0.200),
    "arched": (-0.195, -0.285, -0.190),
    "angled": (-0.190, -0.250, -0.262),
    "round": (-0.215, -0.255, -0.160),
}
# Thickness above and below these heights, relative to the person's.
BROW_TOP_THICKNESS, BROW_BOTTOM_THICKNESS = (0.5, 1.0, 0.5), (1.0, 0.8, 0.0)

FRAME_COLOURS: dict[str, Colour] = {"black": (36, 34, 40), "red": (190, 44, 52), "gold": (204, 156, 62)}
# glasses -> outline of the right lens around its center
LENS_OUTLINES: dict[str, Points] = {
    "round": make_ellipse(0, 0, 0.235, 0.235),
    "square": smooth_outline([(-0.23, -0.17), (0.0, -0.18), (0.25, -0.17), (0.25, 0.15), (0.0, 0.18), (-0.22, 0.15)]),
    "cat eye": smooth_outline(
        [(-0.22, -0.10), (0.05, -0.15), (0.33, -0.25), (0.26, 0.10), (0.02, 0.18), (-0.20, 0.11)]
    ),
}
FRAME_WIDTH = 9.5  # of the line
LENS_HALF_WIDTH = 0.23


def draw_eye(surface: HeadSurface, layout: FaceLayout, side: int) -> None:
    """One eye: the expression opens the lids, and the iris is clipped to the opening."""
    person = surface.head.person
    half, up, down, drop = (value * layout.eye_scale for value in EYE_SHAPES[person.eyes])
    up, down, tilt = (
        up * layout.expression.lid_scale,
        down * (0.5 + 0.5 * layout.expression.lid_scale),
        drop - 0.034 * person.eye_tilt,
    )

    def compute_lids(across: Points) -> tuple[Points, Points]:
        """Heights of both lids from the inner corner (-1) to the outer corner (1)."""
        arch = np.sqrt(1 - across**2 * 0.999)
        return tilt * across - up * arch, tilt * across + down * arch

    across = np.linspace(-1, 1, 13)
    upper, lower = (
        np.stack((side * (layout.eye_offset + half * across), heights), axis=1) for heights in compute_lids(across)
    )
    opening = np.concatenate((upper, lower[::-1]))
    surface.draw_shade(opening + (0, -0.018), mix_colours(SKIN_COLOURS[person.skin], (90, 24, 20), 0.35), 0.45)
    surface.draw_shape(opening, EYEBALL_COLOUR, outline_scale=0.4)
    middle, iris = side * layout.eye_offset, IRIS_COLOURS[person.eye_colour]
    for size, colour in ((1.0, mix_colours(iris, BLACK, 0.35)), (IRIS_INNER_SHARE, iris), (0.42, PUPIL_COLOUR)):
        disc = make_ellipse(
            middle, -0.008, IRIS_RADIUS * layout.eye_scale * size, IRIS_RADIUS * layout.eye_scale * size
        )
        disc[:, 1] = np.clip(disc[:, 1], *compute_lids(np.clip((disc[:, 0] * side - layout.eye_offset) / half, -1, 1)))
        surface.draw_shape(disc, colour)
    surface.draw_shape(make_ellipse(middle + 0.03, -0.04 * layout.expression.lid_scale, 0.024, 0.024, 8), WHITE)
    surface.draw_stroke(upper, mix_colours(get_hair_colour(surface.head), LASH_COLOUR, 0.8), 6.0)


def draw_brow(surface: HeadSurface, layout: FaceLayout, side: int) -> None:
    reach, thick = 0.20 * layout.eye_scale**0.5, 0.038 + 0.022 * surface.head.person.brow_weight
    shift = 0.01 - layout.expression.brow_lift - 0.04 * (layout.eye_scale - 1)
    frown = (layout.expression.brow_frown, 0.0, -0.3 * layout.expression.brow_frown)
    along = layout.eye_offset + np.array((-reach, 0.02, reach))
    heights = np.array(BROW_HEIGHTS[surface.head.person.brows]) + frown + shift
    top, low = (
        smooth_line(np.stack((along, heights + thick * np.array(share)), axis=1))
        for share in (np.negative(BROW_TOP_THICKNESS), BROW_BOTTOM_THICKNESS)
    )  # fmt: skip
    colour = mix_colours(get_hair_colour(surface.head), BLACK, 0.28)
    surface.draw_shape(np.concatenate((top, low[::-1])) * (side, 1), colour, 0.03, outline_scale=0.3)


def draw_glasses(surface: HeadSurface, layout: FaceLayout) -> None:
    person = surface.head.person
    if person.glasses == "none":
        return
    colour = FRAME_COLOURS[person.frames]
    for side in SIDES:
        lens = LENS_OUTLINES[person.glasses] * (side, 1) + (side * layout.eye_offset, 0.02)
        surface.draw_shade(lens, (210, 232, 248), 0.16, 0.10)
        surface.draw_stroke(np.concatenate((lens, lens[:2])), colour, FRAME_WIDTH, 0.10)
        surface.draw_stroke(
            [(side * (layout.eye_offset + LENS_HALF_WIDTH), -0.04), (side * surface.head.half_width * 0.99, -0.02)],
            colour,
            FRAME_WIDTH * 0.8,
            0.06,
        )
    surface.draw_stroke(
        smooth_line(
            [(LENS_HALF_WIDTH - layout.eye_offset, 0.0), (0, -0.05), (layout.eye_offset - LENS_HALF_WIDTH, 0.0)]
        ),
        colour,
        FRAME_WIDTH,
        0.12,
    )
