"""The features of a face, drawn on the head's surface: eyes, brows, nose, mouth, and what years and chance add."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from .canvas import BLACK, WHITE, Canvas, Colour, Points, mix, ring, smooth
from .hair import colour as hair_colour
from .head import Head

SKINS: dict[str, Colour] = {
    "porcelain": (250, 226, 212), "rose": (244, 204, 188), "peach": (238, 188, 156), "olive": (216, 174, 128),
    "tan": (202, 148, 104), "caramel": (172, 116, 78), "brown": (130, 82, 56), "dark": (88, 56, 42),
}  # fmt: skip
IRISES: dict[str, Colour] = {
    "brown": (112, 66, 32), "hazel": (166, 120, 48), "green": (70, 146, 84), "blue": (58, 126, 208),
    "grey": (138, 152, 164), "black": (36, 26, 24),
}  # fmt: skip
LIPS: dict[str, tuple[Colour, float]] = {
    "natural": ((178, 84, 80), 0.42), "rose": ((222, 96, 116), 0.75), "berry": ((150, 34, 74), 0.85),
    "brick": ((186, 62, 42), 0.85),
}  # fmt: skip
FRAMES: dict[str, Colour] = {"black": (36, 34, 40), "red": (190, 44, 52), "gold": (204, 156, 62)}


@dataclass(frozen=True)
class Look:
    """What an expression does, in head units: brows, lids (times), the mouth's corners, opening and width."""

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
# glasses -> points of the right lens around its middle
LENSES: dict[str, Points] = {
    "round": ring(0, 0, 0.235, 0.235),
    "square": smooth([(-0.23, -0.17), (0.0, -0.18), (0.25, -0.17), (0.25, 0.15), (0.0, 0.18), (-0.22, 0.15)]),
    "cat eye": smooth([(-0.22, -0.10), (0.05, -0.15), (0.33, -0.25), (0.26, 0.10), (0.02, 0.18), (-0.20, 0.11)]),
}
# ears -> half axes, and how far the tip stands up
EARS: dict[str, tuple[float, float, float]] = {
    "small": (0.09, 0.15, 0.0), "round": (0.14, 0.20, 0.0), "large": (0.22, 0.27, 0.02), "pointed": (0.13, 0.20, 0.24),
}  # fmt: skip
# In head units, on the viewer's right; the left is their mirror image.
FRECKLES = (
    (0.14, 0.22), (0.22, 0.28), (0.30, 0.23), (0.38, 0.29), (0.45, 0.23), (0.26, 0.35), (0.36, 0.36), (0.18, 0.15),
    (0.46, 0.33), (0.06, 0.17),
)  # fmt: skip
SCAR, MOLE = ((0.26, 0.20), (0.36, 0.24), (0.38, 0.36), (0.50, 0.42)), (0.33, 0.44)
SIDES = (-1, 1)


@dataclass(frozen=True)
class Measures:
    """Where a person's features are, expression included, in head units."""

    gap: float  # of each eye from the middle
    eye: float  # times the usual size
    nose: float  # height of its tip
    wing: float  # half its width
    mouth: float  # height
    half: float  # half the mouth's width
    look: Look


def measures(head: Head) -> Measures:
    who, look = head.person, LOOKS[head.figure.expression]
    scale = head.half / 0.76
    mouth = head.chin * 0.635 + 0.03 * who.nose_length
    return Measures(
        gap=(0.315 + 0.042 * who.eye_gap) * scale,
        eye=(1.24 + 0.20 * who.eye_size) * scale**0.5,
        nose=0.36 * head.chin + 0.06 * who.nose_length,
        wing=(0.115 + 0.045 * who.nose_width) * scale,
        mouth=mouth,
        half=(0.235 + 0.058 * who.mouth_width) * scale * look.wide,
        look=look,
    )


def key_points(head: Head) -> Points:
    """Left eye, right eye, tip of the nose, left and right corner of the mouth, in fine pixels: [5, 2]."""
    m = measures(head)
    eyes = head.place([(-m.gap, 0.0), (m.gap, 0.0)])
    corners = head.place([(side * m.half, m.mouth - m.look.corner) for side in SIDES], 0.03)
    return np.concatenate((eyes, head.place([(0.0, m.nose)], 0.2), corners))


