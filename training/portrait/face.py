"""A face but for its eyes: skin, nose, mouth, ears, and what years and chance add."""

from __future__ import annotations

import numpy as np

from .canvas import BLACK, WHITE, Canvas, Colour, Points, bow, mix, ring, smooth
from .eyes import brow, eye
from .features import MOUTH_LIFT, NOSE_LIFT, SIDES, SKINS, USUAL, Features
from .head import Head
from .surface import Surface

# lip colour -> the colour, and how much of it covers the skin's
LIPS: dict[str, tuple[Colour, float]] = {
    "natural": ((178, 84, 80), 0.42), "rose": ((222, 96, 116), 0.75), "berry": ((150, 34, 74), 0.85),
    "brick": ((186, 62, 42), 0.85),
}  # fmt: skip
THROAT, TEETH, GOLD = (92, 26, 34), (250, 246, 240), (234, 192, 76)
# ears -> half axes, and how far the tip stands up
EARS: dict[str, tuple[float, float, float]] = {
    "small": (0.09, 0.15, 0.0), "round": (0.14, 0.20, 0.0), "large": (0.22, 0.27, 0.02), "pointed": (0.13, 0.20, 0.24),
}  # fmt: skip
EAR, BACK = 0.10, -0.26  # the height of an ear's middle, and its depth
# age -> how deep the lines are, and whether the forehead has some
AGES: dict[str, tuple[float, bool]] = {"smooth": (0.0, False), "lined": (0.62, False), "old": (1.0, True)}
# cheeks -> shape on the viewer's right, what is mixed into the skin, how much, how dense
CHEEKS: dict[str, tuple[tuple[Points, Colour, float, float], ...]] = {
    "pale": (),
    "rosy": (
        (ring(0.42, 0.33, 0.19, 0.14), (226, 60, 60), 0.5, 0.28),
        (ring(0.42, 0.33, 0.125, 0.092), (226, 60, 60), 0.5, 0.30),
    ),
    "hollow": ((smooth([(0.62, 0.22), (0.44, 0.40), (0.36, 0.62), (0.52, 0.52)]), (60, 20, 20), 0.42, 0.26),),
}
# On the viewer's right; the left is its mirror image.
FRECKLES = (
    (0.14, 0.22), (0.22, 0.28), (0.30, 0.23), (0.38, 0.29), (0.45, 0.23), (0.26, 0.35), (0.36, 0.36), (0.18, 0.15),
    (0.46, 0.33), (0.06, 0.17),
)  # fmt: skip
SCAR, MOLE = ((0.26, 0.20), (0.36, 0.24), (0.38, 0.36), (0.50, 0.42)), (0.33, 0.44)


def draw(on: Surface, f: Features) -> None:
    """All of the face but the beard, which is below the mouth, and the glasses, which are above the hair."""
    skin = SKINS[on.head.person.skin]
    _cheeks(on, skin)
    _lines(on, f, skin)
    for side in SIDES:
        eye(on, f, side)
        brow(on, f, side)
    _nose(on, f, skin)
    _mark(on, skin)


def ears(canvas: Canvas, head: Head, label: int) -> None:
    """The ears, behind the face: the further one hides as the head turns."""
    skin, inside = (mix(SKINS[head.person.skin], hue, share) for hue, share in ((BLACK, 0.04), ((150, 40, 30), 0.3)))
    wide, high, tip = EARS[head.person.ears]
    points = [(0.0, -high), (wide * 0.8, -high - tip), (wide, -high * 0.3), (wide * 0.6, high * 0.6), (0.0, high)]
    for side in SIDES:
        shape = smooth(points) * (side, 1)
        canvas.shape(head.rim(shape + (side * head.half * 0.97, EAR), BACK), skin, label)
        canvas.shade(head.rim(shape * (0.55, 0.6) + (side * head.half, EAR), BACK), inside, 0.7)


def earrings(canvas: Canvas, head: Head, label: int) -> None:
    if head.person.earrings == "none":
        return
    low = EAR + 0.02 + EARS[head.person.ears][1]
    for side in SIDES:
        x = side * head.half * 1.04
        if head.person.earrings == "studs":
            canvas.shape(head.rim(ring(x, low, 0.055, 0.055, 10), BACK), GOLD, label, 0.6)
        else:
            hoop = ring(x, low + 0.14, 0.11, 0.15)
            canvas.stroke(head.rim(np.concatenate((hoop, hoop[:2])), BACK), GOLD, 7.5 * head.figure.size, label)


def _cheeks(on: Surface, skin: Colour) -> None:
    who = on.head.person
    for side in SIDES:
        for points, hue, share, opacity in CHEEKS[who.cheeks]:
            on.shade(points * (side * on.head.half / USUAL, 1), mix(skin, hue, share), opacity)
        for x, y in FRECKLES if who.freckles == "some" else ():
            on.shade(ring(side * x, y, 0.021, 0.021, 8), mix(skin, (130, 54, 20), 0.75), 0.95)


