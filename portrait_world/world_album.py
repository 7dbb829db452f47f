"""Portrait World as an album: images by person and index."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch

from ..training.data.clusters import AnnotatedImage
from ..training.data.portable_random import PortableRandom
from . import world
from .drawing.people import SPLIT_REMAINDERS

MAX_IMAGES_PER_PERSON = 1 << 12
NUM_DETAILED_CAPTIONS = 6
CAPTION_SEED = 1 << 40  # beyond the numbers of all scenes
PEOPLE_PER_SPLIT = 1 << 20


@dataclass(frozen=True)
class WorldAlbum:
    """The first `num_people` of a split, each in scenes of their own, so that backgrounds do not reveal the person.

    Each has `images_per_person` images: alone, or next to someone else if `people_per_image` is 2. Any two poses of a
    person differ by at least `min_pose_distance` degrees (world.measure_pose_difference), as in MFHQ (2412.09694,
    Sec. 3.4).
    """

    split: str
    resolution: int = 128
    num_people: int = PEOPLE_PER_SPLIT
    images_per_person: int = MAX_IMAGES_PER_PERSON
    people_per_image: int = 1
    min_pose_distance: float = 0.0

    def __post_init__(self) -> None:
        if self.split not in SPLIT_REMAINDERS:
            raise ValueError(f"got split {self.split!r}; expected {' or '.join(SPLIT_REMAINDERS)}")

    def __len__(self) -> int:
        return self.num_people

    def get_name(self, identity: int) -> str:
        return f"{self.split}-{identity:07d}" if self.people_per_image == 1 else f"{self.split}-pair-{identity:07d}"

    def count_images(self, identity: int) -> int:
        return min(self.images_per_person, MAX_IMAGES_PER_PERSON)

    def find_scene(self, identity: int, index: int) -> world.Scene:
        """The scene of a person's image. Raises ValueError if there are not enough poses that far apart."""
        return self._make_scene(self._find_scene_number(identity, index))

    def _find_scene_number(self, identity: int, index: int) -> int:
        splits = list(SPLIT_REMAINDERS)
        start = identity * MAX_IMAGES_PER_PERSON * len(splits) + splits.index(self.split)
        numbers = range(start, start + MAX_IMAGES_PER_PERSON * len(splits), len(splits))  # of this split alone
        if not self.min_pose_distance:
            return numbers[index]
        accepted: list[world.Scene] = []
        for number in numbers:
            scene = self._make_scene(number)
            if all(
                world.measure_pose_difference(scene.figures[0], other.figures[0]) >= self.min_pose_distance
                for other in accepted
            ):
                accepted.append(scene)
            if len(accepted) > index:
                return number
        raise ValueError(
            f"got min_pose_distance = {self.min_pose_distance} for {index + 1} images of {self.get_name(identity)}; "
            f"expected at most {len(accepted)} images, as no more poses are that far apart; lower one of them"
        )

    def _make_scene(self, number: int) -> world.Scene:
        return world.make_scene(number, self.people_per_image)

    def load_annotated_image(self, identity: int, index: int) -> AnnotatedImage:
        number = self._find_scene_number(identity, index)
        scene, rng = self._make_scene(number), PortableRandom(number + CAPTION_SEED)
        others = [world.make_person(PEOPLE_PER_SPLIT - 1 - identity, self.split)] * (self.people_per_image - 1)
        people = [world.make_person(identity, self.split), *others]
        caption, *detailed = (
            world.make_caption(scene, shown, rng) for shown in ([], *[people] * NUM_DETAILED_CAPTIONS)
        )
        return annotate_painting(world.paint_scene(people, scene, self.resolution), caption, detailed)


def open_validation_album(
    resolution: int, images_per_person: int = MAX_IMAGES_PER_PERSON, min_pose_distance: float = 0.0
) -> WorldAlbum:
    return WorldAlbum(
        "validation", resolution, images_per_person=images_per_person, min_pose_distance=min_pose_distance
    )


def annotate_painting(painted: world.PaintedImage, caption: str, detailed: Sequence[str] = ()) -> AnnotatedImage:
    """A painted image with the annotations of its first person."""
    arrays = (painted.image, painted.key_points[0], painted.boxes[0], painted.face_masks[0])
    image, kps, box, mask = (torch.from_numpy(array) for array in arrays)
    faces = np.concatenate((painted.boxes.reshape(-1, 2, 2), painted.key_points), axis=1)
    return AnnotatedImage(image, caption, kps, box, mask, torch.from_numpy(faces[1:]), tuple(detailed))
