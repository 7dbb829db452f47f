"""The people of Portrait World: 29 visible attributes, and the split that each person belongs to."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from ...training.data.portable_random import PortableRandom

AttributeValue = str | float
FIVE_LEVELS = (-1.0, -0.5, 0.0, 0.5, 1.0)
THREE_LEVELS = (-1.0, 0.0, 1.0)


def _equal_weights(*values: AttributeValue) -> dict[AttributeValue, float]:
    return dict.fromkeys(values, 1.0)


# attribute -> its values and their relative frequencies
PERSON_ATTRIBUTES: Mapping[str, Mapping[AttributeValue, float]] = {
    "face": _equal_weights("oval", "round", "square", "heart", "long", "diamond"),
    "face_width": _equal_weights(*THREE_LEVELS),
    "jaw": _equal_weights(*FIVE_LEVELS),
    "skin": _equal_weights("porcelain", "rose", "peach", "olive", "tan", "caramel", "brown", "dark"),
    "ears": _equal_weights("small", "round", "large", "pointed"),
    "hair": _equal_weights(
        "buzz", "short", "quiff", "curly", "afro", "bob", "long", "wavy", "bun", "pigtails", "mohawk", "ponytail"
    )
    | {"bald": 0.8},
    "hair_colour": _equal_weights("black", "brown", "chestnut", "ginger", "blond", "grey", "white")
    | {"blue": 0.6, "pink": 0.6},
    "fringe": _equal_weights("none", "straight", "swept", "parted", "peak"),
    "brows": _equal_weights("straight", "arched", "angled", "round"),
    "brow_weight": _equal_weights(*THREE_LEVELS),
    "eye_colour": _equal_weights("brown", "hazel", "green", "blue", "grey", "black"),
    "eyes": _equal_weights("round", "almond", "narrow", "drooping"),
    "eye_size": _equal_weights(*FIVE_LEVELS),
    "eye_gap": _equal_weights(*FIVE_LEVELS),
    "eye_tilt": _equal_weights(*THREE_LEVELS),
    "nose_length": _equal_weights(*FIVE_LEVELS),
    "nose_width": _equal_weights(*FIVE_LEVELS),
    "nose_tip": _equal_weights(*THREE_LEVELS),
    "mouth_width": _equal_weights(*FIVE_LEVELS),
    "lips": _equal_weights(*FIVE_LEVELS),
    "lip_colour": _equal_weights("natural", "rose", "berry", "brick"),
    "beard": {"none": 8.0} | _equal_weights("stubble", "moustache", "goatee", "full", "chin curtain"),
    "glasses": {"none": 5.0} | _equal_weights("round", "square", "cat eye"),
    "frames": _equal_weights("black", "red", "gold"),
    "earrings": {"none": 3.0} | _equal_weights("studs", "hoops"),
    "freckles": {"none": 2.0, "some": 1.0},
    "mark": {"none": 2.0} | _equal_weights("left mole", "right mole", "left scar", "right scar"),
    "age": {"smooth": 2.0, "lined": 1.0, "old": 1.0},
    "cheeks": {"pale": 1.0, "rosy": 1.5, "hollow": 0.7},
}  # fmt: skip

# split -> remainders of the sum of a person's attribute indices. A person's attributes determine the split, so that
# nobody is in two splits.
SPLIT_REMAINDERS: Mapping[str, tuple[int, ...]] = {"train": tuple(range(8)), "validation": (8,), "test": (9,)}
SPLIT_MODULUS = 10
NUM_POSSIBLE_PEOPLE = math.prod(len(values) for values in PERSON_ATTRIBUTES.values())


@dataclass(frozen=True)
class Person:
    """The attributes of a person, equal in all images. PERSON_ATTRIBUTES has their values."""

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
    def attribute_indices(self) -> tuple[int, ...]:
        """The index of each attribute's value in PERSON_ATTRIBUTES. Raises ValueError for an unknown value."""
        return tuple(_attribute_index(name, getattr(self, name)) for name in PERSON_ATTRIBUTES)

    @property
    def split(self) -> str:
        remainder = sum(self.attribute_indices) % SPLIT_MODULUS
        return next(name for name, remainders in SPLIT_REMAINDERS.items() if remainder in remainders)


def _attribute_index(name: str, value: AttributeValue) -> int:
    known = list(PERSON_ATTRIBUTES[name])
    if value not in known:
        raise ValueError(f"got {value!r} for {name}; expected one of {', '.join(map(str, known))}")
    return known.index(value)


def make_person(number: int, split: str) -> Person:
    """Person `number` (from 0) of a split. Raises ValueError for an unknown split or a negative number."""
    if split not in SPLIT_REMAINDERS or number < 0:
        raise ValueError(
            f"got person {number} of {split!r}; expected a number from 0 and one of {', '.join(SPLIT_REMAINDERS)}"
        )
    rng = PortableRandom(number * len(SPLIT_REMAINDERS) + list(SPLIT_REMAINDERS).index(split))
    while True:
        attributes: dict[str, Any] = {name: rng.weighted_choice(values) for name, values in PERSON_ATTRIBUTES.items()}
        person = Person(**attributes)
        if person.split == split:
            return person
