"""Captions: they name what is in the image, nothing else, and fit into a prompt."""

from __future__ import annotations

import re
from collections import Counter
from dataclasses import replace

import pytest
from comfyui_likeness.portrait_world import world
from comfyui_likeness.portrait_world.drawing import captions, people, scenes
from comfyui_likeness.portrait_world.world import Figure, Person, Scene
from comfyui_likeness.training.base_models import clip_pair
from comfyui_likeness.training.data.portable_random import PortableRandom

FIGURE = Figure(0.5, 0.5, 0.31, 0.2, 0.0, 0.0, "neutral", "shirt", "blue")
SCENE = Scene("photo", "forest", False, "right", (FIGURE,))
PAIR = replace(SCENE, figures=(FIGURE, replace(FIGURE, colour="orange")))
TOKENIZER = clip_pair.SDTokenizer()
# Attributes that do not show: of glasses that are not worn, and the hair of bald people.
HIDDEN_BY = {"frames": ("glasses", "none"), "fringe": ("hair", "bald")}


def count_tokens(text: str) -> int:
    """The tokens that CLIP reads, without start, end and padding."""
    end = TOKENIZER.end_token
    return sum(
        token not in (TOKENIZER.start_token, end) for row in TOKENIZER.tokenize_with_weights(text) for token, _ in row
    )


def split_phrases(caption: str) -> set[str]:
    """The phrases of a caption, without the words that join them."""
    return {phrase for phrase in re.split(r", | and |(?: |^)with ", caption) if phrase}


@pytest.mark.parametrize("name", people.PERSON_ATTRIBUTES)
def test_every_attribute_is_named(name: str) -> None:
    """Two people who differ in one visible attribute are described differently."""
    hidden_by, value = HIDDEN_BY.get(name, ("", None))
    for number in range(40):
        person = world.make_person(number, "train")
        others = [replace(person, **{name: other}) for other in people.PERSON_ATTRIBUTES[name]]
        described = {" ".join(world.list_looks(other)) for other in others}
        is_hidden = bool(hidden_by) and getattr(person, hidden_by) == value
        assert len(described) == (1 if is_hidden else len(others)), person


def test_full_captions_name_all_looks_and_the_scene() -> None:
    fitting = 0
    for number in range(500):
        person, scene = world.make_person(number, "test"), world.make_scene(number)
        looks = world.list_looks(person)
        text = world.format_caption(scene, [looks])
        (figure,) = scene.figures
        expected = [captions.PLACE_PHRASES[scene.place], captions.LIGHT_PHRASES[scene.light]]
        expected += [captions.describe_view(figure), f"{figure.colour} {figure.clothes}"]
        expected += [captions.STYLE_PHRASES[scene.style][0], figure.expression.replace("neutral", "")]
        assert all(phrase in text for phrase in expected), text
        assert count_tokens(text) <= 75, text
        named = [phrase for phrase in looks if phrase in split_phrases(text)]
        assert named == looks[: len(named)]
        fitting += len(named) == len(looks)
    assert fitting >= 0.8 * 500


@pytest.mark.parametrize("num_people", [1, 2])
def test_random_captions_say_only_what_is_true(num_people: int) -> None:
    styles, told = Counter[str](), Counter[str]()
    for number in range(400):
        scene = world.make_scene(number, num_people)
        shown = [world.make_person(number + 1000 * n, "train") for n in range(num_people)]
        text = world.make_caption(scene, shown, PortableRandom(number))
        assert count_tokens(text) <= 75
        check_scene_words(text, scene)
        sides = re.split(r" and (?=an? .*person on the right)", text) if num_people == 2 else [text]
        for person, side in zip(shown, sides, strict=True) if len(sides) == num_people else ():
            check_looks(side, person)
        styles[text.split(" of ")[0] if " of " in text else "at the end"] += 1
        told.update(name for name in ("looking", "lit", " with ") if name in text)
    assert styles["at the end"] > 60 and len(styles) == 1 + len(scenes.STYLE_NAMES)
    assert told[" with "] > 350 and 60 < told["lit"] < 200 and (told["looking"] > 120) is (num_people == 1)