def _lines(on: Surface, f: Features, skin: Colour) -> None:
    """The folds that years leave: beside the mouth, below the eyes, on the forehead."""
    deep, forehead = AGES[on.head.person.age]
    folds = (
        ((f.wing + 0.05, f.nose), (f.wing + 0.15, f.nose + 0.12), (f.half + 0.07, f.mouth)),
        ((f.gap - 0.13, 0.15), (f.gap, 0.195), (f.gap + 0.14, 0.14)),
    )
    for fold in folds if deep else ():
        for side in SIDES:
            on.stroke(bow(fold) * (side, 1), mix(skin, (110, 40, 30), 0.46 * deep), 4.6 * deep)
    for y in (-0.50, -0.42) if forehead else ():
        on.stroke(bow([(-0.3, y), (0, y - 0.03), (0.3, y)]), mix(skin, (60, 20, 20), 0.42), 4.0)


def _nose(on: Surface, f: Features, skin: Colour) -> None:
    """Bridge in shadow on the side that the head turns from, wings, nostrils, a lit tip."""
    dark, turned = mix(skin, (90, 24, 20), 0.46), -1 if on.head.figure.yaw >= 0 else 1
    raised = on.head.person.nose_tip
    tip, wing = f.nose + 0.03 * raised, f.wing
    bridge = smooth(
        [(0.05, -0.02), (0.045, 0.14), (wing * 0.8, tip - 0.06), (wing, tip + 0.02), (0.0, tip + 0.01), (0.01, 0.14)]
    )
    on.shade(bridge * (turned, 1), dark, 0.42, np.interp(bridge[:, 1], (0.0, tip), (0.02, 0.16)))
    base = [(-wing, tip - 0.03), (-wing * 0.86, tip + 0.045), (-wing * 0.35, tip + 0.035)]
    base += [(0.0, tip + 0.065 + 0.03 * raised), *((-x, y) for x, y in reversed(base))]
    on.line(bow(base), mix(skin, (70, 18, 18), 0.62), 6.0, 0.13)
    for side in SIDES:
        on.shape(ring(side * wing * 0.48, tip + 0.035, wing * 0.24, 0.017, 8), dark, 0.13)
    on.shade(ring(0.0, tip - 0.045, wing * 0.42, 0.05, 10), mix(skin, WHITE, 0.6), 0.5, NOSE_LIFT)


def mouth(on: Surface, f: Features) -> None:
    """Lips, and between them a line or, as far as the mouth is open, the throat and the upper teeth."""
    hue, share = LIPS[on.head.person.lip_colour]
    lip, look = mix(SKINS[on.head.person.skin], hue, share), f.look
    full, half = 0.068 + 0.030 * on.head.person.lips, f.half
    top, bottom = f.mouth + 0.35 * look.corner - 0.25 * look.open, f.mouth + 0.35 * look.corner + 0.75 * look.open

    def across(*inner: tuple[float, float]) -> Points:
        """From the left corner to the right; the points between mirrored, x in half widths of the mouth."""
        right = [*((x * half, y) for x, y in inner), (half, f.corner)]
        return bow([*((-x, y) for x, y in reversed(right) if x), *right])

    upper = across((0.0, top - full * 0.7), (0.16, top - full), (0.45, top - full * 0.75))
    under = across((0.0, bottom + full * 1.3), (0.5, bottom + full * 0.9))
    on.shape(np.concatenate((upper, under[::-1])), lip, MOUTH_LIFT, line=0.5)
    seam = across((0.0, top + 0.01), (0.4, top))
    if not look.open:
        on.line(seam, mix(lip, (50, 10, 16), 0.65), 5.4, MOUTH_LIFT)
        return
    low = across((0.0, bottom + 0.01), (0.5, bottom))
    on.shape(np.concatenate((seam, low[::-1])) * (0.94, 1), THROAT, MOUTH_LIFT, line=0.3)
    if look.wide > 1:
        teeth = np.concatenate((seam * (0.86, 1), (seam * (0.80, 1) + (0, 0.35 * look.open))[::-1]))
        on.shape(teeth, TEETH, MOUTH_LIFT)


def _mark(on: Surface, skin: Colour) -> None:
    where, _, kind = on.head.person.mark.partition(" ")
    side = -1 if where == "left" else 1
    if kind == "mole":
        on.shape(ring(side * MOLE[0], MOLE[1], 0.042, 0.042, 10), mix(skin, (40, 16, 12), 0.85))
    if kind == "scar":
        for hue, share, width in (((150, 30, 50), 0.75, 10.0), ((255, 210, 205), 0.7, 4.0)):
            on.stroke(bow(SCAR) * (side, 1), mix(skin, hue, share), width, 0.01)
