"""Face detection at several detector sizes, and the choice among the detected faces.

The detector and the recognizer are passed in as functions.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

from torch import Tensor
from torch.nn.functional import cosine_similarity, pad

from ..spec import Face
from .alignment import convert_to_uint8

DetectFaces = Callable[[Tensor, int], Sequence[Face]]  # (uint8 RGB [H, W, 3], side of the detector input) -> faces
EmbedFace = Callable[[Tensor, Face], Tensor]  # (uint8 RGB [H, W, 3], face) -> [512]

# From the default size down, since a smaller input finds larger faces; then up, for small faces in large photos.
DETECTION_SIZES = (640, 512, 448, 384, 320, 256, 192, 1024)
DETECTION_MARGIN = 0.5  # padding of the second attempt on each side, relative to the longer side


@dataclass(frozen=True)
class FaceSearch:
    """Result of `find_faces`: the faces, left to right, and the detector sizes tried, for the report."""

    faces: tuple[Face, ...]
    attempts: tuple[str, ...]


def find_faces(photo: Tensor, detect: DetectFaces, sizes: Sequence[int] = DETECTION_SIZES) -> FaceSearch:
    """The faces of a photo, float [H, W, 3] in 0..1, at the first detector size that finds any, left to right.

    If no size does, all are tried again on the padded photo, because detectors miss faces that fill the image.
    """
    image = convert_to_uint8(photo)
    margin = round(max(photo.shape[:2]) * DETECTION_MARGIN)
    padded = pad(image.movedim(-1, 0), (margin,) * 4, value=127).movedim(0, -1)
    attempts: list[str] = []
    for candidate, offset, note in ((image, 0, ""), (padded, margin, " with a margin")):
        for size in sizes:
            attempts.append(f"{size}{note}")
            faces = [_shift_face(face, -offset) for face in detect(candidate, size)]
            if faces:
                faces.sort(key=lambda face: float(face.box[0] + face.box[2]))
                return FaceSearch(tuple(faces), tuple(attempts))
    return FaceSearch((), tuple(attempts))


def _shift_face(face: Face, offset: float) -> Face:
    return Face(face.box + offset, face.kps + offset, face.score)


def _pick_largest(faces: Sequence[Face]) -> int:
    areas = [float((face.box[2:] - face.box[:2]).prod()) for face in faces]
    return areas.index(max(areas))


# Index of the chosen face among the faces of a photo, ordered left to right.
FACE_PICKERS: Mapping[str, Callable[[Sequence[Face]], int]] = {
    "largest": _pick_largest,
    "leftmost": lambda faces: 0,
    "rightmost": lambda faces: len(faces) - 1,
}
PICK_NTH, PICK_MOST_SIMILAR, PICK_WHOLE_PHOTO = "nth", "most alike", "whole photo"


def compute_face_similarity(photo: Tensor, face: Face, embed: EmbedFace, target: Tensor) -> float:
    """Cosine, -1 to 1, between a face's embedding and `target` [512]."""
    return float(cosine_similarity(embed(convert_to_uint8(photo), face).double(), target.double(), dim=0))


def pick_most_similar_face(photo: Tensor, faces: Sequence[Face], embed: EmbedFace, target: Tensor) -> int:
    """Index of the face whose embedding has the highest cosine with `target` [512]."""
    cosines = [compute_face_similarity(photo, face, embed, target) for face in faces]
    return cosines.index(max(cosines))
