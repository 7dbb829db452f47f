"""Renders a drawing as a photo, line art, a watercolour, a bronze or a pencil drawing: one function each."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray
from PIL import Image, ImageFilter

from .canvas import BODY_LABEL, Medium
from .head import Head, compute_body_normals, compute_head_normals
from .scenes import Scene

FloatImage = NDArray[np.floating]  # [H, W, 3], 0 to 1
LUMA_WEIGHTS = np.array((0.299, 0.587, 0.114), dtype=np.float32)


@dataclass(frozen=True)
class Drawing:
    """The scene, heads and labels of a drawing, for the renderers."""

    scene: Scene
    heads: Sequence[Head]
    labels: NDArray[np.uint8]  # [H, W], as in canvas.py
    seed: int

    @property
    def image_size(self) -> int:
        return len(self.labels)

    def make_noise(self, grid_size: int, channel: int) -> FloatImage:
        """Smooth noise from a grid of random values, -1 to 1: [H, W, 1]."""
        values = np.random.Generator(np.random.PCG64([self.seed, channel])).random((grid_size, grid_size)) * 255
        image = Image.fromarray(values.astype(np.uint8)).resize(
            (self.image_size, self.image_size), Image.Resampling.BICUBIC
        )
        return np.asarray(image, dtype=np.float32)[..., None] / 127.5 - 1

    def compute_light(self) -> FloatImage:
        """The brightness of each pixel, around 1, [H, W, 1]: a gradient, plus heads and bodies lit as ellipsoids."""
        scene, size = self.scene, self.image_size
        slope = np.linspace(-0.5, 0.5, size)[None, :] * scene.light_direction
        out = 1 + 0.30 * scene.light_strength * slope * np.ones((size, 1))
        for number, head in enumerate(self.heads):
            for mask, (x, y, z) in (
                (self.labels == BODY_LABEL - number, compute_body_normals(head, size)),
                ((self.labels + 1) // 2 == number + 1, compute_head_normals(head, size)),
            ):
                lit = 0.62 * x * scene.light_direction - 0.32 * y + 0.55 * z - 0.42
                out += 0.62 * scene.light_strength * np.where(mask, lit, 0)
        return out[..., None]


def _blur(pixels: FloatImage, radius: float) -> FloatImage:
    image = Image.fromarray((np.clip(pixels, 0, 1) * 255).astype(np.uint8))
    return np.asarray(image.filter(ImageFilter.GaussianBlur(radius * len(pixels) / 128)), dtype=np.float32) / 255


def _tint(image: FloatImage, warmth: float) -> FloatImage:
    return image * np.array((1 + 0.10 * warmth, 1, 1 - 0.14 * warmth), dtype=np.float32)


def render_photo(image: FloatImage, drawing: Drawing) -> FloatImage:
    """Light, a soft glow, grain."""
    lit = _tint(image * drawing.compute_light(), drawing.scene.light_warmth)
    soft = _blur(lit, 0.7)
    return lit * 0.55 + soft * 0.45 + 0.012 * drawing.make_noise(drawing.image_size, 0)


def render_line_art(image: FloatImage, drawing: Drawing) -> FloatImage:
    """Ink with a light wash; the light only tints the paper."""
    return _tint(image, 0.25 * drawing.scene.light_warmth) * (0.6 + 0.4 * drawing.compute_light())


def render_watercolour(image: FloatImage, drawing: Drawing) -> FloatImage:
    """Colours that bleed, darken at edges and vary on textured paper."""
    size = drawing.image_size
    lit = _tint(image * (0.35 + 0.65 * drawing.compute_light()), 0.7 * drawing.scene.light_warmth)
    rows, columns = np.mgrid[:size, :size]
    sway = 0.9 * size / 128
    dy, dx = (np.rint(drawing.make_noise(12, channel)[..., 0] * sway).astype(int) for channel in (0, 1))
    moved = lit[np.clip(rows + dy, 0, size - 1), np.clip(columns + dx, 0, size - 1)]
    near, far = moved * 0.6 + _blur(moved, 0.8) * 0.4, _blur(moved, 2.6)
    gathered = near + 0.55 * np.minimum(near - far, 0)
    pigment = 1 - (1 - gathered) * (0.90 + 0.11 * drawing.make_noise(7, 2) + 0.08 * drawing.make_noise(24, 3))
    return pigment * (1 + 0.025 * drawing.make_noise(size // 2, 4))


BRONZE_COLOURS = np.array(
    ((0.07, 0.05, 0.05), (0.33, 0.19, 0.09), (0.68, 0.43, 0.19), (0.95, 0.76, 0.45), (1.0, 0.97, 0.84))
)


def render_bronze(image: FloatImage, drawing: Drawing) -> FloatImage:
    """Cast metal: lighter areas are raised, light grazes the relief, the background recedes and has a green patina."""
    tone = _blur(image, 0.4) @ LUMA_WEIGHTS
    down, right = np.gradient(tone)
    rake = np.clip(0.8 * down + (0.5 + drawing.scene.light_direction) * right, -0.2, 0.2)
    front = _blur(np.repeat((drawing.labels > 0).astype(np.float32)[..., None], 3, axis=2), 0.7)[..., 0]
    lit = drawing.compute_light()[..., 0]
    value = (0.10 + 0.62 * tone) * lit**2 * (0.52 + 0.48 * front) + rake * (0.6 + 0.7 * front)
    index = np.clip(value, 0, 1) * (len(BRONZE_COLOURS) - 1)
    cast = np.stack([np.interp(index, np.arange(len(BRONZE_COLOURS)), BRONZE_COLOURS[:, c]) for c in range(3)], axis=-1)
    green = np.array((0.20, 0.42, 0.37)) * (0.55 + value[..., None])
    share = np.clip(0.62 - front + 0.35 * drawing.make_noise(9, 0)[..., 0] * (1 - value), 0, 0.75)[..., None]
    return (cast + (green - cast) * share).astype(np.float32)


def render_pencil(image: FloatImage, drawing: Drawing) -> FloatImage:
    """Graphite: grey tones as diagonal strokes on grained paper, lighter in the background."""
    size = drawing.image_size
    tone = (image * (0.45 + 0.55 * drawing.compute_light())) @ LUMA_WEIGHTS
    rows, columns = np.mgrid[:size, :size]
    hatch = np.sin((rows + 0.7 * columns + 2.5 * drawing.make_noise(14, 0)[..., 0]) * (2 * np.pi / 3.7 * 128 / size))
    dark = np.clip(1 - tone, 0, 1) ** 1.2 * np.where(drawing.labels > 0, 0.86, 0.5)
    grain = drawing.make_noise(size, 1)[..., 0]
    drawn = 0.98 - dark * (0.95 + 0.17 * hatch * (1 - dark) + 0.16 * grain)
    return drawn[..., None] * np.array((1.0, 0.99, 0.965), dtype=np.float32)


@dataclass(frozen=True)
class DrawingStyle:
    """A medium, the blur of the background in 1/128 of the image, and the function that renders the drawing."""

    medium: Medium
    background_blur: float
    render: Callable[[FloatImage, Drawing], FloatImage]


DRAWING_STYLES: Mapping[str, DrawingStyle] = {
    "photo": DrawingStyle(Medium(), 1.3, render_photo),
    "line art": DrawingStyle(
        Medium(paper=(253, 251, 246), colour_strength=0.55, outline_width=0.8), 0, render_line_art
    ),
    "watercolour": DrawingStyle(Medium(paper=(252, 249, 240), colour_strength=0.86), 0, render_watercolour),
    "bronze": DrawingStyle(Medium(), 0.8, render_bronze),
    "pencil": DrawingStyle(
        Medium(paper=(250, 250, 250), colour_strength=0.66, outline_width=0.75, ink=(24, 24, 30)), 0, render_pencil
    ),
}
