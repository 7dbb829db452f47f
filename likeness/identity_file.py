"""Identities as files: safetensors with JSON metadata under the key `likeness`. Nothing in a file is executed.

Tensors, one row per face: `embedding/<encoder id>` and `embedding/<encoder id>/zero` (float16 or float32; the zero may
be absent), `face/box`, `face/kps`, `face/score` and `weight` (float32), `face/crop` (uint8, may be absent); of all the
faces together `joint/<encoder id>` (float16 or float32). Metadata: `version`, `name`, `date`, `encoders` (encoder id to
the sha256 of its file), `sources` (what each photo was), from version 2 on `joint` (as `encoders`). A file is of the
first version that can hold what is in it.
"""

from __future__ import annotations

import json
import os
import re
import secrets
import unicodedata
from datetime import datetime, timezone
from pathlib import Path
from typing import Any, BinaryIO

import torch
from safetensors.torch import load as load_tensors
from safetensors.torch import save as save_tensors
from torch import Tensor

from .spec import Identity, parse_encoder_id

SUFFIX = ".safetensors"
VERSION = 2
FACES_MAX = 1024
HEADER_MAX = 4 << 20
NAME_MAX = 120
TEXT_MAX = 1000

# Per tensor: the dtypes it may have, and its shape after the rows; None is any size of at least 1.
FACE_TENSORS: dict[str, tuple[torch.dtype, tuple[int | None, ...]]] = {
    "face/box": (torch.float32, (4,)),
    "face/kps": (torch.float32, (5, 2)),
    "face/score": (torch.float32, ()),
    "weight": (torch.float32, ()),
    "face/crop": (torch.uint8, (None, None, 3)),
}
EMBEDDING_DTYPES = (torch.float16, torch.float32)
HEADER_DTYPES = ("F16", "F32", "U8")
FIELDS_1 = {"version": int, "name": str, "date": str, "encoders": dict, "sources": list}
FIELDS: dict[int, dict[str, type]] = {1: FIELDS_1, 2: {**FIELDS_1, "joint": dict}}

AGAIN = "expected an identity file of this pack; save the identity again, or fetch the file again"
WINDOWS_NAMES = re.compile(r"(con|prn|aux|nul|(com|lpt)[0-9¹²³]) *(\..*)?", re.IGNORECASE)
LETTERS = ("L", "M", "N")


def check_name(name: str) -> str:
    """The name under which an identity may be saved, in Unicode's composed form (NFC).

    Letters and digits of any script, blanks, `-`, `_`, `.`; `/` for a subfolder. Raises ValueError on anything that
    could leave the folder or that some file system refuses.
    """
    name = unicodedata.normalize("NFC", name)
    reason = _objection(name)
    if reason:
        raise ValueError(
            f"got the identity name {name[:NAME_MAX]!r}, {reason}; expected letters, digits, blanks, - _ . and / for a "
            "subfolder, as family/anna; choose another name"
        )
    return name


def _objection(name: str) -> str:
    """What is wrong with a name; empty where nothing is."""
    if not name:
        return "which is empty"
    if len(name) > NAME_MAX:
        return f"which is longer than {NAME_MAX} characters"
    wrong = next((c for c in name if unicodedata.category(c)[0] not in LETTERS and c not in " -_./"), None)
    if wrong is not None:
        return f"with the character {wrong!r}"
    parts = name.split("/")
    if not all(parts):
        return "with an empty folder or file name"
    rules = (
        (lambda part: part.startswith("."), "a part of which starts with a dot"),
        (lambda part: part != part.strip(), "a part of which starts or ends with a blank"),
        (lambda part: part.endswith("."), "a part of which ends with a dot"),
        (WINDOWS_NAMES.fullmatch, "a part of which is a device on Windows"),
        (lambda part: len(part.encode()) > 240, "a part of which is too long for a file system"),
    )
    return next((reason for broken, reason in rules if any(broken(part) for part in parts)), "")


def save(identity: Identity, path: Path, include_crops: bool = True, date: datetime | None = None) -> None:
    """Write an identity; its folder is made where it is missing. Equal identities of one date give equal bytes.

    A file that was there is replaced in one step once the new one is on the disk, and survives every failure. `date`
    is now, unless given. Raises ValueError where the identity is not valid or the file cannot be written.
    """
    date = date or datetime.now(timezone.utc).replace(microsecond=0)
    tensors, told = _pack(identity, include_crops, date)
    _unpack(dict(tensors), told, f"the identity {identity.name!r}")
    data = save_tensors(tensors, {"likeness": json.dumps(told, ensure_ascii=False)})
    if int.from_bytes(data[:8], "little") > HEADER_MAX:
        raise ValueError(f"got {len(identity.sources)} sources too long for the file's header; shorten them")
    write(data, path)


