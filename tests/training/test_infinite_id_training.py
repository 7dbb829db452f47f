"""Infinite-ID training, with and without text cross-attention, and agreement of the node with training."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import comfy.sd
import pytest
import torch
from comfy.model_patcher import ModelPatcher
from comfyui_likeness.likeness.checkpoints import native_metadata
from comfyui_likeness.likeness.spec import Identity
from comfyui_likeness.nodes import encode
from comfyui_likeness.nodes.attention import apply_mixed
from comfyui_likeness.nodes.attention.patch import attach_injection, training_options
from comfyui_likeness.nodes.loaders import adapter_loader, native_models
from comfyui_likeness.nodes.loaders.face_analyzer import FaceAnalyzer
from comfyui_likeness.nodes.loaders.insightface_networks import InsightfaceRecognizer
from comfyui_likeness.tools.standins import models
from comfyui_likeness.training.adapters import face_encoders, infinite_id
from comfyui_likeness.training.adapters.infinite_id import InfiniteIDTask
from comfyui_likeness.training.base_models import clip_pair, sdxl, unet
from comfyui_likeness.training.data import shard_source
from comfyui_likeness.training.data.shard_source import ShardSource
from comfyui_likeness.training.task import make_generator
from safetensors import safe_open
from support import adaface_models, base_stack
from support.host_models import all_close, make_small_model
from support.infinite_id_adapters import APPLY_MIXED_DEFAULTS
from support.toy_tasks import train_few_steps
from torch import Tensor

CPU = torch.device("cpu")
TEXTS = ("a smiling person", "a bronze statue at a beach")


@pytest.fixture(scope="module")
def stack(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return base_stack.make_base_stack(tmp_path_factory.mktemp("stack"))


def make_task(stack: Path, **options: Any) -> InfiniteIDTask:
    task = base_stack.make_adapter_task("infinite", stack, **options)
    assert isinstance(task, InfiniteIDTask)
    return task


def denoise(model: ModelPatcher, sigma: Tensor, text: Tensor) -> Tensor:
    """The denoised latents of noise [n, 8, 16, 16] at `sigma` [n]."""
    noise = torch.randn(len(sigma), 8, 16, 16, generator=make_generator(3)) * sigma[:, None, None, None]
    with torch.no_grad():
        return model.model.apply_model(noise, sigma, c_crossattn=text, **training_options(model, float(sigma.max())))


def encode_text(task: InfiniteIDTask, text: str, rows: int = 1) -> Tensor:
    return task.frozen.encode_tokens(clip_pair.tokenize_texts(task.tokenizer, [text]), CPU).expand(rows, -1, -1)


def get_sigmas(task: InfiniteIDTask, *timesteps: int) -> Tensor:
    sampling: Any = task.frozen.model.model_sampling
    return sampling.sigma(torch.tensor(timesteps))


@pytest.mark.parametrize("enhanced", [True, False])
def test_only_mappers_and_cross_attention_are_trained(stack: Path, tmp_path: Path, enhanced: bool) -> None:
    tasks: list[InfiniteIDTask] = []

    def make_listed_task() -> InfiniteIDTask:
        tasks.append(make_task(stack, cached_samples=10, identity_enhanced=enhanced))
        return tasks[0]

    options = {"warmup_steps": 0, "sample_every": 8, "ema_decay": 0.0}
    train_few_steps(make_listed_task, tmp_path, steps=8, batch_size=8, learning_rate=5e-3, **options)
    (task,), fresh = tasks, make_task(stack, cached_samples=10, identity_enhanced=enhanced)
    batch = fresh.make_batch(make_generator(9), 8)
    loss = fresh(batch)["noise"]
    assert float(task(batch)["noise"].detach()) < 0.99 * float(loss.detach())
    assert len(list((tmp_path / "samples").glob("images-*.png"))) == 1
    loss.backward()
    weights, trained = base_stack.get_trainable_parameters(fresh), base_stack.get_trainable_parameters(task)
    assert {name.split(".")[1] for name in weights} == {"projector", "layers"}
    assert {".".join(name.split(".")[2:3]) for name in weights if ".projector." in name} == {"clip", "face"}
    assert [name for name, value in weights.items() if value.grad is None or not value.grad.any()] == []
    assert [name for name, value in weights.items() if torch.equal(trained[name], value)] == []
    before, after = fresh.frozen.model.state_dict(), task.frozen.model.state_dict()
    assert all(torch.equal(value, after[name]) for name, value in before.items())


def test_identity_enhanced_training_ignores_the_text(stack: Path) -> None:
    sigma = None
    for enhanced in (True, False):
        task = make_task(stack, identity_enhanced=enhanced)
        patcher = task.frozen.unet_patchers.get_patcher(CPU)
        features = task.read_sample_faces([task.source.load_original_image(4)])
        sigma = get_sigmas(task, 400)
        patched = attach_injection(patcher, task.make_injection(patcher, features))
        first, second = (denoise(patched, sigma, encode_text(task, text)) for text in TEXTS)
        assert all_close(first, second, 1e-5) is enhanced
        batch = task.make_batch(make_generator(2), 12)
        empty = clip_pair.tokenize_texts(task.tokenizer, [""])[0]
        assert all(row == empty for row in batch["tokens"]) is enhanced
    plain = denoise(task.frozen.unet_patchers.get_patcher(CPU), sigma, encode_text(task, TEXTS[0]))
    assert not all_close(plain, first, 1e-3)  # the identity has an effect


def test_text_attention_is_replaced_without_the_output_bias(stack: Path) -> None:
    """With the text's own tokens as the identity's, the output is that of the unpatched model."""
    task = make_task(stack)
    patcher, sigma = task.frozen.unet_patchers.get_patcher(CPU), get_sigmas(task, 300)
    text = encode_text(task, TEXTS[1])
    features = task.read_sample_faces([task.source.load_original_image(4)])
    task.adapter.projector.forward = lambda *_: text  # type: ignore[method-assign]
    injected = attach_injection(patcher, task.make_injection(patcher, features))
    other_text = encode_text(task, TEXTS[0])
    assert all_close(denoise(injected, sigma, other_text), denoise(patcher, sigma, text), 1e-4)


def encode_identity(task: InfiniteIDTask, number: int) -> Identity:
    """The identity that Encode Identity makes of an image with this task's encoders."""
    from insightface.model_zoo import get_model

    sample, face_reader = task.source.load_original_image(number), task.reader.face_reader
    selected, heads = base_stack.make_selected_face(sample), shard_source.crop_head(sample)[None]
    recognizer = InsightfaceRecognizer(get_model(str(face_reader.file), providers=["CPUExecutionProvider"]))
    vectors, hashes = encode.embed_faces([selected], FaceAnalyzer("arcface.demo", face_reader.hash, None, recognizer))
    tower = encode.ClipVisionEncoder(face_encoders.load_clip_vision_file(Path(task.settings.vision)))
    features = encode.encode_image_features([selected], heads, tower, True)
    return Identity(
        name="x", box=torch.zeros(1, 4), kps=torch.zeros(1, 5, 2), score=torch.ones(1), weight=torch.ones(1),
        embeddings=vectors | features.embeddings, zero_embeddings=features.zero_embeddings,
        hashes=hashes | features.hashes,
    )  # fmt: skip


