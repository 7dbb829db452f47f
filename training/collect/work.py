"""One candidate: its photos are read and searched, its people clustered and written as one shard, once."""

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

from ...likeness import faces
from ...likeness.spec import Face
from ...likeness.sphere import units
from ...nodes.loaders import face_analyzer, files
from ...nodes.photos import LEAST
from ...nodes.types import Analyzer
from ..data import View, inside, write_shard
from . import clusters, folders
from .folders import DONE, Candidate


@dataclass(frozen=True)
class Plan:
    """How people are collected; `longest` is the longer side of a kept photo in pixels, `face` that of a face."""

    pack: str
    provider: str = "auto"
    similarity: float = 0.6
    least: int = 2
    views: int = 0
    face: int = faces.SMALL
    longest: int = 1024

    def __post_init__(self) -> None:
        if not (0 < self.similarity < 1 and 0 <= self.views <= clusters.POSES and min(self.least, self.face) > 0):
            raise ValueError(
                f"got {self}; expected a similarity between 0 and 1, views from 0 to {clusters.POSES}, and least and "
                "face of 1 or more"
            )
        if self.longest < LEAST:
            raise ValueError(f"got photos of {self.longest} pixels; expected a longest side of {LEAST} or more")


@dataclass(frozen=True, eq=False)
class Found:
    """A face, the photo it is in, all faces there, its direction [512], and how sharp it is."""

    photo: Path
    face: Face
    beside: Sequence[Face]
    unit: Tensor
    sharpness: float


@dataclass(frozen=True, eq=False)
class Kept:
    """Collected people as an album (data.Album)."""

    people: Mapping[str, Sequence[Found]]
    longest: int

    def __len__(self) -> int:
        return len(self.people)

    def name(self, identity: int) -> str:
        return list(self.people)[identity]

    def pictures(self, identity: int) -> int:
        return len(self.people[self.name(identity)])

    def view(self, identity: int, picture: int) -> View:
        found = self.people[self.name(identity)][picture]
        photo = read(found.photo, self.longest)
        others = [torch.cat((face.box.view(2, 2), face.kps)) for face in found.beside if face is not found.face]
        around = torch.stack(others) if others else torch.empty(0, 7, 2)
        box = found.face.box
        return View(photo, "", found.face.kps, box, inside(box, photo.shape), around)


def read(path: Path, longest: int) -> Tensor:
    """A photo as its camera held it, at most so large: uint8 [H, W, 3]."""
    with Image.open(path) as file:
        image = ImageOps.exif_transpose(file).convert("RGB")
    image.thumbnail((longest, longest), Image.Resampling.LANCZOS)
    return torch.from_numpy(np.array(image))


class Searched(NamedTuple):
    """The faces of a photo that are large enough, of how many, and why there are none."""

    found: Sequence[Found] = ()
    faces: int = 0
    why: str = ""


def search(path: Path, plan: Plan, analyzer: Analyzer) -> Searched:
    try:
        photo = read(path, plan.longest)
    except (OSError, ValueError, SyntaxError, Image.DecompressionBombError):
        return Searched(why="cannot be read")
    real = photo.float() / 255
    beside = faces.find_faces(real, analyzer.detect).faces if min(photo.shape[:2]) >= LEAST else ()
    found = [
        Found(path, face, beside, units(analyzer.embed(photo, face).double()), faces.sharpness(real, face))
        for face in beside
        if face.size >= plan.face
    ]
    why = f"face below {plan.face} pixels" if beside else "no face"
    return Searched(found, len(beside), "" if found else why)


