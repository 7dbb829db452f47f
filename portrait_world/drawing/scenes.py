"""Scenes, everything in an image except the people: pose, expression, light, place, style; and their captions."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass

from ...training.data.portable_random import PortableRandom

# style -> beginning of a caption, alternative ending
STYLE_PHRASES: Mapping[str, tuple[str, str]] = {
    "photo": ("a photo of", "a photo"),
    "line art": ("line art of", "line art"),
    "watercolour": ("a watercolour of", "watercolour"),
    "bronze": ("a bronze of", "a bronze"),
    "pencil": ("a pencil drawing of", "pencil drawing"),
}
PLACE_PHRASES: Mapping[str, str] = {
    "plain": "",
    "forest": "in a forest",
    "city": "in a city",
    "beach": "at a beach",
    "snow": "in the snow",
    "room": "in a room",
    "mountains": "in the mountains",
    "meadow": "in a meadow",
    "desert": "in a desert",
    "night": "at night",
}
# expression -> relative frequency
EXPRESSION_WEIGHTS: Mapping[str, float] = {
    "neutral": 3, "smiling": 3, "laughing": 2, "sad": 1, "surprised": 1, "angry": 1,
}  # fmt: skip
NEUTRAL_EXPRESSION = "neutral"  # not mentioned in captions
GARMENT_NAMES = ("tee", "jumper", "shirt", "hoodie")
GARMENT_COLOUR_NAMES = ("red", "blue", "green", "yellow", "white", "black", "purple", "orange")
FRAMING_PHRASES: Mapping[str, str] = {"close": "close up", "bust": "", "wide": "from afar"}
LIGHT_PHRASES = {"warm": "in warm light", "cold": "in cold light"}
MIN_TINT_WARMTH = 0.45  # absolute light warmth from which captions may mention it

# framing -> range of half the height of a head relative to the image; for one person, for two
HEAD_SIZES: Mapping[str, tuple[tuple[float, float], tuple[float, float]]] = {
    "close": ((0.29, 0.34), (0.21, 0.23)),
    "bust": ((0.20, 0.25), (0.17, 0.20)),
    "wide": ((0.13, 0.16), (0.12, 0.14)),
}
HEAD_HEIGHTS: Mapping[str, tuple[float, float]] = {"close": (0.47, 0.53), "bust": (0.40, 0.48), "wide": (0.40, 0.52)}
# x of each head relative to the image; maximum offset in halves of the head's height.
HEAD_MIDDLES: Mapping[int, tuple[float, ...]] = {1: (0.5,), 2: (0.27, 0.73)}
MAX_HEAD_OFFSETS = {"close": 0.12, "bust": 0.4, "wide": 1.2}
MAX_YAW, MAX_PITCH, MAX_ROLL = 0.6, 0.2, 0.22  # radians


@dataclass(frozen=True)
class Figure:
    """One person's pose, expression and clothes; lengths relative to the image, angles in radians.

    As the viewer sees it, positive yaw turns the head to the right, positive pitch raises it, positive roll tilts it
    clockwise. `gaze`: -1 (left) to 1 (right).
    """

    x: float
    y: float
    head_size: float
    yaw: float
    pitch: float
    roll: float
    gaze: float
    expression: str
    clothes: str
    colour: str


@dataclass(frozen=True)
class Scene:
    """Everything in an image except the people's identities."""

    seed: int
    style: str
    place: str
    framing: str
    light_direction: float  # -1 from the left, 1 from the right
    light_warmth: float  # -1 cold, 1 warm
    light_strength: float  # contrast of light and shadow, 0 to 1
    figures: tuple[Figure, ...]
    wording: tuple[int, ...]  # the optional parts of the caption, 0 or 1 each


