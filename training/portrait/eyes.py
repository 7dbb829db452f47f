"""Eyes, brows and glasses."""

from __future__ import annotations

import numpy as np

from .canvas import BLACK, WHITE, Colour, Points, bow, mix, ring, smooth
from .features import SIDES, SKINS, Features
from .hair import colour as hair_colour
from .surface import Surface

IRISES: dict[str, Colour] = {
    "brown": (112, 66, 32), "hazel": (166, 120, 48), "green": (70, 146, 84), "blue": (58, 126, 208),
    "grey": (138, 152, 164), "black": (36, 26, 24),
}  # fmt: skip
EYEBALL, PUPIL, LASH = (252, 250, 246), (14, 12, 16), (24, 16, 18)
IRIS, RIM = 0.092, 0.82  # half its width; the part of it inside its dark rim

# eyes -> half the width, height above and below the middle, how far the outer corner drops
EYES: dict[str, tuple[float, float, float, float]] = {
    "round": (0.150, 0.125, 0.100, 0.0),
    "almond": (0.175, 0.105, 0.068, -0.012),
    "narrow": (0.180, 0.066, 0.046, -0.010),
    "drooping": (0.168, 0.092, 0.084, 0.045),
}
# brows -> heights at the inner end, the middle and the outer end
BROWS: dict[str, tuple[float, float, float]] = {
    "straight": (-0.205, -0.215, -0.200),
    "arched": (-0.195, -0.285, -0.190),
    "angled": (-0.190, -0.250, -0.262),
    "round": (-0.215, -0.255, -0.160),
}
ABOVE, BELOW = (0.5, 1.0, 0.5), (1.0, 0.8, 0.0)  # how thick a brow is there, on either side of these heights

FRAMES: dict[str, Colour] = {"black": (36, 34, 40), "red": (190, 44, 52), "gold": (204, 156, 62)}
# glasses -> points of the right lens around its middle
LENSES: dict[str, Points] = {
    "round": ring(0, 0, 0.235, 0.235),
    "square": smooth([(-0.23, -0.17), (0.0, -0.18), (0.25, -0.17), (0.25, 0.15), (0.0, 0.18), (-0.22, 0.15)]),
    "cat eye": smooth([(-0.22, -0.10), (0.05, -0.15), (0.33, -0.25), (0.26, 0.10), (0.02, 0.18), (-0.20, 0.11)]),
}
FRAME = 9.5  # width
TEMPLE = 0.23  # from a lens's middle to its edge


def eye(on: Surface, f: Features, side: int) -> None:
    """One eye: the lids open as the expression has them, and cut off what of the iris is behind them."""
    who = on.head.person
    half, up, down, drop = (value * f.eye for value in EYES[who.eyes])
    up, down, tilt = up * f.look.lid, down * (0.5 + 0.5 * f.look.lid), drop - 0.034 * who.eye_tilt

    def lids(across: Points) -> tuple[Points, Points]:
        """Heights of both lids from the inner corner, -1, to the outer, 1."""
        arch = np.sqrt(1 - across**2 * 0.999)
        return tilt * across - up * arch, tilt * across + down * arch

    across = np.linspace(-1, 1, 13)
    upper, lower = (np.stack((side * (f.gap + half * across), heights), axis=1) for heights in lids(across))
    opening = np.concatenate((upper, lower[::-1]))
    on.shade(opening + (0, -0.018), mix(SKINS[who.skin], (90, 24, 20), 0.35), 0.45)
    on.shape(opening, EYEBALL, line=0.4)
    middle, iris = side * f.gap + 0.035 * on.head.figure.gaze, IRISES[who.eye_colour]
    for size, hue in ((1.0, mix(iris, BLACK, 0.35)), (RIM, iris), (0.42, PUPIL)):
        disc = ring(middle, -0.008, IRIS * f.eye * size, IRIS * f.eye * size)
        disc[:, 1] = np.clip(disc[:, 1], *lids(np.clip((disc[:, 0] * side - f.gap) / half, -1, 1)))
        on.shape(disc, hue)
    on.shape(ring(middle + 0.03, -0.04 * f.look.lid, 0.024, 0.024, 8), WHITE)
    on.stroke(upper, mix(hair_colour(on.head), LASH, 0.8), 6.0)


def brow(on: Surface, f: Features, side: int) -> None:
    reach, thick = 0.20 * f.eye**0.5, 0.038 + 0.022 * on.head.person.brow_weight
    shift = 0.01 - f.look.lift - 0.04 * (f.eye - 1)
    frown = (f.look.frown, 0.0, -0.3 * f.look.frown)
    along = f.gap + np.array((-reach, 0.02, reach))
    heights = np.array(BROWS[on.head.person.brows]) + frown + shift
    top, low = (
        bow(np.stack((along, heights + thick * np.array(share)), axis=1))
        for share in (np.negative(ABOVE), BELOW)
    )  # fmt: skip
    hue = mix(hair_colour(on.head), BLACK, 0.28)
    on.shape(np.concatenate((top, low[::-1])) * (side, 1), hue, 0.03, line=0.3)


def glasses(on: Surface, f: Features) -> None:
    who = on.head.person
    if who.glasses == "none":
        return
    hue = FRAMES[who.frames]
    for side in SIDES:
        lens = LENSES[who.glasses] * (side, 1) + (side * f.gap, 0.02)
        on.shade(lens, (210, 232, 248), 0.16, 0.10)
        on.stroke(np.concatenate((lens, lens[:2])), hue, FRAME, 0.10)
        on.stroke([(side * (f.gap + TEMPLE), -0.04), (side * on.head.half * 0.99, -0.02)], hue, FRAME * 0.8, 0.06)
    on.stroke(bow([(TEMPLE - f.gap, 0.0), (0, -0.05), (f.gap - TEMPLE, 0.0)]), hue, FRAME, 0.12)
