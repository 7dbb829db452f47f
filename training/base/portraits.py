"""Portrait World, and shards of photos, as sources of pictures."""

from __future__ import annotations

import copy
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor

from ...likeness import faces
from .. import world
from ..data import ShardAlbum, View

TWO = 8  # every so many pictures show two people
FACE_PICTURE, LARGE = 192, 512  # pixels of what a face is cut out of, drawn or photographed


@dataclass(frozen=True)
class World:
    """Everyone of one of its splits."""

    split: str
    words: Sequence[str] | None = world.WORDS

    def caption(self, number: int) -> str:
        return world.caption(scene_of(number))

    def picture(self, number: int, side: int) -> Tensor:
        scene = scene_of(number)
        people = [world.person(2 * number + place, self.split) for place in range(len(scene.figures))]
        return torch.from_numpy(world.paint(people, scene, side).image)

    def face(self, person: int, number: int) -> Tensor:
        painted = world.paint([world.person(person, self.split)], world.scene(number), FACE_PICTURE)
        return torch.from_numpy(world.aligned(painted, 0))


class Shards:
    """Everyone of a folder's WebDataset shards. Numbers beyond what is there begin anew.

    Raises ValueError on a folder without shards.
    """

    words: Sequence[str] | None = None

    def __init__(self, folder: Path) -> None:
        self.album = ShardAlbum(folder.glob("*.tar"))

    def caption(self, number: int) -> str:
        return self._view(number, LARGE).caption

    def picture(self, number: int, side: int) -> Tensor:
        return self._view(number, side).picture

    def face(self, person: int, number: int) -> Tensor:
        view = self._view(person % len(self.album) + number * len(self.album), LARGE)
        return faces.pixels(faces.align(view.picture.double() / 255, view.kps, 112))

    def _view(self, number: int, side: int) -> View:
        """Picture `number`: people follow each other, each with the next of their pictures."""
        album = copy.copy(self.album)
        album.side = side
        turn, person = divmod(number, len(album))
        return album.view(person, turn % album.pictures(person))


def scene_of(number: int) -> world.Scene:
    return world.scene(number, 2 if number % TWO == 0 else 1)
