"""Load FlashFace: all layouts and versions of the file, complete SD1.5 UNets, and damaged files."""

from __future__ import annotations

import random
from collections.abc import Callable
from pathlib import Path

import folder_paths
import pytest
import torch
from comfyui_likeness.likeness.attention.feature_cache import ReferenceFeatureCache
from comfyui_likeness.likeness.methods import flashface
from comfyui_likeness.nodes.loaders import files, flashface_loader
from safetensors.torch import save_file
from support.flashface_models import apply_flashface, load_flashface, make_face_latents, make_flashface_checkpoint
from support.host_models import all_close, make_conditioning, make_small_model, sample_latent
from torch import Tensor

Tensors = dict[str, Tensor]


@pytest.fixture(scope="module")
def checkpoint() -> Tensors:
    return make_flashface_checkpoint("mini32")


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    files.register_model_folders()
    folder_paths.add_model_folder_path("likeness", str(tmp_path), is_default=True)
    return tmp_path


def keep_ori_keys(tensors: Tensors) -> Tensors:
    return {k: v for k, v in tensors.items() if not k.startswith(("encoder.", "middle.", "decoder."))}


def keep_unprefixed_keys(tensors: Tensors) -> Tensors:
    return {k: v for k, v in tensors.items() if not k.startswith("ori_")}


def drop_unused_weights(tensors: Tensors) -> Tensors:
    return {k: v for k, v in tensors.items() if not k.startswith("ref_middle.")}


def randomize_unused_weights(tensors: Tensors) -> Tensors:
    return {k: torch.randn_like(v) if k.startswith("ref_middle.") else v for k, v in tensors.items()}


def randomize_aliases(tensors: Tensors) -> Tensors:
    aliases = ("encoder.", "middle.", "decoder.")
    return {k: torch.randn_like(v) if k.startswith(aliases) else v for k, v in tensors.items()}


def make_lora_version(tensors: Tensors, rank: int = 4) -> Tensors:
    """A LoRA version: the weights of the main UNet replaced by LoRA matrices for its attentions."""
    generator = torch.Generator().manual_seed(3)
    lora = {k: v for k, v in tensors.items() if k.startswith(("ref_", "time_embedding.", "head."))}
    lora |= {k: v for k, v in tensors.items() if k.startswith("ori_") and "self_attn_first" in k}
    for key, value in tensors.items():
        if key.startswith("ori_") and key.endswith("_attn.q.weight"):
            name = key.removesuffix(".weight")
            lora[f"{name}.lora_down.weight"] = torch.randn(rank, value.shape[1], generator=generator)
            lora[f"{name}.lora_up.weight"] = torch.randn(value.shape[0], rank, generator=generator)
    return lora


LAYOUTS: list[Callable[[Tensors], Tensors]] = [
    keep_ori_keys, keep_unprefixed_keys, drop_unused_weights, randomize_unused_weights, randomize_aliases,
]  # fmt: skip


@pytest.mark.parametrize("layout", LAYOUTS, ids=lambda change: change.__name__)
def test_all_layouts_load_the_same_model(checkpoint: Tensors, layout: Callable[[Tensors], Tensors]) -> None:
    model, net = flashface_loader.build_flashface(layout(checkpoint), "a file", ReferenceFeatureCache())
    expected, reference = load_flashface()
    assert torch.equal(sample_latent(model), sample_latent(expected))
    assert torch.equal(sample_latent(apply_flashface(model, net)), sample_latent(apply_flashface(expected, reference)))


@pytest.mark.parametrize("suffix", [".ckpt", ".safetensors"])
def test_both_formats(folder: Path, checkpoint: Tensors, suffix: str) -> None:
    path = folder / f"flashface{suffix}"
    half = {key: value.half() for key, value in keep_ori_keys(checkpoint).items()}
    torch.save(half, path) if suffix == ".ckpt" else save_file(half, path)
    assert path.name in files.list_weight_files(flashface_loader.FLASHFACE_FOLDER)
    model, net = flashface_loader.LoadFlashFace.execute(path.name).args
    assert all_close(sample_latent(model), sample_latent(load_flashface()[0]), 1e-2)
    assert net.file == path.name and net.feature_cache.max_bytes == 1 << 30


