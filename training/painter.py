"""Paints people into a scene, and says where their faces are."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray
from PIL import Image, ImageFilter

from . import face, hair, places
from .canvas import BLACK, FINE, WHITE, Canvas, Colour, mix, smooth
from .head import Head
from .head import head as head_of
from .media import STYLES, Sheet
from .people import Person
from .scenes import Scene

CLOTHES: dict[str, Colour] = {
    "red": (198, 52, 52), "blue": (54, 98, 176), "green": (62, 132, 84), "yellow": (236, 196, 74),
    "white": (240, 238, 232), "black": (46, 46, 54), "purple": (126, 76, 156), "orange": (232, 132, 52),
}  # fmt: skip
FOREHEAD = -0.66  # where a detector's box begins, in head units
BODY = 255  # the label of all below the chin, of whomever


@dataclass(frozen=True)
class Painted:
    """A picture and, for each person in the order given, where the face is; in pixels, whose middles are integers."""

    image: NDArray[np.uint8]  # [side, side, 3], RGB
    kps: NDArray[np.float32]  # [people, 5, 2]: left eye, right eye, nose, corners of the mouth, as the viewer sees them
    box: NDArray[np.float32]  # [people, 4]: left, top, right, bottom of the face from the forehead to the chin
    face: NDArray[np.bool_]  # [people, side, side]: without hair
    head: NDArray[np.bool_]  # [people, side, side]: with it


def paint(people: Sequence[Person], scene: Scene, side: int = 128) -> Painted:
    """A picture of `side` pixels. Raises ValueError unless the scene has a place for each of the people."""
    if len(people) != len(scene.figures):
        raise ValueError(f"got {len(people)} people for a scene of {len(scene.figures)}; expected as many as it has")
    style = STYLES[scene.style]
    canvas = Canvas(side, style.medium)
    places.draw(canvas, scene.place, scene.seed)
    if style.blur:
        small = canvas.image.reduce(FINE).filter(ImageFilter.GaussianBlur(style.blur * side / 128))
        canvas.image.paste(small.resize(canvas.image.size, Image.Resampling.BILINEAR))
    heads = [head_of(person, figure, side) for person, figure in zip(people, scene.figures, strict=True)]
    for number, head in enumerate(heads):
        _figure(canvas, head, 2 * number + 1)
    owners = np.asarray(canvas.labels)[FINE // 2 :: FINE, FINE // 2 :: FINE]
    drawn = np.asarray(canvas.image.reduce(FINE), dtype=np.float32) / 255
    finished = style.finish(drawn, Sheet(scene, heads, owners, scene.seed))
    kps = np.stack([face.key_points(head) for head in heads])
    boxes = np.stack([_box(head) for head in heads])
    numbers = 2 * np.arange(len(heads))[:, None, None] + 1
    return Painted(
        image=(np.clip(finished, 0, 1) * 255 + 0.5).astype(np.uint8),
        kps=(kps / FINE - 0.5).astype(np.float32),
        box=(boxes / FINE - 0.5).astype(np.float32),
        face=owners == numbers + 1,
        head=(owners == numbers) | (owners == numbers + 1),
    )


def _box(head: Head) -> NDArray[np.float64]:
    outline = head.outline()
    edge = head.rim(outline[outline[:, 1] >= FOREHEAD])
    return np.concatenate((edge.min(0), edge.max(0)))


def _figure(canvas: Canvas, head: Head, label: int) -> None:
    """One person, from what is furthest to what is nearest. `label` owns the head, the next one the face."""
    skin = face.SKINS[head.person.skin]
    _body(canvas, head, skin)
    hair.behind(canvas, head, label)
    _neck(canvas, head, skin)
    face.ears(canvas, head, label)
    face.earrings(canvas, head, label)
    canvas.shape(head.rim(smooth(head.outline())), skin, label + 1)
    mouth = face.measures(head).mouth
    hair.beard(canvas, head, mouth)
    face.draw(canvas, head)
    face.mouth(canvas, head)
    hair.before(canvas, head, label)
    face.glasses(canvas, head)


def _body(canvas: Canvas, head: Head, skin: Colour) -> None:
    cloth = CLOTHES[head.figure.colour]
    chin = head.chin
    right = [(0.30, chin + 0.22), (0.70, chin + 0.40), (1.30, chin + 0.62), (1.62, chin + 1.10), (1.78, chin + 2.2)]
    right += [(1.90, chin + 7)]
    points = smooth([*right, *((-x, y) for x, y in reversed(right))])
    canvas.shape(head.body(points), cloth, BODY)
    for edge in (-1, 1):
        sleeve = [(edge * 1.16, chin + 1.30), (edge * 1.22, chin + 2.2), (edge * 1.24, chin + 6)]
        canvas.line(head.body(smooth(sleeve, closed=False)), mix(cloth, BLACK, 0.30), 8 * head.figure.size)


def _neck(canvas: Canvas, head: Head, skin: Colour) -> None:
    """The neck, from below the turned head down into the collar."""
    cloth, chin = CLOTHES[head.figure.colour], head.chin
    half = 0.36 + 0.03 * head.person.face_width
    top = head.rim([(-half, 0.45 * chin), (half, 0.45 * chin)], -0.35)
    low = head.body([(half + 0.02, chin + 0.30), (0.0, chin + 0.52), (-half - 0.02, chin + 0.30)])
    _collar(canvas, head, cloth, back=True)
    canvas.shape(np.concatenate((top, low)), mix(skin, BLACK, 0.06), BODY)
    deep = head.rim([(0.0, chin + 0.16)]).clip(top.min(0), low.max(0))
    shadow = np.concatenate((top, 0.45 * top[1:] + 0.55 * low[:1], deep, 0.45 * top[:1] + 0.55 * low[2:]))
    canvas.shade(shadow, mix(skin, (70, 20, 20), 0.5), 0.45)
    _collar(canvas, head, cloth, back=False)


def _collar(canvas: Canvas, head: Head, cloth: Colour, back: bool) -> None:
    chin, kind = head.chin, head.figure.clothes
    deep = mix(cloth, BLACK, 0.22)
    if back:
        if kind == "hoodie":
            hood = [
                (-0.80, chin + 0.45),
                (-0.62, chin + 0.02),
                (0, chin - 0.1),
                (0.62, chin + 0.02),
                (0.80, chin + 0.45),
            ]
            canvas.shape(head.body(smooth(hood)), deep, BODY)
        return
    if kind == "jumper":
        roll = [
            (-0.42, chin + 0.24),
            (0, chin + 0.36),
            (0.42, chin + 0.24),
            (0.46, chin + 0.50),
            (0, chin + 0.66),
            (-0.46, chin + 0.50),
        ]
        canvas.shape(head.body(smooth(roll)), mix(cloth, WHITE, 0.12), BODY)
    if kind == "shirt":
        for edge in (-1, 1):
            flap = [
                (edge * 0.38, chin + 0.20),
                (edge * 0.56, chin + 0.42),
                (edge * 0.26, chin + 0.74),
                (edge * 0.02, chin + 0.50),
            ]
            canvas.shape(head.body(flap), mix(cloth, WHITE, 0.25), BODY)
        canvas.line(head.body([(0, chin + 0.5), (0, chin + 6)]), deep, 7 * head.figure.size)
    if kind == "tee":
        band = smooth([(-0.42, chin + 0.27), (0, chin + 0.55), (0.42, chin + 0.27)], closed=False)
        canvas.stroke(head.body(band), deep, 12 * head.figure.size)
    if kind == "hoodie":
        for edge in (-1, 1):
            front = [
                (edge * 0.40, chin + 0.16),
                (edge * 0.70, chin + 0.22),
                (edge * 0.78, chin + 0.52),
                (edge * 0.10, chin + 0.80),
                (edge * 0.06, chin + 0.60),
            ]
            canvas.shape(head.body(smooth(front)), mix(cloth, BLACK, 0.12), BODY)
            cord = [(edge * 0.16, chin + 0.72), (edge * 0.18, chin + 1.15)]
            canvas.line(head.body(cord), WHITE, 6 * head.figure.size)
