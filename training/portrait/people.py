"""The people of Portrait World: 29 attributes that a viewer can tell apart, and who belongs to which split."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from ..dice import Dice

Level = str | float
EVEN = (-1.0, -0.5, 0.0, 0.5, 1.0)  # a measure from the least to the most
COARSE = (-1.0, 0.0, 1.0)


def _even(*values: Level) -> dict[Level, float]:
    return dict.fromkeys(values, 1.0)


# attribute -> its values and how often each is met, relative to the others
ATTRIBUTES: Mapping[str, Mapping[Level, float]] = {
    "face": _even("oval", "round", "square", "heart", "long", "diamond"),
    "face_width": _even(*COARSE),
    "jaw": _even(*EVEN),
    "skin": _even("porcelain", "rose", "peach", "olive", "tan", "caramel", "brown", "dark"),
    "ears": _even("small", "round", "large", "pointed"),
    "hair": _even(
        "buzz", "short", "quiff", "curly", "afro", "bob", "long", "wavy", "bun", "pigtails", "mohawk", "ponytail"
    )
    | {"bald": 0.8},
    "hair_colour": _even("black", "brown", "chestnut", "ginger", "blond", "grey", "white") | {"blue": 0.6, "pink": 0.6},
    "fringe": _even("none", "straight", "swept", "parted", "peak"),
    "brows": _even("straight", "arched", "angled", "round"),
    "brow_weight": _even(*COARSE),
    "eye_colour": _even("brown", "hazel", "green", "blue", "grey", "black"),
    "eyes": _even("round", "almond", "narrow", "drooping"),
    "eye_size": _even(*EVEN),
    "eye_gap": _even(*EVEN),
    "eye_tilt": _even(*COARSE),
    "nose_length": _even(*EVEN),
    "nose_width": _even(*EVEN),
    "nose_tip": _even(*COARSE),
    "mouth_width": _even(*EVEN),
    "lips": _even(*EVEN),
    "lip_colour": _even("natural", "rose", "berry", "brick"),
    "beard": {"none": 8.0} | _even("stubble", "moustache", "goatee", "full", "chin curtain"),
    "glasses": {"none": 5.0} | _even("round", "square", "cat eye"),
    "frames": _even("black", "red", "gold"),
    "earrings": {"none": 3.0} | _even("studs", "hoops"),
    "freckles": {"none": 2.0, "some": 1.0},
    "mark": {"none": 2.0} | _even("left mole", "right mole", "left scar", "right scar"),
    "age": {"smooth": 2.0, "lined": 1.0, "old": 1.0},
    "cheeks": {"pale": 1.0, "rosy": 1.5, "hollow": 0.7},
}  # fmt: skip

# Which remainders of the sum of all levels belong to which split: a person's looks alone say whose split they are in,
# so that nobody is in two.
SPLITS: Mapping[str, tuple[int, ...]] = {"train": tuple(range(8)), "validation": (8,), "test": (9,)}
MODULUS = 10
PEOPLE = math.prod(len(values) for values in ATTRIBUTES.values())


@dataclass(frozen=True)
class Person:
    """All that stays of somebody from one picture to the next. The values of each attribute: `ATTRIBUTES`."""

    face: str
    face_width: float
    jaw: float
    skin: str
    ears: str
    hair: str
    hair_colour: str
    fringe: str
    brows: str
    brow_weight: float
    eye_colour: str
    eyes: str
    eye_size: float
    eye_gap: float
    eye_tilt: float
    nose_length: float
    nose_width: float
    nose_tip: float
    mouth_width: float
    lips: float
    lip_colour: str
    beard: str
    glasses: str
    frames: str
    earrings: str
    freckles: str
    mark: str
    age: str
    cheeks: str

    @property
    def levels(self) -> tuple[int, ...]:
        """The number of each attribute's value in its table. Raises ValueError on one that is not there."""
        return tuple(_level(name, getattr(self, name)) for name in ATTRIBUTES)

    @property
    def split(self) -> str:
        rest = sum(self.levels) % MODULUS
        return next(name for name, rests in SPLITS.items() if rest in rests)


def _level(name: str, value: Level) -> int:
    known = list(ATTRIBUTES[name])
    if value not in known:
        raise ValueError(f"got {value!r} for {name}; expected one of {', '.join(map(str, known))}")
    return known.index(value)


def person(number: int, split: str) -> Person:
    """The person `number`, from 0, of a split. Raises ValueError on a split that is not there or a number below 0."""
    if split not in SPLITS or number < 0:
        raise ValueError(f"got person {number} of {split!r}; expected one from 0 of {', '.join(SPLITS)}")
    dice = Dice(number * len(SPLITS) + list(SPLITS).index(split))
    while True:
        drawn: dict[str, Any] = {name: dice.weigh(values) for name, values in ATTRIBUTES.items()}
        found = Person(**drawn)
        if found.split == split:
            return found