def make_scene(number: int, num_people: int = 1) -> Scene:
    """Scene `number` (from 0) for one or two people. Raises ValueError for other numbers."""
    if num_people not in HEAD_MIDDLES or number < 0:
        raise ValueError(f"got scene {number} for {num_people} people; expected a number from 0, and 1 or 2 people")
    rng = PortableRandom(number * len(HEAD_MIDDLES) + num_people - 1)
    style, place, framing = (
        rng.choice(list(STYLE_PHRASES)),
        rng.choice(list(PLACE_PHRASES)),
        rng.choice(list(FRAMING_PHRASES)),
    )
    return Scene(
        seed=rng.randrange(2**31),
        style=style,
        place=place,
        framing=framing,
        light_direction=rng.uniform(-1, 1),
        light_warmth=rng.uniform(-1, 1),
        light_strength=rng.uniform(0.2, 1),
        figures=tuple(_make_figure(rng, framing, middle, num_people) for middle in HEAD_MIDDLES[num_people]),
        wording=tuple(rng.randrange(2) for _ in range(5)),
    )


def _make_figure(rng: PortableRandom, framing: str, middle: float, num_people: int) -> Figure:
    size = rng.uniform(*HEAD_SIZES[framing][num_people - 1])
    max_offset = MAX_HEAD_OFFSETS[framing] / num_people**2
    return Figure(
        x=middle + rng.uniform(-max_offset, max_offset) * size,
        y=rng.uniform(*HEAD_HEIGHTS[framing]),
        head_size=size,
        yaw=rng.uniform(-MAX_YAW, MAX_YAW),
        pitch=rng.uniform(-MAX_PITCH, MAX_PITCH),
        roll=rng.uniform(-MAX_ROLL, MAX_ROLL),
        gaze=rng.uniform(-1, 1),
        expression=rng.weighted_choice(EXPRESSION_WEIGHTS),
        clothes=rng.choice(GARMENT_NAMES),
        colour=rng.choice(GARMENT_COLOUR_NAMES),
    )


def measure_pose_difference(first: Figure, second: Figure) -> float:
    """Sum of the absolute differences of yaw, pitch and roll in degrees (Omni-ID, arXiv 2412.09694, App. A.2)."""
    return math.degrees(abs(first.yaw - second.yaw) + abs(first.pitch - second.pitch) + abs(first.roll - second.roll))


def format_caption(scene: Scene) -> str:
    """The caption of a scene. It does not describe identities, only the scene."""
    style_first, with_clothes, with_place, with_framing, with_light = scene.wording
    begin, end = STYLE_PHRASES[scene.style]
    tint = "warm" if scene.light_warmth > MIN_TINT_WARMTH else "cold" if scene.light_warmth < -MIN_TINT_WARMTH else ""
    parts = [
        begin if style_first else "",
        _describe_people(scene.figures, bool(with_clothes)),
        PLACE_PHRASES[scene.place],
        LIGHT_PHRASES[tint] if tint and with_light and with_place else "",
    ]
    after = [FRAMING_PHRASES[scene.framing] if with_framing else "", "" if style_first else end]
    return ", ".join(part for part in (" ".join(filter(None, parts)), *after) if part)


def _describe_people(figures: tuple[Figure, ...], with_clothes: bool) -> str:
    first, *others = figures
    same_expression = all(other.expression == first.expression for other in others)
    expression = first.expression if same_expression and first.expression != NEUTRAL_EXPRESSION else ""
    if others:
        return f"two {expression} people" if expression else "two people"
    article = "an" if expression[:1] == "a" else "a"
    return " ".join(filter(None, (article, expression, "person", f"in {first.colour}" if with_clothes else "")))


def _list_caption_words() -> tuple[str, ...]:
    """Every word that captions may contain, in alphabetical order."""
    phrases = [
        *PLACE_PHRASES.values(),
        *GARMENT_COLOUR_NAMES,
        *FRAMING_PHRASES.values(),
        *LIGHT_PHRASES.values(),
        *(set(EXPRESSION_WEIGHTS) - {NEUTRAL_EXPRESSION}),
    ]
    phrases += ["a person", "an", "two people", "in", *(part for parts in STYLE_PHRASES.values() for part in parts)]
    return tuple(sorted({word for text in phrases for word in text.split()}))


CAPTION_WORDS = _list_caption_words()
