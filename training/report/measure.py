"""Makes and measures the pictures of all rows, person by person, so that what was read of a person is read once."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import comfy.model_management
import torch
from torch import Tensor

from ...likeness import faces
from .. import metrics
from . import prompts, stack
from .methods import Asked
from .rows import ROWS, Row
from .sitters import Sitter

Values = dict[str, Tensor]  # by measure, one of each picture [p]
SHOWN = 3  # people whose pictures are kept


def alone(asked: Asked, pictures: Tensor) -> Values:
    (sitter,), seen = asked.sitters, asked.stack.largest(pictures)
    ref = metrics.nearest(seen, sitter.references[: asked.photos])
    target = metrics.cosines(seen, sitter.aims[asked.places])
    texts = torch.cat([asked.stack.text(prompt.text())[1] for prompt in prompts.ALONE])
    styles = torch.cat([asked.stack.text(text)[1] for text in prompts.STYLED.values()])
    wanted = torch.tensor([list(prompts.STYLED).index(prompts.ALONE[place].style) for place in asked.places])
    shown = asked.stack.seen(pictures)
    clip, right = metrics.adherence(shown, texts, torch.tensor(asked.places))
    return {
        "similarity": metrics.cosines(seen, sitter.likeness), "ref": ref, "target": target,
        "paste": metrics.paste(ref, target), "clip": clip, "prompt": right,
        "style": metrics.likest(shown, styles, wanted), "lost": metrics.lost(seen),
    }  # fmt: skip


def photos(asked: Asked, pictures: Tensor) -> Values:
    seen = asked.stack.largest(pictures)
    return {"similarity": metrics.cosines(seen, asked.sitters[0].likeness), "lost": metrics.lost(seen)}


def pairs(asked: Asked, pictures: Tensor) -> Values:
    wanted = torch.stack([sitter.likeness for sitter in asked.sitters])
    return metrics.assignment(asked.stack.halves(pictures), wanted)._asdict()


@dataclass(frozen=True)
class Kind:
    """How pictures are measured, how many people are in each, and what is asked for."""

    measure: Callable[[Asked, Tensor], Values]
    people: int
    asked: Sequence[prompts.Prompt]

    def ask(self, models: stack.Stack, who: Sequence[Sitter], photos: int, count: int) -> Asked:
        """Of so many prompts, which the first person's number tells."""
        places = prompts.turn(who[0].number, count, len(self.asked))
        return Asked(models, who, photos, [self.asked[place].text(self.people) for place in places], places)


KINDS: Mapping[str, Kind] = {
    "alone": Kind(alone, 1, prompts.ALONE),
    "photos": Kind(photos, 1, prompts.ALONE),
    "pairs": Kind(pairs, 2, prompts.PAIRS),
}


@dataclass(frozen=True)
class Plan:
    """Which rows, on how many people at most, each with how many prompts at most."""

    rows: Mapping[str, Row]
    people: int = 64
    prompts: int = len(prompts.ALONE)

    def jobs(self, numbers: Sequence[int]) -> Iterator[tuple[int, str]]:
        """Whose turn it is in which row."""
        for number in numbers:
            yield from ((number, key) for key, row in self.rows.items() if number < min(row.people, self.people))


def planned(only: Sequence[str], people: int, asked: int) -> Plan:
    """All rows whose file is there, or those of these keys. Raises ValueError on others."""
    unknown = [key for key in only if key not in ROWS]
    if unknown:
        raise ValueError(f"got {', '.join(unknown)}; expected rows of the report: {', '.join(ROWS)}")
    here = {key: row for key, row in ROWS.items() if not row.file or stack.place(row.file) is not None}
    return Plan({key: row for key, row in here.items() if not only or key in only}, people, asked)


@dataclass
class Found:
    """By row and measure: each person's mean over the prompts; and the pictures of the first people."""

    values: dict[str, dict[str, dict[int, float]]] = field(default_factory=dict)
    pictures: dict[str, dict[int, Tensor]] = field(default_factory=dict)
    photos: dict[int, Tensor] = field(default_factory=dict)

    def add(self, key: str, who: Sitter, measured: Values, pictures: Tensor) -> None:
        number = who.number
        for name, value in measured.items():
            self.values.setdefault(key, {}).setdefault(name, {})[number] = float(value.double().mean())
        if number < SHOWN:
            self.pictures.setdefault(key, {})[number] = faces.pixels(pictures)
            self.photos[number] = faces.pixels(who.photos)


def run(models: stack.Stack, plan: Plan, numbers: Sequence[int], tick: Callable[[str], Any]) -> Found:
    """The plan's rows, on these of the people; the right neighbour of a pair is the next person.

    What several rows ask of a person is made once.
    """
    found = Found()
    shared: dict[Any, tuple[Values, Tensor]] = {}
    held: dict[int, Sitter] = {}

    def sitter(number: int) -> Sitter:
        if number not in held:
            for old in [one for one in held if one < number - 1]:
                del held[old]
            held[number] = Sitter(models, number)
        return held[number]

    with torch.inference_mode():
        for number, key in plan.jobs(numbers):
            comfy.model_management.throw_exception_if_processing_interrupted()
            row = plan.rows[key]
            kind = KINDS[row.kind]
            who = [sitter(number + i) for i in range(kind.people)]
            asked = kind.ask(models, who, row.photos, min(row.prompts, plan.prompts))
            same = (number, row.make, row.kind, row.photos, tuple(asked.places))
            if same not in shared:
                shared = {other: one for other, one in shared.items() if other[0] == number}
                made = row.make(asked)
                shared[same] = kind.measure(asked, made), made
            found.add(key, who[0], *shared[same])
            tick(key)
    return found
