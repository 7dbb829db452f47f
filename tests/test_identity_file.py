"""Identity files: exact round trips, names, failures while saving, and files that are not what they should be."""

from __future__ import annotations

import json
import os
import random
import subprocess
import sys
from collections.abc import Callable
from dataclasses import replace
from datetime import datetime, timezone
from pathlib import Path
from typing import Any

import pytest
import torch
from comfyui_likeness.likeness import identity_file
from comfyui_likeness.likeness.spec import Feature, Identity
from identities import HASH, identity
from safetensors.torch import load, save, save_file

MUTATIONS = 1500
DATE = datetime(2030, 1, 2, 3, 4, 5, tzinfo=timezone.utc)
ARC = Feature("arcface.buffalo_l", "raw", "face112")
GRID = Feature("clip.vit-h-14", "penultimate", "head")
OMNI = Feature("omni_id", "tokens", "face224")
FIELDS = ("box", "kps", "score", "weight")


def person(faces: int = 2, crops: bool = True) -> Identity:
    one = identity((ARC, GRID), ((8,), (3, 4)), faces)
    key = GRID.id(HASH)
    half = dict(one.embeddings) | {key: one.embeddings[key].half()}
    zeros = {key: one.zeros[key].half().expand(1, 3, 4)}
    crop = torch.randint(0, 256, (faces, 5, 4, 3), dtype=torch.uint8, generator=torch.Generator().manual_seed(1))
    return replace(one, name="Zoë Müller", embeddings=half, zeros=zeros, crop=crop if crops else None)


def together(faces: int = 2, crops: bool = True) -> Identity:
    """The same with what an encoder made of all faces together."""
    one = person(faces, crops)
    tokens = torch.randn(1, 6, 4, generator=torch.Generator().manual_seed(2)).half()
    return replace(one, joint={OMNI.id(HASH): tokens}, hashes=dict(one.hashes) | {OMNI.id(HASH): HASH})


def same(a: Identity, b: Identity) -> bool:
    """Equal to the last bit, dtypes included."""
    pairs = [(getattr(a, name), getattr(b, name)) for name in FIELDS]
    pairs += [(a.crop, b.crop)] if a.crop is not None and b.crop is not None else []
    for x, y in ((a.embeddings, b.embeddings), (a.zeros, b.zeros), (a.joint, b.joint)):
        if list(x) != list(y):
            return False
        pairs += [(x[key], y[key]) for key in x]
    told = [(who.name, who.sources, dict(who.hashes), who.crop is None) for who in (a, b)]
    return told[0] == told[1] and all(x.dtype == y.dtype and torch.equal(x, y) for x, y in pairs)


def header(data: bytes) -> tuple[dict[str, Any], bytes]:
    size = int.from_bytes(data[:8], "little")
    return json.loads(data[8 : 8 + size]), data[8 + size :]


def joined(head: bytes, rest: bytes) -> bytes:
    return len(head).to_bytes(8, "little") + head + rest


@pytest.fixture
def path(tmp_path: Path) -> Path:
    return tmp_path / "anna.safetensors"


@pytest.mark.parametrize("make", [person, together])
@pytest.mark.parametrize("crops", [True, False])
@pytest.mark.parametrize("faces", [1, 3])
def test_round_trip_is_exact(path: Path, make: Callable[..., Identity], crops: bool, faces: int) -> None:
    who = make(faces, crops)
    identity_file.save(who, path)
    assert same(identity_file.load(path), who)
    identity_file.save(who, path, include_crops=False)
    assert same(identity_file.load(path), replace(who, crop=None))
    assert os.listdir(path.parent) == [path.name]


def test_what_is_not_contiguous_or_shared_is_saved_too(path: Path) -> None:
    who = person(3)
    rows = torch.randn(8, 3).T
    who = replace(who, embeddings={ARC.id(HASH): rows}, zeros={ARC.id(HASH): rows[:1]}, hashes={ARC.id(HASH): HASH})
    who = replace(who, weight=torch.ones(1).expand(3), sources=())
    identity_file.save(who, path)
    assert same(identity_file.load(path), who)


def test_equal_identities_of_one_date_give_equal_bytes(path: Path) -> None:
    identity_file.save(person(), path, date=DATE)
    first = path.read_bytes()
    identity_file.save(person(), path, date=DATE)
    assert path.read_bytes() == first
    identity_file.save(person(), path)
    told = json.loads(header(path.read_bytes())[0]["__metadata__"]["likeness"])
    assert list(told) == ["version", "name", "date", "encoders", "sources"]
    assert told["encoders"] == {ARC.id(HASH): HASH, GRID.id(HASH): HASH} and told["name"] == "Zoë Müller"
    assert told["version"] == 1
    assert abs((datetime.now(timezone.utc) - datetime.fromisoformat(told["date"])).total_seconds()) < 600


