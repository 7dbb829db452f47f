"""Portrait World as an album: images by person and index."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import torch

from ..training.data.clusters import AnnotatedImage
from . import world
from .drawing.people import SPLIT_REMAINDERS
from .drawing.scenes import FRAMING_PHRASES

MAX_IMAGES_PER_PERSON = 1 << 12
PEOPLE_PER_SPLIT = 1 << 20


@dataclass(frozen=True)
class WorldAlbum:
    """The first `num_people` of a split, each in scenes of their own, so that backgrounds do not reveal the person.

    Each has `images_per_person` images: alone, or next to someone else if `people_per_image` is 2. Any two poses of a
    person differ by at least `min_pose_distance` degrees (world.measure_pose_difference), as in MFHQ (2412.09694,
    Sec. 3.4). With a `framing` (scenes.FRAMING_PHRASES), all images have that one.
    """

    split: str
    resolution: int = 128
    num_people: int = PEOPLE_PER_SPLIT
    images_per_person: int = MAX_IMAGES_PER_PERSON
    people_per_image: int = 1
    min_pose_distance: float = 0.0
    framing: str = ""

    def __post_init__(self) -> None:
        if self.split not in SPLIT_REMAINDERS or self.framing not in ("", *FRAMING_PHRASES):
            raise ValueError(
                f"got split {self.split!r} and framing {self.framing!r}; expected {' or '.join(SPLIT_REMAINDERS)}, and "
                f"{' or '.join(FRAMING_PHRASES)}, or an empty framing for any"
            )

    def __len__(self) -> int:
        return self.num_people

    def get_name(self, identity: int) -> str:
        return f"{self.split}-{identity:07d}" if self.people_per_image == 1 else f"{self.split}-pair-{identity:07d}"

    def count_images(self, identity: int) -> int:
        return min(self.images_per_person, MAX_IMAGES_PER_PERSON)

    def find_scene(self, identity: int, index: int) -> world.Scene:
        """The scene of a person's image. Raises ValueError if there are not enough poses that far apart."""
        if not self.min_pose_distance and not self.framing:
            return self._make_random_scene(identity, index)
        accepted: list[world.Scene] = []
        for number in range(MAX_IMAGES_PER_PERSON):
            scene = self._make_random_scene(identity, number)
            if self.framing in ("", scene.framing) and all(
                world.measure_pose_difference(scene.figures[0], other.figures[0]) >= self.min_pose_distance
                for other in accepted
            ):
                accepted.append(scene)
            if len(accepted) > index:
                return scene
        raise ValueError(
            f"got min_pose_distance = {self.min_pose_distance} for {index + 1} images of {self.get_name(identity)}; "
            f"expected at most {len(accepted)} images, as no more poses are that far apart; lower one of them"
        )

    def _make_random_scene(self, identity: int, number: int) -> world.Scene:
        # The splits have different scenes.
        splits = list(SPLIT_REMAINDERS)
        scene_number = (identity * MAX_IMAGES_PER_PERSON + number) * len(splits) + splits.index(self.split)
        return world.make_scene(scene_number, self.people_per_image)

    def load_annotated_image(self, identity: int, index: int) -> AnnotatedImage:
        scene = self.find_scene(identity, index)
        others = [world.make_person(PEOPLE_PER_SPLIT - 1 - identity, self.split)] * (self.people_per_image - 1)
        painted = world.paint_scene([world.make_person(identity, self.split), *others], scene, self.resolution)
        return annotate_painting(painted, world.format_caption(scene))


def open_validation_album(
    resolution: int, images_per_person: int = MAX_IMAGES_PER_PERSON, min_pose_distance: float = 0.0
) -> WorldAlbum:
    return WorldAlbum(
        "validation", resolution, images_per_person=images_per_person, min_pose_distance=min_pose_distance
    )


def annotate_painting(painted: world.PaintedImage, caption: str) -> AnnotatedImage:
    """A painted image with the annotations of its first person."""
    arrays = (painted.image, painted.key_points[0], painted.boxes[0], painted.face_masks[0])
    image, kps, box, mask = (torch.from_numpy(array) for array in arrays)
    faces = np.concatenate((painted.boxes.reshape(-1, 2, 2), painted.key_points), axis=1)
    return AnnotatedImage(image, caption, kps, box, mask, torch.from_numpy(faces[1:]))
