"""Photos as the nodes take them: split a batch into images, detect faces, and select one face per photo."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import comfy.model_management
import comfy.utils
from torch import Tensor

from ..likeness.faces import alignment, detection, quality
from ..likeness.identity.averaging import compute_spherical_mean
from ..likeness.spec import Face, Identity
from . import types

MIN_PHOTO_SIZE = 16  # pixels per side


@dataclass(frozen=True, eq=False)
class SelectedFace:
    """A photo [H, W, 3], the face selected in it, all faces detected in it, and a line for the report."""

    photo: Tensor
    face: Face
    detected_faces: tuple[Face, ...]
    note: str


def split_photos(batches: Sequence[Tensor]) -> list[Tensor]:
    """Every image of the batches [n, H, W, C] as RGB [H, W, 3], the one check of every IMAGE input.

    Raises ValueError if there is no image, on NaN or infinite pixels, on tiny images, and on other shapes.
    """
    misshapen = next((batch for batch in batches if batch.ndim != 4 or not batch.shape[-1]), None)
    if misshapen is not None:
        raise ValueError(
            f"connect an IMAGE: got a tensor of shape {list(misshapen.shape)}; expected [images, height, width, "
            "channels]"
        )
    images = [_convert_to_rgb(image).float().cpu() for batch in batches for image in batch]
    if not images:
        raise ValueError("connect at least one image: got an empty batch; expected 1 or more images")
    broken = [i + 1 for i, image in enumerate(images) if not image.isfinite().all()]
    if broken:
        raise ValueError(f"got photo {broken[0]} with NaN or infinite pixels; expected 0 to 1; load the image again")
    tiny = next((image for image in images if min(image.shape[:2]) < MIN_PHOTO_SIZE), None)
    if tiny is not None:
        raise ValueError(
            f"got a photo of {tiny.shape[1]}x{tiny.shape[0]} pixels; expected at least {MIN_PHOTO_SIZE} per side; "
            "use a larger photo"
        )
    return images


def _convert_to_rgb(image: Tensor) -> Tensor:
    """An image [H, W, C] of gray (C = 1), gray and alpha (2), RGB or RGB and alpha, without its alpha."""
    return image[..., :3] if image.shape[-1] > 2 else image[..., :1].expand(-1, -1, 3)


def get_reference_embeddings(identity: Identity | None, analyzer: types.FaceAnalyzerProtocol) -> Tensor:
    """The identity's ArcFace vectors [n, 512] of the analyzer's network. Raises ValueError if it has none."""
    key = None if identity is None else identity.find_embedding(analyzer.feature)
    if identity is None or key is None:
        got = "no identity" if identity is None else f"identity {identity.name!r} with {', '.join(identity.embeddings)}"
        raise ValueError(
            f"got {got}; expected an identity with {analyzer.feature}; connect one that was encoded with this model "
            "pack"
        )
    return identity.embeddings[key].double()


def get_unit_embedding(identity: Identity | None, analyzer: types.FaceAnalyzerProtocol) -> Tensor:
    """The identity's mean unit embedding [512] of the analyzer's network. Raises ValueError if it has none."""
    embeddings = get_reference_embeddings(identity, analyzer)
    assert identity is not None
    return compute_spherical_mean(embeddings, identity.weight.double())


def list_hash_warnings(identity: Identity, analyzer: types.FaceAnalyzerProtocol) -> list[str]:
    """A warning if the identity was encoded with a different file of the same network."""
    if identity.find_embedding(analyzer.feature) == analyzer.feature.format_encoder_id(analyzer.sha256):
        return []
    network = analyzer.feature.network
    return [
        f"Warning: {identity.name} was encoded with another file of {network}; the similarity values may be inaccurate."
    ]


@dataclass(frozen=True)
class FaceSelector:
    """Detects the faces of a photo and selects one. `similar_to` is needed for picking the most similar face."""

    pick: str
    analyzer: types.FaceAnalyzerProtocol | None = None
    nth: int = 1
    similar_to: Identity | None = None

    def select_face(self, photo: Tensor, number: int) -> SelectedFace | str:
        """The selected face of photo `number`, or the reason why there is none."""
        if self.analyzer is None or self.pick == detection.PICK_WHOLE_PHOTO:
            note = f"photo {number}: used as a whole, without face detection"
            return SelectedFace(photo, alignment.make_whole_photo_face(photo), (), note)
        search = detection.find_faces(photo, self.analyzer.detect)
        if not search.faces:
            return f"no face in photo {number} (detector sizes tried: {', '.join(search.attempts)})"
        index = self._pick_index(photo, search.faces, self.analyzer)
        if not 0 <= index < len(search.faces):
            return f"only {len(search.faces)} face(s) in photo {number}, but face {self.nth} was requested"
        face = search.faces[index]
        note = (
            f"photo {number}: {len(search.faces)} face(s) at detector size {search.attempts[-1]}"
            f" (attempt {len(search.attempts)}), selected face {index + 1}: {quality.describe_face(photo, face)}"
        )
        return SelectedFace(photo, face, search.faces, note)

    def _pick_index(self, photo: Tensor, detected_faces: Sequence[Face], analyzer: types.FaceAnalyzerProtocol) -> int:
        if self.pick == detection.PICK_NTH:
            return self.nth - 1
        if self.pick == detection.PICK_MOST_SIMILAR:
            return detection.pick_most_similar_face(
                photo, detected_faces, analyzer.embed, get_unit_embedding(self.similar_to, analyzer)
            )
        return detection.FACE_PICKERS[self.pick](detected_faces)


def select_faces(
    photos: Sequence[Tensor], selector: FaceSelector, on_missing: str
) -> tuple[list[SelectedFace], list[str]]:
    """The selected face of every photo, and a note on each skipped photo.

    Raises ValueError if a photo has no such face and `on_missing` is not "skip", or if no face is left.
    """
    selected_faces: list[SelectedFace] = []
    skipped: list[str] = []
    progress_bar = comfy.utils.ProgressBar(len(photos))
    for number, photo in enumerate(photos, 1):
        comfy.model_management.throw_exception_if_processing_interrupted()
        result = selector.select_face(photo, number)
        if isinstance(result, SelectedFace):
            selected_faces.append(result)
        elif on_missing == "skip":
            skipped.append(f"skipped: {result}")
        else:
            raise ValueError(
                "crop the photo nearer to the face, set pick to 'whole photo' if it already is a face crop, or set "
                f"on_missing to skip: got {result}"
            )
        progress_bar.update(1)
    if not selected_faces:
        raise ValueError(f"got no face in any photo: {'; '.join(skipped)}; expected at least one; use other photos")
    return selected_faces, skipped
