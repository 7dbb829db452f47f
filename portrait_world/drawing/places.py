"""The backgrounds of Portrait World: one fixed set per place; lengths relative to the image's height."""

from __future__ import annotations

from collections.abc import Callable, Mapping

import numpy as np
from PIL import Image

from ...training.data.portable_random import PortableRandom
from .canvas import (
    BLACK,
    SUPERSAMPLING,
    WHITE,
    Canvas,
    Colour,
    PointsLike,
    make_ellipse,
    mix_colours,
    smooth_line,
    smooth_outline,
)

PLAIN_COLOURS: tuple[Colour, ...] = (
    (222, 206, 188), (186, 204, 214), (206, 214, 190), (226, 190, 182), (196, 190, 214), (236, 222, 172),
    (160, 176, 180),
)  # fmt: skip
OUTLINE_SCALE = 0.7  # relative to the outlines of people
SKY_COLOUR, DUSK_COLOUR = (158, 204, 232), (246, 196, 150)


class Backdrop:
    """A canvas in relative coordinates, 0 to 1, and the random generator of the place."""

    def __init__(self, canvas: Canvas, rng: PortableRandom) -> None:
        self.canvas, self.rng = canvas, rng

    def draw_shape(self, points: PointsLike, colour: Colour, outline_scale: float = OUTLINE_SCALE) -> None:
        self.canvas.draw_shape(
            np.asarray(points, dtype=np.float64) * self.canvas.canvas_size, colour, outline_scale=outline_scale
        )

    def fill_gradient(
        self, top: Colour, bottom: Colour, start: float = 0.0, end: float = 1.0, num_bands: int = 24
    ) -> None:
        """A vertical gradient from the top to the bottom colour."""
        for band in range(num_bands):
            y = start + (end - start) * band / num_bands
            self.draw_box(0, y, 1, end, mix_colours(top, bottom, band / (num_bands - 1)), outline_scale=0)

    def draw_ridge(self, height: float, roughness: float, colour: Colour, num_segments: int = 6) -> None:
        """A ridge across the image, filled to the lower edge."""
        xs = [-0.05 + 1.1 * step / num_segments for step in range(num_segments + 1)]
        line = [(x, height + self.rng.uniform(-roughness, roughness)) for x in xs]
        self.draw_shape(np.concatenate((smooth_line(line), [(1.05, 1.05), (-0.05, 1.05)])), colour)

    def draw_box(
        self, left: float, top: float, right: float, bottom: float, colour: Colour, outline_scale: float = OUTLINE_SCALE
    ) -> None:
        self.draw_shape([(left, top), (right, top), (right, bottom), (left, bottom)], colour, outline_scale)

    def draw_disc(
        self, x: float, y: float, radius: float, colour: Colour, outline_scale: float = OUTLINE_SCALE
    ) -> None:
        self.draw_shape(make_ellipse(x, y, radius, radius), colour, outline_scale)


def _plain(b: Backdrop) -> None:
    colour = b.rng.choice(PLAIN_COLOURS)
    b.fill_gradient(mix_colours(colour, WHITE, 0.15), mix_colours(colour, BLACK, 0.12))


def _forest(b: Backdrop) -> None:
    b.fill_gradient((196, 218, 176), (120, 160, 110))
    for depth in range(3):
        colour = mix_colours((156, 186, 142), (34, 78, 52), depth / 2)
        for _ in range(5 - depth):
            x, wide = b.rng.uniform(-0.05, 1.05), b.rng.uniform(0.09, 0.15) * (1 + 0.4 * depth)
            low = 0.70 + 0.11 * depth
            b.draw_box(
                x - 0.013 * (1 + depth), 0.3, x + 0.013 * (1 + depth), low, mix_colours((104, 76, 54), colour, 0.3)
            )
            for layer in range(3):
                y, reach = low - 0.14 - 0.17 * layer, wide * (1 - 0.24 * layer)
                b.draw_shape([(x - reach, y), (x, y - 0.26), (x + reach, y)], mix_colours(colour, WHITE, 0.06 * layer))
    b.draw_ridge(0.84, 0.02, (74, 112, 62))


