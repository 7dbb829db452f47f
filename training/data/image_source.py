"""Sources of training images: captioned images by number, and aligned faces of people by number."""

from __future__ import annotations

import re
from collections.abc import Callable, Sequence
from importlib import import_module
from pathlib import Path
from typing import Any, Protocol

import torch
from torch import Generator, Tensor

from .clusters import Album, AnnotatedImage
from .shard_source import ShardSource
from .shards import ShardAlbum

MAX_IMAGES = 1 << 40  # more than any run reads
# A function of this package in a config: `package.module:function`.
FACTORY_PATH = re.compile(r"(\w+(?:\.\w+)+):(\w+)")


class ImageSource(Protocol):
    """Each image, caption and face follows from its number, the same on any machine."""

    @property
    def caption_words(self) -> Sequence[str] | None:
        """All words of the captions, or None if they are free text."""
        ...

    @property
    def num_people(self) -> int:
        """The number of people with faces."""
        ...

    def load_caption(self, number: int) -> str: ...

    def load_detailed_captions(self, number: int) -> Sequence[str]:
        """Captions that describe the people, too; none if the source has no such."""
        ...

    def load_image(self, number: int, resolution: int, aspect_ratio: float = 1.0) -> Tensor:
        """An image, uint8 [resolution, resolution * aspect_ratio, 3]."""
        ...

    def load_annotated_image(self, number: int, resolution: int, aspect_ratio: float = 1.0) -> AnnotatedImage:
        """The image with its face annotations."""
        ...

    def load_aligned_face(self, person: int, number: int) -> Tensor:
        """An aligned face of a person, as recognizers read it: uint8 [112, 112, 3]."""
        ...


def random_indices(generator: Generator, count: int, end: int = MAX_IMAGES) -> list[int]:
    """`count` random integers from 0 to `end` - 1."""
    return torch.randint(end, (count,), generator=generator).tolist()


def sample_captions(source: ImageSource, generator: Generator, count: int, tries: int = 20) -> dict[str, int]:
    """`count` different captions with the number of an image each; fewer if `count * tries` images have fewer."""
    found: dict[str, int] = {}
    for number in random_indices(generator, count * tries):
        found.setdefault(source.load_caption(number), number)
        if len(found) == count:
            break
    return found


def load_images(source: ImageSource, numbers: Sequence[int], resolution: int, aspect_ratio: float = 1.0) -> Tensor:
    """Images [n, 3, resolution, resolution * aspect_ratio] from 0 to 1."""
    images = [source.load_image(number, resolution, aspect_ratio) for number in numbers]
    return torch.stack(images).movedim(-1, 1).float() / 255


def make_image_grid(*rows: Tensor) -> Tensor:
    """Arrange rows of images [n, 3, H, W], one below the other: [rows H, n W, 3]."""
    return torch.cat([torch.cat(list(row), dim=-1) for row in rows], dim=-2).movedim(0, -1)


def open_source(data: str) -> ImageSource:
    """Open the image source of a config's `data`: a folder of shards, or the path of a function that returns one.

    Raises ValueError if the folder holds no shards or the path names no function of this package.
    """
    factory = find_factory(data)
    return ShardSource(Path(data)) if factory is None else factory()


def open_album(data: str, resolution: int, *, keep_size: bool = False, **options: Any) -> Album:
    """Open the album of a config's `validation_data`: a folder of shards, or the path of a function that returns one.

    Shard images are cropped and resized to `resolution` unless `keep_size`; the function is called with `resolution`
    and the `options`.
    """
    factory = find_factory(data)
    if factory is None:
        return ShardAlbum(Path(data).glob("*.tar"), None if keep_size else resolution)
    return factory(resolution, **options)


def find_factory(data: str) -> Callable[..., Any] | None:
    """The function of this package that `data` names as `package.module:function`, or None for a folder."""
    path = FACTORY_PATH.fullmatch(data)
    if path is None:
        return None
    try:
        return getattr(import_module(f"...{path[1]}", __package__), path[2])
    except (ModuleNotFoundError, AttributeError) as error:
        raise ValueError(
            f"got {data!r} ({error}); expected a folder of shards or a function of this package such as "
            "portrait_world.world_source:open_train_split"
        ) from error
