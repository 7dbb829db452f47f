"""The shape and pose of a head, and the projection of points on it into the image.

Head units: 1 is half the height of a face, x to the viewer's right, y down, the origin between the eyes.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from .canvas import SUPERSAMPLING, Points, PointsLike
from .people import Person
from .scenes import Figure

# face -> half widths at OUTLINE_HEIGHTS, y of the chin
FACE_SHAPES: dict[str, tuple[tuple[float, ...], float]] = {
    "oval": ((0.40, 0.64, 0.73, 0.73, 0.62, 0.40, 0.17), 1.00),
    "round": ((0.44, 0.70, 0.82, 0.86, 0.78, 0.54, 0.24), 0.91),
    "square": ((0.46, 0.72, 0.76, 0.76, 0.73, 0.61, 0.33), 0.95),
    "heart": ((0.48, 0.76, 0.82, 0.74, 0.55, 0.29, 0.11), 1.01),
    "long": ((0.38, 0.58, 0.65, 0.66, 0.60, 0.42, 0.20), 1.13),
    "diamond": ((0.32, 0.54, 0.73, 0.80, 0.60, 0.30, 0.13), 1.05),
}
OUTLINE_HEIGHTS = (-0.90, -0.62, -0.22, 0.18, 0.52, 0.80, 0.95)  # below the eyes relative to the chin
SKULL_TOP = -0.98
LAST_CHEEK_INDEX = 3  # below this outline height the jaw attribute widens the face
FACE_DEPTH, PERSPECTIVE_STRENGTH = 0.66, 0.13  # of the face; scale per unit of depth


@dataclass(frozen=True)
class Head:
    """A person's head in an image. `x`, `y` and `unit` (one head unit) in canvas pixels."""

    person: Person
    figure: Figure
    x: float
    y: float
    unit: float

    @property
    def chin_height(self) -> float:
        return FACE_SHAPES[self.person.face][1]

    @property
    def half_width(self) -> float:
        """Half the width of the face at its widest."""
        return max(FACE_SHAPES[self.person.face][0]) * self._width_scale

    @property
    def _width_scale(self) -> float:
        return 1 + 0.08 * self.person.face_width

    def compute_outline(self) -> Points:
        """The outline of the face from the top of the skull around the chin, in head units: [14 + 2, 2]."""
        widths, chin = FACE_SHAPES[self.person.face]
        right = []
        for number, (width, height) in enumerate(zip(widths, OUTLINE_HEIGHTS, strict=True)):
            jaw = 1 + 0.13 * self.person.jaw * (number > LAST_CHEEK_INDEX)
            right.append((width * self._width_scale * jaw, height * (chin if height > 0 else 1)))
        left = [(-x, y) for x, y in reversed(right)]
        return np.array([(0.0, SKULL_TOP), *right, (0.0, chin), *left])

    def project_onto_face(self, points: PointsLike, lift: float | Points = 0.0) -> Points:
        """Project points on the face surface, raised by `lift`, to canvas pixels: [n, 2]."""
        p = np.asarray(points, dtype=np.float64).reshape(-1, 2)
        curvature = 1 - 0.8 * (p[:, 0] / (self.half_width + 0.1)) ** 2 - 0.35 * (p[:, 1] / 1.1) ** 2
        return self.project_at_depth(p, FACE_DEPTH * np.sqrt(np.maximum(curvature, 0.03)) + lift)

    def project_at_depth(self, points: PointsLike, depth: float | Points) -> Points:
        """Project points at a depth (positive is towards the viewer) to canvas pixels: [n, 2]."""
        p = np.asarray(points, dtype=np.float64).reshape(-1, 2)
        z = np.broadcast_to(np.asarray(depth, dtype=np.float64), len(p))
        sin, cos = math.sin(self.figure.yaw), math.cos(self.figure.yaw)
        x, z = p[:, 0] * cos + z * sin, z * cos - p[:, 0] * sin
        sin, cos = math.sin(self.figure.pitch), math.cos(self.figure.pitch)
        y, z = p[:, 1] * cos - z * sin, z * cos + p[:, 1] * sin
        near = 1 + PERSPECTIVE_STRENGTH * (z - FACE_DEPTH)
        return self._to_pixels(np.stack((x * near, y * near), axis=1))

    def project_silhouette(self, points: PointsLike, depth: float = 0.0) -> Points:
        """Project silhouette points to canvas pixels: a turned head keeps its width, the chin moves with the turn."""
        p = np.asarray(points, dtype=np.float64).reshape(-1, 2)
        swing = 0.46 * np.clip(p[:, 1], 0, 1.2) ** 1.4 + 0.10 + depth
        x = p[:, 0] * (1 - 0.35 * (1 - math.cos(self.figure.yaw))) + swing * math.sin(self.figure.yaw)
        y = p[:, 1] - swing * math.sin(self.figure.pitch)
        return self._to_pixels(np.stack((x, y), axis=1))

    def _to_pixels(self, points: Points) -> Points:
        """Rotate points of the image plane by the roll and convert head units to canvas pixels."""
        sin, cos = math.sin(self.figure.roll), math.cos(self.figure.roll)
        return points @ np.array([[cos, sin], [-sin, cos]]) * self.unit + (self.x, self.y)

    def project_body(self, points: PointsLike) -> Points:
        """Project points of the body, which has no rotation, to canvas pixels."""
        p = np.asarray(points, dtype=np.float64).reshape(-1, 2)
        return p * self.unit + (self.x, self.y)


def place_head(person: Person, figure: Figure, image_size: int) -> Head:
    """The head of a person in an image of this height."""
    canvas_size = image_size * SUPERSAMPLING
    x, y, unit = (value * canvas_size for value in (figure.x, figure.y, figure.head_size))
    return Head(person, figure, x, y, unit)


def compute_head_normals(head: Head, shape: tuple[int, int]) -> NDArray[np.floating]:
    """Surface normals of an ellipsoid in place of the head, [3, H, W]: right, down, towards the viewer."""
    nose = 0.15 * math.sin(head.figure.yaw) * head.unit  # the point that faces the viewer moves with the turn
    return _normals_of_ellipse(head.x + nose, head.y, head.unit * 1.05, head.unit * 1.3, shape)


def compute_body_normals(head: Head, shape: tuple[int, int]) -> NDArray[np.floating]:
    """Surface normals of an ellipsoid in place of the body."""
    return _normals_of_ellipse(head.x, head.y + 2.6 * head.unit, head.unit * 1.9, head.unit * 3.2, shape)


def _normals_of_ellipse(
    x: float, y: float, half_width: float, half_height: float, shape: tuple[int, int]
) -> NDArray[np.floating]:
    rows, columns = ((np.arange(length) + 0.5) * SUPERSAMPLING for length in shape)
    across = np.clip((columns - x) / half_width, -0.85, 0.85)[None, :].repeat(shape[0], 0)
    down = np.clip((rows - y) / half_height, -0.85, 0.85)[:, None].repeat(shape[1], 1)
    return np.stack((across, down, np.sqrt(np.maximum(1 - across**2 - down**2, 0.1))))
