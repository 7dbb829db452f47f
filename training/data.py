"""Pictures of people by identity, drawn or from WebDataset shards, and batches of identity clusters cut from them.

FlashFace (arXiv 2403.17008) trains on B x (N + 1) pictures: of each of B people one to be made and N to look at.
Everything is found by number, so that a run goes on at any step and no two workers or processes see the same cluster.
"""

from __future__ import annotations

import hashlib
import io
import json
import os
import tarfile
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple, Protocol

import numpy as np
import torch
from PIL import Image
from torch import Tensor
from torch.utils.data import Dataset

from . import world
from .dice import Dice
from .portrait.people import SPLITS

PICTURES = 1 << 12  # of each drawn person, at most
PEOPLE = 1 << 20  # of each split
JPEG = 95  # quality
PICTURE_NAMES, MASK_NAME = ("png", "jpg", "jpeg", "webp"), "mask.png"


class View(NamedTuple):
    """One picture of one person; places in pixels, whose middles are integers."""

    picture: Tensor  # uint8 [H, W, 3]
    caption: str
    kps: Tensor  # [5, 2], as a viewer sees them: left eye, right eye, nose, left and right corner of the mouth
    box: Tensor  # [4]: left, top, right, bottom of the face
    mask: Tensor  # bool [H, W], the face without hair, with its beard
    others: Tensor  # [n, 7, 2], of the faces beside this one: two corners of the box, five points


class Clusters(NamedTuple):
    """What one step trains on: n pictures of each of B people."""

    pictures: Tensor  # uint8 [B, n, H, W, 3]
    kps: Tensor  # [B, n, 5, 2]
    boxes: Tensor  # [B, n, 4]
    masks: Tensor  # bool [B, n, H, W]
    captions: Sequence[Sequence[str]]  # B of n
    identities: Sequence[str]  # B


class Album(Protocol):
    """People by number from 0, and each one's pictures by number from 0."""

    def __len__(self) -> int: ...

    def name(self, identity: int) -> str: ...

    def pictures(self, identity: int) -> int:
        """How many there are of somebody."""
        ...

    def view(self, identity: int, picture: int) -> View: ...


@dataclass(frozen=True)
class WorldAlbum:
    """Portrait World, everyone in scenes of their own: what is behind a face says nothing of whose it is.

    The first `people` of a split, `each` pictures of everyone: alone, or with `figures` of 2 beside somebody else. Any
    two of somebody's poses are at least `apart` degrees apart (world.turned), as in MFHQ (2412.09694, Sec. 3.4). With a
    `framing`, all pictures have that one (scenes.FRAMINGS).
    """

    split: str
    side: int = 128
    people: int = PEOPLE
    each: int = PICTURES
    figures: int = 1
    apart: float = 0.0
    framing: str = ""

    def __len__(self) -> int:
        return self.people

    def name(self, identity: int) -> str:
        return f"{self.split}-{identity:07d}" if self.figures == 1 else f"{self.split}-pair-{identity:07d}"

    def pictures(self, identity: int) -> int:
        return min(self.each, PICTURES)

    def scene(self, identity: int, picture: int) -> world.Scene:
        """The scene of one of somebody's pictures. Raises ValueError where so many are not so far apart."""
        if not self.apart and not self.framing:
            return self._rolled(identity, picture)
        taken: list[world.Scene] = []
        for number in range(PICTURES):
            one = self._rolled(identity, number)
            framed = self.framing in ("", one.framing)
            if framed and all(world.turned(one.figures[0], other.figures[0]) >= self.apart for other in taken):
                taken.append(one)
            if len(taken) > picture:
                return one
        raise ValueError(
            f"got apart = {self.apart} for {picture + 1} pictures of {self.name(identity)}; "
            f"expected at most {len(taken)}, as no more are so far apart; lower one of them"
        )

    def _rolled(self, identity: int, number: int) -> world.Scene:
        # No scene of one split is one of another's.
        place = (identity * PICTURES + number) * len(SPLITS) + list(SPLITS).index(self.split)
        return world.scene(place, self.figures)

    def view(self, identity: int, picture: int) -> View:
        scene = self.scene(identity, picture)
        beside = [world.person(PEOPLE - 1 - identity, self.split)] * (self.figures - 1)
        painted = world.paint([world.person(identity, self.split), *beside], scene, self.side)
        return told(painted, world.caption(scene))


