"""Load FlashFace: every spelling and version of the file, two whole UNets of the host, and what bad files get."""

from __future__ import annotations

import random
from collections.abc import Callable
from pathlib import Path
from typing import Any

import folder_paths
import pytest
import torch
from comfyui_likeness.likeness import flashface as math
from comfyui_likeness.likeness.bank import MemoryBank
from comfyui_likeness.nodes.loaders import files
from comfyui_likeness.nodes.loaders import flashface as loader
from flashfaces import checkpoint, latents, loaded, referenced
from models import close, patcher, prompt, sample
from safetensors.torch import save_file
from torch import Tensor

Tensors = dict[str, Tensor]


@pytest.fixture(scope="module")
def whole() -> Tensors:
    return checkpoint("mini32")


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    files.register()
    folder_paths.add_model_folder_path("likeness", str(tmp_path), is_default=True)
    return tmp_path


def only_ori(tensors: Tensors) -> Tensors:
    return {k: v for k, v in tensors.items() if not k.startswith(("encoder.", "middle.", "decoder."))}


def only_bare(tensors: Tensors) -> Tensors:
    return {k: v for k, v in tensors.items() if not k.startswith("ori_")}


def without_dead_weights(tensors: Tensors) -> Tensors:
    return {k: v for k, v in tensors.items() if not k.startswith("ref_middle.")}


def other_dead_weights(tensors: Tensors) -> Tensors:
    return {k: torch.randn_like(v) if k.startswith("ref_middle.") else v for k, v in tensors.items()}


def stale_aliases(tensors: Tensors) -> Tensors:
    stale = ("encoder.", "middle.", "decoder.")
    return {k: torch.randn_like(v) if k.startswith(stale) else v for k, v in tensors.items()}


def lora(tensors: Tensors, rank: int = 4) -> Tensors:
    """A LoRA version: the main UNet's weights replaced by matrices for its attentions."""
    generator = torch.Generator().manual_seed(3)
    out = {k: v for k, v in tensors.items() if k.startswith(("ref_", "time_embedding.", "head."))}
    out |= {k: v for k, v in tensors.items() if k.startswith("ori_") and "self_attn_first" in k}
    for key, value in tensors.items():
        if key.startswith("ori_") and key.endswith("_attn.q.weight"):
            name = key.removesuffix(".weight")
            out[f"{name}.lora_down.weight"] = torch.randn(rank, value.shape[1], generator=generator)
            out[f"{name}.lora_up.weight"] = torch.randn(value.shape[0], rank, generator=generator)
    return out


SPELLINGS: list[Callable[[Tensors], Tensors]] = [
    only_ori, only_bare, without_dead_weights, other_dead_weights, stale_aliases,
]  # fmt: skip


@pytest.mark.parametrize("spelling", SPELLINGS, ids=lambda change: change.__name__)
def test_every_spelling_is_the_same_model(whole: Tensors, spelling: Callable[[Tensors], Tensors]) -> None:
    model, net = loader.build(spelling(whole), "a file", MemoryBank())
    expected, reference = loaded()
    assert torch.equal(sample(model), sample(expected))
    assert torch.equal(sample(referenced(model, net)), sample(referenced(expected, reference)))


@pytest.mark.parametrize("suffix", [".ckpt", ".safetensors"])
def test_both_formats(folder: Path, whole: Tensors, suffix: str) -> None:
    path = folder / f"flashface{suffix}"
    half = {key: value.half() for key, value in only_ori(whole).items()}
    torch.save(half, path) if suffix == ".ckpt" else save_file(half, path)
    assert path.name in files.names(loader.FOLDER)
    model, net = loader.LoadFlashFace.execute(path.name).args
    assert close(sample(model), sample(loaded()[0]), 1e-2)
    assert net.file == path.name and net.bank.limit == 1 << 30


def test_what_both_unets_share_is_stored_once() -> None:
    model, net = loaded()
    own, theirs = (p.model.diffusion_model.state_dict() for p in (model, net.patcher))
    shared = {key for key in theirs if own[key].data_ptr() == theirs[key].data_ptr()}
    assert shared == {key for key in theirs if key.startswith(("time_embed.", "middle_block.", "out."))}


def test_a_lora_on_the_model_leaves_the_reference_net_alone(whole: Tensors) -> None:
    import comfy.sd

    model, net = loader.build(whole, "a file", MemoryBank())
    before = sample(model)
    key = "diffusion_model.middle_block.1.transformer_blocks.0.attn2.to_v"
    matrices = {f"{key}.lora_down.weight": torch.randn(4, 64), f"{key}.lora_up.weight": torch.randn(128, 4)}
    changed, _ = comfy.sd.load_lora_for_models(model, None, matrices, 1.0, 0.0)
    assert changed is not None
    mine, theirs = (referenced(m, net, latents(seed=1)) for m in (changed, model))
    seen = sample(theirs)
    assert not close(sample(mine), seen, 1e-3)
    net.bank.clear()
    assert torch.equal(sample(theirs), seen) and torch.equal(sample(model), before)


