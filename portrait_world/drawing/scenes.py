"""Scenes, everything in an image except who is in it: medium, place, light, and each figure's pose and clothes."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass

from ...training.data.portable_random import PortableRandom

STYLE_NAMES = ("photo", "line art", "watercolour", "bronze", "pencil")
PLACE_NAMES = (
    "plain", "forest", "city", "beach", "snow", "room", "mountains", "meadow", "desert", "night",
)  # fmt: skip
# expression -> relative frequency
EXPRESSION_WEIGHTS: Mapping[str, float] = {
    "neutral": 3, "smiling": 3, "laughing": 2, "sad": 1, "surprised": 1, "angry": 1,
}  # fmt: skip
NEUTRAL_EXPRESSION = "neutral"
GARMENT_NAMES = ("tee", "jumper", "shirt", "hoodie")
GARMENT_COLOUR_NAMES = ("red", "blue", "green", "yellow", "white", "black", "purple", "orange")
LIGHT_DIRECTIONS: Mapping[str, float] = {"left": -0.8, "right": 0.8}  # side -> -1 (from the left) to 1
LIGHT_STRENGTH = 0.6  # contrast of light and shadow, 0 to 1

# number of people -> width of the image relative to its height, and the x of each head
IMAGE_WIDTHS: Mapping[int, float] = {1: 1.0, 2: 1.5}
HEAD_MIDDLES: Mapping[int, tuple[float, ...]] = {1: (0.5,), 2: (0.4, 1.1)}
HEAD_MIDDLE_HEIGHT, HEAD_OFFSET = 0.5, 0.015  # y of every head; maximum offset on both axes
HEAD_SIZE, HEAD_SIZE_RANGE = 0.31, 0.01  # half the height of a head; maximum difference from it
YAW_LEVELS = (-0.4, -0.2, 0.0, 0.2, 0.4)
MAX_YAW_OFFSET, MAX_PITCH, MAX_ROLL = 0.05, 0.06, 0.05


@dataclass(frozen=True)
class Figure:
    """One person's pose, expression and clothes; lengths relative to the image's height, angles in radians.

    As the viewer sees it, positive yaw turns the head to the right, positive pitch raises it, positive roll tilts it
    clockwise.
    """

    x: float
    y: float
    head_size: float
    yaw: float
    pitch: float
    roll: float
    expression: str
    clothes: str
    colour: str


@dataclass(frozen=True)
class Scene:
    """Everything in an image except the people's identities. `light` is a key of LIGHT_DIRECTIONS."""

    style: str
    place: str
    mirrored: bool  # the place, left and right
    light: str
    figures: tuple[Figure, ...]

    @property
    def image_width(self) -> float:
        """The width of the image relative to its height."""
        return IMAGE_WIDTHS[len(self.figures)]


def make_scene(number: int, num_people: int = 1) -> Scene:
    """Scene `number` (from 0) for one or two people. Raises ValueError for other numbers."""
    if num_people not in HEAD_MIDDLES or number < 0:
        raise ValueError(f"got scene {number} for {num_people} people; expected a number from 0, and 1 or 2 people")
    rng = PortableRandom(number * len(HEAD_MIDDLES) + num_people - 1)
    return Scene(
        style=rng.choice(STYLE_NAMES),
        place=rng.choice(PLACE_NAMES),
        mirrored=rng.choice((False, True)),
        light=rng.choice(list(LIGHT_DIRECTIONS)),
        figures=tuple(_make_figure(rng, middle) for middle in HEAD_MIDDLES[num_people]),
    )


def _make_figure(rng: PortableRandom, middle: float) -> Figure:
    return Figure(
        x=middle + rng.uniform(-HEAD_OFFSET, HEAD_OFFSET),
        y=HEAD_MIDDLE_HEIGHT + rng.uniform(-HEAD_OFFSET, HEAD_OFFSET),
        head_size=HEAD_SIZE + rng.uniform(-HEAD_SIZE_RANGE, HEAD_SIZE_RANGE),
        yaw=rng.choice(YAW_LEVELS) + rng.uniform(-MAX_YAW_OFFSET, MAX_YAW_OFFSET),
        pitch=rng.uniform(-MAX_PITCH, MAX_PITCH),
        roll=rng.uniform(-MAX_ROLL, MAX_ROLL),
        expression=rng.weighted_choice(EXPRESSION_WEIGHTS),
        clothes=rng.choice(GARMENT_NAMES),
        colour=rng.choice(GARMENT_COLOUR_NAMES),
    )


def measure_pose_difference(first: Figure, second: Figure) -> float:
    """Sum of the absolute differences of yaw, pitch and roll in degrees (Omni-ID, arXiv 2412.09694, App. A.2)."""
    return math.degrees(abs(first.yaw - second.yaw) + abs(first.pitch - second.pitch) + abs(first.roll - second.roll))
