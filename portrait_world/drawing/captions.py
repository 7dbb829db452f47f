"""Captions: a grammar that can name everything a viewer sees, in any subset and order."""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping, Sequence

from ...training.data.portable_random import PortableRandom
from .people import PERSON_ATTRIBUTES, Person
from .scenes import (
    EXPRESSION_WEIGHTS,
    GARMENT_COLOUR_NAMES,
    GARMENT_NAMES,
    NEUTRAL_EXPRESSION,
    YAW_LEVELS,
    Figure,
    Scene,
)

# style -> beginning of a caption, alternative ending
STYLE_PHRASES: Mapping[str, tuple[str, str]] = {
    "photo": ("a photo of", "a photo"),
    "line art": ("line art of", "line art"),
    "watercolour": ("a watercolour of", "watercolour"),
    "bronze": ("a bronze of", "a bronze"),
    "pencil": ("a pencil drawing of", "pencil drawing"),
}
PLACE_PHRASES: Mapping[str, str] = {
    "plain": "", "forest": "in a forest", "city": "in a city", "beach": "at a beach", "snow": "in the snow",
    "room": "in a room", "mountains": "in the mountains", "meadow": "in a meadow", "desert": "in a desert",
    "night": "at night",
}  # fmt: skip
VIEW_PHRASES = ("looking far left", "looking left", "looking ahead", "looking right", "looking far right")
LIGHT_PHRASES: Mapping[str, str] = {"left": "lit from the left", "right": "lit from the right"}
SIDE_PHRASES = ("on the left", "on the right")  # of two people

# What a caption may say of a scene besides its style: detail -> share of random captions that say it. What is always
# said when there is something to say is neutral or plain otherwise.
DETAIL_SHARES: Mapping[str, float] = {
    "expression": 1.0, "clothes": 0.5, "looks": 1.0, "place": 1.0, "view": 0.5, "light": 0.3,
}  # fmt: skip
STYLE_FIRST_SHARE = 0.7  # of random captions; the others end with the style
FULL_LOOKS_SHARE = 0.5  # of random captions with looks; the others leave out some of them
MIN_LOOKS_SHARE = 0.15  # of all looks, in those
MAX_LOOKS_OF_TWO = 6  # of each of two people, so that those of both are varied

# CLIP reads the first 75 tokens of a prompt: a word or a comma is one, except for these words, which are two.
MAX_CAPTION_TOKENS = 75
TWO_TOKEN_WORDS = ("goatee", "pigtails", "quiff", "spaced", "stub", "stubble")

# Five levels, from -1 to 1, and three. Short words, so that most full captions fit into a prompt.
SIZE_WORDS = {-1.0: "tiny", -0.5: "small", 0.0: "", 0.5: "big", 1.0: "huge"}
WIDTH_WORDS = {-1.0: "slim", -0.5: "narrow", 0.0: "", 0.5: "wide", 1.0: "broad"}
LENGTH_WORDS = {-1.0: "stub", -0.5: "short", 0.0: "", 0.5: "long", 1.0: "lengthy"}
FULLNESS_WORDS = {-1.0: "flat", -0.5: "thin", 0.0: "", 0.5: "full", 1.0: "thick"}
GAP_WORDS = {-1.0: "crossed", -0.5: "close", 0.0: "", 0.5: "spaced", 1.0: "distant"}
TILT_WORDS = {-1.0: "falling", 0.0: "", 1.0: "rising"}
TIP_WORDS = {-1.0: "hooked", 0.0: "", 1.0: "raised"}
THICKNESS_WORDS = {-1.0: "thin", 0.0: "", 1.0: "thick"}
FACE_WIDTH_WORDS = {-1.0: "narrow", 0.0: "", 1.0: "wide"}
# haircut -> phrase around its colour
HAIR_PHRASES: Mapping[str, str] = {
    "bald": "bald head", "buzz": "{} buzz cut", "short": "short {} hair", "quiff": "{} quiff",
    "curly": "curly {} hair", "afro": "{} afro", "bob": "{} bob", "long": "long {} hair", "wavy": "wavy {} hair",
    "bun": "{} bun", "pigtails": "{} pigtails", "mohawk": "{} mohawk", "ponytail": "{} ponytail",
}  # fmt: skip
FRINGE_PHRASES = {
    "none": "", "straight": "straight fringe", "swept": "swept fringe", "parted": "curtain fringe",
    "peak": "pointed fringe",
}  # fmt: skip
BROW_WORDS = {"straight": "straight", "arched": "curved", "angled": "angled", "round": "round"}
EYE_WORDS = {"round": "round", "almond": "almond", "narrow": "narrow", "drooping": "hooded"}
BEARD_PHRASES = {
    "none": "", "stubble": "stubble", "moustache": "moustache", "goatee": "goatee", "full": "full beard",
    "chin curtain": "chin beard",
}  # fmt: skip
EARRING_PHRASES = {"none": "", "studs": "ear studs", "hoops": "ear hoops"}
FRECKLE_PHRASES = {"none": "", "some": "freckles"}
MARK_PHRASES = {
    "none": "", "left mole": "left mole", "right mole": "right mole", "left scar": "left scar",
    "right scar": "right scar",
}  # fmt: skip
AGE_PHRASES = {"smooth": "", "lined": "wrinkles", "old": "deep wrinkles"}
CHEEK_PHRASES = {"pale": "", "rosy": "rosy cheeks", "hollow": "hollow cheeks"}
NATURAL_LIPS = "natural"  # not named
# Attributes whose values are words of captions themselves, and the words around them.
NAMED_ATTRIBUTES = (
    "hair_colour", "skin", "face", "eye_colour", "ears", "lip_colour", "glasses", "frames",
)  # fmt: skip
GRAMMAR_WORDS = (
    "a person", "an", "two people", "and", "in", "with", "skin", "face", "jaw", "brows", "eyes", "nose", "mouth",
    "lips", "ears", "glasses",
)  # fmt: skip


