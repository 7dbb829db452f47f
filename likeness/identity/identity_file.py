"""Identity files: safetensors with JSON metadata under the key `likeness`. Nothing in a file is executed.

Tensors, one row per face: `embedding/<encoder id>` and `face/box`, `face/kps`, `face/score`, `weight` (float32), and
optionally `face/crop` (uint8). One row in all: `embedding/<encoder id>/zero` (optional) and `joint/<encoder id>`, the
embedding of all faces jointly. Embeddings are float16 or float32. Metadata: `version`, `name`, `date`, `encoders`
(encoder id to the sha256 of its file), `sources` (a description of each photo), and from version 2 on `joint` (like
`encoders`). A file gets the lowest version that can represent the identity.
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

from ..checkpoints import file_kinds
from ..spec import Identity, parse_encoder_id

IDENTITY_FILE_SUFFIX = ".safetensors"
FORMAT_VERSION = 2
MAX_FACES = 1024
MAX_HEADER_BYTES = 4 << 20
MAX_NAME_LENGTH = 120
MAX_TEXT_LENGTH = 1000

# Per tensor: its dtype, and its shape without the face dimension; None is any size of at least 1.
FACE_TENSORS: dict[str, tuple[torch.dtype, tuple[int | None, ...]]] = {
    "face/box": (torch.float32, (4,)),
    "face/kps": (torch.float32, (5, 2)),
    "face/score": (torch.float32, ()),
    "weight": (torch.float32, ()),
    "face/crop": (torch.uint8, (None, None, 3)),
}
EMBEDDING_DTYPES = (torch.float16, torch.float32)
HEADER_DTYPES = ("F16", "F32", "U8")
VERSION_1_FIELDS = {"version": int, "name": str, "date": str, "encoders": dict, "sources": list}
METADATA_FIELDS: dict[int, dict[str, type]] = {1: VERSION_1_FIELDS, 2: {**VERSION_1_FIELDS, "joint": dict}}

INVALID_FILE_HINT = "expected an identity file of this pack; save the identity again, or download the file again"
WINDOWS_DEVICE_NAMES = re.compile(r"(con|prn|aux|nul|(com|lpt)[0-9¹²³]) *(\..*)?", re.IGNORECASE)
ALLOWED_UNICODE_CATEGORIES = ("L", "M", "N")


def check_identity_name(name: str) -> str:
    """Validate the file name of an identity. Returns it in Unicode normalization form C.

    Allowed are letters and digits of any script, spaces, `-`, `_`, `.`, and `/` for a subfolder. Raises ValueError for
    names that could leave the folder or that some file systems do not allow.
    """
    name = unicodedata.normalize("NFC", name)
    reason = _name_error(name)
    if reason:
        raise ValueError(
            f"got the identity name {name[:MAX_NAME_LENGTH]!r}, {reason}; expected letters, digits, spaces, - _ . "
            "and / for a subfolder, as in family/anna; choose another name"
        )
    return name


def _name_error(name: str) -> str:
    """What is wrong with a name, or an empty string."""
    if not name:
        return "which is empty"
    if len(name) > MAX_NAME_LENGTH:
        return f"which is longer than {MAX_NAME_LENGTH} characters"
    invalid = next(
        (c for c in name if unicodedata.category(c)[0] not in ALLOWED_UNICODE_CATEGORIES and c not in " -_./"), None
    )
    if invalid is not None:
        return f"with the character {invalid!r}"
    parts = name.split("/")
    if not all(parts):
        return "with an empty folder or file name"
    rules = (
        (lambda part: part.startswith("."), "with a part that starts with a dot"),
        (lambda part: part != part.strip(), "with a part that starts or ends with a space"),
        (lambda part: part.endswith("."), "with a part that ends with a dot"),
        (WINDOWS_DEVICE_NAMES.fullmatch, "with a part that is a device name on Windows"),
        (lambda part: len(part.encode()) > 240, "with a part that is too long for a file system"),
    )
    return next((reason for is_invalid, reason in rules if any(is_invalid(part) for part in parts)), "")


def save_identity(identity: Identity, path: Path, include_crops: bool = True, date: datetime | None = None) -> None:
    """Write an identity file atomically, creating its folder if needed. Equal identities and dates give equal bytes.

    `date` is now by default. Raises ValueError if the identity is invalid or the file cannot be written.
    """
    date = date or datetime.now(timezone.utc).replace(microsecond=0)
    tensors, metadata = _to_file_contents(identity, include_crops, date)
    _from_file_contents(dict(tensors), metadata, f"the identity {identity.name!r}")
    data = save_tensors(tensors, {"likeness": json.dumps(metadata, ensure_ascii=False)})
    if int.from_bytes(data[:8], "little") > MAX_HEADER_BYTES:
        raise ValueError(f"got {len(identity.sources)} sources, too long for the file's header; shorten them")
    write_file_atomically(data, path)


def write_file_atomically(data: bytes, path: Path) -> None:
    """Write a file via a temporary file and a rename, creating its folder if needed. An old file survives any failure.

    Raises ValueError if the file cannot be written.
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
            f"with {len(data):,} bytes free; free some space and save again; an existing file is unchanged"
        ) from error


