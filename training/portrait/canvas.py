"""A canvas of four times the size: shapes in the manner of a medium, and beside them who owns each pixel."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray
from PIL import Image, ImageDraw

Points = NDArray[np.floating]  # [n, 2], x and y
Curve = Points | Sequence[tuple[float, float]]
Colour = tuple[int, int, int]
FINE = 4  # pixels drawn for each pixel of the picture, on each axis
# Labels: nobody 0; person n, from 0, head 2 n + 1, face 2 n + 2, body BODY - n.
BODY = 255
WHITE, BLACK = (255, 255, 255), (0, 0, 0)


def mix(one: Colour, other: Colour, share: float) -> Colour:
    """A colour with a share, 0 to 1, of another."""
    r, g, b = (round(a + (c - a) * share) for a, c in zip(one, other, strict=True))
    return r, g, b


def _basis(per: int) -> Points:
    t = np.arange(per) / per
    rows = (-t + 2 * t**2 - t**3, 2 - 5 * t**2 + 3 * t**3, t + 4 * t**2 - 3 * t**3, t**3 - t**2)
    return np.stack(rows, axis=1) / 2


BASIS = _basis(6)


def smooth(points: Curve) -> Points:
    """A closed Catmull-Rom curve through points, six for each of them."""
    p = np.asarray(points, dtype=np.float64)
    knots = np.stack([np.roll(p, shift, axis=0) for shift in (1, 0, -1, -2)], axis=1)
    return (BASIS @ knots).reshape(-1, 2)


def bow(points: Curve) -> Points:
    """The same from the first point to the last, open."""
    p = np.asarray(points, dtype=np.float64)
    p = np.concatenate((p[:1], p, p[-1:]))
    knots = np.stack([p[:-3], p[1:-2], p[2:-1], p[3:]], axis=1)
    return np.concatenate(((BASIS @ knots).reshape(-1, 2), p[-1:]))


def ring(x: float, y: float, wide: float, high: float, number: int = 20) -> Points:
    """An ellipse with the half axes `wide` and `high`."""
    t = np.arange(number) * (2 * np.pi / number)
    return np.stack((x + wide * np.cos(t), y + high * np.sin(t)), axis=1)


@dataclass(frozen=True)
class Medium:
    """How shapes are put on paper: how much of their colour stays, and the outline's width in 1/128 of the picture."""

    paper: Colour = (255, 255, 255)
    keep: float = 1.0
    outline: float = 0.0
    ink: Colour = (40, 34, 38)


class Canvas:
    """A picture of `side` pixels while it is drawn. Places are in fine pixels, widths in 1/128 of the picture."""

    def __init__(self, side: int, medium: Medium) -> None:
        self.side, self.medium = side, medium
        self.fine = side * FINE
        self.image = Image.new("RGB", (self.fine, self.fine), medium.paper)
        self.labels = Image.new("L", (self.fine, self.fine), 0)
        self._draw, self._label = ImageDraw.Draw(self.image, "RGBA"), ImageDraw.Draw(self.labels)

    def shape(self, points: Points, colour: Colour, label: int | None = None, line: float = 1.0) -> None:
        """A closed shape with the medium's outline, `line` times as wide; it owns its pixels if it has a label."""
        flat = points.ravel().tolist()
        self._draw.polygon(flat, fill=self._put(colour))
        if label is not None:
            self._label.polygon(flat, fill=label)
        if self.medium.outline and line:
            self.stroke(np.concatenate((points, points[:1])), self.medium.ink, self.medium.outline * line)

    def shade(self, points: Points, colour: Colour, opacity: float) -> None:
        """A shape without an outline that lets through what is below it."""
        self._draw.polygon(points.ravel().tolist(), fill=(*self._put(colour), round(255 * opacity)))

    def stroke(self, points: Points, colour: Colour, width: float, label: int | None = None) -> None:
        """An open line in a colour as it is; it owns its pixels if it has a label."""
        flat, pixels = points.ravel().tolist(), max(1, round(width * self.fine / 128))
        self._draw.line(flat, fill=colour, width=pixels)
        if label is not None:
            self._label.line(flat, fill=label, width=pixels)

    def line(self, points: Points, colour: Colour, width: float) -> None:
        """An open line of a thing, which media with outlines draw in ink."""
        if self.medium.outline:
            self.stroke(points, self.medium.ink, min(width, self.medium.outline))
        else:
            self.stroke(points, self._put(colour), width)

    def _put(self, colour: Colour) -> Colour:
        return mix(self.medium.paper, colour, self.medium.keep)