def _city(b: Backdrop) -> None:
    b.fill_gradient(mix_colours(SKY_COLOUR, WHITE, 0.2), mix_colours(DUSK_COLOUR, WHITE, 0.3))
    for depth, colour in enumerate(((172, 180, 196), (112, 122, 146))):
        x = b.rng.uniform(-0.1, 0.0)
        while x < 1:
            wide, top = b.rng.uniform(0.12, 0.22), b.rng.uniform(0.08, 0.42) + 0.14 * depth
            b.draw_box(
                x, top, x + wide, 1.02, mix_colours(colour, b.rng.choice(((190, 140, 120), (110, 130, 160))), 0.3)
            )
            for row in range(5 * depth):
                for column in range(3):
                    left, y = x + wide * (0.14 + 0.28 * column), top + 0.04 + 0.085 * row
                    lit = (252, 228, 150) if b.rng.randrange(3) else (84, 94, 118)
                    b.draw_box(left, y, left + wide * 0.17, y + 0.045, lit, outline_scale=0)
            x += wide + b.rng.uniform(0.0, 0.03)


def _beach(b: Backdrop) -> None:
    horizon = b.rng.uniform(0.42, 0.54)
    b.fill_gradient(SKY_COLOUR, mix_colours(SKY_COLOUR, WHITE, 0.55), end=horizon)
    b.draw_disc(b.rng.uniform(0.1, 0.9), b.rng.uniform(0.1, 0.24), 0.07, (255, 238, 168))
    b.fill_gradient((44, 134, 178), (96, 190, 196), start=horizon, end=0.8)
    b.draw_ridge(0.76, 0.02, (240, 246, 240))
    b.draw_ridge(0.79, 0.02, (238, 214, 160))


def _snow(b: Backdrop) -> None:
    b.fill_gradient((176, 194, 216), (222, 232, 242))
    for x in (b.rng.uniform(0.0, 0.25), b.rng.uniform(0.75, 1.0)):
        for layer in range(3):
            y, reach = 0.66 - 0.14 * layer, 0.15 * (1 - 0.22 * layer)
            b.draw_shape([(x - reach, y), (x, y - 0.24), (x + reach, y)], (86, 122, 124))
            b.draw_shape([(x - reach * 0.55, y - 0.11), (x, y - 0.24), (x + reach * 0.55, y - 0.11)], (244, 248, 252))
    b.draw_ridge(0.64, 0.05, (226, 234, 244))
    b.draw_ridge(0.78, 0.04, (246, 249, 252))
    for _ in range(34):
        b.draw_disc(b.rng.uniform(0, 1), b.rng.uniform(0, 1), 0.007, WHITE, outline_scale=0)


def _room(b: Backdrop) -> None:
    wall = b.rng.choice(((206, 186, 160), (176, 196, 190), (214, 176, 160), (180, 182, 204)))
    b.fill_gradient(mix_colours(wall, WHITE, 0.12), wall)
    left = b.rng.choice((0.05, 0.66))
    b.draw_box(left, 0.10, left + 0.30, 0.54, (246, 242, 232))
    b.draw_box(left + 0.02, 0.12, left + 0.14, 0.52, (172, 214, 236))
    b.draw_box(left + 0.16, 0.12, left + 0.28, 0.52, (172, 214, 236))
    other = 0.72 - left
    b.draw_box(other, 0.14, other + 0.20, 0.38, (112, 76, 54))
    b.draw_box(other + 0.02, 0.16, other + 0.18, 0.36, b.rng.choice(((232, 176, 96), (120, 164, 150), (206, 110, 96))))
    b.draw_box(0, 0.82, 1, 1.02, (136, 96, 68))
    b.draw_box(0, 0.79, 1, 0.82, (240, 232, 220))


def _mountains(b: Backdrop) -> None:
    b.fill_gradient(SKY_COLOUR, mix_colours(DUSK_COLOUR, WHITE, 0.5))
    for start in (b.rng.uniform(-0.15, 0.0), b.rng.uniform(0.3, 0.45), b.rng.uniform(0.75, 0.9)):
        top, reach = b.rng.uniform(0.10, 0.28), b.rng.uniform(0.30, 0.42)
        x = start + 0.12
        b.draw_shape([(x - reach, 0.85), (x, top), (x + reach, 0.85)], (122, 138, 168))
        cap = 0.22
        b.draw_shape(
            [(x - reach * cap, top + 0.75 * cap), (x, top), (x + reach * cap, top + 0.75 * cap), (x + 0.03, top + 0.11),
             (x - 0.02, top + 0.15)], (246, 248, 252),
        )  # fmt: skip
    b.draw_ridge(0.66, 0.05, (104, 138, 122))
    b.draw_ridge(0.80, 0.03, (72, 112, 84))


