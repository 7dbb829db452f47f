"""Portrait World, and shards of photos, as sources of pictures."""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path

import torch
from torch import Tensor

from ...likeness import faces
from ...likeness.spec import Face
from .. import world
from ..data import PEOPLE, ShardAlbum, View, fit, told

TWO = 8  # every so many pictures show two people
FACE_PICTURE = 192  # pixels of what a face is cut out of
CLOSED = 1000  # words of captions that are a closed list


@dataclass(frozen=True)
class World:
    """Everyone of one of its splits."""

    split: str
    words: Sequence[str] | None = world.WORDS
    people: int = PEOPLE

    def caption(self, number: int) -> str:
        return world.caption(scene_of(number))

    def picture(self, number: int, side: int) -> Tensor:
        return self.shown(number, side).picture

    def shown(self, number: int, side: int) -> View:
        scene = scene_of(number)
        people = [world.person(2 * number + place, self.split) for place in range(len(scene.figures))]
        return told(world.paint(people, scene, side), world.caption(scene))

    def face(self, person: int, number: int) -> Tensor:
        painted = world.paint([world.person(person, self.split)], world.scene(number), FACE_PICTURE)
        return torch.from_numpy(world.aligned(painted, 0))


class Shards:
    """Everyone of a folder's WebDataset shards. Numbers beyond what is there begin anew.

    Pictures follow each other person by person, everyone's first before anyone's second. Faces are those of people
    with several pictures. Raises ValueError on a folder without shards.
    """

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.album = album = ShardAlbum(folder.glob("*.tar"), side=None)
        counts = [album.pictures(person) for person in range(len(album))]
        turns = range(max(counts))
        self._views = [(person, turn) for turn in turns for person, count in enumerate(counts) if turn < count]
        self._people = [person for person, count in enumerate(counts) if count > 1]
        self.people = len(self._people)

    @property
    def words(self) -> Sequence[str] | None:
        """Every word of the captions, as all of them are read; None where there are too many to be a closed list."""
        return self._words

    @cached_property
    def _words(self) -> Sequence[str] | None:
        said = {word for number in range(len(self)) for word in re.findall(r"\w+", self.caption(number))}
        return sorted(said) if len(said) < CLOSED else None

    def __len__(self) -> int:
        return len(self._views)

    def clusters(self, below: int, people: int, each: int) -> list[list[int]]:
        """The pictures of people with several, by number: up to `each` of everyone, of those below `below`.

        Of at most so many `people`; who has fewer than two pictures there is left out.
        """
        found: dict[int, list[int]] = {person: [] for person in self._people}
        for number, (person, _) in enumerate(self._views[:below]):
            if person in found and len(found[person]) < each:
                found[person].append(number)
        return [numbers for numbers in found.values() if len(numbers) > 1][:people]

    def view(self, number: int) -> View:
        """A picture as it is in the shards, and what is known of it."""
        return self.album.view(*self._views[number % len(self)])

    def caption(self, number: int) -> str:
        return self.album.about(*self._views[number % len(self)])["caption"]

    def picture(self, number: int, side: int) -> Tensor:
        return self.shown(number, side).picture

    def shown(self, number: int, side: int) -> View:
        return fit(self.view(number), side)

    def face(self, person: int, number: int) -> Tensor:
        person = self._people[person % len(self._people)]
        view = self.album.view(person, number % self.album.pictures(person))
        return faces.pixels(faces.align(view.picture.double() / 255, view.kps, 112))


def shards(source: object, how: str = "") -> Shards:
    """A source, as people have several pictures there. Raises ValueError where it is the drawn world itself; `how`
    are the options by which shards for the task are painted."""
    if isinstance(source, Shards):
        return source
    raise ValueError(
        'got data = "world" in [run]; expected a folder of shards, in which people have several pictures; '
        f"paint some by python -m training.shards FOLDER{how}"
    )


def head(view: View) -> Tensor:
    """The head with a margin, as an identity holds it: uint8 [HEAD, HEAD, 3]."""
    return faces.head(view.picture.float() / 255, Face(view.box.float(), view.kps.float(), 1.0))[0]


def scene_of(number: int) -> world.Scene:
    return world.scene(number, 2 if number % TWO == 0 else 1)
