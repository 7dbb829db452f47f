"""Load Identity Adapter on real files: both containers, reports, and damaged or foreign files."""

from __future__ import annotations

import random
from functools import reduce
from pathlib import Path
from typing import Any

import folder_paths
import pytest
import torch
from comfyui_likeness.likeness.methods import fused_kv
from comfyui_likeness.nodes.loaders import adapter_loader, files
from comfyui_likeness.nodes.types import LoadedFusedKV
from safetensors.torch import save, save_file
from support.fused_kv import make_fused_kv_spec, make_fused_kv_tensors
from support.ip_adapters import make_ip_adapter_tensors

MUTATIONS = 1200


@pytest.fixture
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """An empty models folder for ComfyUI."""
    monkeypatch.setattr(folder_paths, "models_dir", str(tmp_path))
    monkeypatch.setattr(folder_paths, "folder_names_and_paths", {})
    monkeypatch.setattr(folder_paths, "filename_list_cache", {})
    files.register_model_folders()
    for name in files.MODEL_FOLDERS:
        (tmp_path / name).mkdir()
    return tmp_path


def nest_tensors(flat: dict[str, torch.Tensor]) -> dict[str, dict[str, torch.Tensor]]:
    nested: dict[str, dict[str, torch.Tensor]] = {}
    for key, value in flat.items():
        group, rest = key.split(".", 1)
        nested.setdefault(group, {})[rest] = value
    return nested


@pytest.mark.parametrize("kind", ["image", "faceid", "portrait", "pulid"])
def test_both_containers_hold_the_same(folder: Path, kind: str) -> None:
    flat = make_ip_adapter_tensors(kind)
    save_file(flat, folder / "ipadapter" / "a.safetensors")
    torch.save(nest_tensors(flat), folder / "ipadapter" / "b.bin")
    torch.save(
        nest_tensors({key.replace("ip_adapter.", "adapter_modules."): value for key, value in flat.items()}),
        folder / "ipadapter" / "c.bin",
    )
    first, *others = (adapter_loader.load_adapter_file(name)[0] for name in ("a.safetensors", "b.bin", "c.bin"))
    assert first.spec.kind == kind and bool(first.lora) == (kind == "faceid")
    for other in others:
        assert other.spec == first.spec
        for a, b in ((first.patcher.model.state_dict(), other.patcher.model.state_dict()), (first.lora, other.lora)):
            assert a.keys() == b.keys() and all(torch.equal(a[key], b[key]) for key in a)


def test_report_lists_found_and_missing_encoders(folder: Path) -> None:
    save_file(make_ip_adapter_tensors("faceid"), folder / "ipadapter" / "face.safetensors")
    report = adapter_loader.load_adapter_file("face.safetensors")[1]
    assert "FaceID for SD1.5" in report and "rank 4" in report and "missing: put the folder buffalo_l" in report
    (folder / "insightface" / "models" / "buffalo_l").mkdir(parents=True)
    assert "found" in adapter_loader.load_adapter_file("face.safetensors")[1]
    save_file(make_ip_adapter_tensors("image"), folder / "ipadapter" / "image.safetensors")
    assert "missing: put it into models/clip_vision" in adapter_loader.load_adapter_file("image.safetensors")[1]
    save_file({"vision_model.embeddings.class_embedding": torch.zeros(1280)}, folder / "clip_vision" / "H.safetensors")
    assert "found as H.safetensors" in adapter_loader.load_adapter_file("image.safetensors")[1]


def test_report_of_pulid_finds_its_encoders(folder: Path) -> None:
    save_file(make_ip_adapter_tensors("pulid_v1_1"), folder / "pulid" / "pulid.safetensors")
    report = adapter_loader.load_adapter_file("pulid.safetensors")[1]
    assert "PuLID v1.1 for SD1.5, 6 tokens per identity" in report and "missing: put the folder antelopev2" in report
    assert report.count("eva02-l-14-336 (Load Image Encoder) of the aligned head in grey on white: missing") == 1
    encoders = folder / "clip_vision"
    torch.save({"visual.pos_embed": torch.zeros(1, 577, 1024)}, encoders / "EVA.pt")
    torch.save({"visual.pos_embed": torch.zeros(1, 257, 1024)}, encoders / "EVA_224.pt")
    save_file({"visual.trunk.pos_embed": torch.zeros(1, 577, 1024)}, encoders / "EVA.safetensors")
    (encoders / "EVA_cut.pt").write_bytes((encoders / "EVA.pt").read_bytes()[:5000])
    assert "found as EVA.pt, EVA.safetensors." in adapter_loader.load_adapter_file("pulid.safetensors")[1]