def test_the_node_reproduces_training(stack: Path, folder: Path) -> None:
    task = make_task(stack, identity_enhanced=False)
    task.save_model(folder / "likeness", {"steps": 2})
    loaded, report = adapter_loader.load_adapter_file("made.safetensors")
    assert loaded.spec == task.spec and loaded.spec.tokens == 65 + 4
    assert "Infinite-ID for SD1.5, 69 tokens per face, 16 layers" in report and "steps: 2" in report
    assert "arcface.demo.raw.face112 and clip.vit-128-4-16-128.last.face224" in report
    patcher = task.frozen.unet_patchers.get_patcher(CPU)
    features = task.read_sample_faces([task.source.load_original_image(4)])
    model = ModelPatcher(native_models.load_unet(stack / unet.UNET_FILE), CPU, CPU)
    sigma, text = get_sigmas(task, 400), encode_text(task, TEXTS[0])
    plain = denoise(model, sigma, text)
    expected = denoise(attach_injection(patcher, task.make_injection(patcher, features)), sigma, text)
    moved = (expected - plain).norm()
    assert moved > 1e-2 * plain.norm()
    options = {**APPLY_MIXED_DEFAULTS, "attention": "off"}
    with torch.inference_mode():
        patched = apply_mixed.ApplyMixed.execute(model, loaded, encode_identity(task, 4), **options).args[0]
        assert (denoise(patched, sigma, text) - expected).norm() < 0.02 * moved
    assert torch.equal(denoise(model, sigma, text), plain)


def test_samples_match_the_node_with_a_text_stream(stack: Path, folder: Path) -> None:
    task = make_task(stack)
    task.save_model(folder / "likeness", {"steps": 2})
    loaded, _ = adapter_loader.load_adapter_file("made.safetensors")
    model = ModelPatcher(native_models.load_unet(stack / unet.UNET_FILE), CPU, CPU)
    patcher = task.frozen.unet_patchers.get_patcher(CPU)
    features = task.read_sample_faces([task.source.load_original_image(n) for n in (4, 5)])
    noise = torch.randn(2, 8, 16, 16, generator=make_generator(5))
    prompts = [[[encode_text(task, text), {}]] for text in (TEXTS[0], "")]
    with torch.no_grad():
        sampled = unet.sample_latents(task.apply_adapter(patcher, features), noise, *prompts)
        without_stream = unet.sample_latents(
            attach_injection(patcher, task.make_injection(patcher, features)), noise, *prompts
        )
        for row, number in enumerate((4, 5)):
            node = apply_mixed.ApplyMixed.execute(
                model, loaded, encode_identity(task, number), **APPLY_MIXED_DEFAULTS
            ).args[0]
            assert all_close(unet.sample_latents(node, noise[row : row + 1], *prompts), sampled[row : row + 1], 0.05)
    assert not all_close(sampled, without_stream, 0.05) and not all_close(sampled[:1], sampled[1:], 0.05)


