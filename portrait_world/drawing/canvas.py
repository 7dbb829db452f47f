"""A supersampled canvas: draws shapes in a medium, and a label image that assigns each pixel to a person and part."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray
from PIL import Image, ImageDraw

Points = NDArray[np.floating]  # [n, 2], x and y
PointsLike = Points | Sequence[tuple[float, float]]
Colour = tuple[int, int, int]
SUPERSAMPLING = 4  # canvas pixels per image pixel, on each axis
# Labels: background 0; person n, from 0: head 2 n + 1, face 2 n + 2, body BODY_LABEL - n.
BODY_LABEL = 255
WHITE, BLACK = (255, 255, 255), (0, 0, 0)


def mix_colours(first: Colour, second: Colour, share: float) -> Colour:
    """Linear interpolation from the first colour (share 0) to the second (share 1)."""
    r, g, b = (round(a + (c - a) * share) for a, c in zip(first, second, strict=True))
    return r, g, b


def _catmull_rom_basis(samples: int) -> Points:
    t = np.arange(samples) / samples
    rows = (-t + 2 * t**2 - t**3, 2 - 5 * t**2 + 3 * t**3, t + 4 * t**2 - 3 * t**3, t**3 - t**2)
    return np.stack(rows, axis=1) / 2


CATMULL_ROM_BASIS = _catmull_rom_basis(6)


def smooth_outline(points: PointsLike) -> Points:
    """A closed Catmull-Rom curve through the points, six samples per segment."""
    p = np.asarray(points, dtype=np.float64)
    knots = np.stack([np.roll(p, shift, axis=0) for shift in (1, 0, -1, -2)], axis=1)
    return (CATMULL_ROM_BASIS @ knots).reshape(-1, 2)


def smooth_line(points: PointsLike) -> Points:
    """An open Catmull-Rom curve from the first point to the last."""
    p = np.asarray(points, dtype=np.float64)
    p = np.concatenate((p[:1], p, p[-1:]))
    knots = np.stack([p[:-3], p[1:-2], p[2:-1], p[3:]], axis=1)
    return np.concatenate(((CATMULL_ROM_BASIS @ knots).reshape(-1, 2), p[-1:]))


def make_ellipse(x: float, y: float, half_width: float, half_height: float, num_points: int = 20) -> Points:
    """The outline of an ellipse with these half axes, [num_points, 2]."""
    t = np.arange(num_points) * (2 * np.pi / num_points)
    return np.stack((x + half_width * np.cos(t), y + half_height * np.sin(t)), axis=1)


@dataclass(frozen=True)
class Medium:
    """How shapes are drawn: the paper, the share of their colour over it, and the outline in 1/128 of the image's
    height."""

    paper: Colour = (255, 255, 255)
    colour_strength: float = 1.0
    outline_width: float = 0.0
    ink: Colour = (40, 34, 38)


class Canvas:
    """An image in progress. Coordinates are in canvas pixels, line widths in 1/128 of the image's height.

    `canvas_size` is the height; `width` is that of the image relative to its height.
    """

    def __init__(self, image_size: int, medium: Medium, width: float = 1.0) -> None:
        self.medium = medium
        self.canvas_size = image_size * SUPERSAMPLING
        size = round(image_size * width) * SUPERSAMPLING, self.canvas_size
        self.image, self.labels = Image.new("RGB", size, medium.paper), Image.new("L", size, 0)
        self._draw, self._label = ImageDraw.Draw(self.image, "RGBA"), ImageDraw.Draw(self.labels)

    def draw_shape(self, points: Points, colour: Colour, label: int | None = None, outline_scale: float = 1.0) -> None:
        """A closed shape with the medium's outline, scaled by `outline_scale`; with a label it claims its pixels."""
        flat = points.ravel().tolist()
        self._draw.polygon(flat, fill=self._fade_colour(colour))
        if label is not None:
            self._label.polygon(flat, fill=label)
        if self.medium.outline_width and outline_scale:
            self.draw_stroke(
                np.concatenate((points, points[:1])), self.medium.ink, self.medium.outline_width * outline_scale
            )

    def draw_shade(self, points: Points, colour: Colour, opacity: float) -> None:
        """A semi-transparent shape without an outline."""
        self._draw.polygon(points.ravel().tolist(), fill=(*self._fade_colour(colour), round(255 * opacity)))

    def draw_stroke(self, points: Points, colour: Colour, width: float, label: int | None = None) -> None:
        """An open line in exactly this colour; with a label it claims its pixels."""
        flat, pixels = points.ravel().tolist(), max(1, round(width * self.canvas_size / 128))
        self._draw.line(flat, fill=colour, width=pixels)
        if label is not None:
            self._label.line(flat, fill=label, width=pixels)

    def draw_line(self, points: Points, colour: Colour, width: float) -> None:
        """An open line; media with outlines draw it in ink."""
        if self.medium.outline_width:
            self.draw_stroke(points, self.medium.ink, min(width, self.medium.outline_width))
        else:
            self.draw_stroke(points, self._fade_colour(colour), width)

    def _fade_colour(self, colour: Colour) -> Colour:
        return mix_colours(self.medium.paper, colour, self.medium.colour_strength)
