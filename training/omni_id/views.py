"""Few to many (Sec. 3.2): pictures of a person that are read, and those to reconstruct; faces as the encoder sees them.

A face is uint8 [S, S, 4]: its picture in the encoder's framing, and where in it is face rather than background.
"""

from __future__ import annotations

import hashlib
from collections.abc import Sequence

import torch
from torch import Generator, Tensor

from ...likeness import faces
from ..base import latents, portraits
from ..base.portraits import Shards
from ..base.source import some
from ..data import View

APART = 15.0  # degrees, of any two poses of somebody (MFHQ, Sec. 3.4)

Clusters = Sequence[Sequence[int]]


def shards(source: object, each: int) -> Shards:
    """The source with its people's views. Raises ValueError where there are none."""
    return portraits.shards(source, f" --apart {APART:g} --each {each} --pairs 0")


def check(least: int, most: int, targets: int, each: int) -> None:
    """Raise ValueError where of `each` pictures these cannot be read and reconstructed."""
    if not (0 < least <= most <= each and 0 < targets <= each):
        raise ValueError(
            f"got least, most, targets, each = {least}, {most}, {targets}, {each} in [task]; "
            "expected 1 <= least <= most <= each and 1 <= targets <= each"
        )


def people(source: Shards, below: int, count: int, each: int) -> Clusters:
    """The pictures of everyone who has `each`, by number, of the first `below` pictures, for at most `count` people.

    0 is all of them. Raises ValueError where there is nobody.
    """
    below = below or len(source)
    found = [numbers for numbers in source.clusters(below, count, each) if len(numbers) == each]
    if not found:
        raise ValueError(
            f"got nobody with {each} of the first {below} pictures; expected some; raise pool or lower each"
        )
    return found


def few_to_many(
    chance: Generator, clusters: Clusters, size: int, few: tuple[int, int], many: int
) -> tuple[list[list[int]], list[list[int]]]:
    """Of `size` people the pictures that are read, X_s, as many of each, and those to reconstruct, X_r.

    How many are read is uniform from the least to the most of `few`. What is read may be among what is reconstructed.
    """
    count = few[0] + int(torch.randint(few[1] - few[0] + 1, (), generator=chance))
    who = [clusters[one] for one in some(chance, size, len(clusters))]

    def of_each(number: int) -> list[list[int]]:
        return [[own[i] for i in torch.randperm(len(own), generator=chance)[:number].tolist()] for own in who]

    return of_each(count), of_each(many)


def face(view: View, size: int) -> Tensor:
    """The face of a picture, uint8 [size, size, 4]."""
    whole = torch.cat((view.picture.float() / 255, view.mask[..., None].float()), dim=-1)
    return faces.pixels(faces.align(whole, view.kps, size))


def pool(source: Shards, clusters: Clusters, size: int) -> dict[int, Tensor]:
    """The faces of all these pictures by their numbers, cut once and kept beside the shards."""
    order = [number for own in clusters for number in own]
    first = source.view(order[0]).picture.numpy().tobytes()
    digest = hashlib.sha256(f"{size} {order}".encode() + first).hexdigest()[:8]

    def make(places: range) -> Tensor:
        return torch.stack([face(source.view(order[place % len(order)]), size) for place in places])

    kept = latents.kept(source.folder / f"faces-{digest}-{size}", len(order), make)
    return dict(zip(order, kept, strict=True))