# The blocks of SD1.5's UNet in the order in which published files count, by their paths in diffusers.
SD15_BLOCKS = (
    *(f"down_blocks.{i}.attentions.{j}" for i in range(3) for j in range(2)),
    *(f"up_blocks.{i}.attentions.{j}" for i in range(1, 4) for j in range(3)),
    "mid_block.attentions.0",
)


def name_by_module_path(key: str) -> str:
    """A published key of a layer as the attention processor's in diffusers' UNet."""
    _, number, name = key.split(".", 2)
    block, attention = SD15_BLOCKS[int(number) // 2], int(number) % 2 + 1
    return f"unet.{block}.transformer_blocks.0.attn{attention}.processor.{name}"


def rename_in_training(flat: dict[str, torch.Tensor], by_path: bool, prefix: str = "") -> dict[str, torch.Tensor]:
    """An adapter's tensors under the names of IP-Adapter's training script."""
    rename = {
        "image_proj": lambda key: key.replace("image_proj.", "image_proj_model."),
        "ip_adapter": name_by_module_path if by_path else lambda key: key.replace("ip_adapter.", "adapter_modules."),
    }
    return {prefix + rename[key.split(".")[0]](key): value for key, value in flat.items()}


UNET_TENSORS = {
    "unet.conv_in.weight": torch.ones(3, 3),
    "unet.mid_block.attentions.0.transformer_blocks.0.attn2.to_k.weight": torch.ones(3, 3),
}


@pytest.mark.parametrize("kind", ["image", "faceid"])
def test_training_checkpoints_hold_the_same_adapter(folder: Path, kind: str) -> None:
    flat = make_ip_adapter_tensors(kind)
    by_number, by_path = (rename_in_training(flat, by_path) for by_path in (False, True))
    loop = {"global_step": 7, "epoch": 1, "args": {"lr": 1e-4, "resume": None}, "log": ["a", 2]}
    optimizer = {"state": {0: {"step": torch.tensor(3.0), "exp_avg": torch.ones(2)}}, "param_groups": [{"lr": 1e-4}]}
    shared = {name_by_module_path(key): value for key, value in flat.items() if key.startswith("ip_adapter.")}
    counters = {"step": torch.tensor(7), "adapter_modules.steps": torch.tensor([7])}
    wrapped_projector = {key.replace("_model.", "_model.module._orig_mod."): value for key, value in by_path.items()}
    # file -> content, what is left out of it
    checkpoints: dict[str, tuple[dict[str, Any], str]] = {
        "accelerate.bin": ({**UNET_TENSORS, **shared, **by_number}, "unet"),
        "accelerate.safetensors": ({**UNET_TENSORS, **by_path, **counters}, "unet"),
        "ddp.bin": ({f"module.{key}": value for key, value in {**UNET_TENSORS, **by_number}.items()}, "unet"),
        "loop.pt": ({"model": by_number, "optimizer": optimizer, **loop}, "optimizer"),
        "nested.pt": ({**nest_tensors(flat), "optimizer": optimizer, "lr_scheduler": {"step": 3}, **loop}, "optimizer"),
        "state_dict.ckpt": ({"state_dict": {**UNET_TENSORS, **by_path}, **loop}, "unet"),
        "ip_list.bin": ({key.replace("_ip.weight", "_ip.0.weight"): value for key, value in by_path.items()}, ""),
        "parts.bin": (wrapped_projector, ""),
    }
    save_file(flat, folder / "ipadapter" / "published.safetensors")
    expected, plain_report = adapter_loader.load_adapter_file("published.safetensors")
    for name, (content, left_out) in checkpoints.items():
        path = folder / "ipadapter" / name
        save_file(content, path) if path.suffix == ".safetensors" else torch.save(content, path)
        loaded, report = adapter_loader.load_adapter_file(name)
        assert loaded.spec == expected.spec, name
        for a, b in (
            (loaded.patcher.model.state_dict(), expected.patcher.model.state_dict()),
            (loaded.lora, expected.lora),
        ):
            assert a.keys() == b.keys() and all(torch.equal(a[key], b[key]) for key in a), name
        note = f"A training checkpoint; its {left_out} are not used.\n" if left_out else ""
        title, rest = plain_report.replace("published.safetensors", name).split("\n", 1)
        assert report == f"{title}\n{note}{rest}"


def test_parts_of_an_adapter_that_are_not_known_are_refused(folder: Path) -> None:
    by_number = rename_in_training(make_ip_adapter_tensors("image"), by_path=False)
    path = folder / "ipadapter" / "a.safetensors"
    save_file({**by_number, "unet.mid_block.attn1.to_q.lora_A.default.weight": torch.ones(2, 2)}, path)
    with pytest.raises(ValueError, match="lora_A"):
        adapter_loader.load_adapter_file(path.name)
    save_file({**by_number, "module.image_proj_model.norm.weight": torch.ones(2)}, path)
    with pytest.raises(ValueError, match="two keys for 'image_proj_model.norm.weight'"):
        adapter_loader.load_adapter_file(path.name)


OFFICIAL_NAMES = (
    ("image_proj.", "id_adapter."),
    ("ip_adapter.", "id_adapter_attn_layers."),
    (".to_k_ip.", ".id_to_k."),
    (".to_v_ip.", ".id_to_v."),
)


@pytest.mark.parametrize("kind", ["pulid", "pulid_v1_1"])
def test_pulid_in_its_authors_names_and_converted(folder: Path, kind: str) -> None:
    converted = make_ip_adapter_tensors(kind)
    official = {reduce(lambda key, pair: key.replace(*pair), OFFICIAL_NAMES, key): w for key, w in converted.items()}
    save_file(converted, folder / "ipadapter" / "converted.safetensors")
    save_file(official, folder / "pulid" / "official.safetensors")
    a, b = (adapter_loader.load_adapter_file(f"{name}.safetensors")[0] for name in ("converted", "official"))
    assert a.spec == b.spec and a.spec.kind == kind
    left, right = a.patcher.model.state_dict(), b.patcher.model.state_dict()
    assert left.keys() == right.keys() and all(torch.equal(left[key], right[key]) for key in left)
    for missing in (
        "id_adapter.mapping_4.",
        "id_adapter.mapping_2.0.bias",
        "id_adapter_attn_layers.31.id_to_v",
        "id_adapter.layers.3.",
    ):
        cut = {key: weight for key, weight in official.items() if not key.startswith(missing)}
        if len(cut) < len(official):
            save_file(cut, folder / "pulid" / "cut.safetensors")
            with pytest.raises(ValueError, match="incomplete or misshapen|misses"):
                adapter_loader.load_adapter_file("cut.safetensors")


class Trap:
    """Unpickling this would write a file."""

    def __init__(self, path: Path) -> None:
        self.path = path

    def __reduce__(self) -> tuple[object, tuple[str]]:
        return Path.touch, (Path(self.path),)  # pyright: ignore[reportReturnType]


def test_files_without_weights_are_refused(folder: Path) -> None:
    target = folder / "ipadapter"
    complete = save(make_ip_adapter_tensors("image"))
    bad = make_ip_adapter_tensors("image")
    bad["ip_adapter.1.to_k_ip.weight"][0, 0] = float("nan")
    torch.save({"image_proj": {"a": "text"}, "ip_adapter": {}}, target / "text.bin")
    torch.save({"image_proj": Trap(folder / "sprung")}, target / "trap.bin")
    for name, content, message in (
        ("empty.safetensors", b"", "an empty file"),
        ("page.safetensors", b"<!DOCTYPE html><html>", "a web page"),
        ("page.bin", b"\n <html>", "a web page"),
        ("pointer.safetensors", b"version https://git-lfs.github.com/spec/v1\n", "Git LFS"),
        ("short.safetensors", complete[: len(complete) // 2], "cannot be read"),
        ("noise.bin", bytes(range(256)) * 40, "cannot be read"),
        ("nan.safetensors", save(bad), "NaN or infinity"),
        ("other.safetensors", save({"first.weight": torch.zeros(2)}), "no table of this pack knows"),
        ("text.bin", None, "expected named tensors"),
        ("trap.bin", None, "cannot be read"),
    ):
        if content is not None:
            (target / name).write_bytes(content)
        with pytest.raises(ValueError, match=message):
            adapter_loader.load_adapter_file(name)
    assert not (folder / "sprung").exists()


@pytest.mark.parametrize("name", ["gone.safetensors", "../secret.safetensors", "/etc/passwd", ""])
def test_names_stay_in_the_folder(folder: Path, name: str) -> None:
    save_file(make_ip_adapter_tensors("image"), folder / "secret.safetensors")
    with pytest.raises(ValueError, match="could not find .*; expected a file in"):
        adapter_loader.load_adapter_file(name)


def mutate_bytes(content: bytes, rng: random.Random) -> bytes:
    """Damage a file: cut it, change bytes or its header, append bytes, move a block."""
    data = bytearray(content)
    head = min(len(data), 4096)
    mutation = rng.randrange(6)
    if mutation == 0:
        return bytes(data[: rng.randrange(len(data))])
    if mutation == 1:
        for _ in range(rng.randrange(1, 9)):
            data[rng.randrange(len(data))] = rng.randrange(256)
    elif mutation == 2:
        for _ in range(rng.randrange(1, 5)):
            data[rng.randrange(head)] ^= 1 << rng.randrange(8)
    elif mutation == 3:
        data += rng.randbytes(rng.randrange(1, 64))
    elif mutation == 4:
        at = rng.randrange(head)
        data[at : at + rng.randrange(1, 16)] = rng.randbytes(rng.randrange(0, 16))
    else:
        at = rng.randrange(len(data))
        data = data[at:] + data[:at]
    return bytes(data)


@pytest.mark.parametrize("suffix", [".safetensors", ".bin"])
def test_damaged_files_raise_or_load_completely(folder: Path, suffix: str) -> None:
    tensors = {key: value[..., :] for key, value in make_ip_adapter_tensors("image").items()}
    path = folder / "ipadapter" / f"fuzz{suffix}"
    save_file(tensors, path) if suffix == ".safetensors" else torch.save(nest_tensors(tensors), path)
    content, rng = path.read_bytes(), random.Random(11)
    expected = adapter_loader.load_adapter_file(path.name)[0].patcher.model.state_dict().keys()
    refused = 0
    for _ in range(MUTATIONS // 2):
        path.write_bytes(mutate_bytes(content, rng))
        try:
            loaded, _ = adapter_loader.load_adapter_file(path.name)
        except ValueError as error:
            refused += 1
            assert "expected" in str(error), error
        else:
            state = loaded.patcher.model.state_dict()
            assert state.keys() == expected and all(value.isfinite().all() for value in state.values())
    assert refused > MUTATIONS // 10


def test_native_files_are_loaded_by_their_metadata(folder: Path) -> None:
    tensors = make_fused_kv_tensors()
    metadata = fused_kv.make_fused_kv_metadata(make_fused_kv_spec(tensors))
    save_file(tensors, folder / "likeness" / "own.safetensors", metadata)
    loaded, report = adapter_loader.load_adapter_file("own.safetensors")
    assert isinstance(loaded, LoadedFusedKV) and loaded.spec == make_fused_kv_spec(tensors)
    assert report.startswith("own.safetensors: fused KV for SD1.5, 16 cross-attentions")
    data = (folder / "likeness" / "own.safetensors").read_bytes()
    for name, other_metadata, message in (
        ("other", {"likeness": '{"kind": "something"}'}, "kind 'something'; expected fused_kv, infinite_id"),
        ("broken", {"likeness": "{"}, "metadata is damaged"),
        ("list", {"likeness": "[]"}, "metadata is damaged"),
        ("bare", {"likeness": '{"kind": "fused_kv"}'}, "not that of the kind fused_kv"),
        ("none", None, "no table of this pack knows"),
    ):
        save_file(tensors, folder / "likeness" / f"{name}.safetensors", other_metadata)
        with pytest.raises(ValueError, match=message):
            adapter_loader.load_adapter_file(f"{name}.safetensors")
    (folder / "likeness" / "cut.safetensors").write_bytes(data[: len(data) // 2])
    with pytest.raises(ValueError, match="cut short"):
        adapter_loader.load_adapter_file("cut.safetensors")
    tensors["text.hidden"][0, 0] = torch.nan
    save_file(tensors, folder / "likeness" / "nan.safetensors", metadata)
    with pytest.raises(ValueError, match="NaN"):
        adapter_loader.load_adapter_file("nan.safetensors")


def test_flashface_checkpoints_are_refused(folder: Path) -> None:
    torch.save({"ref_encoder.0.weight": torch.zeros(4, 4)}, folder / "likeness" / "flashface.ckpt")
    with pytest.raises(ValueError, match="Load FlashFace"):
        adapter_loader.load_adapter_file("flashface.ckpt")
