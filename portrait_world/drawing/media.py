"""Renders a drawing as a photo, line art, a watercolour, a bronze or a pencil drawing: one function each."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray
from PIL import Image, ImageFilter

from .canvas import BODY_LABEL, Medium
from .head import Head, compute_body_normals, compute_head_normals
from .scenes import LIGHT_DIRECTIONS, LIGHT_STRENGTH, Scene

FloatImage = NDArray[np.floating]  # [H, W, 3], 0 to 1
LUMA_WEIGHTS = np.array((0.299, 0.587, 0.114), dtype=np.float32)


@dataclass(frozen=True)
class Drawing:
    """The scene, heads and labels of a drawing, for the renderers."""

    scene: Scene
    heads: Sequence[Head]
    labels: NDArray[np.uint8]  # [H, W], as in canvas.py

    def compute_light(self) -> FloatImage:
        """The brightness of each pixel, around 1, [H, W, 1]: a gradient, plus heads and bodies lit as ellipsoids."""
        shape = self.labels.shape
        direction = LIGHT_DIRECTIONS[self.scene.light]
        slope = np.linspace(-0.5, 0.5, shape[1])[None, :] * direction
        out = 1 + 0.30 * LIGHT_STRENGTH * slope * np.ones((shape[0], 1))
        for number, head in enumerate(self.heads):
            for mask, (x, y, z) in (
                (self.labels == BODY_LABEL - number, compute_body_normals(head, shape)),
                ((self.labels + 1) // 2 == number + 1, compute_head_normals(head, shape)),
            ):
                lit = 0.62 * x * direction - 0.32 * y + 0.55 * z - 0.42
                out += 0.62 * LIGHT_STRENGTH * np.where(mask, lit, 0)
        return out[..., None]


def _blur(pixels: FloatImage, radius: float) -> FloatImage:
    image = Image.fromarray((np.clip(pixels, 0, 1) * 255).astype(np.uint8))
    return np.asarray(image.filter(ImageFilter.GaussianBlur(radius * len(pixels) / 128)), dtype=np.float32) / 255


def render_photo(image: FloatImage, drawing: Drawing) -> FloatImage:
    """Full light and shadow."""
    return image * drawing.compute_light()


def render_line_art(image: FloatImage, drawing: Drawing) -> FloatImage:
    """Ink with a light wash, almost without shadow."""
    return image * (0.85 + 0.15 * drawing.compute_light())


def render_watercolour(image: FloatImage, drawing: Drawing) -> FloatImage:
    """Thin colours that darken at edges."""
    lit = image * (0.6 + 0.4 * drawing.compute_light())
    near, far = _blur(lit, 0.5), _blur(lit, 2.6)
    return 1 - (1 - (near + 0.5 * np.minimum(near - far, 0))) * 0.85


BRONZE_COLOURS = np.array(
    ((0.07, 0.05, 0.05), (0.33, 0.19, 0.09), (0.68, 0.43, 0.19), (0.95, 0.76, 0.45), (1.0, 0.97, 0.84))
)


def render_bronze(image: FloatImage, drawing: Drawing) -> FloatImage:
    """Cast metal: tones become metal colours, and the background recedes."""
    tone = _blur(image, 0.4) @ LUMA_WEIGHTS
    front = _blur(np.repeat((drawing.labels > 0).astype(np.float32)[..., None], 3, axis=2), 0.7)[..., 0]
    value = (0.12 + 0.66 * tone) * drawing.compute_light()[..., 0] ** 1.5 * (0.5 + 0.5 * front)
    index = np.clip(value, 0, 1) * (len(BRONZE_COLOURS) - 1)
    channels = [np.interp(index, np.arange(len(BRONZE_COLOURS)), BRONZE_COLOURS[:, c]) for c in range(3)]
    return np.stack(channels, axis=-1).astype(np.float32)


def render_pencil(image: FloatImage, drawing: Drawing) -> FloatImage:
    """Graphite on white paper, lighter in the background."""
    tone = (image * (0.6 + 0.4 * drawing.compute_light())) @ LUMA_WEIGHTS
    dark = np.clip(1 - tone, 0, 1) ** 1.2 * np.where(drawing.labels > 0, 0.9, 0.5)
    return (0.98 - dark * 0.95)[..., None] * np.array((1.0, 0.99, 0.965), dtype=np.float32)


@dataclass(frozen=True)
class DrawingStyle:
    """A medium, the blur of the background in 1/128 of the image, and the function that renders the drawing."""

    medium: Medium
    background_blur: float
    render: Callable[[FloatImage, Drawing], FloatImage]


DRAWING_STYLES: Mapping[str, DrawingStyle] = {
    "photo": DrawingStyle(Medium(), 0.8, render_photo),
    "line art": DrawingStyle(
        Medium(paper=(253, 251, 246), colour_strength=0.55, outline_width=0.8), 0, render_line_art
    ),
    "watercolour": DrawingStyle(Medium(paper=(252, 249, 240), colour_strength=0.86), 0, render_watercolour),
    "bronze": DrawingStyle(Medium(), 0, render_bronze),
    "pencil": DrawingStyle(
        Medium(paper=(250, 250, 250), colour_strength=0.66, outline_width=0.75, ink=(24, 24, 30)), 0, render_pencil
    ),
}