def check_scene_words(text: str, scene: Scene) -> None:
    assert any(phrase in text for phrase in captions.STYLE_PHRASES[scene.style])
    for phrases, right in (
        (captions.PLACE_PHRASES, captions.PLACE_PHRASES[scene.place]),
        (captions.LIGHT_PHRASES, captions.LIGHT_PHRASES[scene.light]),
    ):
        assert {phrase for phrase in phrases.values() if phrase and phrase in text} <= {right}, text
    views = re.findall(r"looking (?:far )?\w+", text)
    assert views in ([], [captions.describe_view(scene.figures[0])])
    expressions = {figure.expression for figure in scene.figures}
    assert {word for word in scenes.EXPRESSION_WEIGHTS if word in text.split()} <= expressions
    garments = {f"{figure.colour} {figure.clothes}" for figure in scene.figures}
    assert set(re.findall(rf"\w+ (?:{'|'.join(scenes.GARMENT_NAMES)})(?= |,|$)", text)) <= garments


def check_looks(text: str, person: Person) -> None:
    """What follows `with` are looks of the person."""
    listed = re.search(r" with (.*)", text)
    if listed is not None:
        looks = set(world.list_looks(person))
        phrases = re.split(r", | and ", listed[1])
        named = [phrase for phrase in phrases if phrase in looks]
        rest = [phrase for phrase in phrases if phrase not in looks]
        assert named and all(re.match(r"(in|at|looking|lit|a|line|watercolour|pencil)\b", phrase) for phrase in rest), (
            text
        )


def test_captions_without_people_say_no_looks() -> None:
    looks = {look for n in range(50) for look in world.list_looks(world.make_person(n, "train"))}
    for number in range(200):
        scene = world.make_scene(number, 1 + number % 2)
        for text in (world.make_caption(scene, [], PortableRandom(number)), world.format_caption(scene)):
            assert " with " not in text and not any(look in text for look in looks)
            check_scene_words(text, scene)


def test_captions_of_two_people_keep_the_sides_apart() -> None:
    looks = [["ginger hair", "freckles"], ["round glasses"]]
    assert world.format_caption(PAIR, looks) == (
        "a photo of a person on the left in a blue shirt with ginger hair and freckles and a person on the right in an "
        "orange shirt with round glasses, in a forest, lit from the right"
    )
    assert world.format_caption(PAIR, looks, ("expression", "place")) == "a photo of two people in a forest"
    laughing = replace(PAIR, figures=tuple(replace(figure, expression="laughing") for figure in PAIR.figures))
    assert world.format_caption(laughing, details=("expression",)) == "a photo of two laughing people"
    mixed = replace(laughing, figures=(laughing.figures[0], FIGURE))
    assert world.format_caption(mixed, details=("expression",)) == (
        "a photo of a laughing person on the left and a person on the right"
    )


def test_caption_texts() -> None:
    looks = [["curly ginger hair", "green eyes", "full beard"]]
    angry = replace(SCENE, figures=(replace(FIGURE, expression="angry", yaw=-0.41),))
    assert world.format_caption(angry, looks) == (
        "a photo of an angry person in a blue shirt with curly ginger hair, green eyes and full beard, in a forest, "
        "looking far left, lit from the right"
    )
    assert world.format_caption(angry, looks, ("place", "looks"), style_first=False) == (
        "a person in a forest, with curly ginger hair, green eyes and full beard, a photo"
    )
    assert world.format_caption(replace(SCENE, place="plain"), details=("place",)) == "a photo of a person"
    assert [captions.describe_view(replace(FIGURE, yaw=yaw)) for yaw in (-0.45, -0.16, 0.05, 0.25, 0.35)] == [
        "looking far left", "looking left", "looking ahead", "looking right", "looking far right",
    ]  # fmt: skip


def test_long_captions_lose_the_last_looks_of_whoever_has_most() -> None:
    many, few = [*["rosy cheeks"] * 20, "wrinkles"], ["left mole"]
    text = world.format_caption(PAIR, [many, few])
    assert 70 < count_tokens(text) <= 75 and "left mole" in text and text.endswith(", in a forest, lit from the right")
    assert 5 < text.count("rosy cheeks") < 20 and "wrinkles" not in text


def test_captions_use_a_closed_vocabulary() -> None:
    used: set[str] = set()
    for number in range(3000):
        count = 1 + number % 2
        scene = world.make_scene(number, count)
        shown = [world.make_person(number + n, "train") for n in range(count)]
        for text in (
            world.format_caption(scene, [world.list_looks(person) for person in shown]),
            world.format_caption(scene, style_first=False),
            world.make_caption(scene, shown if number % 4 < 2 else [], PortableRandom(number)),
        ):
            used |= set(text.replace(",", "").split())
    assert used == set(world.CAPTION_WORDS)
    for word in world.CAPTION_WORDS:
        assert count_tokens(word) == 1 + (word in captions.TWO_TOKEN_WORDS), word