def test_a_lora_version_takes_any_base(whole: Tensors) -> None:
    base = patcher(channel_mult=[1, 2, 4, 4])
    before = sample(base)
    model, net = loader.build(lora(whole), "a lora", MemoryBank(), base)
    assert not close(sample(model), before, 1e-3)
    assert not close(sample(referenced(model, net)), sample(model), 1e-3)
    assert torch.equal(sample(base), before)
    with pytest.raises(ValueError, match="connect an SD1.5 model"):
        loader.build(lora(whole), "a lora", MemoryBank())
    with pytest.raises(ValueError, match="disconnect the model"):
        loader.build(whole, "a file", MemoryBank(), base)
    with pytest.raises(ValueError, match="added layers"):
        loader.build(lora(whole), "a lora", MemoryBank(), patcher())


def test_an_inpainting_version_reads_the_picture_around_the_face(whole: Tensors) -> None:
    tensors = only_ori(whole)
    first = tensors["ori_encoder.0.weight"]
    tensors["ori_encoder.0.weight"] = torch.cat((first[:, :4], torch.randn(32, 5, 3, 3)), 1)
    model, net = loader.build(tensors, "inpainting", MemoryBank())
    mask = torch.zeros(1, 64, 64)
    mask[:, :32] = 1
    around = torch.randn(1, 4, 8, 8)

    def painted(latent: Tensor) -> Tensor:
        given = {"concat_latent_image": latent, "concat_mask": mask}
        options = {"positive": prompt(1, **given), "negative": prompt(2, **given)}
        return sample(referenced(model, net), **options)

    out = painted(around)
    inside, outside = around.clone(), around.clone()
    inside[:, :, :4] += 1
    outside[:, :, 4:] += 1
    assert out.isfinite().all()
    assert torch.equal(painted(inside), out)  # what was there is hidden
    assert not close(painted(outside), out, 1e-3)
    assert sample(model).isfinite().all()  # without a picture: all is to be painted


@pytest.mark.parametrize(
    ("change", "says"),
    [
        (lambda t: {k: v for k, v in t.items() if "self_attn_first" not in k}, "self_attn_first"),
        (lambda t: {k: v for k, v in t.items() if k != "ori_decoder.4.0.layer1.0.weight"}, "make no UNet"),
        (lambda t: {k: v for k, v in t.items() if k != "ori_decoder.4.0.layer1.2.bias"}, "misses"),
        (lambda t: t | {"ori_decoder.4.0.layer9.weight": torch.ones(1)}, "no table"),
        (lambda t: t | {"ori_decoder.4.0.layer1.0.weight": torch.ones(7)}, "misshapen"),
        (lambda t: {"weight": torch.ones(1)}, "ref_encoder"),
    ],
    ids=["a plain SD1.5", "a layer missing", "one missing", "one unknown", "one misshapen", "foreign"],
)
def test_other_files_are_refused(whole: Tensors, change: Callable[[Tensors], Tensors], says: str) -> None:
    with pytest.raises(ValueError, match=says):
        loader.build(change(only_ori(whole)), "a file", MemoryBank())


def test_broken_files_are_refused(folder: Path, whole: Tensors) -> None:
    """No mutation of a file crashes, is run, or loads in part."""
    path = folder / "flashface.ckpt"
    torch.save(only_ori(whole), path)
    good, numbers = path.read_bytes(), random.Random(5)
    headers = len(good) - 400_000  # the pickle and the zip's directory lie at the ends
    for _ in range(24):
        broken = bytearray(good[: numbers.randrange(len(good))] if numbers.random() < 0.3 else good)
        for _ in range(8):
            at = numbers.choice((numbers.randrange(4096), numbers.randrange(headers, len(good))))
            if at < len(broken):
                broken[at] = numbers.randrange(256)
        path.write_bytes(broken)
        try:
            model, _ = loader.load(path.name, None, 0)
        except ValueError:
            continue
        assert set(model.model.diffusion_model.state_dict()) == set(loaded()[0].model.diffusion_model.state_dict())
    path.write_bytes(b"<html>")
    with pytest.raises(ValueError, match="web page"):
        loader.load(path.name, None, 0)
    torch.save(only_ori(whole) | {"head.0.weight": torch.full((32,), float("nan"))}, path)
    with pytest.raises(ValueError, match="NaN"):
        loader.load(path.name, None, 0)


def test_the_bank_is_bounded_and_gives_way() -> None:
    cpu, made = torch.device("cpu"), list[int]()

    def make(i: int) -> Callable[[], dict[str, Tensor]]:
        return lambda: made.append(i) or {"x": torch.full((256,), float(i))}

    bank: Any = MemoryBank(limit=3 * 1024)
    for i in (1, 2, 3, 1, 4):  # 2 was used least recently
        assert float(bank.get(i, cpu, make(i))["x"][0]) == i
    assert made == [1, 2, 3, 4] and 2 not in bank and len(bank) == 3 and bank.bytes == 3 * 1024
    short = MemoryBank(limit=1 << 20, free=lambda: 0)
    short.get(1, cpu, make(1))
    assert len(short) == 0
    none = MemoryBank(limit=0)
    none.get(1, cpu, make(1))
    assert len(none) == 0


def test_repeats() -> None:
    assert math.repeats(3, 4) == [0, 1, 2, 0] and math.repeats(5, 4) == [0, 1, 2, 3, 4] and math.repeats(1, 1) == [0]
