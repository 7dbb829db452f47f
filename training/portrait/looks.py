"""Words for looks: short phrases that say who somebody is and how the head is held, the most visible ones first."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import Any

from .people import ATTRIBUTES, EVEN, Person
from .scenes import YAW, Figure, scene

# A haircut, around its colour.
CUTS: Mapping[str, str] = {
    "buzz": "{} buzz cut", "short": "short {} hair", "quiff": "{} quiff", "curly": "curly {} hair", "afro": "{} afro",
    "bob": "{} bob", "long": "long {} hair", "wavy": "wavy {} hair", "bun": "{} bun", "pigtails": "{} pigtails",
    "mohawk": "{} mohawk", "ponytail": "{} ponytail", "bald": "bald head",
}  # fmt: skip
FRINGES: Mapping[str, str] = {
    "none": "", "straight": "straight fringe", "swept": "swept fringe", "parted": "parted fringe",
    "peak": "pointed fringe",
}  # fmt: skip
AGES: Mapping[str, str] = {"smooth": "", "lined": "lined face", "old": "old face"}
NONE = "none"
SLIGHT, STRONG = 0.4, 0.8  # of a measure that reaches from -1 to 1
TURN = 0.2  # radians, from which a pose is spoken of
BESIDE = 6  # phrases for each of two people: a prompt has 77 tokens
SIDES = ("left", "right")


def looks(people: Sequence[Person], figures: Sequence[Figure]) -> tuple[str, ...]:
    """The phrases for everyone in a picture; for two people fewer, each of which begins with its person's side."""
    told = [_phrases(who, figure) for who, figure in zip(people, figures, strict=True)]
    if len(told) == 1:
        return told[0]
    return tuple(f"{side} {phrase}" for side, phrases in zip(SIDES, told, strict=True) for phrase in phrases[:BESIDE])


def _phrases(who: Person, figure: Figure) -> tuple[str, ...]:
    found = (
        CUTS[who.hair].format(who.hair_colour),
        f"{who.skin} skin",
        "" if who.glasses == NONE else f"{who.glasses} {who.frames} glasses",
        "" if who.beard == NONE else who.beard.replace("full", "full beard"),
        _measured("{} face", who.face_width, "narrow", "broad", who.face),
        _measured("turned {}", figure.yaw / TURN * SLIGHT, "left", "right"),
        _measured("{} eyes", who.eye_size, "small", "large", f"{who.eye_colour} {who.eyes}"),
        "" if who.hair == "bald" else FRINGES[who.fringe],
        _measured("{} eyebrows", who.brow_weight, "thin", "thick", who.brows),
        "freckles" if who.freckles != NONE else "",
        "" if who.mark == NONE else who.mark,
        AGES[who.age],
        _measured("{} nose", who.nose_length, "short", "long", _measured("{}", who.nose_width, "narrow", "broad")),
        _measured("{} lips", who.lips, "thin", "full", who.lip_colour.replace("natural", "")),
        _measured("{} mouth", who.mouth_width, "small", "wide"),
        f"{who.cheeks} cheeks",
        f"{who.ears} ears",
        _measured("{} set eyes", who.eye_gap, "close", "wide"),
        _measured("{} jaw", who.jaw, "narrow", "broad"),
        "" if who.earrings == NONE else who.earrings,
        _measured("looking {}", figure.pitch / TURN, "down", "up"),
        _measured("leaning {}", figure.roll / TURN * SLIGHT, "left", "right"),
        _measured("slanted {}", who.eye_tilt, "down", "up"),
        _measured("nose {}", who.nose_tip, "down", "up"),
    )
    return tuple(phrase for phrase in found if phrase)


def _measured(phrase: str, value: float, low: str, high: str, besides: str = "") -> str:
    """A phrase around how much of something there is, and what is said `besides`; empty where both are."""
    much = low if value < 0 else high
    how = "" if abs(value) < SLIGHT else f"very {much}" if abs(value) > STRONG else much
    said = " ".join(filter(None, (how, besides)))
    return phrase.format(said) if said else ""


def _words() -> tuple[str, ...]:
    """Every word that a phrase may hold, in alphabetical order: those for people who have every value between them."""
    found = set(SIDES)
    for number in range(max(map(len, ATTRIBUTES.values())) ** 2):
        values: dict[str, Any] = {name: list(known)[number % len(known)] for name, known in ATTRIBUTES.items()}
        turn = YAW * EVEN[number % len(EVEN)]
        figure = replace(scene(0).figures[0], yaw=turn, pitch=turn, roll=turn)
        found.update(word for phrase in _phrases(Person(**values), figure) for word in phrase.split())
    return tuple(sorted(found))


WORDS = _words()