def _to_file_contents(
    identity: Identity, include_crops: bool, date: datetime
) -> tuple[dict[str, Tensor], dict[str, Any]]:
    tensors = {f"embedding/{key}": value for key, value in identity.embeddings.items()}
    tensors |= {f"embedding/{key}/zero": value for key, value in identity.zero_embeddings.items()}
    tensors |= {f"joint/{key}": value for key, value in identity.joint_embeddings.items()}
    floats = {"face/box": identity.box, "face/kps": identity.kps, "face/score": identity.score}
    tensors |= {key: value.float() for key, value in (floats | {"weight": identity.weight}).items()}
    if include_crops and identity.crop is not None:
        tensors["face/crop"] = identity.crop
    metadata = {
        "version": 2 if identity.joint_embeddings else 1,
        "name": identity.name,
        "date": date.isoformat(),
        "encoders": {key: identity.hashes.get(key, "") for key in identity.embeddings},
        "sources": list(identity.sources),
    }
    if identity.joint_embeddings:
        metadata["joint"] = {key: identity.hashes.get(key, "") for key in identity.joint_embeddings}
    # safetensors refuses tensors that share storage, such as expanded rows.
    contiguous = torch.contiguous_format
    return {key: value.detach().cpu().clone(memory_format=contiguous) for key, value in tensors.items()}, metadata


def load_identity(path: Path) -> Identity:
    """Read an identity file. Raises ValueError unless it is complete, valid and of a known version."""
    try:
        with path.open("rb") as file:
            metadata = _read_metadata(file.read(8), file, path)
            file.seek(0)
            data = file.read()
    except OSError as error:
        raise ValueError(f"could not read {path.name}: {error.strerror or error}; expected a readable file") from error
    try:
        tensors = load_tensors(data)
    except Exception as error:
        raise ValueError(
            f"got {path.name}, which is damaged or truncated ({str(error)[:120]}); {INVALID_FILE_HINT}"
        ) from error
    return _from_file_contents(tensors, metadata, path.name)


def _read_metadata(length_bytes: bytes, file: BinaryIO, path: Path) -> Any:
    """Read the pack's metadata before any tensor, so that a huge file of another kind is rejected at once."""
    size = int.from_bytes(length_bytes, "little")
    if len(length_bytes) < 8:
        raise ValueError(f"got {path.name}, which is empty or truncated; {INVALID_FILE_HINT}")
    if not 2 <= size <= min(MAX_HEADER_BYTES, path.stat().st_size - 8):
        problem = "a web page" if length_bytes.lstrip().startswith(b"<") else "not a complete safetensors file"
        raise ValueError(f"got {path.name}, {problem}; {INVALID_FILE_HINT}")
    header = _parse_json(file.read(size).decode("utf-8", "replace"), path.name)
    entries = dict(header) if isinstance(header, dict) else {}
    file_metadata = entries.pop("__metadata__", None)
    text = file_metadata.get("likeness") if isinstance(file_metadata, dict) else None
    metadata = _parse_json(text, path.name) if isinstance(text, str) else None
    file_kinds.check_file_kind(
        path.name, entries, metadata if isinstance(metadata, dict) else None, file_kinds.IDENTITY
    )
    if not all(isinstance(entry, dict) and entry.get("dtype") in HEADER_DTYPES for entry in entries.values()):
        raise ValueError(f"got {path.name}, with tensors other than {', '.join(HEADER_DTYPES)}; {INVALID_FILE_HINT}")
    if metadata is None:
        raise ValueError(
            f"got {path.name}, a safetensors file without the metadata of an identity; {INVALID_FILE_HINT}"
        )
    return metadata


def _parse_json(text: str, source: str) -> Any:
    try:
        return json.loads(text)
    except (ValueError, RecursionError) as error:
        raise ValueError(f"got {source}, whose header is damaged ({str(error)[:80]}); {INVALID_FILE_HINT}") from error