def test_shared_weights_are_stored_once() -> None:
    model, net = load_flashface()
    main, reference = (p.model.diffusion_model.state_dict() for p in (model, net.patcher))
    shared = {key for key in reference if main[key].data_ptr() == reference[key].data_ptr()}
    assert shared == {key for key in reference if key.startswith(("time_embed.", "middle_block.", "out."))}


def test_a_lora_does_not_affect_the_reference_net(checkpoint: Tensors) -> None:
    import comfy.sd

    model, net = flashface_loader.build_flashface(checkpoint, "a file", ReferenceFeatureCache())
    before = sample_latent(model)
    key = "diffusion_model.middle_block.1.transformer_blocks.0.attn2.to_v"
    matrices = {f"{key}.lora_down.weight": torch.randn(4, 64), f"{key}.lora_up.weight": torch.randn(128, 4)}
    changed, _ = comfy.sd.load_lora_for_models(model, None, matrices, 1.0, 0.0)
    assert changed is not None
    with_lora, without_lora = (apply_flashface(m, net, make_face_latents(seed=1)) for m in (changed, model))
    expected = sample_latent(without_lora)
    assert not all_close(sample_latent(with_lora), expected, 1e-3)
    net.feature_cache.clear()
    assert torch.equal(sample_latent(without_lora), expected) and torch.equal(sample_latent(model), before)


def test_a_lora_version_works_with_any_base_model(checkpoint: Tensors) -> None:
    base = make_small_model(channel_mult=[1, 2, 4, 4])
    before = sample_latent(base)
    model, net = flashface_loader.build_flashface(
        make_lora_version(checkpoint), "a lora", ReferenceFeatureCache(), base
    )
    assert not all_close(sample_latent(model), before, 1e-3)
    assert not all_close(sample_latent(apply_flashface(model, net)), sample_latent(model), 1e-3)
    assert torch.equal(sample_latent(base), before)
    with pytest.raises(ValueError, match="connect an SD1.5 model"):
        flashface_loader.build_flashface(make_lora_version(checkpoint), "a lora", ReferenceFeatureCache())
    with pytest.raises(ValueError, match="disconnect the model"):
        flashface_loader.build_flashface(checkpoint, "a file", ReferenceFeatureCache(), base)
    with pytest.raises(ValueError, match="added layers"):
        flashface_loader.build_flashface(
            make_lora_version(checkpoint), "a lora", ReferenceFeatureCache(), make_small_model()
        )