def list_looks(person: Person) -> list[str]:
    """A phrase for each visible feature of a person; features without a special trait have none."""
    bald = person.hair == "bald"
    phrases = [
        HAIR_PHRASES[person.hair].format(person.hair_colour),
        "" if bald else FRINGE_PHRASES[person.fringe],
        f"{person.skin} skin",
        _join(FACE_WIDTH_WORDS[person.face_width], person.face, "face"),
        _join(WIDTH_WORDS[person.jaw], "jaw") if person.jaw else "",
        _join(
            THICKNESS_WORDS[person.brow_weight], BROW_WORDS[person.brows],
            person.hair_colour if bald else "", "brows",  # only here a bald person's hair colour shows
        ),
        _join(
            SIZE_WORDS[person.eye_size], GAP_WORDS[person.eye_gap], TILT_WORDS[person.eye_tilt],
            EYE_WORDS[person.eyes], person.eye_colour, "eyes",
        ),
        _join(
            LENGTH_WORDS[person.nose_length], WIDTH_WORDS[person.nose_width], TIP_WORDS[person.nose_tip], "nose"
        ) if person.nose_length or person.nose_width or person.nose_tip else "",
        _join(WIDTH_WORDS[person.mouth_width], "mouth") if person.mouth_width else "",
        _join(FULLNESS_WORDS[person.lips], person.lip_colour.replace(NATURAL_LIPS, ""), "lips")
        if person.lips or person.lip_colour != NATURAL_LIPS else "",
        f"{person.ears} ears",
        BEARD_PHRASES[person.beard],
        f"{person.glasses} {person.frames} glasses" if person.glasses != "none" else "",
        EARRING_PHRASES[person.earrings],
        FRECKLE_PHRASES[person.freckles],
        MARK_PHRASES[person.mark],
        AGE_PHRASES[person.age],
        CHEEK_PHRASES[person.cheeks],
    ]  # fmt: skip
    return [phrase for phrase in phrases if phrase]


def format_caption(
    scene: Scene, looks: Sequence[Sequence[str]] = (), details: Iterable[str] = DETAIL_SHARES, style_first: bool = True
) -> str:
    """The caption of a scene: its style and its `details` in order, with the `looks` of each person (list_looks).

    Looks that come after something else follow a comma, as in "a person in a forest, with ginger hair". The last looks
    are left out if the caption is longer than a prompt, so that the scene is always said.
    """
    details = list(details)
    said = [list(own) for own in looks] if "looks" in details else []
    while True:
        caption = _write_caption(scene, said, details, style_first)
        if _count_tokens(caption) <= MAX_CAPTION_TOKENS or not any(said):
            return caption
        max(said, key=len).pop()


def _write_caption(scene: Scene, looks: Sequence[Sequence[str]], details: Sequence[str], style_first: bool) -> str:
    begin, end = STYLE_PHRASES[scene.style]
    alone = len(scene.figures) == 1
    phrases = {
        "looks": f"with {_list_phrases(looks[0])}" if alone and any(looks) else "",
        "place": PLACE_PHRASES[scene.place],
        "view": describe_view(scene.figures[0]) if alone else "",
        "light": LIGHT_PHRASES[scene.light],
    }
    people = _describe_people(scene.figures, () if alone else looks, "expression" in details, "clothes" in details)
    after = [detail for detail in details if phrases.get(detail)]
    caption = _join(begin if style_first else "", people)
    for number, detail in enumerate(after):
        joined = number == 0 and detail in ("looks", "place") and (alone or not any(looks))
        caption += f"{'' if joined else ','} {phrases[detail]}"
    return caption if style_first else f"{caption}, {end}"


