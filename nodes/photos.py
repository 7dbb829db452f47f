"""Photos as the nodes take them: split into pictures, searched for faces, one face chosen of each."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import comfy.model_management
import comfy.utils
from torch import Tensor

from ..likeness import faces
from ..likeness.spec import Face, Identity
from ..likeness.sphere import mean
from . import types

LEAST = 16  # pixels a side


@dataclass(frozen=True, eq=False)
class Taken:
    """A photo [H, W, 3], the face taken of it, all faces found in it, and what to report of it."""

    photo: Tensor
    face: Face
    found: tuple[Face, ...]
    note: str


def split(batches: Sequence[Tensor]) -> list[Tensor]:
    """Every picture of some batches as RGB [H, W, 3]. Raises ValueError on a NaN, or where one is a mere strip."""
    pictures = [picture[..., :3].float().cpu() for batch in batches for picture in batch]
    broken = [i + 1 for i, picture in enumerate(pictures) if not picture.isfinite().all()]
    if broken:
        raise ValueError(f"got photo {broken[0]} with NaN or infinite pixels; expected 0 to 1; load the picture again")
    strip = next((p for p in pictures if min(p.shape[:2]) < LEAST), None)
    if strip is not None:
        raise ValueError(
            f"got a photo of {strip.shape[1]}x{strip.shape[0]} pixels; expected {LEAST} a side; use a larger photo"
        )
    return pictures


def references(identity: Identity | None, analyzer: types.Analyzer) -> Tensor:
    """An identity's vectors [n, 512] in the analyzer's network. Raises ValueError where it has none."""
    key = None if identity is None else identity.find(analyzer.feature)
    if identity is None or key is None:
        got = "no identity" if identity is None else f"identity {identity.name!r} with {', '.join(identity.embeddings)}"
        raise ValueError(
            f"got {got}; expected one with {analyzer.feature}; connect one that was encoded with this model pack"
        )
    return identity.embeddings[key].double()


def target(identity: Identity | None, analyzer: types.Analyzer) -> Tensor:
    """The direction [512] of an identity in the analyzer's network. Raises ValueError where it has none."""
    rows = references(identity, analyzer)
    assert identity is not None
    return mean(rows, identity.weight.double())


def hash_note(identity: Identity, analyzer: types.Analyzer) -> list[str]:
    """A warning where the identity was encoded with another file of the same network."""
    if identity.find(analyzer.feature) == analyzer.feature.id(analyzer.sha256):
        return []
    network = analyzer.feature.network
    return [f"Warning: {identity.name} was encoded with another file of {network}; the numbers may be off."]


@dataclass(frozen=True)
class Choice:
    """Which face of a photo is wanted, and what looks for it."""

    pick: str
    analyzer: types.Analyzer | None = None
    nth: int = 1
    like: Identity | None = None

    def take(self, photo: Tensor, number: int) -> Taken | str:
        """The chosen face of a photo, or why there is none."""
        if self.analyzer is None or self.pick == faces.WHOLE:
            return Taken(photo, faces.whole(photo), (), f"photo {number}: taken whole, no face was looked for")
        search = faces.find_faces(photo, self.analyzer.detect)
        if not search.faces:
            return f"no face in photo {number} (detector sizes tried: {', '.join(search.tried)})"
        index = self._index(photo, search.faces, self.analyzer)
        if not 0 <= index < len(search.faces):
            return f"{len(search.faces)} face(s) in photo {number}, so there is no face {self.nth}"
        face = search.faces[index]
        note = (
            f"photo {number}: {len(search.faces)} face(s) at detector size {search.tried[-1]}"
            f" (tried {len(search.tried)}), took {index + 1}: {faces.describe(photo, face)}"
        )
        return Taken(photo, face, search.faces, note)

    def _index(self, photo: Tensor, found: Sequence[Face], analyzer: types.Analyzer) -> int:
        if self.pick == faces.NTH:
            return self.nth - 1
        if self.pick == faces.ALIKE:
            return faces.most_alike(photo, found, analyzer.embed, target(self.like, analyzer))
        return faces.PICKS[self.pick](found)


def take_all(photos: Sequence[Tensor], choice: Choice, on_missing: str) -> tuple[list[Taken], list[str]]:
    """The chosen face of every photo, and notes on those skipped. Raises ValueError as `on_missing` says."""
    taken: list[Taken] = []
    skipped: list[str] = []
    bar = comfy.utils.ProgressBar(len(photos))
    for number, photo in enumerate(photos, 1):
        comfy.model_management.throw_exception_if_processing_interrupted()
        one = choice.take(photo, number)
        if isinstance(one, Taken):
            taken.append(one)
        elif on_missing == "skip":
            skipped.append(f"skipped: {one}")
        else:
            raise ValueError(
                f"got {one}; expected one there; use a larger or wider photo, pick 'whole photo' for a picture that is "
                "a face crop already, or set on_missing to skip"
            )
        bar.update(1)
    if not taken:
        raise ValueError(f"got no face in any photo: {'; '.join(skipped)}; expected one; use other photos")
    return taken, skipped
