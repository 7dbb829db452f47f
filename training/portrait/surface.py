"""A head's surface to draw on: points in head units, widths in 1/128 of twice a face's height."""

from __future__ import annotations

from dataclasses import dataclass

from .canvas import Canvas, Colour, Curve, Points
from .head import Head


@dataclass(frozen=True)
class Surface:
    """As `Canvas` draws, on a face; `lift` is how far above it."""

    canvas: Canvas
    head: Head

    def shape(
        self, points: Curve, colour: Colour, lift: float = 0.0, line: float = 0.0, label: int | None = None
    ) -> None:
        self.canvas.shape(self.head.place(points, lift), colour, label, line)

    def shade(self, points: Curve, colour: Colour, opacity: float, lift: float | Points = 0.0) -> None:
        self.canvas.shade(self.head.place(points, lift), colour, opacity)

    def stroke(self, points: Curve, colour: Colour, width: float, lift: float = 0.0) -> None:
        self.canvas.stroke(self.head.place(points, lift), colour, width * self.head.figure.size)

    def line(self, points: Curve, colour: Colour, width: float, lift: float = 0.0) -> None:
        self.canvas.line(self.head.place(points, lift), colour, width * self.head.figure.size)
