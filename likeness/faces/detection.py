"""Face detection at several detector sizes, and the choice among the detected faces.

The detector and the recognizer are passed in as functions.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

from torch import Tensor
from torch.nn.functional import cosine_similarity, pad

from ..spec import Face
from .alignment import convert_to_uint8, downscale_photo

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

    If no size does, all are tried again on the padded photo, because detectors miss faces that fill the image. It is
    shrunk before, to what the largest detector size can resolve.
    """
    attempts: list[str] = []
    for prepare, note in ((_keep_photo, ""), (_shrink_and_pad, " with a margin")):
        image, scale, margin = prepare(photo, max(sizes))
        for size in sizes:
            attempts.append(f"{size}{note}")
            faces = [_map_face(face, scale, margin) for face in detect(image, size)]
            if faces:
                faces.sort(key=lambda face: float(face.box[0] + face.box[2]))
                return FaceSearch(tuple(faces), tuple(attempts))
    return FaceSearch((), tuple(attempts))


def _keep_photo(photo: Tensor, _max_size: int) -> tuple[Tensor, float, int]:
    return convert_to_uint8(photo), 1.0, 0


def _shrink_and_pad(photo: Tensor, max_size: int) -> tuple[Tensor, float, int]:
    """The photo with a margin, uint8, of about `max_size` pixels at most; its scale, and the margin in pixels."""
    height, width = photo.shape[:2]
    scale = min(1.0, max(max_size / ((1 + 2 * DETECTION_MARGIN) * max(height, width)), 1 / min(height, width)))
    shrunk = downscale_photo(photo, scale) if scale < 1 else photo
    margin = round(max(shrunk.shape[:2]) * DETECTION_MARGIN)
    padded = pad(convert_to_uint8(shrunk).movedim(-1, 0), (margin,) * 4, value=127)
    return padded.movedim(0, -1), scale, margin


def _map_face(face: Face, scale: float, margin: int) -> Face:
    """A face of a photo that was scaled and then got a margin, in pixels of the photo."""
    if scale == 1 and not margin:
        return face
    box, kps = ((points - margin + 0.5) / scale - 0.5 for points in (face.box, face.kps))
    return Face(box, kps, face.score)


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
