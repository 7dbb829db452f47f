"""Processes one candidate: detects the faces in its photos, clusters them by person and writes one shard."""

from __future__ import annotations

import json
import os
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from functools import lru_cache
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
from PIL import Image, ImageOps
from torch import Tensor

from ...likeness.faces import detection, quality
from ...likeness.identity.averaging import normalize_rows
from ...likeness.spec import Face
from ...nodes.loaders import face_analyzer, files
from ...nodes.photos import MIN_PHOTO_SIZE
from ...nodes.types import FaceAnalyzerProtocol
from ..data.clusters import AnnotatedImage, make_box_mask
from ..data.shards import write_shard
from . import face_clusters, photo_folders
from .photo_folders import RESULTS_FOLDER, Candidate


@dataclass(frozen=True)
class DatasetBuildConfig:
    """Which photos of people are kept; the options of build.py. Sizes are in pixels."""

    pack: str
    provider: str = "auto"
    min_similarity: float = 0.6
    min_photos: int = 2
    num_views: int = 0
    min_face_size: int = quality.MIN_FACE_SIZE
    max_photo_size: int = 1024

    def __post_init__(self) -> None:
        if not (
            0 < self.min_similarity < 1
            and 0 <= self.num_views <= face_clusters.NUM_POSE_CLUSTERS
            and min(self.min_photos, self.min_face_size) > 0
        ):
            raise ValueError(
                f"got {self}; expected a min_similarity between 0 and 1, num_views from 0 to "
                f"{face_clusters.NUM_POSE_CLUSTERS}, and min_photos and min_face_size of at least 1"
            )
        if self.max_photo_size < MIN_PHOTO_SIZE:
            raise ValueError(f"got a max_photo_size of {self.max_photo_size}; expected at least {MIN_PHOTO_SIZE}")


@dataclass(frozen=True, eq=False)
class FoundFace:
    """A face, its photo, all faces in that photo, its unit embedding [512] and its sharpness."""

    photo: Path
    face: Face
    faces_in_photo: Sequence[Face]
    unit_embedding: Tensor
    sharpness: float


@dataclass(frozen=True, eq=False)
class PersonAlbum:
    """The kept people as a clusters.Album."""

    people: Mapping[str, Sequence[FoundFace]]
    max_photo_size: int

    def __len__(self) -> int:
        return len(self.people)

    def get_name(self, identity: int) -> str:
        return list(self.people)[identity]

    def count_images(self, identity: int) -> int:
        return len(self.people[self.get_name(identity)])

    def load_annotated_image(self, identity: int, index: int) -> AnnotatedImage:
        found = self.people[self.get_name(identity)][index]
        photo = read_photo(found.photo, self.max_photo_size)
        others = [torch.cat((face.box.view(2, 2), face.kps)) for face in found.faces_in_photo if face is not found.face]
        other_faces = torch.stack(others) if others else torch.empty(0, 7, 2)
        box = found.face.box
        return AnnotatedImage(photo, "", found.face.kps, box, make_box_mask(box, photo.shape), other_faces)


def read_photo(path: Path, max_photo_size: int) -> Tensor:
    """Load a photo, rotated by its EXIF orientation and scaled down to `max_photo_size`: uint8 [H, W, 3]."""
    with Image.open(path) as file:
        image = ImageOps.exif_transpose(file).convert("RGB")
    image.thumbnail((max_photo_size, max_photo_size), Image.Resampling.LANCZOS)
    return torch.from_numpy(np.array(image))


class SearchedPhoto(NamedTuple):
    """The faces of a photo that are large enough, the number of all its faces, and the reason if there are none."""

    found_faces: Sequence[FoundFace] = ()
    num_faces: int = 0
    drop_reason: str = ""


def search_photo(path: Path, config: DatasetBuildConfig, analyzer: FaceAnalyzerProtocol) -> SearchedPhoto:
    try:
        photo = read_photo(path, config.max_photo_size)
    except (OSError, ValueError, SyntaxError, Image.DecompressionBombError):
        return SearchedPhoto(drop_reason="cannot be read")
    image = photo.float() / 255
    faces = detection.find_faces(image, analyzer.detect).faces if min(photo.shape[:2]) >= MIN_PHOTO_SIZE else ()
    found = [
        FoundFace(
            path,
            face,
            faces,
            normalize_rows(analyzer.embed(photo, face).double()),
            quality.compute_sharpness(image, face),
        )
        for face in faces
        if face.size >= config.min_face_size
    ]
    reason = f"face smaller than {config.min_face_size} pixels" if faces else "no face"
    return SearchedPhoto(found, len(faces), "" if found else reason)