def choose(candidate: Candidate, found: Sequence[Found], plan: Plan) -> tuple[dict[str, list[Found]], dict[Path, str]]:
    """The people of a candidate, and why photos of which no face is kept are left out."""
    stacked = torch.stack([one.unit for one in found]) if found else torch.empty(0, 512)
    dropped = {
        one.photo: f"nobody who is in {plan.least} photos" if candidate.crowd else "not the person" for one in found
    }
    chosen: list[Tensor] = []
    if candidate.crowd:
        chosen = clusters.people(stacked, plan.similarity, plan.least)
    elif found:
        chosen = [clusters.person(stacked, plan.similarity)]
    people: dict[str, list[Found]] = {}
    for number, rows in enumerate(chosen):
        # The likest comes first, and stands for its photo.
        alone = list({found[row].photo: found[row] for row in reversed(rows.tolist())}.values())[::-1]
        taken, why = _views(alone, plan) if plan.views and alone else (alone, "")
        if len(taken) < max(plan.views, plan.least):
            taken, why = [], f"fewer than {max(plan.views, plan.least)} of the person"
        dropped |= {one.photo: why for one in alone if one not in taken}
        if taken:
            people[f"{candidate.name}-{number:05d}" if candidate.crowd else candidate.name] = taken
    for one in (one for some in people.values() for one in some):
        dropped.pop(one.photo, None)
    return people, dropped


def _views(alone: Sequence[Found], plan: Plan) -> tuple[list[Found], str]:
    poses = torch.tensor([faces.pose(one.face) for one in alone])
    rows = clusters.views(poses, [one.sharpness for one in alone], plan.views)
    return [alone[row] for row in rows], "quality or pose"


def collect(candidate: Candidate, plan: Plan, analyzer: Analyzer, out: Path) -> dict[str, Any]:
    """What became of a candidate's photos; their people are in a shard named by the key, unless there are none.

    Where `out` has the result of these very photos, it is read. The shard is there before what is told of it.
    """
    photos = candidate.photos()
    digests = {path.name: files.sha256(path) for path in photos}
    settings = [f"{name}={value}" for name, value in asdict(plan).items() if name != "provider"]
    key = folders.key([candidate.name, str(candidate.crowd), analyzer.sha256, *settings], digests)
    shard, done = out / f"{key}.tar", out / DONE / f"{key}.json"
    if done.is_file():
        told = json.loads(done.read_text(encoding="utf-8"))
        if shard.is_file() or not told["kept"]:
            return told
    first = {digest: name for name, digest in reversed(digests.items())}
    once = {path: first[digests[path.name]] == path.name for path in photos}
    searched = {
        path: search(path, plan, analyzer) if new else Searched(why="the same file again")
        for path, new in once.items()
    }  # fmt: skip
    people, left = choose(candidate, [one for seen in searched.values() for one in seen.found], plan)
    dropped = {path: seen.why for path, seen in searched.items() if seen.why} | left
    if people:
        write_shard(Kept(people, plan.longest), range(len(people)), shard, len(photos), masks=False)
    told = {
        "candidate": candidate.name, "key": key, "photos": len(photos),
        "faces": sum(seen.faces for seen in searched.values()),
        "kept": {name: [one.photo.name for one in some] for name, some in people.items()},
        "dropped": {path.name: why for path, why in sorted(dropped.items())},
    }  # fmt: skip
    _write(done, json.dumps(told))
    return told


def _write(path: Path, text: str) -> None:
    """Whole or not at all."""
    path.parent.mkdir(parents=True, exist_ok=True)
    part = path.with_suffix(".part")
    part.write_text(text, encoding="utf-8")
    os.replace(part, path)


@lru_cache(maxsize=1)
def analyzer(pack: str, provider: str) -> Analyzer:
    """The process's own: a pack of the host's by its name, or the folder of one."""
    torch.set_num_threads(1)  # there is a process for each core
    files.register()
    folder = Path(pack)
    if any(folder.glob("*.onnx")):
        return face_analyzer.open_pack(folder, provider)[0]
    return face_analyzer.load(pack, provider)[0]


def from_row(row: Mapping[str, str]) -> dict[str, str]:
    """`collect` from and to texts, for other processes and other machines."""
    told = json.loads(row["candidate"])
    plan = Plan(**json.loads(row["plan"]))
    candidate = Candidate(told["name"], Path(told["folder"]), told["crowd"])
    return {"told": json.dumps(collect(candidate, plan, analyzer(plan.pack, plan.provider), Path(row["out"])))}