def told(painted: world.Painted, caption: str) -> View:
    """A painted picture as a view of the first person in it."""
    whole = (painted.image, painted.kps[0], painted.box[0], painted.face[0])
    image, kps, box, mask = (torch.from_numpy(value) for value in whole)
    others = np.concatenate((painted.box.reshape(-1, 2, 2), painted.kps), axis=1)[1:]
    return View(image, caption, kps, box, mask, torch.from_numpy(others))


class Member(NamedTuple):
    """Where the bytes of one file lie."""

    shard: Path
    start: int
    size: int

    def read(self) -> bytes:
        with self.shard.open("rb") as file:
            file.seek(self.start)
            return file.read(self.size)


class ShardAlbum:
    """WebDataset shards, not compressed: `<identity>/<n>.jpg` (or png, webp), `.json` and, if it is known, `.mask.png`.

    The JSON holds `caption`, `kps` [5][2] and `box` [4], and `others` [n][7][2] where there are more faces. Without a
    mask the box is the face. Pictures of another size are cut square around the face and resized, unless `side` is
    None. Shards must be files at hand: their headers are read once, here, and every picture is then found by number.
    Raises ValueError on shards that hold no picture or one without its JSON.
    """

    def __init__(self, shards: Iterable[Path], side: int | None = 128) -> None:
        self.side = side
        self._people: dict[str, dict[str, dict[str, Member]]] = {}
        files = sorted(shards)
        for shard in files:
            self._index(shard)
        if not self._people:
            raise ValueError(
                f"got {len(files)} shards without a picture; expected <identity>/<n>.jpg and .json in them"
            )
        self._names = sorted(self._people)
        for name in self._names:
            for number, parts in self._people[name].items():
                if "json" not in parts or not set(PICTURE_NAMES) & set(parts):
                    found = ", ".join(sorted(parts))
                    raise ValueError(f"got {name}/{number} with {found}; expected a picture and a .json beside it")
        self._numbers = {name: sorted(people, key=_natural) for name, people in self._people.items()}

    def _index(self, shard: Path) -> None:
        with tarfile.open(shard, "r:") as tar:
            for member in tar:
                person, _, file = member.name.rpartition("/")
                number, _, kind = file.partition(".")
                if member.isfile() and person and kind:
                    place = Member(shard, member.offset_data, member.size)
                    self._people.setdefault(person, {}).setdefault(number, {})[kind.lower()] = place

    def __len__(self) -> int:
        return len(self._names)

    def name(self, identity: int) -> str:
        return self._names[identity]

    def pictures(self, identity: int) -> int:
        return len(self._numbers[self._names[identity]])

    def about(self, identity: int, picture: int) -> dict[str, Any]:
        """What the JSON of a picture says."""
        return json.loads(self._parts(identity, picture)["json"].read())

    def view(self, identity: int, picture: int) -> View:
        parts, about = self._parts(identity, picture), self.about(identity, picture)
        kind = next(kind for kind in PICTURE_NAMES if kind in parts)
        image = _decode(parts[kind].read(), "RGB")
        box = torch.tensor(about["box"])
        mask = _decode(parts[MASK_NAME].read(), "L") > 127 if MASK_NAME in parts else inside(box, image.shape)
        others = torch.tensor(about.get("others", ())).view(-1, 7, 2)
        whole = View(image, about["caption"], torch.tensor(about["kps"]), box, mask, others)
        return whole if self.side is None else fit(whole, self.side)

    def _parts(self, identity: int, picture: int) -> dict[str, Member]:
        name = self._names[identity]
        return self._people[name][self._numbers[name][picture]]