def choose_people(
    candidate: Candidate, found_faces: Sequence[FoundFace], config: DatasetBuildConfig
) -> tuple[dict[str, list[FoundFace]], dict[Path, str]]:
    """The people of a candidate with their faces, and the reasons for dropping photos."""
    stacked = torch.stack([one.unit_embedding for one in found_faces]) if found_faces else torch.empty(0, 512)
    rare = f"person in fewer than {config.min_photos} photos" if candidate.may_show_anyone else "another person"
    dropped = {one.photo: rare for one in found_faces}
    chosen: list[Tensor] = []
    if candidate.may_show_anyone:
        chosen = face_clusters.find_people(stacked, config.min_similarity, config.min_photos)
    elif found_faces:
        chosen = [face_clusters.find_main_person(stacked, config.min_similarity)]
    people: dict[str, list[FoundFace]] = {}
    for number, rows in enumerate(chosen):
        # One face per photo: the most typical, which comes first.
        faces = list({found_faces[row].photo: found_faces[row] for row in reversed(rows.tolist())}.values())[::-1]
        selected, reason = _select_views(faces, config) if config.num_views and faces else (faces, "")
        if len(selected) < max(config.num_views, config.min_photos):
            selected, reason = [], f"fewer than {max(config.num_views, config.min_photos)} photos of the person"
        dropped |= {one.photo: reason for one in faces if one not in selected}
        if selected:
            people[f"{candidate.name}-{number:05d}" if candidate.may_show_anyone else candidate.name] = selected
    for face in (face for faces in people.values() for face in faces):
        dropped.pop(face.photo, None)
    return people, dropped


def _select_views(person_faces: Sequence[FoundFace], config: DatasetBuildConfig) -> tuple[list[FoundFace], str]:
    poses = torch.tensor([quality.estimate_pose(one.face) for one in person_faces])
    rows = face_clusters.select_views(poses, [one.sharpness for one in person_faces], config.num_views)
    return [person_faces[row] for row in rows], "quality or pose"


def build_candidate_shard(
    candidate: Candidate, config: DatasetBuildConfig, analyzer: FaceAnalyzerProtocol, out: Path
) -> dict[str, Any]:
    """Write the shard of a candidate's people, unless there are none, and return the result: what was kept and why not.

    If `out` has the result for the same photos and settings, it is returned. The result is written after the shard.
    """
    photos = candidate.list_photos()
    digests = {path.name: files.hash_file(path) for path in photos}
    settings = [f"{name}={value}" for name, value in asdict(config).items() if name != "provider"]
    key = photo_folders.make_result_key(
        [candidate.name, str(candidate.may_show_anyone), analyzer.sha256, *settings], digests
    )
    shard, done = out / f"{key}.tar", out / RESULTS_FOLDER / f"{key}.json"
    if done.is_file():
        result = json.loads(done.read_text(encoding="utf-8"))
        if shard.is_file() or not result["kept"]:
            return result
    first_names = {digest: name for name, digest in reversed(digests.items())}
    searched = {
        path: search_photo(path, config, analyzer)
        if first_names[digests[path.name]] == path.name
        else SearchedPhoto(drop_reason="duplicate file")
        for path in photos
    }
    found_faces = [face for photo in searched.values() for face in photo.found_faces]
    people, dropped_people = choose_people(candidate, found_faces, config)
    dropped = {path: photo.drop_reason for path, photo in searched.items() if photo.drop_reason} | dropped_people
    if people:
        write_shard(PersonAlbum(people, config.max_photo_size), range(len(people)), shard, len(photos), masks=False)
    result = {
        "candidate": candidate.name, "key": key, "photos": len(photos),
        "faces": sum(photo.num_faces for photo in searched.values()),
        "kept": {name: [face.photo.name for face in faces] for name, faces in people.items()},
        "dropped": {path.name: reason for path, reason in sorted(dropped.items())},
    }  # fmt: skip
    _write_atomically(done, json.dumps(result))
    return result


def _write_atomically(path: Path, text: str) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    part = path.with_suffix(".part")
    part.write_text(text, encoding="utf-8")
    os.replace(part, path)


@lru_cache(maxsize=1)
def open_analyzer(pack: str, provider: str) -> FaceAnalyzerProtocol:
    """The face analyzer of this process; `pack` is the name of a model pack in ComfyUI, or the folder of one."""
    torch.set_num_threads(1)  # one process per core
    files.register_model_folders()
    folder = Path(pack)
    if any(folder.glob("*.onnx")):
        return face_analyzer.open_model_pack(folder, provider)[0]
    return face_analyzer.load_face_analyzer(pack, provider)[0]


def build_from_row(row: Mapping[str, str]) -> dict[str, str]:
    """`build_candidate_shard` from and to texts, for other processes and machines."""
    fields = json.loads(row["candidate"])
    config = DatasetBuildConfig(**json.loads(row["config"]))
    candidate = Candidate(fields["name"], Path(fields["folder"]), fields["may_show_anyone"])
    analyzer = open_analyzer(config.pack, config.provider)
    return {"result": json.dumps(build_candidate_shard(candidate, config, analyzer, Path(row["out"])))}
