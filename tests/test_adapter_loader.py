"""Load Identity Adapter on real files: both containers, reports, and files that are not what they should be."""

from __future__ import annotations

import random
from functools import reduce
from pathlib import Path

import folder_paths
import fuseds
import pytest
import torch
from adapters import tensors
from comfyui_likeness.likeness import fused as fused_math
from comfyui_likeness.nodes.loaders import adapter, files
from comfyui_likeness.nodes.types import LoadedFused
from safetensors.torch import save, save_file

MUTATIONS = 1200


@pytest.fixture
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A models folder of its own for the host."""
    monkeypatch.setattr(folder_paths, "models_dir", str(tmp_path))
    monkeypatch.setattr(folder_paths, "folder_names_and_paths", {})
    monkeypatch.setattr(folder_paths, "filename_list_cache", {})
    files.register()
    for name in files.FOLDERS:
        (tmp_path / name).mkdir()
    return tmp_path


def nested(flat: dict[str, torch.Tensor]) -> dict[str, dict[str, torch.Tensor]]:
    out: dict[str, dict[str, torch.Tensor]] = {}
    for key, value in flat.items():
        group, rest = key.split(".", 1)
        out.setdefault(group, {})[rest] = value
    return out


@pytest.mark.parametrize("kind", ["image", "faceid", "portrait", "pulid"])
def test_both_containers_hold_the_same(folder: Path, kind: str) -> None:
    flat = tensors(kind)
    save_file(flat, folder / "ipadapter" / "a.safetensors")
    torch.save(nested(flat), folder / "ipadapter" / "b.bin")
    torch.save(
        nested({key.replace("ip_adapter.", "adapter_modules."): value for key, value in flat.items()}),
        folder / "ipadapter" / "c.bin",
    )
    first, *others = (adapter.load(name)[0] for name in ("a.safetensors", "b.bin", "c.bin"))
    assert first.spec.kind == kind and bool(first.lora) == (kind == "faceid")
    for other in others:
        assert other.spec == first.spec
        for a, b in ((first.patcher.model.state_dict(), other.patcher.model.state_dict()), (first.lora, other.lora)):
            assert a.keys() == b.keys() and all(torch.equal(a[key], b[key]) for key in a)


def test_the_report_says_what_is_there_and_what_is_missing(folder: Path) -> None:
    save_file(tensors("faceid"), folder / "ipadapter" / "face.safetensors")
    report = adapter.load("face.safetensors")[1]
    assert "FaceID for SD1.5" in report and "rank 4" in report and "missing: put the folder buffalo_l" in report
    (folder / "insightface" / "models" / "buffalo_l").mkdir(parents=True)
    assert "found" in adapter.load("face.safetensors")[1]
    save_file(tensors("image"), folder / "ipadapter" / "image.safetensors")
    assert "missing: put one into models/clip_vision" in adapter.load("image.safetensors")[1]
    save_file({"vision_model.embeddings.class_embedding": torch.zeros(1280)}, folder / "clip_vision" / "H.safetensors")
    assert "found as H.safetensors" in adapter.load("image.safetensors")[1]


def test_the_report_of_pulid_finds_its_networks(folder: Path) -> None:
    save_file(tensors("pulid_v1_1"), folder / "pulid" / "pulid.safetensors")
    report = adapter.load("pulid.safetensors")[1]
    assert "PuLID v1.1 for SD1.5, 6 tokens per identity" in report and "missing: put the folder antelopev2" in report
    assert report.count("eva02-l-14-336 (Load Image Encoder) of the aligned head in grey on white: missing") == 1
    place = folder / "clip_vision"
    torch.save({"visual.pos_embed": torch.zeros(1, 577, 1024)}, place / "EVA.pt")
    torch.save({"visual.pos_embed": torch.zeros(1, 257, 1024)}, place / "EVA_224.pt")
    save_file({"visual.trunk.pos_embed": torch.zeros(1, 577, 1024)}, place / "EVA.safetensors")
    (place / "EVA_cut.pt").write_bytes((place / "EVA.pt").read_bytes()[:5000])
    assert "found as EVA.pt, EVA.safetensors." in adapter.load("pulid.safetensors")[1]


OFFICIAL = (("image_proj.", "id_adapter."), ("ip_adapter.", "id_adapter_attn_layers."), (".to_k_ip.", ".id_to_k."),
            (".to_v_ip.", ".id_to_v."))  # fmt: skip


@pytest.mark.parametrize("kind", ["pulid", "pulid_v1_1"])
def test_pulid_in_its_authors_names_and_converted(folder: Path, kind: str) -> None:
    converted = tensors(kind)
    official = {reduce(lambda key, pair: key.replace(*pair), OFFICIAL, key): w for key, w in converted.items()}
    save_file(converted, folder / "ipadapter" / "converted.safetensors")
    save_file(official, folder / "pulid" / "official.safetensors")
    a, b = (adapter.load(f"{name}.safetensors")[0] for name in ("converted", "official"))
    assert a.spec == b.spec and a.spec.kind == kind
    left, right = a.patcher.model.state_dict(), b.patcher.model.state_dict()
    assert left.keys() == right.keys() and all(torch.equal(left[key], right[key]) for key in left)
    for gone in (
        "id_adapter.mapping_4.",
        "id_adapter.mapping_2.0.bias",
        "id_adapter_attn_layers.31.id_to_v",
        "id_adapter.layers.3.",
    ):
        cut = {key: weight for key, weight in official.items() if not key.startswith(gone)}
        if len(cut) < len(official):
            save_file(cut, folder / "pulid" / "cut.safetensors")
            with pytest.raises(ValueError, match="incomplete or misshapen|misses"):
                adapter.load("cut.safetensors")


class Trap:
    """Unpickling this would write a file."""

    def __init__(self, path: Path) -> None:
        self.path = path

    def __reduce__(self) -> tuple[object, tuple[str]]:
        return Path.touch, (Path(self.path),)  # pyright: ignore[reportReturnType]


def test_what_is_not_weights_is_named(folder: Path) -> None:
    place = folder / "ipadapter"
    whole = save(tensors("image"))
    bad = tensors("image")
    bad["ip_adapter.1.to_k_ip.weight"][0, 0] = float("nan")
    torch.save({"image_proj": {"a": "text"}, "ip_adapter": {}}, place / "text.bin")
    torch.save({"image_proj": Trap(folder / "sprung")}, place / "trap.bin")
    for name, content, message in (
        ("empty.safetensors", b"", "an empty file"),
        ("page.safetensors", b"<!DOCTYPE html><html>", "a web page"),
        ("page.bin", b"\n <html>", "a web page"),
        ("pointer.safetensors", b"version https://git-lfs.github.com/spec/v1\n", "Git LFS"),
        ("short.safetensors", whole[: len(whole) // 2], "cannot be read"),
        ("noise.bin", bytes(range(256)) * 40, "cannot be read"),
        ("nan.safetensors", save(bad), "NaN or infinity"),
        ("other.safetensors", save({"first.weight": torch.zeros(2)}), "no table of this pack knows"),
        ("text.bin", None, "expected named tensors"),
        ("trap.bin", None, "cannot be read"),
    ):
        if content is not None:
            (place / name).write_bytes(content)
        with pytest.raises(ValueError, match=message):
            adapter.load(name)
    assert not (folder / "sprung").exists()


@pytest.mark.parametrize("name", ["gone.safetensors", "../secret.safetensors", "/etc/passwd", ""])
def test_names_stay_in_the_folder(folder: Path, name: str) -> None:
    save_file(tensors("image"), folder / "secret.safetensors")
    with pytest.raises(ValueError, match="not there|expected"):
        adapter.load(name)


def mutated(content: bytes, rng: random.Random) -> bytes:
    """One of the ways in which files break: cut, bytes changed, header changed, grown, blocks moved."""
    data = bytearray(content)
    head = min(len(data), 4096)
    way = rng.randrange(6)
    if way == 0:
        return bytes(data[: rng.randrange(len(data))])
    if way == 1:
        for _ in range(rng.randrange(1, 9)):
            data[rng.randrange(len(data))] = rng.randrange(256)
    elif way == 2:
        for _ in range(rng.randrange(1, 5)):
            data[rng.randrange(head)] ^= 1 << rng.randrange(8)
    elif way == 3:
        data += rng.randbytes(rng.randrange(1, 64))
    elif way == 4:
        at = rng.randrange(head)
        data[at : at + rng.randrange(1, 16)] = rng.randbytes(rng.randrange(0, 16))
    else:
        at = rng.randrange(len(data))
        data = data[at:] + data[:at]
    return bytes(data)


@pytest.mark.parametrize("suffix", [".safetensors", ".bin"])
def test_broken_files_raise_or_load_whole(folder: Path, suffix: str) -> None:
    whole = {key: value[..., :] for key, value in tensors("image").items()}
    path = folder / "ipadapter" / f"fuzz{suffix}"
    save_file(whole, path) if suffix == ".safetensors" else torch.save(nested(whole), path)
    content, rng = path.read_bytes(), random.Random(11)
    expected = adapter.load(path.name)[0].patcher.model.state_dict().keys()
    refused = 0
    for _ in range(MUTATIONS // 2):
        path.write_bytes(mutated(content, rng))
        try:
            loaded, _ = adapter.load(path.name)
        except ValueError as error:
            refused += 1
            assert "expected" in str(error), error
        else:
            state = loaded.patcher.model.state_dict()
            assert state.keys() == expected and all(value.isfinite().all() for value in state.values())
    assert refused > MUTATIONS // 10


def test_files_of_the_packs_own_say_what_they_are(folder: Path) -> None:
    tensors = fuseds.tensors()
    told = fused_math.metadata(fuseds.spec(tensors))
    save_file(tensors, folder / "likeness" / "own.safetensors", told)
    loaded, report = adapter.load("own.safetensors")
    assert isinstance(loaded, LoadedFused) and loaded.spec == fuseds.spec(tensors)
    assert report.startswith("own.safetensors: fused KV for SD1.5, 16 cross-attentions")
    data = (folder / "likeness" / "own.safetensors").read_bytes()
    for name, metadata, message in (
        ("other", {"likeness": '{"kind": "something"}'}, "kind 'something'; expected fused_kv, infinite_id"),
        ("broken", {"likeness": "{"}, "metadata is damaged"),
        ("list", {"likeness": "[]"}, "metadata is damaged"),
        ("bare", {"likeness": '{"kind": "fused_kv"}'}, "not that of the kind fused_kv"),
        ("none", None, "no table of this pack knows"),
    ):
        save_file(tensors, folder / "likeness" / f"{name}.safetensors", metadata)
        with pytest.raises(ValueError, match=message):
            adapter.load(f"{name}.safetensors")
    (folder / "likeness" / "cut.safetensors").write_bytes(data[: len(data) // 2])
    with pytest.raises(ValueError, match="cut short"):
        adapter.load("cut.safetensors")
    tensors["text.hidden"][0, 0] = torch.nan
    save_file(tensors, folder / "likeness" / "nan.safetensors", told)
    with pytest.raises(ValueError, match="NaN"):
        adapter.load("nan.safetensors")


def test_a_flashface_checkpoint_is_sent_to_its_loader(folder: Path) -> None:
    torch.save({"ref_encoder.0.weight": torch.zeros(4, 4)}, folder / "likeness" / "flashface.ckpt")
    with pytest.raises(ValueError, match="Load FlashFace"):
        adapter.load("flashface.ckpt")
