"""Paints people into a scene, with key points, boxes and masks of their faces."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray
from PIL import Image, ImageFilter

from . import clothes, eyes, face, hair, places
from .canvas import BODY_LABEL, SUPERSAMPLING, Canvas, smooth_outline
from .features import SKIN_COLOURS, compute_face_layout, compute_key_points
from .head import Head, place_head
from .head_surface import HeadSurface
from .media import DRAWING_STYLES, Drawing
from .people import Person
from .scenes import Scene

FOREHEAD_HEIGHT = -0.66  # y of the upper edge of face boxes, in head units


@dataclass(frozen=True)
class PaintedImage:
    """An image and its annotations, people in the order of the scene. Pixel centers have integer coordinates."""

    image: NDArray[np.uint8]  # [H, W, 3], RGB
    key_points: NDArray[np.float32]  # [people, 5, 2]: left eye, right eye, nose, mouth corners; the viewer's left
    boxes: NDArray[np.float32]  # [people, 4]: left, top, right, bottom of the face, forehead to chin
    face_masks: NDArray[np.bool_]  # [people, H, W]: without hair, with beard
    head_masks: NDArray[np.bool_]  # [people, H, W]: with hair


def paint_scene(people: Sequence[Person], scene: Scene, image_size: int = 128) -> PaintedImage:
    """Paint an image of this height. Raises ValueError unless the scene has a figure for each person."""
    if len(people) != len(scene.figures):
        raise ValueError(
            f"got {len(people)} people for a scene of {len(scene.figures)}; expected one person per figure"
        )
    style = DRAWING_STYLES[scene.style]
    canvas = Canvas(image_size, style.medium, scene.image_width)
    places.draw_place(canvas, scene.place, scene.mirrored)
    if style.background_blur:
        small = canvas.image.reduce(SUPERSAMPLING).filter(
            ImageFilter.GaussianBlur(style.background_blur * image_size / 128)
        )
        canvas.image.paste(small.resize(canvas.image.size, Image.Resampling.BILINEAR))
    heads = [place_head(person, figure, image_size) for person, figure in zip(people, scene.figures, strict=True)]
    for number, head in enumerate(heads):
        _draw_person(canvas, head, number)
    labels = np.asarray(canvas.labels)[SUPERSAMPLING // 2 :: SUPERSAMPLING, SUPERSAMPLING // 2 :: SUPERSAMPLING]
    drawn = np.asarray(canvas.image.reduce(SUPERSAMPLING), dtype=np.float32) / 255
    finished = style.render(drawn, Drawing(scene, heads, labels))
    kps = np.stack([compute_key_points(head) for head in heads])
    boxes = np.stack([_face_box(head) for head in heads])
    numbers = 2 * np.arange(len(heads))[:, None, None] + 1
    return PaintedImage(
        image=(np.clip(finished, 0, 1) * 255 + 0.5).astype(np.uint8),
        key_points=(kps / SUPERSAMPLING - 0.5).astype(np.float32),
        boxes=(boxes / SUPERSAMPLING - 0.5).astype(np.float32),
        face_masks=labels == numbers + 1,
        head_masks=(labels == numbers) | (labels == numbers + 1),
    )


def _face_box(head: Head) -> NDArray[np.floating]:
    outline = head.compute_outline()
    edge = head.project_silhouette(outline[outline[:, 1] >= FOREHEAD_HEIGHT])
    return np.concatenate((edge.min(0), edge.max(0)))


def _draw_person(canvas: Canvas, head: Head, number: int) -> None:
    """Draw one person from back to front."""
    skin, label, body = SKIN_COLOURS[head.person.skin], 2 * number + 1, BODY_LABEL - number
    surface, layout = HeadSurface(canvas, head), compute_face_layout(head)
    clothes.draw_body(canvas, head, body)
    hair.draw_back_hair(canvas, head, label)
    clothes.draw_neck(canvas, head, skin, body)
    face.draw_ears(canvas, head, label)
    face.draw_earrings(canvas, head, label)
    canvas.draw_shape(head.project_silhouette(smooth_outline(head.compute_outline())), skin, label + 1)
    hair.draw_beard(surface, layout.mouth_height, label + 1)
    face.draw_face(surface, layout)
    face.draw_mouth(surface, layout)
    hair.draw_front_hair(canvas, head, label)
    eyes.draw_glasses(surface, layout)