def write(data: bytes, path: Path) -> None:
    """Write a file whole or not at all; its folder is made where it is missing. Raises ValueError where it cannot be.

    A file that was there is replaced in one step once the new one is on the disk.
    """
    temporary = path.parent / f".likeness-{secrets.token_hex(8)}.tmp"
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        try:
            with temporary.open("xb") as file:
                file.write(data)
                file.flush()
                os.fsync(file.fileno())
            os.replace(temporary, path)
        finally:
            temporary.unlink(missing_ok=True)
    except OSError as error:
        raise ValueError(
            f"could not save {path.name} into {path.parent}: {error.strerror or error}; expected a writable folder "
            f"with {len(data):,} bytes free; make room and save again; a file that was there is unchanged"
        ) from error


def _pack(identity: Identity, include_crops: bool, date: datetime) -> tuple[dict[str, Tensor], dict[str, Any]]:
    tensors = {f"embedding/{key}": value for key, value in identity.embeddings.items()}
    tensors |= {f"embedding/{key}/zero": value for key, value in identity.zeros.items()}
    tensors |= {f"joint/{key}": value for key, value in identity.joint.items()}
    floats = {"face/box": identity.box, "face/kps": identity.kps, "face/score": identity.score}
    tensors |= {key: value.float() for key, value in (floats | {"weight": identity.weight}).items()}
    if include_crops and identity.crop is not None:
        tensors["face/crop"] = identity.crop
    told = {
        "version": 2 if identity.joint else 1,
        "name": identity.name,
        "date": date.isoformat(),
        "encoders": {key: identity.hashes.get(key, "") for key in identity.embeddings},
        "sources": list(identity.sources),
    }
    if identity.joint:
        told["joint"] = {key: identity.hashes.get(key, "") for key in identity.joint}
    # Views of one storage, such as expanded rows, cannot be written as they are.
    whole = torch.contiguous_format
    return {key: value.detach().cpu().clone(memory_format=whole) for key, value in tensors.items()}, told


def load(path: Path) -> Identity:
    """Read an identity. Raises ValueError on whatever is not a whole, valid identity file of a known version."""
    try:
        with path.open("rb") as file:
            told = _metadata(file.read(8), file, path)
            file.seek(0)
            data = file.read()
    except OSError as error:
        raise ValueError(f"could not read {path.name}: {error.strerror or error}; expected a readable file") from error
    try:
        tensors = load_tensors(data)
    except Exception as error:
        raise ValueError(f"got {path.name}, which is damaged or cut short ({str(error)[:120]}); {AGAIN}") from error
    return _unpack(tensors, told, path.name)


def _metadata(start: bytes, file: BinaryIO, path: Path) -> Any:
    """The pack's own metadata, read before anything else, so that a huge foreign file costs nothing."""
    size = int.from_bytes(start, "little")
    if len(start) < 8:
        raise ValueError(f"got {path.name}, which is empty or cut short; {AGAIN}")
    if not 2 <= size <= min(HEADER_MAX, path.stat().st_size - 8):
        what = "a web page" if start.lstrip().startswith(b"<") else "not a whole safetensors file"
        raise ValueError(f"got {path.name}, {what}; {AGAIN}")
    header = _json(file.read(size).decode("utf-8", "replace"), path.name)
    groups = [value for key, value in header.items() if key != "__metadata__"] if isinstance(header, dict) else []
    if not all(isinstance(group, dict) and group.get("dtype") in HEADER_DTYPES for group in groups):
        raise ValueError(f"got {path.name}, with tensors other than {', '.join(HEADER_DTYPES)}; {AGAIN}")
    metadata = header.get("__metadata__") if isinstance(header, dict) else None
    text = metadata.get("likeness") if isinstance(metadata, dict) else None
    if not isinstance(text, str):
        raise ValueError(f"got {path.name}, a safetensors file without the metadata of an identity; {AGAIN}")
    return _json(text, path.name)


def _json(text: str, where: str) -> Any:
    try:
        return json.loads(text)
    except (ValueError, RecursionError) as error:
        raise ValueError(f"got {where}, whose header is damaged ({str(error)[:80]}); {AGAIN}") from error