def test_the_layout_of_the_file(path: Path) -> None:
    identity_file.save(person(), path)
    shapes = {key: tuple(value.shape) for key, value in load(path.read_bytes()).items()}
    assert shapes == {
        f"embedding/{ARC.id(HASH)}": (2, 8),
        f"embedding/{GRID.id(HASH)}": (2, 3, 4),
        f"embedding/{GRID.id(HASH)}/zero": (1, 3, 4),
        "face/box": (2, 4),
        "face/kps": (2, 5, 2),
        "face/score": (2,),
        "face/crop": (2, 5, 4, 3),
        "weight": (2,),
    }


def test_what_was_made_of_all_faces_together_makes_a_file_of_version_2(path: Path) -> None:
    identity_file.save(together(), path)
    head, _ = header(path.read_bytes())
    told = json.loads(head["__metadata__"]["likeness"])
    assert list(told) == ["version", "name", "date", "encoders", "sources", "joint"] and told["version"] == 2
    assert told["joint"] == {OMNI.id(HASH): HASH} and OMNI.id(HASH) not in told["encoders"]
    assert head[f"joint/{OMNI.id(HASH)}"]["shape"] == [1, 6, 4]
    alone = replace(together(), embeddings={}, zeros={}, hashes={OMNI.id(HASH): HASH})
    identity_file.save(alone, path, include_crops=False)
    assert same(identity_file.load(path), replace(alone, crop=None))


def test_a_loaded_identity_does_not_hold_its_file(path: Path) -> None:
    identity_file.save(person(), path)
    loaded = identity_file.load(path)
    path.write_bytes(b"")
    assert same(loaded, person())


@pytest.mark.parametrize(
    "changes",
    [
        {"box": torch.zeros(3, 4)},
        {"kps": torch.zeros(2, 4, 2)},
        {"weight": torch.tensor([1.0, -1.0])},
        {"score": torch.tensor([0.5, float("nan")])},
        {"crop": torch.zeros(2, 4, 4, 4, dtype=torch.uint8)},
        {"crop": torch.zeros(2, 4, 4, 3)},
        {"embeddings": {ARC.id(HASH): torch.zeros(1, 8)}},
        {"embeddings": {ARC.id(HASH): torch.zeros(2, 8, dtype=torch.float64)}},
        {"embeddings": {ARC.id(HASH): torch.full((2, 8), float("inf"))}},
        {"embeddings": {ARC.id(HASH): torch.zeros(2)}},
        {"embeddings": {"my encoder": torch.zeros(2, 8)}},
        {"zeros": {GRID.id(HASH): torch.zeros(1, 3, 5)}},
        {"zeros": {GRID.id("f" * 64): torch.zeros(1, 3, 5)}},
        {"joint": {OMNI.id(HASH): torch.zeros(2, 6, 4)}},
        {"joint": {OMNI.id(HASH): torch.zeros(1, 6)}},
        {"joint": {OMNI.id(HASH): torch.zeros(1, 6, 4, dtype=torch.float64)}},
        {"joint": {OMNI.id(HASH): torch.full((1, 6, 4), float("nan"))}},
        {"joint": {OMNI.id("f" * 64): torch.zeros(1, 6, 4)}},
        {"joint": {"omni": torch.zeros(1, 6, 4)}},
        {"hashes": {}},
        {"hashes": {ARC.id(HASH): HASH, GRID.id(HASH): "f" * 64}},
        {"sources": ("one", "two", "three")},
        {"sources": ("one", "two\n")},
        {"name": "a\0b"},
    ],
    ids=lambda changes: next(iter(changes)),
)
def test_what_could_not_be_read_is_not_written(path: Path, changes: dict[str, Any]) -> None:
    identity_file.save(person(), path, date=DATE)
    before = path.read_bytes()
    with pytest.raises(ValueError):
        identity_file.save(replace(together(), **changes), path)
    assert path.read_bytes() == before and os.listdir(path.parent) == [path.name]


FULL_DISK = """
import resource, sys
from pathlib import Path
sys.path.insert(0, {tests!r})
import conftest
from comfyui_likeness.likeness import identity_file
from test_identity_file import person
resource.setrlimit(resource.RLIMIT_FSIZE, (700, 700))
identity_file.save(person(), Path({path!r}))
"""


