"""How a drawing becomes a photo, line art, a watercolour, a bronze or a pencil drawing: one function each."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray
from PIL import Image, ImageFilter

from .canvas import BODY, Medium
from .head import Head, ball, barrel
from .scenes import Scene

Picture = NDArray[np.floating]  # [side, side, 3], 0 to 1
GREY = np.array((0.299, 0.587, 0.114), dtype=np.float32)


@dataclass(frozen=True)
class Sheet:
    """What a medium knows of a drawing besides its colours."""

    scene: Scene
    heads: Sequence[Head]
    owners: NDArray[np.uint8]  # [side, side], the labels of a canvas
    seed: int

    @property
    def side(self) -> int:
        return len(self.owners)

    def noise(self, cells: int, channel: int) -> Picture:
        """Soft noise of `cells` bumps across, -1 to 1: [side, side, 1]."""
        values = np.random.Generator(np.random.PCG64([self.seed, channel])).random((cells, cells)) * 255
        image = Image.fromarray(values.astype(np.uint8)).resize((self.side, self.side), Image.Resampling.BICUBIC)
        return np.asarray(image, dtype=np.float32)[..., None] / 127.5 - 1

    def light(self) -> Picture:
        """How bright each pixel is lit, around 1: a soft slope over the picture, heads as balls, bodies as barrels."""
        scene, side = self.scene, self.side
        slope = np.linspace(-0.5, 0.5, side)[None, :] * scene.side
        out = 1 + 0.30 * scene.strength * slope * np.ones((side, 1))
        for number, head in enumerate(self.heads):
            for mine, (x, y, z) in (
                (self.owners == BODY - number, barrel(head, side)),
                ((self.owners + 1) // 2 == number + 1, ball(head, side)),
            ):
                lit = 0.62 * x * scene.side - 0.32 * y + 0.55 * z - 0.42
                out += 0.62 * scene.strength * np.where(mine, lit, 0)
        return out[..., None]


def _blur(picture: Picture, radius: float) -> Picture:
    image = Image.fromarray((np.clip(picture, 0, 1) * 255).astype(np.uint8))
    return np.asarray(image.filter(ImageFilter.GaussianBlur(radius * len(picture) / 128)), dtype=np.float32) / 255


def _tint(picture: Picture, warmth: float) -> Picture:
    return picture * np.array((1 + 0.10 * warmth, 1, 1 - 0.14 * warmth), dtype=np.float32)


def photo(picture: Picture, sheet: Sheet) -> Picture:
    """Light, a faint glow, grain."""
    lit = _tint(picture * sheet.light(), sheet.scene.warmth)
    soft = _blur(lit, 0.7)
    return lit * 0.55 + soft * 0.45 + 0.012 * sheet.noise(sheet.side, 0)


def line_art(picture: Picture, sheet: Sheet) -> Picture:
    """Ink and a thin wash, as it was drawn; the light only tints the paper."""
    return _tint(picture, 0.25 * sheet.scene.warmth) * (0.6 + 0.4 * sheet.light())


def watercolour(picture: Picture, sheet: Sheet) -> Picture:
    """Colours that run, gather at their edges and lie unevenly on rough paper."""
    side = sheet.side
    lit = _tint(picture * (0.35 + 0.65 * sheet.light()), 0.7 * sheet.scene.warmth)
    rows, columns = np.mgrid[:side, :side]
    sway = 0.9 * side / 128
    dy, dx = (np.rint(sheet.noise(12, channel)[..., 0] * sway).astype(int) for channel in (0, 1))
    moved = lit[np.clip(rows + dy, 0, side - 1), np.clip(columns + dx, 0, side - 1)]
    near, far = moved * 0.6 + _blur(moved, 0.8) * 0.4, _blur(moved, 2.6)
    gathered = near + 0.55 * np.minimum(near - far, 0)
    pigment = 1 - (1 - gathered) * (0.90 + 0.11 * sheet.noise(7, 2) + 0.08 * sheet.noise(24, 3))
    return pigment * (1 + 0.025 * sheet.noise(side // 2, 4))


BRONZE = np.array(((0.07, 0.05, 0.05), (0.33, 0.19, 0.09), (0.68, 0.43, 0.19), (0.95, 0.76, 0.45), (1.0, 0.97, 0.84)))


def bronze(picture: Picture, sheet: Sheet) -> Picture:
    """Cast metal: what is lighter stands out, light rakes over the relief, the ground lies back and has gone green."""
    tone = _blur(picture, 0.4) @ GREY
    down, right = np.gradient(tone)
    rake = np.clip(0.8 * down + (0.5 + sheet.scene.side) * right, -0.2, 0.2)
    front = _blur(np.repeat((sheet.owners > 0).astype(np.float32)[..., None], 3, axis=2), 0.7)[..., 0]
    lit = sheet.light()[..., 0]
    value = (0.10 + 0.62 * tone) * lit**2 * (0.52 + 0.48 * front) + rake * (0.6 + 0.7 * front)
    at = np.clip(value, 0, 1) * (len(BRONZE) - 1)
    cast = np.stack([np.interp(at, np.arange(len(BRONZE)), BRONZE[:, c]) for c in range(3)], axis=-1)
    green = np.array((0.20, 0.42, 0.37)) * (0.55 + value[..., None])
    share = np.clip(0.62 - front + 0.35 * sheet.noise(9, 0)[..., 0] * (1 - value), 0, 0.75)[..., None]
    return (cast + (green - cast) * share).astype(np.float32)


def pencil(picture: Picture, sheet: Sheet) -> Picture:
    """Graphite: grey tones as slanting strokes on grained paper, lighter behind people."""
    side = sheet.side
    tone = (picture * (0.45 + 0.55 * sheet.light())) @ GREY
    rows, columns = np.mgrid[:side, :side]
    hatch = np.sin((rows + 0.7 * columns + 2.5 * sheet.noise(14, 0)[..., 0]) * (2 * np.pi / 3.7 * 128 / side))
    dark = np.clip(1 - tone, 0, 1) ** 1.2 * np.where(sheet.owners > 0, 0.86, 0.5)
    grain = sheet.noise(side, 1)[..., 0]
    drawn = 0.98 - dark * (0.95 + 0.17 * hatch * (1 - dark) + 0.16 * grain)
    return drawn[..., None] * np.array((1.0, 0.99, 0.965), dtype=np.float32)


@dataclass(frozen=True)
class Style:
    """A medium, how far it blurs what is behind people, in 1/128 of the picture, and what it makes of the drawing."""

    medium: Medium
    blur: float
    finish: Callable[[Picture, Sheet], Picture]


STYLES: Mapping[str, Style] = {
    "photo": Style(Medium(), 1.3, photo),
    "line art": Style(Medium(paper=(253, 251, 246), keep=0.55, outline=0.8), 0, line_art),
    "watercolour": Style(Medium(paper=(252, 249, 240), keep=0.86), 0, watercolour),
    "bronze": Style(Medium(), 0.8, bronze),
    "pencil": Style(Medium(paper=(250, 250, 250), keep=0.66, outline=0.75, ink=(24, 24, 30)), 0, pencil),
}
