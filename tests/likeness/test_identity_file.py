"""Identity files: exact round trips, failures while saving, and invalid files."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Callable
from dataclasses import replace
from datetime import datetime, timezone
from pathlib import Path
from typing import Any

import pytest
import torch
from comfyui_likeness.likeness.identity import identity_file
from comfyui_likeness.likeness.spec import Identity
from safetensors.torch import load, save, save_file
from support.identities import ENCODER_HASH
from support.identity_files import (
    ARCFACE,
    CLIP_GRID,
    DATE,
    OMNI_ID_TOKENS,
    are_identical,
    join_header,
    make_full_identity,
    make_jointly_encoded_identity,
    split_header,
)

ARCFACE_ID, CLIP_GRID_ID, OMNI_ID_TOKENS_ID = (
    feature.format_encoder_id(ENCODER_HASH) for feature in (ARCFACE, CLIP_GRID, OMNI_ID_TOKENS)
)


@pytest.fixture
def path(tmp_path: Path) -> Path:
    return tmp_path / "anna.safetensors"


@pytest.mark.parametrize("make", [make_full_identity, make_jointly_encoded_identity])
@pytest.mark.parametrize("crops", [True, False])
@pytest.mark.parametrize("faces", [1, 3])
def test_round_trip_is_exact(path: Path, make: Callable[..., Identity], crops: bool, faces: int) -> None:
    identity = make(faces, crops)
    identity_file.save_identity(identity, path)
    assert are_identical(identity_file.load_identity(path), identity)
    identity_file.save_identity(identity, path, include_crops=False)
    assert are_identical(identity_file.load_identity(path), replace(identity, crop=None))
    assert os.listdir(path.parent) == [path.name]


def test_noncontiguous_and_shared_tensors_are_saved(path: Path) -> None:
    identity = make_full_identity(3)
    rows = torch.randn(8, 3).T
    identity = replace(
        identity,
        embeddings={ARCFACE_ID: rows},
        zero_embeddings={ARCFACE_ID: rows[:1]},
        hashes={ARCFACE_ID: ENCODER_HASH},
    )
    identity = replace(identity, weight=torch.ones(1).expand(3), sources=())
    identity_file.save_identity(identity, path)
    assert are_identical(identity_file.load_identity(path), identity)


def test_equal_identities_and_dates_give_equal_bytes(path: Path) -> None:
    identity_file.save_identity(make_full_identity(), path, date=DATE)
    first = path.read_bytes()
    identity_file.save_identity(make_full_identity(), path, date=DATE)
    assert path.read_bytes() == first
    identity_file.save_identity(make_full_identity(), path)
    metadata = json.loads(split_header(path.read_bytes())[0]["__metadata__"]["likeness"])
    assert list(metadata) == ["version", "name", "date", "encoders", "sources"]
    assert (
        metadata["encoders"]
        == {
            ARCFACE_ID: ENCODER_HASH,
            CLIP_GRID_ID: ENCODER_HASH,
        }
        and metadata["name"] == "Zoë Müller"
    )
    assert metadata["version"] == 1
    assert abs((datetime.now(timezone.utc) - datetime.fromisoformat(metadata["date"])).total_seconds()) < 600


def test_file_layout(path: Path) -> None:
    identity_file.save_identity(make_full_identity(), path)
    shapes = {key: tuple(value.shape) for key, value in load(path.read_bytes()).items()}
    assert shapes == {
        f"embedding/{ARCFACE_ID}": (2, 8),
        f"embedding/{CLIP_GRID_ID}": (2, 3, 4),
        f"embedding/{CLIP_GRID_ID}/zero": (1, 3, 4),
        "face/box": (2, 4),
        "face/kps": (2, 5, 2),
        "face/score": (2,),
        "face/crop": (2, 5, 4, 3),
        "weight": (2,),
    }


def test_joint_embeddings_need_version_2(path: Path) -> None:
    identity_file.save_identity(make_jointly_encoded_identity(), path)
    head, _ = split_header(path.read_bytes())
    metadata = json.loads(head["__metadata__"]["likeness"])
    assert list(metadata) == ["version", "name", "date", "encoders", "sources", "joint"] and metadata["version"] == 2
    assert metadata["joint"] == {OMNI_ID_TOKENS_ID: ENCODER_HASH} and OMNI_ID_TOKENS_ID not in metadata["encoders"]
    assert head[f"joint/{OMNI_ID_TOKENS_ID}"]["shape"] == [1, 6, 4]
    alone = replace(
        make_jointly_encoded_identity(),
        embeddings={},
        zero_embeddings={},
        hashes={OMNI_ID_TOKENS_ID: ENCODER_HASH},
    )
    identity_file.save_identity(alone, path, include_crops=False)
    assert are_identical(identity_file.load_identity(path), replace(alone, crop=None))


def test_a_loaded_identity_does_not_depend_on_its_file(path: Path) -> None:
    identity_file.save_identity(make_full_identity(), path)
    loaded = identity_file.load_identity(path)
    path.write_bytes(b"")
    assert are_identical(loaded, make_full_identity())


@pytest.mark.parametrize(
    "changes",
    [
        {"box": torch.zeros(3, 4)},
        {"kps": torch.zeros(2, 4, 2)},
        {"weight": torch.tensor([1.0, -1.0])},
        {"score": torch.tensor([0.5, float("nan")])},
        {"crop": torch.zeros(2, 4, 4, 4, dtype=torch.uint8)},
        {"crop": torch.zeros(2, 4, 4, 3)},
        {"embeddings": {ARCFACE_ID: torch.zeros(1, 8)}},
        {"embeddings": {ARCFACE_ID: torch.zeros(2, 8, dtype=torch.float64)}},
        {"embeddings": {ARCFACE_ID: torch.full((2, 8), float("inf"))}},
        {"embeddings": {ARCFACE_ID: torch.zeros(2)}},
        {"embeddings": {"my encoder": torch.zeros(2, 8)}},
        {"zero_embeddings": {CLIP_GRID_ID: torch.zeros(1, 3, 5)}},
        {"zero_embeddings": {CLIP_GRID.format_encoder_id("f" * 64): torch.zeros(1, 3, 5)}},
        {"joint_embeddings": {OMNI_ID_TOKENS_ID: torch.zeros(2, 6, 4)}},
        {"joint_embeddings": {OMNI_ID_TOKENS_ID: torch.zeros(1, 6)}},
        {"joint_embeddings": {OMNI_ID_TOKENS_ID: torch.zeros(1, 6, 4, dtype=torch.float64)}},
        {"joint_embeddings": {OMNI_ID_TOKENS_ID: torch.full((1, 6, 4), float("nan"))}},
        {"joint_embeddings": {OMNI_ID_TOKENS.format_encoder_id("f" * 64): torch.zeros(1, 6, 4)}},
        {"joint_embeddings": {"omni": torch.zeros(1, 6, 4)}},
        {"hashes": {}},
        {
            "hashes": {
                ARCFACE_ID: ENCODER_HASH,
                CLIP_GRID_ID: "f" * 64,
            }
        },
        {"sources": ("one", "two", "three")},
        {"sources": ("one", "two\n")},
        {"name": "a\0b"},
    ],
    ids=lambda changes: next(iter(changes)),
)
def test_invalid_identities_are_not_written(path: Path, changes: dict[str, Any]) -> None:
    identity_file.save_identity(make_full_identity(), path, date=DATE)
    before = path.read_bytes()
    with pytest.raises(ValueError):
        identity_file.save_identity(replace(make_jointly_encoded_identity(), **changes), path)
    assert path.read_bytes() == before and os.listdir(path.parent) == [path.name]


FULL_DISK = """
import resource, sys
from pathlib import Path
sys.path.insert(0, {tests!r})
import conftest
from comfyui_likeness.likeness.identity import identity_file
from support.identity_files import make_full_identity
resource.setrlimit(resource.RLIMIT_FSIZE, (700, 700))
identity_file.save_identity(make_full_identity(), Path({path!r}))
"""


@pytest.mark.skipif(sys.platform == "win32", reason="Windows has no limit on a file's size")
def test_the_old_file_survives_a_full_disk(path: Path) -> None:
    identity_file.save_identity(make_full_identity(1), path, date=DATE)
    before = path.read_bytes()
    script = FULL_DISK.format(tests=str(Path(__file__).resolve().parents[1]), path=str(path))
    done = subprocess.run([sys.executable, "-B", "-c", script], capture_output=True, text=True)
    assert "ValueError: could not save anna.safetensors into" in done.stderr and "bytes free" in done.stderr
    assert path.read_bytes() == before and os.listdir(path.parent) == [path.name]
    assert are_identical(identity_file.load_identity(path), make_full_identity(1))


def test_failures_while_saving_leave_no_files(path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def stop(*_: object) -> None:
        raise KeyboardInterrupt

    identity_file.save_identity(make_full_identity(), path)
    before = path.read_bytes()
    with monkeypatch.context() as patch:
        patch.setattr(os, "replace", stop)
        with pytest.raises(KeyboardInterrupt):
            identity_file.save_identity(make_full_identity(1), path)
    assert path.read_bytes() == before and os.listdir(path.parent) == [path.name]
    with pytest.raises(ValueError, match="could not save"):
        identity_file.save_identity(make_full_identity(), path / "below a file.safetensors")
    folder = path.parent / "taken.safetensors"
    folder.mkdir()
    with pytest.raises(ValueError, match="could not save"):
        identity_file.save_identity(make_full_identity(), folder)
    assert sorted(os.listdir(path.parent)) == [path.name, folder.name]


def test_other_files_are_rejected(path: Path) -> None:
    cases: list[tuple[bytes, str]] = [
        (b"", "empty"),
        (b"abc", "empty or truncated"),
        (b"<!DOCTYPE html><html>" + b" " * 900, "a web page"),
        (b"version https://git-lfs.github.com/spec/v1\n", "not a complete safetensors file"),
        (b"\x80\x02}q\x00.", "truncated"),
        (save({"a": torch.zeros(2)}), "without the metadata"),
        (save({"a": torch.zeros(2)}, {"format": "pt"}), "without the metadata"),
        (save({"a": torch.zeros(2, dtype=torch.bfloat16)}), "other than F16"),
        (join_header(b'{"__metadata__":{"likeness":"' + b"[" * 100_000 + b'"}}', b""), "damaged"),
        (join_header(b"[" * 100_000, b""), "damaged"),
        (join_header(b"[]", b""), "without the metadata"),
        (join_header(b"\xff" * 40, b""), "damaged"),
        ((2**63).to_bytes(8, "little") + b"{}", "not a complete"),
        (
            (identity_file.MAX_HEADER_BYTES + 1).to_bytes(8, "little") + b" " * (identity_file.MAX_HEADER_BYTES + 9),
            "not a complete",
        ),
    ]
    for data, message in cases:
        path.write_bytes(data)
        with pytest.raises(ValueError, match=f"got anna.safetensors, .*{message}.*; expected"):
            identity_file.load_identity(path)
    for missing in (path.parent, path.parent / "none.safetensors"):
        with pytest.raises(ValueError, match="could not read"):
            identity_file.load_identity(missing)


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
        ({"encoders": {"x": ENCODER_HASH}}, "not an encoder id"),
        ({"encoders": {ARCFACE_ID: "0123"}}, "lacks the sha256"),
        ({"encoders": {ARCFACE_ID: None}}, "lacks the sha256"),
        ({"encoders": {ARCFACE.format_encoder_id("f" * 64): "f" * 64}}, "without the tensor"),
        ({"more": 1}, "metadata is not"),
        ({"version": 1}, "metadata is not"),
        ({"joint": [OMNI_ID_TOKENS_ID]}, "metadata is not"),
        ({"joint": {}}, "unknown tensor 'joint/"),
        ({"joint": {"omni": ENCODER_HASH}}, "not an encoder id"),
        ({"joint": {OMNI_ID_TOKENS_ID: "0123"}}, "lacks the sha256"),
        ({"joint": {OMNI_ID_TOKENS.format_encoder_id("f" * 64): "f" * 64}}, "without the tensor joint/"),
    ],
)
def test_metadata_is_checked(path: Path, change: dict[str, Any], message: str) -> None:
    identity_file.save_identity(make_jointly_encoded_identity(), path)
    head, rest = split_header(path.read_bytes())
    metadata = json.loads(head["__metadata__"]["likeness"])
    head["__metadata__"]["likeness"] = json.dumps(metadata | change)
    path.write_bytes(join_header(json.dumps(head).encode(), rest))
    with pytest.raises(ValueError, match=message):
        identity_file.load_identity(path)
    head["__metadata__"]["likeness"] = json.dumps(metadata)
    path.write_bytes(join_header(json.dumps(head).encode(), rest))
    assert are_identical(identity_file.load_identity(path), make_jointly_encoded_identity())


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
        (f"embedding/{ARCFACE_ID}", torch.zeros(3, 8)),
        (f"embedding/{ARCFACE_ID}", torch.zeros(2, 8, dtype=torch.uint8)),
        (f"embedding/{ARCFACE_ID}", torch.zeros(2, 1, 1, 1, 1)),
        (f"embedding/{ARCFACE_ID}", None),
        (f"embedding/{ARCFACE_ID}/zero", torch.zeros(1, 9)),
        (f"embedding/{CLIP_GRID.format_encoder_id('f' * 64)}", torch.zeros(2, 3)),
        (f"joint/{OMNI_ID_TOKENS_ID}", None),
        (f"joint/{OMNI_ID_TOKENS_ID}", torch.zeros(2, 6, 4)),
        (f"joint/{OMNI_ID_TOKENS_ID}", torch.zeros(1, 0, 4)),
        (f"joint/{OMNI_ID_TOKENS_ID}", torch.zeros(1, 6, 4, dtype=torch.uint8)),
        (f"joint/{OMNI_ID_TOKENS_ID}", torch.full((1, 6, 4), float("inf"))),
        (f"joint/{OMNI_ID_TOKENS.format_encoder_id('f' * 64)}", torch.zeros(1, 6, 4)),
        ("something", torch.zeros(1)),
    ],
)
def test_tensors_are_checked(path: Path, key: str, value: torch.Tensor | None) -> None:
    identity_file.save_identity(make_jointly_encoded_identity(), path)
    tensors, metadata = load(path.read_bytes()), split_header(path.read_bytes())[0]["__metadata__"]
    if value is None:
        del tensors[key]
    else:
        tensors[key] = value
    save_file(tensors, path, metadata)
    with pytest.raises(ValueError, match="got anna.safetensors, .*expected"):
        identity_file.load_identity(path)
