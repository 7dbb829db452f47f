"""The people that gates measure on: of the validation split, painted twice each, with the judge's embeddings."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import cache, cached_property
from pathlib import Path

import torch
from torch import Tensor

from ...likeness.faces import alignment
from ...nodes.loaders import files
from ...training.adapters.face_encoders import ArcFaceReader
from ...training.base_models.face_recognizer import FACE_SIZE
from ...training.data.clusters import AnnotatedImage
from .. import world
from ..evaluation.metrics import compute_cosines
from ..world_album import WorldAlbum

JUDGE_FILE = Path("judge") / "model" / "judge.onnx"  # in the folder of the runs
SHIPPED_JUDGE_FILE = files.SHIPPED_WEIGHTS / "demo" / "judge.onnx"  # as long as there is no other
SPLIT = "validation"
# Everything but the side of the light, so that nearly all captions fit into one prompt.
FULL_DETAILS = ("expression", "clothes", "looks", "place", "view")


@dataclass(frozen=True)
class JudgedFaces:
    """Images of people of the train split, one each, and the judge's embeddings of them [n, 512]."""

    samples: Sequence[AnnotatedImage]
    embeddings: Tensor


@dataclass(frozen=True)
class JudgedImages:
    """How well images show people: mean cosine to their own person's image, and how often no other is nearer."""

    cosine: float
    identified: float


class HeldOutPeople:
    """`count` people: `images` and `other_images` uint8 [count, H, W, 3], two of each; what the first show, in words.

    Key points are the painter's, so that no detector takes part.
    """

    def __init__(self, count: int, runs: Path) -> None:
        self.judge = load_judge(runs)
        album = WorldAlbum(SPLIT)
        self.people = [world.make_person(number, SPLIT) for number in range(count)]
        self.scenes = [album.find_scene(number, 0) for number in range(count)]
        first = [album.load_annotated_image(number, 0) for number in range(count)]
        second = [album.load_annotated_image(number, 1) for number in range(count)]
        self.images, self.key_points = (
            torch.stack([getattr(sample, name) for sample in first]) for name in ("image", "kps")
        )
        self.other_samples = second
        self.other_images = torch.stack([sample.image for sample in second])
        self.other_key_points = torch.stack([sample.kps for sample in second])

    @property
    def full_captions(self) -> list[str]:
        """Captions of the first images that describe the people."""
        return [
            world.format_caption(scene, [world.list_looks(person)], FULL_DETAILS)
            for person, scene in zip(self.people, self.scenes, strict=True)
        ]

    @property
    def plain_captions(self) -> list[str]:
        """Captions of the first images that do not."""
        return [world.format_caption(scene, (), FULL_DETAILS) for scene in self.scenes]

    @cached_property
    def embeddings(self) -> Tensor:
        """The judge's embeddings of the first images, [count, 512]."""
        return self.embed_faces(self.images / 255, self.key_points)

    def judge_images(self, images: Tensor, key_points: Tensor | None = None) -> JudgedImages:
        """Judge images [count, H, W, 3] from 0 to 1, one of each person, posed as the first ones unless told."""
        found = self.embed_faces(images, self.key_points if key_points is None else key_points)
        cosines = compute_cosines(found[:, None], self.embeddings[None]).float()
        right = cosines.argmax(1) == torch.arange(len(cosines))
        return JudgedImages(float(cosines.diagonal().mean()), float(right.float().mean()))

    def judge_other_images(self) -> JudgedImages:
        """The upper limit: another drawing of each person."""
        return self.judge_images(self.other_images / 255, self.other_key_points)

    def embed_faces(self, images: Tensor, key_points: Tensor) -> Tensor:
        """The judge's embeddings [n, 512] of images [n, H, W, 3] from 0 to 1."""
        crops = [
            alignment.convert_to_uint8(alignment.align_face(image.double(), kps, FACE_SIZE))
            for image, kps in zip(images, key_points, strict=True)
        ]
        return self.judge.read_faces(torch.stack(crops), torch.device("cpu"))

    def judge_train_people(self, count: int) -> JudgedFaces:
        """Images of `count` people of the train split."""
        album = WorldAlbum("train")
        samples = [album.load_annotated_image(person, 0) for person in range(count)]
        images, key_points = (torch.stack([getattr(sample, name) for sample in samples]) for name in ("image", "kps"))
        return JudgedFaces(samples, self.embed_faces(images / 255, key_points))


@cache
def load_judge(runs: Path) -> ArcFaceReader:
    trained = runs / JUDGE_FILE
    return ArcFaceReader(trained if trained.is_file() else SHIPPED_JUDGE_FILE, "judge")