def _meadow(b: Backdrop) -> None:
    b.fill_gradient(SKY_COLOUR, mix_colours(SKY_COLOUR, WHITE, 0.6), end=0.6)
    for _ in range(2):
        x, y = b.rng.uniform(0, 1), b.rng.uniform(0.08, 0.25)
        b.draw_shape(
            smooth_outline([(x - 0.14, y), (x - 0.05, y - 0.06), (x + 0.05, y - 0.05), (x + 0.14, y), (x, y + 0.03)]),
            WHITE,
        )
    b.draw_ridge(0.56, 0.04, (150, 192, 106), 4)
    b.draw_ridge(0.70, 0.03, (112, 168, 84), 4)
    for _ in range(26):
        x, y = b.rng.uniform(0, 1), b.rng.uniform(0.66, 1.0)
        colour = b.rng.choice(((240, 96, 92), (250, 220, 90), (250, 250, 250), (206, 130, 210)))
        b.draw_disc(x, y, 0.013, colour, outline_scale=0)


def _desert(b: Backdrop) -> None:
    b.fill_gradient((244, 210, 160), (250, 232, 200))
    b.draw_disc(b.rng.uniform(0.1, 0.9), b.rng.uniform(0.12, 0.28), 0.09, (255, 246, 214))
    b.draw_ridge(0.50, 0.06, (226, 164, 104), 4)
    b.draw_ridge(0.66, 0.06, (210, 140, 82), 4)
    b.draw_ridge(0.82, 0.04, (190, 118, 68), 4)
    x = b.rng.choice((0.10, 0.90))
    green = (86, 132, 84)
    b.draw_shape(
        smooth_outline([(x - 0.03, 0.86), (x - 0.03, 0.46), (x, 0.42), (x + 0.03, 0.46), (x + 0.03, 0.86)]), green
    )
    for side in (-1, 1):
        arm = [(0.02, 0.66), (0.075, 0.66), (0.075, 0.54), (0.11, 0.54), (0.11, 0.70), (0.02, 0.71)]
        b.draw_shape([(x + side * dx, y - 0.04 * side) for dx, y in arm], green)


def _night(b: Backdrop) -> None:
    b.fill_gradient((20, 26, 62), (66, 66, 116))
    for _ in range(30):
        size = b.rng.uniform(0.003, 0.009)
        b.draw_disc(b.rng.uniform(0, 1), b.rng.uniform(0, 0.75), size, (252, 246, 214), outline_scale=0)
    x, y = b.rng.uniform(0.1, 0.9), b.rng.uniform(0.1, 0.22)
    b.draw_disc(x, y, 0.085, (250, 240, 200))
    for dx, dy, radius in ((-0.03, -0.02, 0.018), (0.03, 0.015, 0.022), (-0.01, 0.04, 0.012)):
        b.draw_disc(x + dx, y + dy, radius, (230, 216, 172))
    b.draw_ridge(0.76, 0.05, (34, 38, 70))
    b.draw_ridge(0.86, 0.04, (22, 24, 48))


# Of the sets; chosen for sets that leave room for a head in the middle.
PLACE_SEEDS: Mapping[str, int] = {
    "plain": 100, "forest": 101, "city": 102, "beach": 103, "snow": 104, "room": 105, "mountains": 106, "meadow": 107,
    "desert": 108, "night": 109,
}  # fmt: skip
PLACE_PAINTERS: Mapping[str, Callable[[Backdrop], None]] = {
    "plain": _plain, "forest": _forest, "city": _city, "beach": _beach, "snow": _snow, "room": _room,
    "mountains": _mountains, "meadow": _meadow, "desert": _desert, "night": _night,
}  # fmt: skip


def draw_place(canvas: Canvas, place: str, mirrored: bool) -> None:
    """Fill the canvas with a place. It is one fixed square set, continued by its reflections in wider images."""
    set_canvas = Canvas(canvas.canvas_size // SUPERSAMPLING, canvas.medium)
    PLACE_PAINTERS[place](Backdrop(set_canvas, PortableRandom(PLACE_SEEDS[place])))
    drawn = np.asarray(set_canvas.image)[:, :: -1 if mirrored else 1]
    left, odd = divmod(canvas.image.width - canvas.canvas_size, 2)
    canvas.image.paste(Image.fromarray(np.pad(drawn, ((0, 0), (left, left + odd), (0, 0)), mode="symmetric")))
