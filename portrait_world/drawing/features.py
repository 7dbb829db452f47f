"""The layout of a face, computed from a person's attributes and an expression. In head units."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from .canvas import Colour, Points
from .head import Head

SIDES = (-1, 1)  # the viewer's left and right
AVERAGE_HALF_WIDTH = 0.76  # of a face
NOSE_LIFT, MOUTH_LIFT = 0.20, 0.03  # height of the tip of the nose and of the mouth above the face surface

SKIN_COLOURS: dict[str, Colour] = {
    "porcelain": (250, 226, 212), "rose": (244, 204, 188), "peach": (238, 188, 156), "olive": (216, 174, 128),
    "tan": (202, 148, 104), "caramel": (172, 116, 78), "brown": (130, 82, 56), "dark": (88, 56, 42),
}  # fmt: skip


@dataclass(frozen=True)
class ExpressionShape:
    """How an expression changes a face: offsets in head units, and scale factors."""

    brow_lift: float = 0.0
    brow_frown: float = 0.0  # lowers the inner ends of the brows
    lid_scale: float = 1.0
    mouth_corner_lift: float = 0.0
    mouth_opening: float = 0.0
    mouth_width_scale: float = 1.0


EXPRESSION_SHAPES: dict[str, ExpressionShape] = {
    "neutral": ExpressionShape(mouth_corner_lift=0.03),
    "smiling": ExpressionShape(brow_lift=0.01, lid_scale=0.86, mouth_corner_lift=0.085, mouth_width_scale=1.18),
    "laughing": ExpressionShape(
        brow_lift=0.04, lid_scale=0.58, mouth_corner_lift=0.09, mouth_opening=0.19, mouth_width_scale=1.24
    ),
    "sad": ExpressionShape(
        brow_lift=0.01, brow_frown=-0.075, lid_scale=0.80, mouth_corner_lift=-0.075, mouth_width_scale=0.92
    ),
    "surprised": ExpressionShape(brow_lift=0.10, lid_scale=1.30, mouth_opening=0.20, mouth_width_scale=0.72),
    "angry": ExpressionShape(
        brow_lift=-0.03, brow_frown=0.095, lid_scale=0.78, mouth_corner_lift=-0.05, mouth_width_scale=0.96
    ),
}


@dataclass(frozen=True)
class FaceLayout:
    """The positions and sizes of a person's features with one expression."""

    eye_offset: float  # of each eye from the vertical axis
    eye_scale: float
    nose_height: float  # y of the tip
    nose_half_width: float
    mouth_height: float  # y of the mouth
    mouth_half_width: float
    expression: ExpressionShape

    @property
    def mouth_corner_height(self) -> float:
        """The y of the mouth corners."""
        return self.mouth_height - self.expression.mouth_corner_lift


def compute_face_layout(head: Head) -> FaceLayout:
    person, expression = head.person, EXPRESSION_SHAPES[head.figure.expression]
    scale = head.half_width / AVERAGE_HALF_WIDTH
    return FaceLayout(
        eye_offset=(0.315 + 0.042 * person.eye_gap) * scale,
        eye_scale=(1.24 + 0.20 * person.eye_size) * scale**0.5,
        nose_height=0.36 * head.chin_height + 0.06 * person.nose_length,
        nose_half_width=(0.115 + 0.045 * person.nose_width) * scale,
        mouth_height=0.635 * head.chin_height + 0.03 * person.nose_length,
        mouth_half_width=(0.235 + 0.058 * person.mouth_width) * scale * expression.mouth_width_scale,
        expression=expression,
    )


def compute_key_points(head: Head) -> Points:
    """Left eye, right eye, tip of the nose, left and right mouth corner in canvas pixels: [5, 2]."""
    layout = compute_face_layout(head)
    eyes = head.project_onto_face([(side * layout.eye_offset, 0.0) for side in SIDES])
    corners = head.project_onto_face(
        [(side * layout.mouth_half_width, layout.mouth_corner_height) for side in SIDES], MOUTH_LIFT
    )
    return np.concatenate((eyes, head.project_onto_face([(0.0, layout.nose_height)], NOSE_LIFT), corners))