def draw(canvas: Canvas, head: Head) -> None:
    """Everything on the face but the beard, which the mouth lies on, and the hair."""
    skin, m = SKINS[head.person.skin], measures(head)
    _skin(canvas, head, m, skin)
    for side in SIDES:
        _eye(canvas, head, m, side)
    _nose(canvas, head, m, skin)
    _mark(canvas, head, skin)


def ears(canvas: Canvas, head: Head, label: int) -> None:
    """The ears, behind the face: the further one hides as the head turns."""
    skin = SKINS[head.person.skin]
    wide, high, tip = EARS[head.person.ears]
    for side in SIDES:
        shape = smooth(
            [(0.0, -high), (wide * 0.8, -high - tip), (wide, -high * 0.3), (wide * 0.6, high * 0.6), (0, high)]
        )
        at = shape * (side, 1) + (side * head.half * 0.97, 0.10)
        canvas.shape(head.rim(at, -0.26), mix(skin, BLACK, 0.04), label)
        canvas.shade(
            head.rim(shape * (side * 0.55, 0.6) + (side * head.half, 0.10), -0.26), mix(skin, (150, 40, 30), 0.3), 0.7
        )


def earrings(canvas: Canvas, head: Head, label: int) -> None:
    high = EARS[head.person.ears][1]
    for side in SIDES if head.person.earrings != "none" else ():
        lobe = (side * head.half * 1.04, 0.12 + high)
        if head.person.earrings == "studs":
            canvas.shape(head.rim(ring(*lobe, 0.055, 0.055, 10), -0.24), (242, 206, 92), label, 0.6)
        else:
            canvas.line(
                head.rim(ring(lobe[0], lobe[1] + 0.14, 0.11, 0.15), -0.24), (226, 178, 60), 7.5 * head.figure.size
            )


def _skin(canvas: Canvas, head: Head, m: Measures, skin: Colour) -> None:
    """Blush, hollows, freckles and the lines of age."""
    who = head.person
    warm, dark = mix(skin, (226, 60, 60), 0.5), mix(skin, (60, 20, 20), 0.42)
    for side in SIDES:
        if who.cheeks == "rosy":
            for size, opacity in ((1.0, 0.28), (0.66, 0.30)):
                canvas.shade(head.place(ring(side * 0.42, 0.33, 0.19 * size, 0.14 * size)), warm, opacity)
        if who.cheeks == "hollow":
            hollow = [(0.62, 0.22), (0.44, 0.40), (0.36, 0.62), (0.52, 0.52)]
            canvas.shade(head.place(smooth(np.array(hollow) * (side * head.half / 0.76, 1))), dark, 0.26)
        for x, y in FRECKLES if who.freckles == "some" else ():
            canvas.shade(head.place(ring(side * x, y, 0.021, 0.021, 8)), mix(skin, (130, 54, 20), 0.75), 0.95)
    for points in _lines(m) if who.age != "smooth" else ():
        deep = 1.0 if who.age == "old" else 0.62
        canvas.stroke(
            head.place(smooth(points, closed=False)),
            mix(skin, (110, 40, 30), 0.46 * deep),
            4.6 * deep * head.figure.size,
        )
    if who.age == "old":
        for y in (-0.50, -0.42):
            canvas.stroke(
                head.place(smooth([(-0.3, y), (0, y - 0.03), (0.3, y)], closed=False)), dark, 4 * head.figure.size
            )


def _lines(m: Measures) -> list[list[tuple[float, float]]]:
    """Folds beside the mouth and below the eyes."""
    out = []
    for side in SIDES:
        out.append(
            [
                (side * (m.wing + 0.05), m.nose),
                (side * (m.wing + 0.15), m.nose + 0.12),
                (side * (m.half + 0.07), m.mouth),
            ]
        )
        out.append([(side * (m.gap - 0.13), 0.15), (side * m.gap, 0.195), (side * (m.gap + 0.14), 0.14)])
    return out


