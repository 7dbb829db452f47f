"""WebDataset shards of people: `<identity>/<n>.jpg`, `.json` and optionally `.mask.png`, read by random access."""

from __future__ import annotations

import io
import json
import os
import tarfile
from collections.abc import Iterable
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
from PIL import Image
from torch import Tensor

from .clusters import Album, AnnotatedImage, crop_and_resize, make_box_mask

JPEG_QUALITY = 95
IMAGE_SUFFIXES, MASK_SUFFIX = ("png", "jpg", "jpeg", "webp"), "mask.png"


class ShardMember(NamedTuple):
    """The position of one file's bytes in a shard."""

    shard: Path
    offset: int
    size: int

    def read_bytes(self) -> bytes:
        with self.shard.open("rb") as file:
            file.seek(self.offset)
            return file.read(self.size)


class ShardAlbum:
    """Uncompressed WebDataset shards with `<identity>/<n>.jpg` (or png, webp), `.json` and optionally `.mask.png`.

    The JSON holds `caption`, `kps` [5][2] and `box` [4], `others` [n][7][2] if the image shows more faces, and
    `detailed`, captions that describe the people, if there are some. Without a mask file the mask is the box. Images
    of another size are cropped square around the face and resized to `resolution`, unless that is None. Shards must be
    local files: the constructor reads their headers, and images are then read by random access. Raises ValueError on
    shards without images, or with an image that lacks its JSON.
    """

    def __init__(self, shards: Iterable[Path], resolution: int | None = 128) -> None:
        self.resolution = resolution
        self._people: dict[str, dict[str, dict[str, ShardMember]]] = {}
        files = sorted(shards)
        for shard in files:
            self._index_shard(shard)
        if not self._people:
            raise ValueError(f"got {len(files)} shards without an image; expected <identity>/<n>.jpg and .json in them")
        self._names = sorted(self._people)
        for name in self._names:
            for number, members in self._people[name].items():
                if "json" not in members or not set(IMAGE_SUFFIXES) & set(members):
                    found = ", ".join(sorted(members))
                    raise ValueError(f"got {name}/{number} with {found}; expected an image and its .json; add them")
        self._image_numbers = {name: sorted(people, key=_natural_order) for name, people in self._people.items()}

    def _index_shard(self, shard: Path) -> None:
        with tarfile.open(shard, "r:") as tar:
            for member in tar:
                person, _, file = member.name.rpartition("/")
                number, _, kind = file.partition(".")
                if member.isfile() and person and kind:
                    place = ShardMember(shard, member.offset_data, member.size)
                    self._people.setdefault(person, {}).setdefault(number, {})[kind.lower()] = place

    def __len__(self) -> int:
        return len(self._names)

    def get_name(self, identity: int) -> str:
        return self._names[identity]

    def count_images(self, identity: int) -> int:
        return len(self._image_numbers[self._names[identity]])

    def read_annotation(self, identity: int, index: int) -> dict[str, Any]:
        """The JSON of an image."""
        return json.loads(self._find_members(identity, index)["json"].read_bytes())

    def load_annotated_image(self, identity: int, index: int) -> AnnotatedImage:
        members, annotation = self._find_members(identity, index), self.read_annotation(identity, index)
        kind = next(kind for kind in IMAGE_SUFFIXES if kind in members)
        image = _decode_image(members[kind].read_bytes(), "RGB")
        box = torch.tensor(annotation["box"])
        mask = (
            _decode_image(members[MASK_SUFFIX].read_bytes(), "L") > 127
            if MASK_SUFFIX in members
            else make_box_mask(box, image.shape)
        )
        other_faces = torch.tensor(annotation.get("others", ())).view(-1, 7, 2)
        sample = AnnotatedImage(
            image, annotation["caption"], torch.tensor(annotation["kps"]), box, mask, other_faces,
            annotation.get("detailed", ()),
        )  # fmt: skip
        return sample if self.resolution is None else crop_and_resize(sample, self.resolution)

    def _find_members(self, identity: int, index: int) -> dict[str, ShardMember]:
        name = self._names[identity]
        return self._people[name][self._image_numbers[name][index]]


def _natural_order(number: str) -> tuple[int, str]:
    return (int(number) if number.isdecimal() else -1, number)


def _decode_image(data: bytes, mode: str) -> Tensor:
    return torch.from_numpy(np.array(Image.open(io.BytesIO(data)).convert(mode)))


def write_shards(
    album: Album, folder: Path, images_per_person: int, per_shard: int = 1000, lossless: bool = False
) -> list[Path]:
    """Write `images_per_person` images of everyone in an album, `per_shard` people in each shard, as JPEG or PNG.

    The same album gives the same bytes with the same version of Pillow.
    """
    folder.mkdir(parents=True, exist_ok=True)
    starts = range(0, len(album), per_shard)
    return [
        write_shard(
            album,
            range(start, min(start + per_shard, len(album))),
            folder / f"{number:06d}.tar",
            images_per_person,
            lossless,
        )
        for number, start in enumerate(starts)
    ]


def write_shard(
    album: Album,
    people: range,
    path: Path,
    images_per_person: int,
    lossless: bool = False,
    masks: bool = True,
) -> Path:
    """Write one shard atomically; without `masks` if only the face boxes are known."""
    from webdataset.writer import TarWriter

    kind, options = ("png", {}) if lossless else ("jpeg", {"quality": JPEG_QUALITY, "subsampling": 0})
    part = path.with_suffix(".part")
    with part.open("wb") as file, TarWriter(file, encoder=False, mtime=0) as writer:
        for identity in people:
            for index in range(min(images_per_person, album.count_images(identity))):
                sample = album.load_annotated_image(identity, index)
                annotation = {"caption": sample.caption, "kps": sample.kps.tolist(), "box": sample.box.tolist()}
                annotation |= {"others": sample.other_faces.tolist()} if len(sample.other_faces) else {}
                annotation |= {"detailed": list(sample.detailed_captions)} if sample.detailed_captions else {}
                members = {
                    kind.replace("jpeg", "jpg"): _encode_image(sample.image, kind, options),
                    "json": json.dumps(annotation).encode(),
                }
                if masks:
                    members[MASK_SUFFIX] = _encode_image(sample.mask.to(torch.uint8) * 255, "png", {})
                writer.write({"__key__": f"{album.get_name(identity)}/{index}", **members})
    os.replace(part, path)
    return path


def _encode_image(image: Tensor, kind: str, options: dict[str, int]) -> bytes:
    out = io.BytesIO()
    Image.fromarray(image.numpy()).save(out, kind, **options)
    return out.getvalue()
