"""The people of the report: nobody that anything was trained on, in photos, and as the prompts ask for them."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from itertools import islice
from typing import Any

import torch
from torch import Tensor

from ...likeness.spec import Identity
from ...nodes.encode import EncodeIdentity
from ...nodes.identity import MergeIdentities
from ...nodes.types import OmniEncoder
from .. import metrics, world
from .prompts import ALONE, SPLIT, Prompt, scenes
from .stack import Stack

PHOTOS = 4  # of a person that a method may read, and as many others that none reads
STRANGERS = 1 << 16  # from this number on
TRIES = 20  # scenes for each prompt
PHOTO = [Prompt("photo", place) for place in ("room", "city", "meadow", "plain")]  # of all that are taken of somebody


class Sitter:
    """One of the test split's people.

    `photos` [4, H, W, 3] are what methods read, with the judge's vectors `references` [4, 512]; `likeness` [512] is
    the direction of four other photos; `targets` [8, H, W, 3] show the person as the prompts ask, with their vectors
    `aims` [8, 512].
    """

    def __init__(self, stack: Stack, number: int) -> None:
        self.stack, self.number, self.name = stack, number, f"{SPLIT} {number}"
        shown = scenes(number)
        self.photos, self.references = self._take(stack, number, PHOTO, shown)
        _, others = self._take(stack, number, PHOTO, shown)
        self.likeness = metrics.direction(others)
        self.targets, self.aims = self._take(stack, number, ALONE, shown)
        self._encoded: dict[int, Identity] = {}

    @staticmethod
    def _take(
        stack: Stack, number: int, prompts: Iterable[Prompt], shown: Iterator[world.Scene]
    ) -> tuple[Tensor, Tensor]:
        """A picture for each prompt whose face is found, and the judge's vectors. Raises ValueError without one."""
        person, pictures, vectors = world.person(number, SPLIT), [], []
        for prompt in prompts:
            for scene in islice(shown, TRIES):
                picture = torch.from_numpy(world.paint([person], prompt.shown(scene)).image).float()[None] / 255
                vector = stack.largest(picture)
                if vector.any():
                    break
            else:
                raise ValueError(
                    f"got no face in {TRIES} pictures of a person of the {SPLIT} split ({prompt.text()}); expected "
                    "one; train the detector for longer"
                )
            pictures.append(picture)
            vectors.append(vector)
        return torch.cat(pictures), torch.cat(vectors)

    def stranger(self) -> Tensor:
        """Somebody else as the prompts ask, [8, H, W, 3]."""
        return self._take(self.stack, STRANGERS + self.number, ALONE, scenes(STRANGERS + self.number))[0]

    def identity(self, photos: int) -> Identity:
        """The first photos by Encode Identity, each once, put together by Merge Identities."""
        for i in range(len(self._encoded), photos):
            self._encoded[i] = self._encode(self.photos[i : i + 1], image_encoder=self.stack.vision)
        if photos == 1:
            return self._encoded[0]
        each = {f"identity_{i + 1}": self._encoded[i] for i in range(photos)}
        return MergeIdentities.execute(each, "concatenate").args[0]

    def together(self, photos: int, omni: OmniEncoder) -> Identity:
        """The first photos by Encode Identity with an Omni-ID encoder."""
        return self._encode(self.photos[:photos], omni_id=omni)

    def _encode(self, pictures: Tensor, **told: Any) -> Identity:
        given = {"photo_1": pictures}
        return EncodeIdentity.execute(given, self.name, "largest", "stop", self.stack.analyzer, **told).args[0]