def _eye(canvas: Canvas, head: Head, m: Measures, side: int) -> None:
    who, unit = head.person, head.figure.size
    half, up, down, drop = (value * m.eye for value in EYES[who.eyes])
    up, down = up * m.look.lid, down * (0.5 + 0.5 * m.look.lid)
    tilt = drop - 0.034 * who.eye_tilt
    t = np.linspace(-1, 1, 13)
    bow = np.sqrt(1 - t**2 * 0.999)
    upper = np.stack((m.gap + half * t, tilt * t - up * bow), axis=1) * (side, 1)
    lower = np.stack((m.gap + half * t, tilt * t + down * bow), axis=1) * (side, 1)
    open_ = np.concatenate((upper, lower[::-1]))
    canvas.shade(head.place(open_ * (1, 1.0) + (0, -0.018)), mix(SKINS[who.skin], (90, 24, 20), 0.35), 0.45)
    canvas.shape(head.place(open_), (252, 250, 246), line=0.4)
    middle, size = side * m.gap + 0.035 * head.figure.gaze, 0.092 * m.eye
    for scale, hue in (
        (1.0, mix(IRISES[who.eye_colour], BLACK, 0.35)),
        (0.82, IRISES[who.eye_colour]),
        (0.42, (14, 12, 16)),
    ):
        disc = ring(middle, -0.008, size * scale, size * scale)
        across = np.clip((disc[:, 0] * side - m.gap) / half, -1, 1)
        bend = np.sqrt(1 - across**2 * 0.999)
        disc[:, 1] = np.clip(disc[:, 1], tilt * across - up * bend, tilt * across + down * bend)
        canvas.shape(head.place(disc), hue, line=0)
    canvas.shape(head.place(ring(middle + 0.03, -0.04 * m.look.lid, 0.024, 0.024, 8)), WHITE, line=0)
    lash = upper[:-1] if side < 0 else upper
    canvas.stroke(head.place(lash), mix(hair_colour(head), (24, 16, 18), 0.8), 6.0 * unit)
    _brow(canvas, head, m, side)


def _brow(canvas: Canvas, head: Head, m: Measures, side: int) -> None:
    inner, middle, outer = BROWS[head.person.brows]
    reach, thick = 0.20 * m.eye**0.5, 0.038 + 0.022 * head.person.brow_weight
    lift = 0.01 - m.look.lift - 0.04 * (m.eye - 1)
    spine = [
        (m.gap - reach, inner + m.look.frown), (m.gap + 0.02, middle), (m.gap + reach, outer - 0.3 * m.look.frown),
    ]  # fmt: skip
    top = smooth(
        [(x, y + lift - thick * (0.5 + 0.5 * (number == 1))) for number, (x, y) in enumerate(spine)], closed=False
    )
    low = smooth([(x, y + lift + thick * (1.0, 0.8, 0.0)[number]) for number, (x, y) in enumerate(spine)], closed=False)
    hue = mix(hair_colour(head), BLACK, 0.28)
    canvas.shape(head.place(np.concatenate((top, low[::-1])) * (side, 1), 0.03), hue, line=0.3)


def _nose(canvas: Canvas, head: Head, m: Measures, skin: Colour) -> None:
    who, dark = head.person, mix(skin, (90, 24, 20), 0.46)
    tip = m.nose + 0.03 * who.nose_tip
    side = 1 if head.figure.yaw >= 0 else -1
    bridge = [
        (0.05, -0.02),
        (0.045, 0.14),
        (m.wing * 0.8, tip - 0.06),
        (m.wing, tip + 0.02),
        (0.0, tip + 0.01),
        (0.01, 0.14),
    ]
    rise = np.interp(np.array(smooth(bridge))[:, 1], (0.0, tip), (0.02, 0.16))
    canvas.shade(head.place(smooth(bridge) * (-side, 1), rise), dark, 0.42)
    base = [(-m.wing, tip - 0.03), (-m.wing * 0.86, tip + 0.045), (-m.wing * 0.35, tip + 0.035)]
    base += [(0.0, tip + 0.065 + 0.03 * who.nose_tip), *((-x, y) for x, y in reversed(base))]
    canvas.line(head.place(smooth(base, closed=False), 0.13), mix(skin, (70, 18, 18), 0.62), 6.0 * head.figure.size)
    for edge in SIDES:
        canvas.shape(head.place(ring(edge * m.wing * 0.48, tip + 0.035, m.wing * 0.24, 0.017, 8), 0.13), dark, line=0)
    canvas.shade(head.place(ring(0.0, tip - 0.045, m.wing * 0.42, 0.05, 10), 0.2), mix(skin, WHITE, 0.6), 0.5)


