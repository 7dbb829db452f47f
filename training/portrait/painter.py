"""Paints people into a scene, and says where their faces are."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray
from PIL import Image, ImageFilter

from . import clothes, eyes, face, hair, places
from .canvas import BODY, FINE, Canvas, smooth
from .features import SKINS, features, key_points
from .head import Head
from .head import head as head_of
from .media import STYLES, Sheet
from .people import Person
from .scenes import Scene
from .surface import Surface

FOREHEAD = -0.66  # where a detector's box begins, in head units


@dataclass(frozen=True)
class Painted:
    """A picture and, for each person in the order given, where the face is; in pixels, whose middles are integers."""

    image: NDArray[np.uint8]  # [side, side, 3], RGB
    kps: NDArray[np.float32]  # [people, 5, 2]: left eye, right eye, nose, corners of the mouth, as the viewer sees them
    box: NDArray[np.float32]  # [people, 4]: left, top, right, bottom of the face from the forehead to the chin
    face: NDArray[np.bool_]  # [people, side, side]: without hair, with its beard
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
        _figure(canvas, head, number)
    owners = np.asarray(canvas.labels)[FINE // 2 :: FINE, FINE // 2 :: FINE]
    drawn = np.asarray(canvas.image.reduce(FINE), dtype=np.float32) / 255
    finished = style.finish(drawn, Sheet(scene, heads, owners, scene.seed))
    kps = np.stack([key_points(head) for head in heads])
    boxes = np.stack([_box(head) for head in heads])
    numbers = 2 * np.arange(len(heads))[:, None, None] + 1
    return Painted(
        image=(np.clip(finished, 0, 1) * 255 + 0.5).astype(np.uint8),
        kps=(kps / FINE - 0.5).astype(np.float32),
        box=(boxes / FINE - 0.5).astype(np.float32),
        face=owners == numbers + 1,
        head=(owners == numbers) | (owners == numbers + 1),
    )


def _box(head: Head) -> NDArray[np.floating]:
    outline = head.outline()
    edge = head.rim(outline[outline[:, 1] >= FOREHEAD])
    return np.concatenate((edge.min(0), edge.max(0)))


def _figure(canvas: Canvas, head: Head, number: int) -> None:
    """One person, from what is furthest to what is nearest."""
    skin, label, body = SKINS[head.person.skin], 2 * number + 1, BODY - number
    on, where = Surface(canvas, head), features(head)
    clothes.body(canvas, head, body)
    hair.behind(canvas, head, label)
    clothes.neck(canvas, head, skin, body)
    face.ears(canvas, head, label)
    face.earrings(canvas, head, label)
    canvas.shape(head.rim(smooth(head.outline())), skin, label + 1)
    hair.beard(on, where.mouth, label + 1)
    face.draw(on, where)
    face.mouth(on, where)
    hair.before(canvas, head, label)
    eyes.glasses(on, where)
