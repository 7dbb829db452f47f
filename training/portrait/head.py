"""The shape of a head and where it is in a picture: points on its round surface, turned, nodded, tilted, seen nearby.

Head units: 1 is half a face's height, x to the viewer's right, y down, the origin between the eyes.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from .canvas import FINE, Curve, Points
from .people import Person
from .scenes import Figure

# face -> half widths at the heights below, and the height of the chin
FACES: dict[str, tuple[tuple[float, ...], float]] = {
    "oval": ((0.40, 0.64, 0.73, 0.73, 0.62, 0.40, 0.17), 1.00),
    "round": ((0.44, 0.70, 0.82, 0.86, 0.78, 0.54, 0.24), 0.91),
    "square": ((0.46, 0.72, 0.76, 0.76, 0.73, 0.61, 0.33), 0.95),
    "heart": ((0.48, 0.76, 0.82, 0.74, 0.55, 0.29, 0.11), 1.01),
    "long": ((0.38, 0.58, 0.65, 0.66, 0.60, 0.42, 0.20), 1.13),
    "diamond": ((0.32, 0.54, 0.73, 0.80, 0.60, 0.30, 0.13), 1.05),
}
HEIGHTS = (-0.90, -0.62, -0.22, 0.18, 0.52, 0.80, 0.95)  # in parts of the chin's height below the eyes
TOP = -0.98
JAW = 3  # from this height on the jaw widens a face
DEPTH, NEARER = 0.66, 0.13  # how far the face stands out, and how much larger what is near looks


@dataclass(frozen=True)
class Head:
    """One person's head in one picture. `unit` in fine pixels, angles in radians."""

    person: Person
    figure: Figure
    x: float
    y: float
    unit: float

    @property
    def chin(self) -> float:
        return FACES[self.person.face][1]

    @property
    def half(self) -> float:
        """Half the width of the face at its widest."""
        return max(FACES[self.person.face][0]) * self._broad

    @property
    def _broad(self) -> float:
        return 1 + 0.08 * self.person.face_width

    def outline(self) -> Points:
        """The face from the top of the skull around the chin, in head units: [14 + 2, 2]."""
        widths, chin = FACES[self.person.face]
        right = []
        for number, (width, height) in enumerate(zip(widths, HEIGHTS, strict=True)):
            jaw = 1 + 0.13 * self.person.jaw * (number > JAW)
            right.append((width * self._broad * jaw, height * (chin if height > 0 else 1)))
        left = [(-x, y) for x, y in reversed(right)]
        return np.array([(0.0, TOP), *right, (0.0, chin), *left])

    def place(self, points: Curve, lift: float | Points = 0.0) -> Points:
        """Points on the face's surface, `lift` above it, as fine pixels of the picture: [n, 2]."""
        p = np.asarray(points, dtype=np.float64).reshape(-1, 2)
        round_ = 1 - 0.8 * (p[:, 0] / (self.half + 0.1)) ** 2 - 0.35 * (p[:, 1] / 1.1) ** 2
        return self.at(p, DEPTH * np.sqrt(np.maximum(round_, 0.03)) + lift)

    def at(self, points: Curve, depth: float | Points) -> Points:
        """Points at a depth, above 0 towards the viewer, as fine pixels of the picture: [n, 2]."""
        p = np.asarray(points, dtype=np.float64).reshape(-1, 2)
        z = np.broadcast_to(np.asarray(depth, dtype=np.float64), len(p))
        sin, cos = math.sin(self.figure.yaw), math.cos(self.figure.yaw)
        x, z = p[:, 0] * cos + z * sin, z * cos - p[:, 0] * sin
        sin, cos = math.sin(self.figure.pitch), math.cos(self.figure.pitch)
        y, z = p[:, 1] * cos - z * sin, z * cos + p[:, 1] * sin
        near = 1 + NEARER * (z - DEPTH)
        return self._flat(np.stack((x * near, y * near), axis=1))

    def rim(self, points: Curve, depth: float = 0.0) -> Points:
        """Points of a silhouette: a round head turns without growing narrow; the chin, further out, swings along."""
        p = np.asarray(points, dtype=np.float64).reshape(-1, 2)
        swing = 0.46 * np.clip(p[:, 1], 0, 1.2) ** 1.4 + 0.10 + depth
        x = p[:, 0] * (1 - 0.35 * (1 - math.cos(self.figure.yaw))) + swing * math.sin(self.figure.yaw)
        y = p[:, 1] - swing * math.sin(self.figure.pitch)
        return self._flat(np.stack((x, y), axis=1))

    def _flat(self, points: Points) -> Points:
        """Points of the picture's plane, in head units, tilted with the head and put in the picture."""
        sin, cos = math.sin(self.figure.roll), math.cos(self.figure.roll)
        return points @ np.array([[cos, sin], [-sin, cos]]) * self.unit + (self.x, self.y)

    def body(self, points: Curve) -> Points:
        """Points of the body, which neither turns nor tilts, as fine pixels of the picture."""
        p = np.asarray(points, dtype=np.float64).reshape(-1, 2)
        return p * self.unit + (self.x, self.y)


def head(person: Person, figure: Figure, side: int) -> Head:
    """The head of a person in a picture of `side` pixels."""
    fine = side * FINE
    return Head(person, figure, figure.x * fine, figure.y * fine, figure.size * fine)


def ball(given: Head, side: int) -> NDArray[np.floating]:
    """Which way a ball in the head's place faces at each pixel: [3, side, side], right, down and to the viewer."""
    nose = 0.15 * math.sin(given.figure.yaw) * given.unit  # what faces the viewer moves as the head turns
    return _facing(given.x + nose, given.y, given.unit * 1.05, given.unit * 1.3, side)


def barrel(given: Head, side: int) -> NDArray[np.floating]:
    """The same for an upright body below the head."""
    return _facing(given.x, given.y + 2.6 * given.unit, given.unit * 1.9, given.unit * 3.2, side)


def _facing(x: float, y: float, wide: float, high: float, side: int) -> NDArray[np.floating]:
    at = (np.arange(side) + 0.5) * FINE
    across = np.clip((at - x) / wide, -0.85, 0.85)[None, :].repeat(side, 0)
    down = np.clip((at - y) / high, -0.85, 0.85)[:, None].repeat(side, 1)
    return np.stack((across, down, np.sqrt(np.maximum(1 - across**2 - down**2, 0.1))))