def _count_tokens(caption: str) -> int:
    words = re.findall(r"\w+|,", caption)
    return len(words) + sum(word in TWO_TOKEN_WORDS for word in words)


def make_caption(scene: Scene, people: Sequence[Person], rng: PortableRandom) -> str:
    """A random caption: a random subset of the details in random order, and of the looks of `people`, if given."""
    details = [detail for detail, share in DETAIL_SHARES.items() if rng.uniform(0, 1) < share]
    looks = [_choose_looks(list_looks(person), rng) for person in people]
    if len(people) > 1:
        looks = [_shuffle(own, rng)[:MAX_LOOKS_OF_TWO] for own in looks]
    return format_caption(scene, looks, _shuffle(details, rng), rng.uniform(0, 1) < STYLE_FIRST_SHARE)


def describe_view(figure: Figure) -> str:
    """Where a figure looks, by the nearest of the yaw levels."""
    return VIEW_PHRASES[min(range(len(YAW_LEVELS)), key=lambda level: abs(YAW_LEVELS[level] - figure.yaw))]


def _choose_looks(looks: list[str], rng: PortableRandom) -> list[str]:
    if rng.uniform(0, 1) < FULL_LOOKS_SHARE:
        return looks
    share = rng.uniform(MIN_LOOKS_SHARE, 1)
    return _shuffle([phrase for phrase in looks if rng.uniform(0, 1) < share], rng)


def _describe_people(
    figures: Sequence[Figure], looks: Sequence[Sequence[str]], with_expression: bool, with_clothes: bool
) -> str:
    expressions = [figure.expression if with_expression else NEUTRAL_EXPRESSION for figure in figures]
    if len(figures) > 1 and len(set(expressions)) == 1 and not with_clothes and not any(looks):
        return _join("two", _say_expression(expressions[0]), "people")
    people = []
    for number, (figure, expression) in enumerate(zip(figures, expressions, strict=True)):
        noun = _join(_say_expression(expression), "person")
        clothes = f"in {_add_article(f'{figure.colour} {figure.clothes}')}" if with_clothes else ""
        with_looks = f"with {_list_phrases(looks[number])}" if looks and looks[number] else ""
        side = SIDE_PHRASES[number] if len(figures) > 1 else ""
        people.append(_join(_add_article(noun), side, clothes, with_looks))
    return " and ".join(people)


def _list_phrases(phrases: Sequence[str]) -> str:
    return " and ".join([", ".join(phrases[:-1]), phrases[-1]]) if len(phrases) > 1 else phrases[0]


def _say_expression(expression: str) -> str:
    return "" if expression == NEUTRAL_EXPRESSION else expression


def _add_article(noun: str) -> str:
    return f"{'an' if noun[0] in 'aeiou' else 'a'} {noun}"


def _join(*words: str) -> str:
    return " ".join(word for word in words if word)


def _shuffle(items: Sequence[str], rng: PortableRandom) -> list[str]:
    remaining = list(items)
    return [remaining.pop(rng.randrange(len(remaining))) for _ in items]


def _list_caption_words() -> tuple[str, ...]:
    """Every word that captions may contain, in alphabetical order."""
    tables: Iterable[Iterable[str]] = (
        (part for parts in STYLE_PHRASES.values() for part in parts), PLACE_PHRASES.values(), VIEW_PHRASES,
        LIGHT_PHRASES.values(), SIDE_PHRASES, set(EXPRESSION_WEIGHTS) - {NEUTRAL_EXPRESSION}, GARMENT_NAMES,
        GARMENT_COLOUR_NAMES, SIZE_WORDS.values(), WIDTH_WORDS.values(), LENGTH_WORDS.values(), FULLNESS_WORDS.values(),
        GAP_WORDS.values(), TILT_WORDS.values(), TIP_WORDS.values(), THICKNESS_WORDS.values(),
        FACE_WIDTH_WORDS.values(), (phrase.replace("{}", "") for phrase in HAIR_PHRASES.values()),
        FRINGE_PHRASES.values(), BROW_WORDS.values(), EYE_WORDS.values(), BEARD_PHRASES.values(),
        EARRING_PHRASES.values(), FRECKLE_PHRASES.values(), MARK_PHRASES.values(), AGE_PHRASES.values(),
        CHEEK_PHRASES.values(),
        *((str(value) for value in PERSON_ATTRIBUTES[name]) for name in NAMED_ATTRIBUTES), GRAMMAR_WORDS,
    )  # fmt: skip
    words = {word for table in tables for phrase in table for word in phrase.split()}
    return tuple(sorted(words - {NATURAL_LIPS, "none"}))


CAPTION_WORDS = _list_caption_words()
