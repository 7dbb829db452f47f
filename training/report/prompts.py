"""What is asked for: eight prompts for one person and four for two, in the words of the world's own captions."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, replace

from .. import world
from ..data import PICTURES
from ..portrait.people import SPLITS
from ..portrait.scenes import NEUTRAL, STYLES

SPLIT = "test"  # nobody of whom anything was trained on
CLOSE = "close"  # as the demo's UNet was trained
SAY = (1, 0, 1, 0, 0)  # style first, then place; nothing of framing and light
DRESSED = (1, 1, 1, 0, 0)
STYLED = {style: f"{begin} a person" for style, (begin, _) in STYLES.items()}


@dataclass(frozen=True)
class Prompt:
    """What a picture shall show, whoever is in it; `colour` is that of the clothes, empty where nothing is said."""

    style: str
    place: str
    expression: str = NEUTRAL
    colour: str = ""

    def shown(self, scene: world.Scene) -> world.Scene:
        """That scene, its heads and light as they are, as this prompt asks for it."""
        told = {"expression": self.expression} | ({"colour": self.colour} if self.colour else {})
        figures = tuple(replace(figure, **told) for figure in scene.figures)
        wording = DRESSED if self.colour else SAY
        return replace(scene, style=self.style, place=self.place, figures=figures, wording=wording)

    def text(self, people: int = 1) -> str:
        """The caption of any scene that shows it."""
        return world.caption(self.shown(next(scenes(0, people))))


# Rows that take fewer of them take the first ones.
ALONE = (
    Prompt("photo", "beach", "smiling", "red"),
    Prompt("watercolour", "forest"),
    Prompt("bronze", "city", "sad"),
    Prompt("pencil", "mountains", "surprised"),
    Prompt("photo", "night", "angry"),
    Prompt("line art", "room", "smiling"),
    Prompt("watercolour", "snow", "laughing", "green"),
    Prompt("photo", "desert", colour="yellow"),
)
PAIRS = (
    Prompt("photo", "meadow", "smiling"),
    Prompt("watercolour", "beach"),
    Prompt("photo", "city"),
    Prompt("pencil", "snow", "laughing"),
)


def turn(person: int, count: int, of: int) -> list[int]:
    """Which of so many prompts a person is asked for, where each person is asked for some: all as often."""
    count = min(count, of)
    return [(person * count + i) % of for i in range(count)]


def scenes(person: int, people: int = 1) -> Iterator[world.Scene]:
    """Scenes of the test split's person, no two people's the same, as close ups."""
    numbers = range(person * PICTURES, (person + 1) * PICTURES)
    found = (world.scene(number * len(SPLITS) + list(SPLITS).index(SPLIT), people) for number in numbers)
    return (scene for scene in found if scene.framing == CLOSE)
