"""An image source that reads WebDataset shards."""

from __future__ import annotations

import re
from collections.abc import Sequence
from functools import cached_property
from pathlib import Path

from torch import Tensor

from ...likeness.faces import alignment
from ...likeness.spec import Face
from .clusters import AnnotatedImage, crop_and_resize
from .shards import ShardAlbum

MAX_CAPTION_WORDS = 1000  # captions with more different words are free text
NUM_SCANNED_IMAGES = 5000  # about so many images show the words of all


class ShardSource:
    """All people of a folder's WebDataset shards. Numbers beyond the last image start over.

    Images are numbered in turns: everyone's first image, then everyone's second, and so on. Faces are those of people
    with several images. Raises ValueError if the folder holds no shards.
    """

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.album = album = ShardAlbum(folder.rglob("*.tar"), resolution=None)
        counts = [album.count_images(person) for person in range(len(album))]
        self._image_places = [
            (person, index) for index in range(max(counts)) for person, count in enumerate(counts) if index < count
        ]
        self._people = [person for person, count in enumerate(counts) if count > 1]
        self.num_people = len(self._people)

    @property
    def caption_words(self) -> Sequence[str] | None:
        """The words of the captions, of some in large data; None if there are too many for a closed vocabulary."""
        return self._caption_words

    @cached_property
    def _caption_words(self) -> Sequence[str] | None:
        numbers = range(0, len(self), max(1, len(self) // NUM_SCANNED_IMAGES))
        captions = [
            caption
            for number in numbers
            for caption in (self.load_caption(number), *self.load_detailed_captions(number))
        ]
        words = {word for caption in captions for word in re.findall(r"\w+", caption)}
        return sorted(words) if len(words) < MAX_CAPTION_WORDS else None

    def __len__(self) -> int:
        return len(self._image_places)

    def list_clusters(self, num_images: int, max_people: int, max_images_per_person: int) -> list[list[int]]:
        """Image numbers by person, for at most `max_people` people with two or more of the first `num_images`."""
        clusters: dict[int, list[int]] = {person: [] for person in self._people}
        for number, (person, _) in enumerate(self._image_places[:num_images]):
            if person in clusters and len(clusters[person]) < max_images_per_person:
                clusters[person].append(number)
        return [numbers for numbers in clusters.values() if len(numbers) > 1][:max_people]

    def load_original_image(self, number: int) -> AnnotatedImage:
        """An image in its original size."""
        return self.album.load_annotated_image(*self._image_places[number % len(self)])

    def load_caption(self, number: int) -> str:
        return self.album.read_annotation(*self._image_places[number % len(self)])["caption"]

    def load_detailed_captions(self, number: int) -> Sequence[str]:
        return self.album.read_annotation(*self._image_places[number % len(self)]).get("detailed", ())

    def load_image(self, number: int, resolution: int, aspect_ratio: float = 1.0) -> Tensor:
        return self.load_annotated_image(number, resolution, aspect_ratio).image

    def load_annotated_image(self, number: int, resolution: int, aspect_ratio: float = 1.0) -> AnnotatedImage:
        return crop_and_resize(self.load_original_image(number), resolution, aspect_ratio)

    def load_aligned_face(self, person: int, number: int) -> Tensor:
        person = self._people[person % len(self._people)]
        sample = self.album.load_annotated_image(person, number % self.album.count_images(person))
        return alignment.convert_to_uint8(alignment.align_face(sample.image.double() / 255, sample.kps, 112))


def require_shards(source: object, paint_options: str = "") -> ShardSource:
    """Return `source` if it reads shards, where each person has several images. Raises ValueError otherwise.

    `paint_options` are the options with which paint_shards makes shards for the task.
    """
    if isinstance(source, ShardSource):
        return source
    raise ValueError(
        f"got {type(source).__name__} as data in [run]; expected a folder of shards with several images of each "
        f"person; make one with python -m portrait_world.paint_shards FOLDER{paint_options}"
    )


def crop_head(sample: AnnotatedImage) -> Tensor:
    """The head with a margin, as stored in an identity: uint8 [HEAD, HEAD, 3]."""
    return alignment.crop_head(sample.image.float() / 255, Face(sample.box.float(), sample.kps.float(), 1.0))[0]
