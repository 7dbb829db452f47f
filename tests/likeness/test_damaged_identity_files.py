"""Damaged identity files are rejected, or load as valid identities."""

from __future__ import annotations

import json
import random
from collections.abc import Callable
from pathlib import Path

from comfyui_likeness.likeness.identity import identity_file
from support.identity_files import (
    DATE,
    are_identical,
    join_header,
    make_full_identity,
    make_jointly_encoded_identity,
    split_header,
)

NUM_MUTATIONS = 1500


def _flip(data: bytes, rng: random.Random) -> bytes:
    changed = bytearray(data)
    for _ in range(rng.choice((1, 1, 1, 2, 8, 64))):
        changed[rng.randrange(len(data))] ^= 1 << rng.randrange(8)
    return bytes(changed)


def _flip_header(data: bytes, rng: random.Random) -> bytes:
    size = 8 + int.from_bytes(data[:8], "little")
    return _flip(data[:size], rng) + data[size:]


def _cut(data: bytes, rng: random.Random) -> bytes:
    return data[: rng.randrange(len(data))]


def _append(data: bytes, rng: random.Random) -> bytes:
    return data + rng.randbytes(rng.randrange(1, 50))


def _splice(data: bytes, rng: random.Random) -> bytes:
    start, length = rng.randrange(len(data)), rng.randrange(1, 60)
    return data[:start] + rng.choice((b"", rng.randbytes(length))) + data[start + length :]


def _edit(data: bytes, rng: random.Random) -> bytes:
    """Change a dtype, a shape, an offset or a name in the split_header, which stays valid JSON."""
    head, rest = split_header(data)
    name = rng.choice([key for key in head if key != "__metadata__"])
    field = rng.choice(("dtype", "shape", "data_offsets", "name"))
    numbers = (-1, 0, 1, 2, 7, 2**31, 2**63, 2**64, 10**400, 1.5, None, "2", [])
    if field == "name":
        head[rng.choice(("", "face/box", "embedding/x", "embedding/" + "a" * 5000, "x"))] = head.pop(name)
    elif field == "dtype":
        head[name]["dtype"] = rng.choice(("F64", "F16", "F32", "U8", "I64", "F8_E8M0", "BOOL", "C64", "", None, 3))
    else:
        head[name][field] = [rng.choice((old, *numbers)) for old in head[name][field]][: rng.choice((1, 9, 9))]
    return join_header(json.dumps(head).encode(), rest)


MUTATORS: tuple[Callable[[bytes, random.Random], bytes], ...] = (_flip, _flip_header, _cut, _append, _splice, _edit)


def test_damaged_files_are_rejected_or_valid(tmp_path: Path) -> None:
    source, path = tmp_path / "source.safetensors", tmp_path / "damaged.safetensors"
    refused = 0
    for number in range(NUM_MUTATIONS):
        rng = random.Random(number)
        make = (make_full_identity, make_jointly_encoded_identity)[number // 6 % 2]
        identity_file.save_identity(make(1 + number % 2, bool(number % 3)), source, date=DATE)
        path.write_bytes(MUTATORS[number % len(MUTATORS)](source.read_bytes(), rng))
        try:
            loaded = identity_file.load_identity(path)
        except ValueError as error:
            refused += 1
            assert len(str(error)) < 2500
            continue
        # The result is a valid identity, with an exact round trip.
        identity_file.save_identity(loaded, path)
        assert are_identical(identity_file.load_identity(path), loaded)
    assert 0.6 * NUM_MUTATIONS < refused < NUM_MUTATIONS