@pytest.mark.skipif(sys.platform == "win32", reason="Windows has no limit on a file's size")
def test_the_old_file_survives_a_full_disk(path: Path) -> None:
    identity_file.save(person(1), path, date=DATE)
    before = path.read_bytes()
    script = FULL_DISK.format(tests=str(Path(__file__).parent), path=str(path))
    done = subprocess.run([sys.executable, "-B", "-c", script], capture_output=True, text=True)
    assert "ValueError: could not save anna.safetensors into" in done.stderr and "bytes free" in done.stderr
    assert path.read_bytes() == before and os.listdir(path.parent) == [path.name]
    assert same(identity_file.load(path), person(1))


def test_other_failures_while_saving_leave_no_trace(path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def stop(*_: object) -> None:
        raise KeyboardInterrupt

    identity_file.save(person(), path)
    before = path.read_bytes()
    with monkeypatch.context() as patch:
        patch.setattr(os, "replace", stop)
        with pytest.raises(KeyboardInterrupt):
            identity_file.save(person(1), path)
    assert path.read_bytes() == before and os.listdir(path.parent) == [path.name]
    with pytest.raises(ValueError, match="could not save"):
        identity_file.save(person(), path / "below a file.safetensors")
    folder = path.parent / "taken.safetensors"
    folder.mkdir()
    with pytest.raises(ValueError, match="could not save"):
        identity_file.save(person(), folder)
    assert sorted(os.listdir(path.parent)) == [path.name, folder.name]


def test_what_is_no_identity_is_named(path: Path) -> None:
    cases: list[tuple[bytes, str]] = [
        (b"", "empty"),
        (b"abc", "empty or cut short"),
        (b"<!DOCTYPE html><html>" + b" " * 900, "a web page"),
        (b"version https://git-lfs.github.com/spec/v1\n", "not a whole safetensors file"),
        (b"\x80\x02}q\x00.", "cut short"),
        (save({"a": torch.zeros(2)}), "without the metadata"),
        (save({"a": torch.zeros(2)}, {"format": "pt"}), "without the metadata"),
        (save({"a": torch.zeros(2, dtype=torch.bfloat16)}), "other than F16"),
        (joined(b'{"__metadata__":{"likeness":"' + b"[" * 100_000 + b'"}}', b""), "damaged"),
        (joined(b"[" * 100_000, b""), "damaged"),
        (joined(b"[]", b""), "without the metadata"),
        (joined(b"\xff" * 40, b""), "damaged"),
        ((2**63).to_bytes(8, "little") + b"{}", "not a whole"),
        ((identity_file.HEADER_MAX + 1).to_bytes(8, "little") + b" " * (identity_file.HEADER_MAX + 9), "not a whole"),
    ]
    for data, message in cases:
        path.write_bytes(data)
        with pytest.raises(ValueError, match=f"got anna.safetensors, .*{message}.*; expected"):
            identity_file.load(path)
    for missing in (path.parent, path.parent / "none.safetensors"):
        with pytest.raises(ValueError, match="could not read"):
            identity_file.load(missing)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"version": 3}, "version 3; this pack reads up to version 2; update the pack"),
        ({"version": 99, "name": None, "new": 1}, "update the pack"),
        ({"version": 0}, "without a version"),
        ({"version": True}, "without a version"),
        ({"version": "1"}, "without a version"),
        ({"name": 3}, "metadata is not"),
        ({"name": "a" * 2000}, "printable"),
        ({"name": "\ud800"}, "printable"),
        ({"date": "yesterday"}, "ISO date"),
        ({"sources": ["one"]}, "1 sources for 2 faces"),
        ({"sources": [1, 2]}, "printable"),
        ({"encoders": {}}, "unknown tensor"),
        ({"encoders": {"x": HASH}}, "not an encoder id"),
        ({"encoders": {ARC.id(HASH): "0123"}}, "lacks the sha256"),
        ({"encoders": {ARC.id(HASH): None}}, "lacks the sha256"),
        ({"encoders": {ARC.id("f" * 64): "f" * 64}}, "without the tensor"),
        ({"more": 1}, "metadata is not"),
        ({"version": 1}, "metadata is not"),
        ({"joint": [OMNI.id(HASH)]}, "metadata is not"),
        ({"joint": {}}, "unknown tensor 'joint/"),
        ({"joint": {"omni": HASH}}, "not an encoder id"),
        ({"joint": {OMNI.id(HASH): "0123"}}, "lacks the sha256"),
        ({"joint": {OMNI.id("f" * 64): "f" * 64}}, "without the tensor joint/"),
    ],
)
def test_metadata_is_checked(path: Path, change: dict[str, Any], message: str) -> None:
    identity_file.save(together(), path)
    head, rest = header(path.read_bytes())
    told = json.loads(head["__metadata__"]["likeness"])
    head["__metadata__"]["likeness"] = json.dumps(told | change)
    path.write_bytes(joined(json.dumps(head).encode(), rest))
    with pytest.raises(ValueError, match=message):
        identity_file.load(path)
    head["__metadata__"]["likeness"] = json.dumps(told)
    path.write_bytes(joined(json.dumps(head).encode(), rest))
    assert same(identity_file.load(path), together())