def mouth(canvas: Canvas, head: Head) -> None:
    who, m = head.person, measures(head)
    hue, share = LIPS[who.lip_colour]
    lip, look = mix(SKINS[who.skin], hue, share), m.look
    full, half = 0.068 + 0.030 * who.lips, m.half
    left, right = (-half, m.mouth - look.corner), (half, m.mouth - look.corner)
    top, bottom = m.mouth + 0.35 * look.corner - 0.25 * look.open, m.mouth + 0.35 * look.corner + 0.75 * look.open
    upper = smooth([left, (-half * 0.45, top - full * 0.75), (-half * 0.16, top - full), (0, top - full * 0.7),
                    (half * 0.16, top - full), (half * 0.45, top - full * 0.75), right], closed=False)  # fmt: skip
    under = smooth([right, (half * 0.5, bottom + full * 0.9), (0, bottom + full * 1.3),
                    (-half * 0.5, bottom + full * 0.9), left], closed=False)  # fmt: skip
    canvas.shape(head.place(np.concatenate((upper, under)), 0.03), lip, line=0.5)
    seam_top = smooth([left, (-half * 0.4, top), (0, top + 0.01), (half * 0.4, top), right], closed=False)
    if not look.open:
        canvas.line(head.place(seam_top, 0.03), mix(lip, (50, 10, 16), 0.65), 5.4 * head.figure.size)
        return
    seam_low = smooth([right, (half * 0.5, bottom), (0, bottom + 0.01), (-half * 0.5, bottom), left], closed=False)
    canvas.shape(head.place(np.concatenate((seam_top, seam_low)) * (0.94, 1), 0.03), (92, 26, 34), line=0.3)
    if look.wide < 1:
        return
    teeth = np.concatenate((seam_top * (0.86, 1), (seam_top * (0.80, 1) + (0, 0.35 * look.open))[::-1]))
    canvas.shape(head.place(teeth, 0.03), (250, 246, 240), line=0)


def _mark(canvas: Canvas, head: Head, skin: Colour) -> None:
    side, _, kind = head.person.mark.partition(" ")
    sign = -1 if side == "left" else 1
    if kind == "mole":
        canvas.shape(head.place(ring(sign * MOLE[0], MOLE[1], 0.042, 0.042, 10)), mix(skin, (40, 16, 12), 0.85), line=0)
    if kind == "scar":
        scar = head.place(smooth(SCAR, closed=False) * (sign, 1), 0.01)
        canvas.stroke(scar, mix(skin, (150, 30, 50), 0.75), 10 * head.figure.size)
        canvas.stroke(scar, mix(skin, (255, 210, 205), 0.7), 4 * head.figure.size)


def glasses(canvas: Canvas, head: Head) -> None:
    if head.person.glasses == "none":
        return
    m, lens, hue = measures(head), LENSES[head.person.glasses], FRAMES[head.person.frames]
    width = 9.5 * head.figure.size
    for side in SIDES:
        rim = head.place(lens * (side, 1) + (side * m.gap, 0.02), 0.10)
        canvas.shade(rim, (210, 232, 248), 0.16)
        canvas.stroke(np.concatenate((rim, rim[:2])), hue, width)
        canvas.stroke(
            head.place([(side * (m.gap + 0.23), -0.04), (side * head.half * 0.99, -0.02)], 0.06), hue, width * 0.8
        )
    canvas.stroke(
        head.place(smooth([(-m.gap + 0.23, 0.0), (0, -0.05), (m.gap - 0.23, 0.0)], closed=False), 0.12), hue, width
    )
