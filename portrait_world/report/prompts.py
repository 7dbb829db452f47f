"""The evaluation prompts: eight for one person and four for two, in the words of the captions of Portrait World."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, replace

from .. import world
from ..drawing.captions import STYLE_PHRASES
from ..drawing.people import SPLIT_REMAINDERS
from ..drawing.scenes import NEUTRAL_EXPRESSION
from ..world_album import MAX_IMAGES_PER_PERSON

EVAL_SPLIT = "test"  # nothing was trained on these people
STYLE_PROMPTS = {style: f"{begin} a person" for style, (begin, _) in STYLE_PHRASES.items()}


@dataclass(frozen=True)
class EvalPrompt:
    """What an image should show, apart from the person.

    `clothes` are a colour and a garment such as "red jumper", or empty if left open.
    """

    style: str
    place: str
    expression: str = NEUTRAL_EXPRESSION
    clothes: str = ""

    def apply_to_scene(self, scene: world.Scene) -> world.Scene:
        """The scene changed to match the prompt; poses and light stay."""
        changes = {"expression": self.expression}
        if self.clothes:
            changes["colour"], changes["clothes"] = self.clothes.split()
        figures = tuple(replace(figure, **changes) for figure in scene.figures)
        return replace(scene, style=self.style, place=self.place, figures=figures)

    def format_text(self, num_people: int = 1) -> str:
        """The caption of any scene that matches the prompt, without what the prompt leaves open."""
        details = ("expression", "clothes", "place") if self.clothes else ("expression", "place")
        return world.format_caption(self.apply_to_scene(next(iterate_scenes(0, num_people))), details=details)


# Rows with fewer prompts per person still cover all of them: see assign_prompts.
SINGLE_PROMPTS = (
    EvalPrompt("photo", "beach", "smiling", "red tee"),
    EvalPrompt("watercolour", "forest"),
    EvalPrompt("bronze", "city", "sad"),
    EvalPrompt("pencil", "mountains", "surprised"),
    EvalPrompt("photo", "night", "angry"),
    EvalPrompt("line art", "room", "smiling"),
    EvalPrompt("watercolour", "snow", "laughing", "green hoodie"),
    EvalPrompt("photo", "desert", clothes="yellow shirt"),
)
PAIR_PROMPTS = (
    EvalPrompt("photo", "meadow", "smiling"),
    EvalPrompt("watercolour", "beach"),
    EvalPrompt("photo", "city"),
    EvalPrompt("pencil", "snow", "laughing"),
)


def assign_prompts(person: int, count: int, total: int) -> list[int]:
    """The indices of `count` of `total` prompts for a person, in rotation, so that all prompts are used equally."""
    count = min(count, total)
    return [(person * count + i) % total for i in range(count)]


def iterate_scenes(person: int, num_people: int = 1) -> Iterator[world.Scene]:
    """Scenes of the test split; every person has different ones."""
    numbers = range(person * MAX_IMAGES_PER_PERSON, (person + 1) * MAX_IMAGES_PER_PERSON)
    split_index = list(SPLIT_REMAINDERS).index(EVAL_SPLIT)
    return (world.make_scene(number * len(SPLIT_REMAINDERS) + split_index, num_people) for number in numbers)
