"""Portrait World as a source of pictures."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from .. import world

TWO = 8  # every so many pictures show two people
FACE_PICTURE = 192  # pixels of what a face is cut out of


@dataclass(frozen=True)
class World:
    """Everyone of one of its splits."""

    split: str
    words: Sequence[str] = world.WORDS

    def caption(self, number: int) -> str:
        return world.caption(scene_of(number))

    def picture(self, number: int, side: int) -> Tensor:
        scene = scene_of(number)
        people = [world.person(2 * number + place, self.split) for place in range(len(scene.figures))]
        return torch.from_numpy(world.paint(people, scene, side).image)

    def face(self, person: int, number: int) -> Tensor:
        painted = world.paint([world.person(person, self.split)], world.scene(number), FACE_PICTURE)
        return torch.from_numpy(world.aligned(painted, 0))


def scene_of(number: int) -> world.Scene:
    return world.scene(number, 2 if number % TWO == 0 else 1)