def _natural(number: str) -> tuple[int, str]:
    return (int(number) if number.isdecimal() else -1, number)


def _decode(data: bytes, mode: str) -> Tensor:
    return torch.from_numpy(np.array(Image.open(io.BytesIO(data)).convert(mode)))


def inside(box: Tensor, shape: Sequence[int]) -> Tensor:
    """A mask [H, W] of a box."""
    y, x = torch.arange(shape[0])[:, None], torch.arange(shape[1])[None, :]
    left, top, right, bottom = box.tolist()
    return (x >= left) & (x <= right) & (y >= top) & (y <= bottom)


def fit(view: View, side: int) -> View:
    """A view of `side` x `side` pixels: the largest square with the face as near its middle as may be, resized."""
    height, width = view.picture.shape[:2]
    if height == width == side:
        return view
    square = min(height, width)
    middle = (view.box[:2] + view.box[2:]) / 2
    left, top = (
        int(min(max(float(at) + 0.5 - square / 2, 0), length - square))
        for at, length in zip(middle, (width, height), strict=True)
    )
    cut = (slice(top, top + square), slice(left, left + square))
    image = Image.fromarray(view.picture[cut].numpy()).resize((side, side), Image.Resampling.LANCZOS)
    mask = Image.fromarray(view.mask[cut].numpy().astype(np.uint8) * 255).resize((side, side), Image.Resampling.BOX)
    corner, scale = torch.tensor([left, top]) - 0.5, side / square
    face = torch.from_numpy(np.array(mask)) > 127
    kps, box, others = ((points - corner) * scale - 0.5 for points in (view.kps, view.box.view(2, 2), view.others))
    return View(torch.from_numpy(np.array(image)), view.caption, kps, box.flatten(), face, others)


def write_shards(
    album: Album, folder: Path, pictures: int, per_shard: int = 1000, lossless: bool = False
) -> list[Path]:
    """Write `pictures` of everyone in an album as shards of `per_shard` people; as JPEG, or PNG where `lossless`.

    The same album gives the same bytes, for one version of Pillow.
    """
    folder.mkdir(parents=True, exist_ok=True)
    starts = range(0, len(album), per_shard)
    return [
        write_shard(
            album, range(start, min(start + per_shard, len(album))), folder / f"{number:06d}.tar", pictures, lossless
        )
        for number, start in enumerate(starts)
    ]


def write_shard(
    album: Album, people: range, path: Path, pictures: int, lossless: bool = False, masks: bool = True, least: float = 0
) -> Path:
    """Write one shard, whole or not at all; without `masks` where the boxes are all that is known.

    Of so many pictures of everyone, those on which a face is less than `least` pixels high are left out.
    """
    kind, options = ("png", {}) if lossless else ("jpeg", {"quality": JPEG, "subsampling": 0})
    part = path.with_suffix(".part")
    with tarfile.open(part, "w") as tar:
        for identity in people:
            for number in range(min(pictures, album.pictures(identity))):
                view = album.view(identity, number)
                if lowest(view) < least:
                    continue
                about = {"caption": view.caption, "kps": view.kps.tolist(), "box": view.box.tolist()}
                about |= {"others": view.others.tolist()} if len(view.others) else {}
                stem = f"{album.name(identity)}/{number}"
                _add(tar, f"{stem}.{kind.replace('jpeg', 'jpg')}", _encode(view.picture, kind, options))
                _add(tar, f"{stem}.json", json.dumps(about).encode())
                if masks:
                    _add(tar, f"{stem}.{MASK_NAME}", _encode(view.mask.to(torch.uint8) * 255, "png", {}))
    os.replace(part, path)
    return path


def lowest(view: View) -> float:
    """The height of the smallest face of a picture, in pixels."""
    boxes = torch.cat([view.box.float().view(1, 2, 2), view.others[:, :2].float()])
    return float((boxes[:, 1] - boxes[:, 0])[:, 1].min())


