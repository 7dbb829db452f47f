"""Where pictures come from: numbered, with captions, and aligned faces of numbered people."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Protocol

import torch
from torch import Generator, Tensor

if TYPE_CHECKING:
    from ..data import View

# More than any run reads; what a number shows never changes.
PICTURES = 1 << 40
WORLD = "world"


class Source(Protocol):
    """Everything is a function of its numbers, the same on any machine."""

    @property
    def words(self) -> Sequence[str] | None:
        """Every word of the captions, or None where they may hold any."""
        ...

    @property
    def people(self) -> int:
        """How many people there are faces of."""
        ...

    def caption(self, number: int) -> str: ...

    def picture(self, number: int, side: int) -> Tensor:
        """A picture, uint8 [side, side, 3]."""
        ...

    def shown(self, number: int, side: int) -> View:
        """A picture of `side` x `side` pixels and what is known of the faces in it."""
        ...

    def face(self, person: int, number: int) -> Tensor:
        """A face of a person as recognisers read it, uint8 [112, 112, 3]."""
        ...


def some(chance: Generator, count: int, below: int = PICTURES) -> list[int]:
    """So many random numbers."""
    return torch.randint(below, (count,), generator=chance).tolist()


def captions(source: Source, chance: Generator, count: int, tries: int = 20) -> dict[str, int]:
    """So many captions, no two the same, each with the number of its picture; fewer where there are not so many."""
    found: dict[str, int] = {}
    for number in some(chance, count * tries):
        found.setdefault(source.caption(number), number)
        if len(found) == count:
            break
    return found


def pictures(source: Source, numbers: Sequence[int], side: int) -> Tensor:
    """Pictures as networks read them: [n, 3, side, side] from 0 to 1."""
    return torch.stack([source.picture(number, side) for number in numbers]).movedim(-1, 1).float() / 255


def sheet(*rows: Tensor) -> Tensor:
    """Rows of pictures [n, 3, H, W], one below the other: [rows H, n W, 3]."""
    return torch.cat([torch.cat(list(row), dim=-1) for row in rows], dim=-2).movedim(0, -1)


def find(data: str) -> Source:
    """The source of a config's `data`. Raises ValueError where there are no shards."""
    from . import portraits  # which needs Pillow

    return portraits.World("train") if data == WORLD else portraits.Shards(Path(data))
