"""Draws on the surface of a face: points in head units, line widths in 1/128 of twice the height of a face."""

from __future__ import annotations

from dataclasses import dataclass

from .canvas import Canvas, Colour, Points, PointsLike
from .head import Head


@dataclass(frozen=True)
class HeadSurface:
    """The drawing methods of Canvas on a face; `lift` is the height above its surface."""

    canvas: Canvas
    head: Head

    def draw_shape(
        self,
        points: PointsLike,
        colour: Colour,
        lift: float = 0.0,
        outline_scale: float = 0.0,
        label: int | None = None,
    ) -> None:
        self.canvas.draw_shape(self.head.project_onto_face(points, lift), colour, label, outline_scale)

    def draw_shade(self, points: PointsLike, colour: Colour, opacity: float, lift: float | Points = 0.0) -> None:
        self.canvas.draw_shade(self.head.project_onto_face(points, lift), colour, opacity)

    def draw_stroke(self, points: PointsLike, colour: Colour, width: float, lift: float = 0.0) -> None:
        self.canvas.draw_stroke(self.head.project_onto_face(points, lift), colour, width * self.head.figure.head_size)

    def draw_line(self, points: PointsLike, colour: Colour, width: float, lift: float = 0.0) -> None:
        self.canvas.draw_line(self.head.project_onto_face(points, lift), colour, width * self.head.figure.head_size)
