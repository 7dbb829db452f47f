"""Batches of several images per person, as FlashFace trains on (arXiv 2403.17008): B x (N + 1) images, of each of B
people one target and N references.

A batch follows from its step alone, so a run can resume at any step, and no two workers or processes get the same
images.
"""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor
from torch.utils.data import Dataset

from .clusters import Album, ClusterBatch
from .portable_random import PortableRandom


@dataclass(frozen=True)
class ClusterConfig:
    """`batch_size` is in people per step and process, `min_images` and `max_images` are per person."""

    batch_size: int
    min_images: int = 2
    max_images: int = 5
    seed: int = 0
    process_index: int = 0
    num_processes: int = 1

    def __post_init__(self) -> None:
        if not (
            self.batch_size > 0 < self.min_images <= self.max_images and 0 <= self.process_index < self.num_processes
        ):
            raise ValueError(
                f"got {self}; expected a batch_size above 0, 1 <= min_images <= max_images and "
                "0 <= process_index < num_processes"
            )


def load_cluster_batch(album: Album, people: Sequence[int], image_indices: Sequence[Sequence[int]]) -> ClusterBatch:
    """Load the images `image_indices` of each person of `people`, the same number of each."""
    rows = [
        [album.load_annotated_image(person, index) for index in indices]
        for person, indices in zip(people, image_indices, strict=True)
    ]

    def stack(field: str) -> Tensor:
        return torch.stack([torch.stack([getattr(sample, field) for sample in row]) for row in rows])

    return ClusterBatch(
        images=stack("image"),
        kps=stack("kps"),
        boxes=stack("box"),
        masks=stack("mask"),
        captions=[[sample.caption for sample in row] for row in rows],
        identities=[album.get_name(person) for person in people],
    )


class ClusterDataset(Dataset[ClusterBatch]):
    """The batches by step, in epochs: everyone once in random order, then everyone again.

    All people of a step, in all processes, have the same number of images, all different. People with fewer images than
    `config.max_images` are left out; raises ValueError if nobody remains. Read it with a DataLoader of
    `batch_size=None` and `sampler=range(step, steps)`, with any number of workers.
    """

    def __init__(self, album: Album, config: ClusterConfig, steps: int) -> None:
        self.album, self.config, self.steps = album, config, steps
        self.people = [person for person in range(len(album)) if album.count_images(person) >= config.max_images]
        if not self.people:
            raise ValueError(
                f"got nobody with {config.max_images} images among {len(album)} people; expected at least one; "
                "lower max_images"
            )
        self._shuffled: tuple[int, Tensor] | None = None

    def __len__(self) -> int:
        return self.steps

    def __getitem__(self, step: int) -> ClusterBatch:
        if not 0 <= step < self.steps:
            raise IndexError(f"got step {step} of {self.steps}")
        config = self.config
        first = (step * config.num_processes + config.process_index) * config.batch_size
        size_rng = _make_rng(config.seed, "size", step)
        count = config.min_images + size_rng.randrange(config.max_images - config.min_images + 1)
        positions = range(first, first + config.batch_size)
        people = [self._person_at(position) for position in positions]
        image_indices = [
            # The seed's "pictures" stays: another word would make other batches.
            _sample_distinct(_make_rng(config.seed, "pictures", position), self.album.count_images(person), count)
            for position, person in zip(positions, people, strict=True)
        ]
        return load_cluster_batch(self.album, people, image_indices)

    def _person_at(self, position: int) -> int:
        """The person at a position of the endless sequence of epochs."""
        epoch, index = divmod(position, len(self.people))
        if self._shuffled is None or self._shuffled[0] != epoch:
            generator = torch.Generator().manual_seed(_derive_seed(self.config.seed, "people", epoch))
            self._shuffled = epoch, torch.randperm(len(self.people), generator=generator)
        return self.people[int(self._shuffled[1][index])]


def _derive_seed(*parts: int | str) -> int:
    """An independent seed for each tuple."""
    digest = hashlib.sha256(repr(parts).encode()).digest()
    return int.from_bytes(digest[:8], "little") >> 1


def _make_rng(*parts: int | str) -> PortableRandom:
    return PortableRandom(_derive_seed(*parts))


def _sample_distinct(rng: PortableRandom, end: int, count: int) -> list[int]:
    """`count` different integers from 0 to `end` - 1."""
    found: list[int] = []
    while len(found) < count:
        number = rng.randrange(end)
        if number not in found:
            found.append(number)
    return found