def test_each_row_attends_to_its_own_face(stack: Path) -> None:
    task = make_task(stack)
    patcher, sigma = task.frozen.unet_patchers.get_patcher(CPU), get_sigmas(task, 50, 500, 900)
    with torch.no_grad():
        features = task.read_sample_faces([task.source.load_original_image(number) for number in (4, 5, 6)])
    together = denoise(
        attach_injection(patcher, task.make_injection(patcher, features)), sigma, encode_text(task, "", 3)
    )
    reordered = denoise(
        attach_injection(patcher, task.make_injection(patcher, features[[2, 1, 0]])), sigma, encode_text(task, "", 3)
    )
    assert all_close(reordered[1], together[1], 1e-5) and not all_close(reordered[0], together[0], 1e-3)


def test_conditions_are_dropped_at_the_configured_rates(stack: Path) -> None:
    rates = {"caption_dropout": 0.2, "face_dropout": 0.3, "face_and_caption_dropout": 0.1}
    enhanced, plain = (make_task(stack, cached_samples=10, identity_enhanced=on, **rates) for on in (True, False))
    assert enhanced.dropout_rates == pytest.approx((0.6, 0.0, 0.4)) and plain.dropout_rates == (0.2, 0.3, 0.1)
    batch = enhanced.make_batch(make_generator(2), 500)
    drop_face, features = batch["drop_face"], enhanced.get_face_features(batch)
    assert float(drop_face.float().mean()) == pytest.approx(0.4, abs=0.06)
    assert not features[drop_face].any() and torch.equal(features[~drop_face], batch["face_features"][~drop_face])


def test_cached_samples_give_the_same_loss(stack: Path) -> None:
    cached, uncached = make_task(stack, cached_samples=10), make_task(stack)
    batch, other = cached.make_batch(make_generator(1), 6), uncached.make_batch(make_generator(1), 6)
    assert batch["face_features"].shape == (6, 512 + 65 * 128)
    assert other["face_crops"].shape == (6, 3 * (112**2 + 224**2))
    assert float(cached(batch)["noise"].detach()) == pytest.approx(float(uncached(other)["noise"].detach()), rel=2e-2)


def test_training_on_sdxl(stack: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    clip = adaface_models.make_sdxl_clip()
    text_encoders: Any = clip.cond_stage_model
    text = sdxl.SDXLTextEncoders(text_encoders.clip_l, text_encoders.clip_g)
    denoiser = make_small_model("SDXL", context_dim=64 + 512, adm_in_channels=512 + 6 * 256).model
    autoencoder = comfy.sd.VAE(sd=models.make_taesd(0.13025, prefix="")).first_stage_model
    monkeypatch.setattr(sdxl, "load_sdxl", lambda _: (text, autoencoder, denoiser))
    config = replace(make_task(stack).settings, vae="sdxl", text="sdxl", unet="sdxl")
    task = InfiniteIDTask(config, ShardSource(stack), 5)
    assert task.spec.base == "SDXL" and len(task.spec.layers) == 70 and task.spec.width == 576
    embeddings, pooled = clip.encode_from_tokens(clip.tokenize(TEXTS[0]), return_pooled=True)
    tokens = clip_pair.tokenize_texts(task.tokenizer, [TEXTS[0], TEXTS[1]])
    assert all_close(task.frozen.encode_tokens(tokens, CPU)[:1], embeddings, 1e-5)
    assert all_close(text(tokens)[1][:1], pooled, 1e-5)
    conds = denoiser.extra_conds(pooled_output=pooled, cross_attn=embeddings, width=128, height=128)
    assert all_close(task.frozen.make_model_kwargs(tokens[:1], 128, CPU)["y"], conds["y"].cond, 1e-5)
    task(task.make_batch(make_generator(1), 2))["noise"].backward()
    weights = base_stack.get_trainable_parameters(task)
    assert len(weights) > 140 and [name for name, value in weights.items() if value.grad is None] == []
    with pytest.raises(ValueError, match="expected a checkpoint of SDXL"):
        monkeypatch.undo()
        sdxl.load_sdxl(stack / "none.safetensors")


def test_invalid_configs_and_files_are_rejected(stack: Path, tmp_path: Path) -> None:
    task = make_task(stack)
    with pytest.raises(ValueError, match=r"got unconditional = 'some' in \[task\]; expected zero or none"):
        replace(task.settings, unconditional="some")
    task.save_model(tmp_path, {})
    with safe_open(tmp_path / "made.safetensors", "pt") as opened:
        metadata = json.loads(opened.metadata()["likeness"])
    assert metadata["needs"] == [str(feature) for feature in task.spec.needs] and metadata["clip_tokens"] == 65
    with pytest.raises(ValueError, match="got f, which needs 'face'; expected <network>.<layer>.<crop>"):
        native_metadata.parse_features(["face"], "f")
    assert infinite_id.CROSS_ATTENTION_TERMS[True] is infinite_id.IdentityOnlyTerm