def test_an_inpainting_version_reads_the_masked_image(checkpoint: Tensors) -> None:
    tensors = keep_ori_keys(checkpoint)
    first = tensors["ori_encoder.0.weight"]
    tensors["ori_encoder.0.weight"] = torch.cat((first[:, :4], torch.randn(32, 5, 3, 3)), 1)
    model, net = flashface_loader.build_flashface(tensors, "inpainting", ReferenceFeatureCache())
    mask = torch.zeros(1, 64, 64)
    mask[:, :32] = 1
    latent = torch.randn(1, 4, 8, 8)

    def inpaint(masked_latent: Tensor) -> Tensor:
        inpainting = {"concat_latent_image": masked_latent, "concat_mask": mask}
        options = {"positive": make_conditioning(1, **inpainting), "negative": make_conditioning(2, **inpainting)}
        return sample_latent(apply_flashface(model, net), **options)

    output = inpaint(latent)
    inside, outside = latent.clone(), latent.clone()
    inside[:, :, :4] += 1
    outside[:, :, 4:] += 1
    assert output.isfinite().all()
    assert torch.equal(inpaint(inside), output)  # the masked area is hidden
    assert not all_close(inpaint(outside), output, 1e-3)
    assert sample_latent(model).isfinite().all()  # without a masked image


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda t: {k: v for k, v in t.items() if "self_attn_first" not in k}, "self_attn_first"),
        (lambda t: {k: v for k, v in t.items() if k != "ori_decoder.4.0.layer1.0.weight"}, "do not make a UNet"),
        (lambda t: {k: v for k, v in t.items() if k != "ori_decoder.4.0.layer1.2.bias"}, "misses"),
        (lambda t: t | {"ori_decoder.4.0.layer9.weight": torch.ones(1)}, "no table"),
        (lambda t: t | {"ori_decoder.4.0.layer1.0.weight": torch.ones(7)}, "misshapen"),
        (lambda t: {"weight": torch.ones(1)}, "ref_encoder"),
    ],
    ids=["a plain SD1.5", "a layer missing", "one missing", "one unknown", "one misshapen", "foreign"],
)
def test_foreign_and_incomplete_files_are_refused(
    checkpoint: Tensors, change: Callable[[Tensors], Tensors], message: str
) -> None:
    with pytest.raises(ValueError, match=message):
        flashface_loader.build_flashface(change(keep_ori_keys(checkpoint)), "a file", ReferenceFeatureCache())


def test_damaged_files_are_refused(folder: Path, checkpoint: Tensors) -> None:
    """No mutation of a file crashes, is executed, or loads partially."""
    path = folder / "flashface.ckpt"
    torch.save(keep_ori_keys(checkpoint), path)
    content, rng = path.read_bytes(), random.Random(5)
    directory_start = len(content) - 400_000  # the pickle and the zip's directory lie at the ends
    for _ in range(24):
        damaged = bytearray(content[: rng.randrange(len(content))] if rng.random() < 0.3 else content)
        for _ in range(8):
            at = rng.choice((rng.randrange(4096), rng.randrange(directory_start, len(content))))
            if at < len(damaged):
                damaged[at] = rng.randrange(256)
        path.write_bytes(damaged)
        try:
            model, _ = flashface_loader.load_flashface(path.name, None, 0)
        except ValueError:
            continue
        assert set(model.model.diffusion_model.state_dict()) == set(
            load_flashface()[0].model.diffusion_model.state_dict()
        )
    path.write_bytes(b"<html>")
    with pytest.raises(ValueError, match="web page"):
        flashface_loader.load_flashface(path.name, None, 0)
    torch.save(keep_ori_keys(checkpoint) | {"head.0.weight": torch.full((32,), float("nan"))}, path)
    with pytest.raises(ValueError, match="NaN"):
        flashface_loader.load_flashface(path.name, None, 0)


def test_feature_cache_is_bounded() -> None:
    cpu, computed = torch.device("cpu"), list[int]()

    def compute(i: int) -> Callable[[], dict[str, Tensor]]:
        return lambda: computed.append(i) or {"x": torch.full((256,), float(i))}

    cache = ReferenceFeatureCache(max_bytes=3 * 1024)
    for i in (1, 2, 3, 1, 4):  # 2 was used least recently
        assert float(cache.get_or_compute(i, cpu, compute(i))["x"][0]) == i
    assert computed == [1, 2, 3, 4] and 2 not in cache and len(cache) == 3 and cache.size_bytes == 3 * 1024
    without_memory = ReferenceFeatureCache(max_bytes=1 << 20, get_free_memory=lambda: 0)
    without_memory.get_or_compute(1, cpu, compute(1))
    assert len(without_memory) == 0
    empty = ReferenceFeatureCache(max_bytes=0)
    empty.get_or_compute(1, cpu, compute(1))
    assert len(empty) == 0


def test_repeated_references() -> None:
    assert (
        flashface.repeat_reference_indices(3, 4) == [0, 1, 2, 0]
        and flashface.repeat_reference_indices(5, 4) == [0, 1, 2, 3, 4]
        and flashface.repeat_reference_indices(1, 1) == [0]
    )
