"""Portrait World as an image source, rendered on the fly."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from ..training.data.clusters import AnnotatedImage, crop_and_resize
from . import world
from .world_album import PEOPLE_PER_SPLIT, annotate_painting

PAIR_INTERVAL = 8  # one image in so many shows two people
FACE_IMAGE_SIZE = 192  # pixels of the image that an aligned face is cropped from


@dataclass(frozen=True)
class WorldSource:
    """All people of one split."""

    split: str
    caption_words: Sequence[str] | None = world.CAPTION_WORDS
    num_people: int = PEOPLE_PER_SPLIT

    def load_caption(self, number: int) -> str:
        return world.format_caption(make_numbered_scene(number))

    def load_detailed_captions(self, number: int) -> list[str]:
        scene = make_numbered_scene(number)
        looks = [world.list_looks(person) for person in self._find_people(number, scene)]
        return [world.format_caption(scene, looks)]

    def load_image(self, number: int, resolution: int, aspect_ratio: float = 1.0) -> Tensor:
        return self.load_annotated_image(number, resolution, aspect_ratio).image

    def load_annotated_image(self, number: int, resolution: int, aspect_ratio: float = 1.0) -> AnnotatedImage:
        scene = make_numbered_scene(number)
        painted = world.paint_scene(self._find_people(number, scene), scene, resolution)
        return crop_and_resize(annotate_painting(painted, world.format_caption(scene)), resolution, aspect_ratio)

    def _find_people(self, number: int, scene: world.Scene) -> list[world.Person]:
        return [world.make_person(2 * number + place, self.split) for place in range(len(scene.figures))]

    def load_aligned_face(self, person: int, number: int) -> Tensor:
        painted = world.paint_scene([world.make_person(person, self.split)], world.make_scene(number), FACE_IMAGE_SIZE)
        return torch.from_numpy(world.align_painted_face(painted, 0))


def open_train_split() -> WorldSource:
    return WorldSource("train")


def open_validation_split() -> WorldSource:
    return WorldSource("validation")


def make_numbered_scene(number: int) -> world.Scene:
    return world.make_scene(number, 2 if number % PAIR_INTERVAL == 0 else 1)