def _from_file_contents(tensors: dict[str, Tensor], metadata: Any, source: str) -> Identity:
    """Validate the metadata and tensors and build the identity. Empties `tensors`; a leftover one is an error."""
    _check_metadata(metadata, source)
    n = tensors["face/box"].shape[0] if "face/box" in tensors and tensors["face/box"].ndim else 0
    if not 1 <= n <= MAX_FACES:
        raise ValueError(f"got {source}, with {n} faces; expected 1 to {MAX_FACES}; {INVALID_FILE_HINT}")
    if len(metadata["sources"]) not in (0, n):
        raise ValueError(f"got {source}, with {len(metadata['sources'])} sources for {n} faces; {INVALID_FILE_HINT}")
    faces = {}
    for key, (dtype, shape) in FACE_TENSORS.items():
        if key in tensors or key != "face/crop":
            faces[key] = _take_tensor(tensors, key, (dtype,), (n, *shape), source)
    if bool((faces["weight"] < 0).any()):
        raise ValueError(f"got {source}, with a negative weight; expected 0 or more; {INVALID_FILE_HINT}")
    embeddings, zero_embeddings = {}, {}
    for key in metadata["encoders"]:
        ndim = tensors[f"embedding/{key}"].ndim if f"embedding/{key}" in tensors else 2
        rows = _take_tensor(
            tensors, f"embedding/{key}", EMBEDDING_DTYPES, (n, *[None] * min(max(ndim - 1, 1), 3)), source
        )
        embeddings[key] = rows
        if f"embedding/{key}/zero" in tensors:
            zero_shape = (1, *rows.shape[1:])
            zero_embeddings[key] = _take_tensor(tensors, f"embedding/{key}/zero", EMBEDDING_DTYPES, zero_shape, source)
    joint_hashes = metadata.get("joint", {})
    joint_embeddings = {
        key: _take_tensor(tensors, f"joint/{key}", EMBEDDING_DTYPES, (1, None, None), source) for key in joint_hashes
    }
    if tensors:
        raise ValueError(f"got {source}, with the unknown tensor {next(iter(tensors))[:80]!r}; {INVALID_FILE_HINT}")
    return Identity(
        name=metadata["name"],
        box=faces["face/box"],
        kps=faces["face/kps"],
        score=faces["face/score"],
        weight=faces["weight"],
        crop=faces.get("face/crop"),
        embeddings=embeddings,
        zero_embeddings=zero_embeddings,
        sources=tuple(metadata["sources"]),
        hashes=metadata["encoders"] | joint_hashes,
        joint_embeddings=joint_embeddings,
    )


def _take_tensor(
    tensors: dict[str, Tensor], key: str, dtypes: tuple[torch.dtype, ...], shape: tuple[int | None, ...], source: str
) -> Tensor:
    """Pop a tensor and check its dtype, its shape (None: any size of at least 1) and that it is finite."""
    if key not in tensors:
        raise ValueError(f"got {source}, without the tensor {key}; {INVALID_FILE_HINT}")
    tensor = tensors.pop(key)
    sizes = tuple(tensor.shape)
    matches = len(sizes) == len(shape) and all(
        size >= 1 if expected is None else size == expected for size, expected in zip(sizes, shape, strict=True)
    )
    if not matches or tensor.dtype not in dtypes:
        got = f"{list(sizes)} {str(tensor.dtype).removeprefix('torch.')}"
        expected_sizes = ", ".join("any" if expected is None else str(expected) for expected in shape)
        expected_dtypes = " or ".join(str(dtype).removeprefix("torch.") for dtype in dtypes)
        raise ValueError(
            f"got {source}, whose tensor {key} is {got}; expected [{expected_sizes}] {expected_dtypes}; "
            f"{INVALID_FILE_HINT}"
        )
    if tensor.is_floating_point() and not bool(tensor.isfinite().all()):
        raise ValueError(
            f"got {source}, whose tensor {key} has NaN or infinite values; expected finite ones; {INVALID_FILE_HINT}"
        )
    return tensor


def _check_metadata(metadata: Any, source: str) -> None:
    """Raise ValueError unless the metadata is of a known version, complete and valid."""
    version = metadata.get("version") if isinstance(metadata, dict) else None
    if isinstance(version, bool) or not isinstance(version, int) or version < 1:
        raise ValueError(f"got {source}, without a version number; {INVALID_FILE_HINT}")
    if version > FORMAT_VERSION:
        raise ValueError(
            f"got {source}, an identity of version {version}; this pack reads up to version {FORMAT_VERSION}; "
            "update the pack"
        )
    fields = METADATA_FIELDS[version]
    if metadata.keys() != fields.keys() or not all(isinstance(metadata[key], kind) for key, kind in fields.items()):
        raise ValueError(f"got {source}, whose metadata is not {', '.join(fields)}; {INVALID_FILE_HINT}")
    try:
        datetime.fromisoformat(metadata["date"])
    except ValueError as error:
        raise ValueError(
            f"got {source}, with the date {metadata['date'][:40]!r}; expected an ISO date; {INVALID_FILE_HINT}"
        ) from error
    texts = (metadata["name"], *metadata["sources"])
    if not all(isinstance(text, str) and len(text) <= MAX_TEXT_LENGTH and text.isprintable() for text in texts):
        raise ValueError(
            f"got {source}, whose name or a source is not one line of up to {MAX_TEXT_LENGTH} printable characters; "
            f"{INVALID_FILE_HINT}"
        )
    for key, sha256 in (*metadata["encoders"].items(), *metadata.get("joint", {}).items()):
        hash8 = parse_encoder_id(key)[1]
        is_valid = isinstance(sha256, str) and re.fullmatch("[0-9a-f]{64}", sha256) and sha256.startswith(hash8)
        if not is_valid:
            raise ValueError(
                f"got {source}, whose encoder {key} lacks the sha256 of its file, 64 hex digits; {INVALID_FILE_HINT}"
            )