def _encode(picture: Tensor, kind: str, options: dict[str, int]) -> bytes:
    out = io.BytesIO()
    Image.fromarray(picture.numpy()).save(out, kind, **options)
    return out.getvalue()


def _add(tar: tarfile.TarFile, name: str, data: bytes) -> None:
    about = tarfile.TarInfo(name)
    about.size = len(data)
    tar.addfile(about, io.BytesIO(data))


@dataclass(frozen=True)
class Plan:
    """How clusters are cut: people a step and process, least and most pictures of each, seed, share of the work."""

    batch: int
    least: int = 2
    most: int = 5
    seed: int = 0
    process: int = 0
    processes: int = 1

    def __post_init__(self) -> None:
        if not (self.batch > 0 < self.least <= self.most and 0 <= self.process < self.processes):
            raise ValueError(f"got {self}; expected a batch and 1 <= least <= most and 0 <= process < processes")


def gather(album: Album, who: Sequence[int], which: Sequence[Sequence[int]]) -> Clusters:
    """Of each person in `who` the pictures in `which`, as many of each."""
    rows = [[album.view(one, picture) for picture in pictures] for one, pictures in zip(who, which, strict=True)]

    def stack(field: str) -> Tensor:
        return torch.stack([torch.stack([getattr(view, field) for view in row]) for row in rows])

    return Clusters(
        pictures=stack("picture"),
        kps=stack("kps"),
        boxes=stack("box"),
        masks=stack("mask"),
        captions=[[view.caption for view in row] for row in rows],
        identities=[album.name(one) for one in who],
    )


class ClusterBatches(Dataset[Clusters]):
    """The clusters of each step, by its number: nobody twice before everybody's turn has come, in no order.

    All people of a step, on all processes, have the same number of pictures, none of them twice. People with fewer
    pictures than `plan.most` are left out; raises ValueError where nobody remains. Read it with a DataLoader of
    `batch_size=None` and `sampler=range(step, steps)`, with any number of workers.
    """

    def __init__(self, album: Album, plan: Plan, steps: int) -> None:
        self.album, self.plan, self.steps = album, plan, steps
        self.people = [number for number in range(len(album)) if album.pictures(number) >= plan.most]
        if not self.people:
            raise ValueError(f"got nobody with {plan.most} pictures of {len(album)} people; lower `most`")
        self._shuffled: tuple[int, Tensor] | None = None

    def __len__(self) -> int:
        return self.steps

    def __getitem__(self, step: int) -> Clusters:
        if not 0 <= step < self.steps:
            raise IndexError(f"got step {step} of {self.steps}")
        plan = self.plan
        first = (step * plan.processes + plan.process) * plan.batch
        count = plan.least + _dice(plan.seed, "size", step).below(plan.most - plan.least + 1)
        places = range(first, first + plan.batch)
        who = [self._person(place) for place in places]
        which = [
            _some(_dice(plan.seed, "pictures", place), self.album.pictures(one), count)
            for place, one in zip(places, who, strict=True)
        ]
        return gather(self.album, who, which)

    def _person(self, place: int) -> int:
        """Who is at a place of the endless row of all people, shuffled anew for each epoch."""
        epoch, at = divmod(place, len(self.people))
        if self._shuffled is None or self._shuffled[0] != epoch:
            chance = torch.Generator().manual_seed(_number(self.plan.seed, "people", epoch))
            self._shuffled = epoch, torch.randperm(len(self.people), generator=chance)
        return self.people[int(self._shuffled[1][at])]


def _number(*parts: int | str) -> int:
    """A seed of its own for each tuple."""
    digest = hashlib.sha256(repr(parts).encode()).digest()
    return int.from_bytes(digest[:8], "little") >> 1


def _dice(*parts: int | str) -> Dice:
    return Dice(_number(*parts))


def _some(dice: Dice, below: int, count: int) -> list[int]:
    """So many different numbers from 0 to `below` - 1."""
    found: list[int] = []
    while len(found) < count:
        number = dice.below(below)
        if number not in found:
            found.append(number)
    return found
