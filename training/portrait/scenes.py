"""What changes from one picture to the next: pose, expression, light, place, style; and the sentence that says it."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass

from ..dice import Dice

# style -> how a sentence begins, how it may end instead
STYLES: Mapping[str, tuple[str, str]] = {
    "photo": ("a photo of", "a photo"),
    "line art": ("line art of", "line art"),
    "watercolour": ("a watercolour of", "watercolour"),
    "bronze": ("a bronze of", "a bronze"),
    "pencil": ("a pencil drawing of", "pencil drawing"),
}
PLACES: Mapping[str, str] = {
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
# expression -> how often it is met, relative to the others
EXPRESSIONS: Mapping[str, float] = {
    "neutral": 3, "smiling": 3, "laughing": 2, "sad": 1, "surprised": 1, "angry": 1,
}  # fmt: skip
NEUTRAL = "neutral"  # of which nothing is said
CLOTHES = ("tee", "jumper", "shirt", "hoodie")
COLOURS = ("red", "blue", "green", "yellow", "white", "black", "purple", "orange")
FRAMINGS: Mapping[str, str] = {"close": "close up", "bust": "", "wide": "from afar"}
LIGHTS = {"warm": "in warm light", "cold": "in cold light"}
TINTED = 0.45  # the warmth from which a sentence may speak of it

# framing -> half the head's height in sides of the picture, at least and at most; for one person, for two
SIZES: Mapping[str, tuple[tuple[float, float], tuple[float, float]]] = {
    "close": ((0.29, 0.34), (0.21, 0.23)),
    "bust": ((0.20, 0.25), (0.17, 0.20)),
    "wide": ((0.13, 0.16), (0.12, 0.14)),
}
HEIGHTS: Mapping[str, tuple[float, float]] = {"close": (0.47, 0.53), "bust": (0.40, 0.48), "wide": (0.40, 0.52)}
# The middle of each head, in sides of the picture, and how far it may stray, in halves of its height.
MIDDLES: Mapping[int, tuple[float, ...]] = {1: (0.5,), 2: (0.27, 0.73)}
STRAY = {"close": 0.12, "bust": 0.4, "wide": 1.2}
YAW, PITCH, ROLL = 0.6, 0.2, 0.22  # radians, at most


@dataclass(frozen=True)
class Figure:
    """How one person stands in a picture; lengths in its sides, angles in radians as the viewer sees them.

    Above 0 yaw looks to the right, pitch up, and roll leans the head clockwise; gaze, -1 to 1, looks to the right.
    """

    x: float
    y: float
    size: float
    yaw: float
    pitch: float
    roll: float
    gaze: float
    expression: str
    clothes: str
    colour: str


@dataclass(frozen=True)
class Scene:
    """A picture without the people: where they stand, and everything around them."""

    seed: int
    style: str
    place: str
    framing: str
    side: float  # of the light: -1 from the left, 1 from the right
    warmth: float  # -1 cold, 1 warm
    strength: float  # of light and shadow, 0 to 1
    figures: tuple[Figure, ...]
    wording: tuple[int, ...]  # one number for each choice that a sentence leaves open


def scene(number: int, people: int = 1) -> Scene:
    """The scene `number`, from 0, for one person or two. Raises ValueError on any other number of people."""
    if people not in MIDDLES or number < 0:
        raise ValueError(f"got scene {number} for {people} people; expected one from 0, for 1 or 2 people")
    dice = Dice(number * len(MIDDLES) + people - 1)
    style, place, framing = dice.pick(list(STYLES)), dice.pick(list(PLACES)), dice.pick(list(FRAMINGS))
    return Scene(
        seed=dice.below(2**31),
        style=style,
        place=place,
        framing=framing,
        side=dice.between(-1, 1),
        warmth=dice.between(-1, 1),
        strength=dice.between(0.2, 1),
        figures=tuple(_figure(dice, framing, middle, people) for middle in MIDDLES[people]),
        wording=tuple(dice.below(2) for _ in range(5)),
    )


def _figure(dice: Dice, framing: str, middle: float, people: int) -> Figure:
    size = dice.between(*SIZES[framing][people - 1])
    stray = STRAY[framing] / people**2
    return Figure(
        x=middle + dice.between(-stray, stray) * size,
        y=dice.between(*HEIGHTS[framing]),
        size=size,
        yaw=dice.between(-YAW, YAW),
        pitch=dice.between(-PITCH, PITCH),
        roll=dice.between(-ROLL, ROLL),
        gaze=dice.between(-1, 1),
        expression=dice.weigh(EXPRESSIONS),
        clothes=dice.pick(CLOTHES),
        colour=dice.pick(COLOURS),
    )


def turned(one: Figure, other: Figure) -> float:
    """How far apart two poses are: the sum of what yaw, pitch and roll differ by, in degrees (2412.09694, App. A.2)."""
    return math.degrees(abs(one.yaw - other.yaw) + abs(one.pitch - other.pitch) + abs(one.roll - other.roll))


def caption(given: Scene) -> str:
    """The sentence for a scene. It says nothing of who is there: the people are told from the pictures alone."""
    first, dressed, placed, framed, lit = given.wording
    begin, end = STYLES[given.style]
    tint = "warm" if given.warmth > TINTED else "cold" if given.warmth < -TINTED else ""
    parts = [
        begin if first else "",
        _who(given.figures, bool(dressed)),
        PLACES[given.place],
        LIGHTS[tint] if tint and lit and placed else "",
    ]
    after = [FRAMINGS[given.framing] if framed else "", "" if first else end]
    return ", ".join(part for part in (" ".join(filter(None, parts)), *after) if part)


def _who(figures: tuple[Figure, ...], dressed: bool) -> str:
    first, *others = figures
    alike = all(other.expression == first.expression for other in others)
    face = first.expression if alike and first.expression != NEUTRAL else ""
    if others:
        return f"two {face} people" if face else "two people"
    article = "an" if face[:1] == "a" else "a"
    return " ".join(filter(None, (article, face, "person", f"in {first.colour}" if dressed else "")))


def _words() -> tuple[str, ...]:
    """Every word that a sentence may hold, in alphabetical order."""
    said = [*PLACES.values(), *COLOURS, *FRAMINGS.values(), *LIGHTS.values(), *(set(EXPRESSIONS) - {NEUTRAL})]
    said += ["a person", "an", "two people", "in", *(part for parts in STYLES.values() for part in parts)]
    return tuple(sorted({word for text in said for word in text.split()}))


WORDS = _words()