def _unpack(tensors: dict[str, Tensor], told: Any, where: str) -> Identity:
    """Check everything and build the identity; takes its tensors out of `tensors`, and nothing may be left."""
    _check_told(told, where)
    n = tensors["face/box"].shape[0] if "face/box" in tensors and tensors["face/box"].ndim else 0
    if not 1 <= n <= FACES_MAX:
        raise ValueError(f"got {where}, with {n} faces; expected 1 to {FACES_MAX}; {AGAIN}")
    if len(told["sources"]) not in (0, n):
        raise ValueError(f"got {where}, with {len(told['sources'])} sources for {n} faces; {AGAIN}")
    faces = {}
    for key, (dtype, shape) in FACE_TENSORS.items():
        if key in tensors or key != "face/crop":
            faces[key] = _take(tensors, key, (dtype,), (n, *shape), where)
    if bool((faces["weight"] < 0).any()):
        raise ValueError(f"got {where}, with a negative weight; expected 0 or more; {AGAIN}")
    embeddings, zeros = {}, {}
    for key in told["encoders"]:
        ndim = tensors[f"embedding/{key}"].ndim if f"embedding/{key}" in tensors else 2
        rows = _take(tensors, f"embedding/{key}", EMBEDDING_DTYPES, (n, *[None] * min(max(ndim - 1, 1), 3)), where)
        embeddings[key] = rows
        if f"embedding/{key}/zero" in tensors:
            zeros[key] = _take(tensors, f"embedding/{key}/zero", EMBEDDING_DTYPES, (1, *rows.shape[1:]), where)
    together = told.get("joint", {})
    joint = {key: _take(tensors, f"joint/{key}", EMBEDDING_DTYPES, (1, None, None), where) for key in together}
    if tensors:
        raise ValueError(f"got {where}, with the unknown tensor {next(iter(tensors))[:80]!r}; {AGAIN}")
    return Identity(
        name=told["name"],
        box=faces["face/box"],
        kps=faces["face/kps"],
        score=faces["face/score"],
        weight=faces["weight"],
        crop=faces.get("face/crop"),
        embeddings=embeddings,
        zeros=zeros,
        sources=tuple(told["sources"]),
        hashes=told["encoders"] | together,
        joint=joint,
    )


def _take(
    tensors: dict[str, Tensor], key: str, dtypes: tuple[torch.dtype, ...], shape: tuple[int | None, ...], where: str
) -> Tensor:
    """Take a tensor out of `tensors`, of one of `dtypes`, of `shape` (None: any size of at least 1), all finite."""
    if key not in tensors:
        raise ValueError(f"got {where}, without the tensor {key}; {AGAIN}")
    tensor = tensors.pop(key)
    sizes = tuple(tensor.shape)
    fits = len(sizes) == len(shape) and all(
        size >= 1 if want is None else size == want for size, want in zip(sizes, shape, strict=True)
    )
    if not fits or tensor.dtype not in dtypes:
        wanted = ", ".join("any" if want is None else str(want) for want in shape)
        kinds = " or ".join(str(dtype).removeprefix("torch.") for dtype in dtypes)
        got = f"{list(sizes)} {str(tensor.dtype).removeprefix('torch.')}"
        raise ValueError(f"got {where}, whose tensor {key} is {got}; expected [{wanted}] {kinds}; {AGAIN}")
    if tensor.is_floating_point() and not bool(tensor.isfinite().all()):
        raise ValueError(f"got {where}, whose tensor {key} holds NaN or infinity; expected finite numbers; {AGAIN}")
    return tensor


def _check_told(told: Any, where: str) -> None:
    """Raise ValueError unless the metadata is that of a version this pack knows, complete and sound."""
    version = told.get("version") if isinstance(told, dict) else None
    if isinstance(version, bool) or not isinstance(version, int) or version < 1:
        raise ValueError(f"got {where}, without a version number; {AGAIN}")
    if version > VERSION:
        raise ValueError(
            f"got {where}, an identity of version {version}; this pack reads up to version {VERSION}; update the pack"
        )
    fields = FIELDS[version]
    if told.keys() != fields.keys() or not all(isinstance(told[key], kind) for key, kind in fields.items()):
        raise ValueError(f"got {where}, whose metadata is not {', '.join(fields)}; {AGAIN}")
    try:
        datetime.fromisoformat(told["date"])
    except ValueError as error:
        raise ValueError(f"got {where}, with the date {told['date'][:40]!r}; expected an ISO date; {AGAIN}") from error
    texts = (told["name"], *told["sources"])
    if not all(isinstance(text, str) and len(text) <= TEXT_MAX and text.isprintable() for text in texts):
        raise ValueError(
            f"got {where}, whose name or a source is not one line of up to {TEXT_MAX} printable characters; {AGAIN}"
        )
    for key, sha256 in (*told["encoders"].items(), *told.get("joint", {}).items()):
        hash8 = parse_encoder_id(key)[1]
        whole = isinstance(sha256, str) and re.fullmatch("[0-9a-f]{64}", sha256) and sha256.startswith(hash8)
        if not whole:
            raise ValueError(f"got {where}, whose encoder {key} lacks the sha256 of its file, 64 hex digits; {AGAIN}")