@pytest.mark.parametrize(
    ("key", "value"),
    [
        ("face/box", None),
        ("face/box", torch.zeros(0, 4)),
        ("face/box", torch.zeros(())),
        ("face/box", torch.zeros(2, 4).half()),
        ("face/kps", torch.zeros(2, 5, 3)),
        ("face/score", torch.zeros(2, 1)),
        ("weight", None),
        ("weight", torch.tensor([1.0, float("nan")])),
        ("weight", torch.tensor([1.0, -2.0])),
        ("face/crop", torch.zeros(2, 0, 4, 3, dtype=torch.uint8)),
        ("face/crop", torch.zeros(2, 4, 4, 3)),
        (f"embedding/{ARC.id(HASH)}", torch.zeros(3, 8)),
        (f"embedding/{ARC.id(HASH)}", torch.zeros(2, 8, dtype=torch.uint8)),
        (f"embedding/{ARC.id(HASH)}", torch.zeros(2, 1, 1, 1, 1)),
        (f"embedding/{ARC.id(HASH)}", None),
        (f"embedding/{ARC.id(HASH)}/zero", torch.zeros(1, 9)),
        (f"embedding/{GRID.id('f' * 64)}", torch.zeros(2, 3)),
        (f"joint/{OMNI.id(HASH)}", None),
        (f"joint/{OMNI.id(HASH)}", torch.zeros(2, 6, 4)),
        (f"joint/{OMNI.id(HASH)}", torch.zeros(1, 0, 4)),
        (f"joint/{OMNI.id(HASH)}", torch.zeros(1, 6, 4, dtype=torch.uint8)),
        (f"joint/{OMNI.id(HASH)}", torch.full((1, 6, 4), float("inf"))),
        (f"joint/{OMNI.id('f' * 64)}", torch.zeros(1, 6, 4)),
        ("something", torch.zeros(1)),
    ],
)
def test_tensors_are_checked(path: Path, key: str, value: torch.Tensor | None) -> None:
    identity_file.save(together(), path)
    tensors, metadata = load(path.read_bytes()), header(path.read_bytes())[0]["__metadata__"]
    if value is None:
        del tensors[key]
    else:
        tensors[key] = value
    save_file(tensors, path, metadata)
    with pytest.raises(ValueError, match="got anna.safetensors, .*expected"):
        identity_file.load(path)


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
    """Change a dtype, a shape, an offset or a name in the header, which stays JSON."""
    head, rest = header(data)
    name = rng.choice([key for key in head if key != "__metadata__"])
    field = rng.choice(("dtype", "shape", "data_offsets", "name"))
    numbers = (-1, 0, 1, 2, 7, 2**31, 2**63, 2**64, 10**400, 1.5, None, "2", [])
    if field == "name":
        head[rng.choice(("", "face/box", "embedding/x", "embedding/" + "a" * 5000, "x"))] = head.pop(name)
    elif field == "dtype":
        head[name]["dtype"] = rng.choice(("F64", "F16", "F32", "U8", "I64", "F8_E8M0", "BOOL", "C64", "", None, 3))
    else:
        head[name][field] = [rng.choice((old, *numbers)) for old in head[name][field]][: rng.choice((1, 9, 9))]
    return joined(json.dumps(head).encode(), rest)


MUTATORS: tuple[Callable[[bytes, random.Random], bytes], ...] = (_flip, _flip_header, _cut, _append, _splice, _edit)


def test_damaged_files_raise_or_are_valid(tmp_path: Path) -> None:
    source, path = tmp_path / "source.safetensors", tmp_path / "damaged.safetensors"
    refused = 0
    for number in range(MUTATIONS):
        rng = random.Random(number)
        make = (person, together)[number // 6 % 2]
        identity_file.save(make(1 + number % 2, bool(number % 3)), source, date=DATE)
        path.write_bytes(MUTATORS[number % len(MUTATORS)](source.read_bytes(), rng))
        try:
            loaded = identity_file.load(path)
        except ValueError as error:
            refused += 1
            assert len(str(error)) < 2500
            continue
        # What was read is a whole identity: it can be written and is read as the same again.
        identity_file.save(loaded, path)
        assert same(identity_file.load(path), loaded)
    assert 0.6 * MUTATIONS < refused < MUTATIONS
