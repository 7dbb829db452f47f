"""Adapter training: gradients, output files, and agreement of the nodes with training."""

from __future__ import annotations

import shutil
from dataclasses import fields, replace
from pathlib import Path
from typing import Any

import pytest
import torch
from comfy.model_patcher import ModelPatcher
from comfyui_likeness.likeness.checkpoints import native_decoupled
from comfyui_likeness.likeness.spec import Feature, Identity
from comfyui_likeness.nodes import encode
from comfyui_likeness.nodes.attention import apply_decoupled, apply_fused
from comfyui_likeness.nodes.attention.injection import Injection, RunCache
from comfyui_likeness.nodes.attention.patch import attach_injection, training_options
from comfyui_likeness.nodes.loaders import adapter_loader, native_models, native_vae, omni_id_loader
from comfyui_likeness.nodes.loaders.face_analyzer import FaceAnalyzer
from comfyui_likeness.nodes.loaders.insightface_networks import InsightfaceRecognizer
from comfyui_likeness.training.adapters import decoupled, face_encoders
from comfyui_likeness.training.adapters.adapter_task import AdapterTask
from comfyui_likeness.training.base_models import clip_pair, unet
from comfyui_likeness.training.data import shard_source
from comfyui_likeness.training.data.clusters import AnnotatedImage
from comfyui_likeness.training.data.shard_source import ShardSource
from comfyui_likeness.training.omni_id import encoder
from comfyui_likeness.training.task import make_generator
from safetensors.torch import load_file, save_file
from support import base_stack
from support.toy_tasks import DISC_WORLD, train_few_steps
from torch import Tensor

CPU = torch.device("cpu")
KINDS = ["arcface", "image", "omni", "clean", "match"]  # adapters that are trained exactly as the nodes apply them
APPLY: dict[str, Any] = {"strength": 1.0, "start_percent": 0.0, "end_percent": 1.0}


@pytest.fixture(scope="module")
def stack(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return base_stack.make_base_stack(tmp_path_factory.mktemp("stack"))


def loss(task: AdapterTask[Any], rows: int = 8) -> Tensor:
    return task(task.make_batch(make_generator(9), rows))["noise"]


def denoise(model: ModelPatcher, sigma: Tensor, text: Tensor) -> Tensor:
    """The denoised latents of noise [n, 8, 16, 16] at `sigma` [n]."""
    noise = torch.randn(len(sigma), 8, 16, 16, generator=make_generator(3)) * sigma[:, None, None, None]
    with torch.no_grad():
        return model.model.apply_model(noise, sigma, c_crossattn=text, **training_options(model, float(sigma.max())))


def encode_text(task: AdapterTask[Any], rows: int) -> Tensor:
    text = task.frozen.encode_tokens(clip_pair.tokenize_texts(task.tokenizer, ["a smiling person"]), CPU)
    return text.expand(rows, -1, -1)


@pytest.mark.parametrize("kind", KINDS)
def test_only_the_adapter_is_trained(stack: Path, tmp_path: Path, kind: str) -> None:
    tasks: list[AdapterTask[Any]] = []

    def make_task() -> AdapterTask[Any]:
        tasks.append(base_stack.make_adapter_task(kind, stack, cached_samples=10))
        return tasks[0]

    options = {"warmup_steps": 0, "sample_every": 8, "ema_decay": 0.0}
    train_few_steps(make_task, tmp_path, steps=8, batch_size=8, learning_rate=5e-3, **options)
    (task,), fresh = tasks, base_stack.make_adapter_task(kind, stack, cached_samples=10)
    assert float(loss(task).detach()) < 0.99 * float(loss(fresh).detach())
    assert len(list((tmp_path / "samples").glob("images-*.png"))) == 1
    loss(fresh).backward()
    weights = base_stack.get_trainable_parameters(fresh)
    assert all(name.startswith("adapter.") for name in weights)
    assert [name for name, value in weights.items() if value.grad is None or not value.grad.any()] == []
    trained = base_stack.get_trainable_parameters(task)
    assert [name for name, value in weights.items() if torch.equal(trained[name], value)] == []
    before, after = fresh.frozen.model.state_dict(), task.frozen.model.state_dict()
    assert all(torch.equal(value, after[name]) for name, value in before.items())
    assert not any(value.requires_grad for value in task.frozen.model.parameters())


@torch.no_grad()
def encode_samples(task: AdapterTask[Any], *samples: AnnotatedImage) -> Tensor:
    """The face features that an adapter is bound to, one sample per row."""
    drop_face = torch.zeros(len(samples), dtype=torch.bool)
    return task.get_face_features({"face_features": task.read_sample_faces(samples), "drop_face": drop_face})


def encode_identity(task: AdapterTask[Any], sample: AnnotatedImage) -> Identity:
    """The identity that Encode Identity makes of an image with this task's encoder."""
    selected = base_stack.make_selected_face(sample)
    heads = shard_source.crop_head(sample)[None]
    identity = Identity("x", torch.zeros(1, 4), torch.zeros(1, 5, 2), torch.ones(1), torch.ones(1), heads)
    reader = task.reader
    if isinstance(reader, face_encoders.ArcFaceReader):
        from insightface.model_zoo import get_model

        network = get_model(str(reader.file), providers=["CPUExecutionProvider"])
        analyzer = FaceAnalyzer("arcface.demo", reader.hash, None, InsightfaceRecognizer(network))
        vectors, hashes = encode.embed_faces([selected], analyzer)
        return replace(identity, embeddings=vectors, hashes=hashes)
    if isinstance(reader, face_encoders.CLIPVisionReader):
        tower = encode.ClipVisionEncoder(face_encoders.load_clip_vision_file(Path(task.settings.encoder)))
        features = encode.encode_image_features([selected], heads, tower, True)
        return replace(
            identity, embeddings=features.embeddings, zero_embeddings=features.zero_embeddings, hashes=features.hashes
        )
    if isinstance(reader, face_encoders.OmniIDReader):
        loaded = omni_id_loader.load_omni_id_encoder(Path(task.settings.encoder).name)
        tokens, hashes = encode.encode_joint_tokens([selected], loaded)
        return replace(identity, joint_embeddings=tokens, hashes=hashes)
    return identity


def apply_with_node(
    task: AdapterTask[Any], model: ModelPatcher, file: str, identity: Identity, **changes: Any
) -> ModelPatcher:
    """The model with an adapter file applied by the nodes."""
    loaded, report = adapter_loader.load_adapter_file(file)
    assert "16" in report and "steps: 2" in report
    options = {**APPLY, **changes}
    if isinstance(task, decoupled.DecoupledTask):
        node = apply_decoupled.ApplyDecoupled
        return node.execute(model, loaded, identity, layer_weights="linear", scaling="V only", **options).args[0]
    vae = native_vae.wrap_vae(native_models.load_vae(Path(task.settings.vae)))
    return apply_fused.ApplyFused.execute(model, loaded, identity, vae, outside="all", **options).args[0]


@pytest.mark.parametrize("kind", KINDS)
def test_the_nodes_reproduce_training(stack: Path, folder: Path, kind: str) -> None:
    task = base_stack.make_adapter_task(kind, stack)
    shutil.copy(stack / encoder.ENCODER_FILE, folder / "likeness")
    task.save_model(folder / ("ipadapter" if kind in ("arcface", "image") else "likeness"), {"steps": 2})
    sample = task.source.load_original_image(4)
    features = encode_samples(task, sample)
    model = ModelPatcher(native_models.load_unet(stack / unet.UNET_FILE), CPU, CPU)
    text, sigma = encode_text(task, 1), task.frozen.model.model_sampling.sigma(torch.tensor([400]))
    patcher = task.frozen.unet_patchers.get_patcher(CPU)
    expected = denoise(attach_injection(patcher, task.make_injection(patcher, features)), sigma, text)
    plain = denoise(model, sigma, text)
    # The adapter's effect on the output is the scale for the comparison.
    moved = (expected - plain).norm()
    assert moved > 1e-2 * plain.norm()
    identity = encode_identity(task, sample)
    with torch.inference_mode():
        denoised = denoise(apply_with_node(task, model, "made.safetensors", identity), sigma, text)
    assert (denoised - expected).norm() < 0.02 * moved
    assert apply_with_node(task, model, "made.safetensors", identity, strength=0.0) is model
    assert torch.equal(denoise(model, sigma, text), plain)


def bind_one_face(task: AdapterTask[Any], face_features: Tensor) -> Injection:
    """The adapter bound to one face as the nodes bind it, not by batch row."""
    injection: Any = task.make_injection(task.frozen.unet_patchers.get_patcher(CPU), face_features)
    if isinstance(injection, apply_decoupled.DecoupledTerm):
        return replace(injection, unfold=False, run_cache=RunCache())
    values = {field.name: getattr(injection, field.name) for field in fields(injection)}
    return apply_fused.FusedKVExtension(**{**values, "run_cache": RunCache()})


@pytest.mark.parametrize("kind", KINDS)
def test_each_row_attends_to_its_own_face_at_its_own_noise_level(stack: Path, kind: str) -> None:
    task = base_stack.make_adapter_task(kind, stack)
    patcher = task.frozen.unet_patchers.get_patcher(CPU)
    features = encode_samples(task, *(task.source.load_original_image(number) for number in (0, 1, 2)))
    sigma = task.frozen.model.model_sampling.sigma(torch.tensor([50, 500, 900]))
    text = encode_text(task, 3)
    together = denoise(attach_injection(patcher, task.make_injection(patcher, features)), sigma, text)
    noise = torch.randn(3, 8, 16, 16, generator=make_generator(3)) * sigma[:, None, None, None]
    for row in range(3):
        patched = attach_injection(patcher, bind_one_face(task, features[row : row + 1]))
        row_sigma = sigma[row : row + 1]
        with torch.no_grad():
            single = patcher.model.apply_model(
                noise[row : row + 1], row_sigma, c_crossattn=text[:1], **training_options(patched, float(row_sigma))
            )
        assert torch.allclose(together[row], single[0], atol=2e-4 * float(single.abs().max()))
    reordered = denoise(attach_injection(patcher, task.make_injection(patcher, features[[2, 1, 0]])), sigma, text)
    assert torch.equal(reordered[1], together[1]) or torch.allclose(reordered[1], together[1], atol=1e-5)
    assert not torch.allclose(reordered[0], together[0], atol=1e-3)


@pytest.mark.parametrize("kind", ["arcface", "image", "omni", "clean"])
def test_cached_samples_are_computed_once_and_give_the_same_loss(stack: Path, kind: str) -> None:
    cached = base_stack.make_adapter_task(kind, stack, cached_samples=10)
    uncached = base_stack.make_adapter_task(kind, stack)
    batch, other = cached.make_batch(make_generator(1), 6), uncached.make_batch(make_generator(1), 6)
    assert {"latents", "face_features"} <= set(batch) and {"images", "face_crops"} <= set(other)
    assert batch["tokens"] == other["tokens"] and torch.equal(batch["noise"], other["noise"])
    assert float(cached(batch)["noise"].detach()) == pytest.approx(float(uncached(other)["noise"].detach()), rel=2e-2)
    files = list(stack.glob("faces-*/*.safetensors"))
    stamps = {file: file.stat().st_mtime_ns for file in files}
    again = base_stack.make_adapter_task(kind, stack, cached_samples=10)
    assert files and {file: file.stat().st_mtime_ns for file in stack.glob("faces-*/*.safetensors")} == stamps
    assert all(
        torch.equal(value, again.frozen.cached_faces[number]) for number, value in cached.frozen.cached_faces.items()
    )


def test_the_face_comes_from_another_image_of_the_person(stack: Path) -> None:
    task = base_stack.make_adapter_task("arcface", stack)
    source = task.source
    assert isinstance(source, ShardSource)
    assert task.clusters == [[0, 4, 7], [1, 5, 8], [2, 6, 9]]  # 3 is the pair's
    assert source.list_clusters(7, 9, 9) == [[0, 4], [1, 5], [2, 6]] and source.list_clusters(10, 2, 2) == [
        [0, 4],
        [1, 5],
    ]
    assert source.list_clusters(4, 9, 9) == []
    pairs: list[list[int]] = []
    load_inputs = task._load_inputs

    def record_pairs(targets: list[int], faces: list[int]) -> dict[str, Tensor]:
        pairs.extend([*pair] for pair in zip(targets, faces, strict=True))
        return load_inputs(targets, faces)

    task._load_inputs = record_pairs  # type: ignore[method-assign]
    task.make_batch(make_generator(1), 150)
    of = {number: person for person, numbers in enumerate(task.clusters) for number in numbers}
    assert all(a != b and of[a] == of[b] for a, b in pairs) and len({tuple(pair) for pair in pairs}) == 18
    pairs.clear()
    task.settings = replace(task.settings, face_from_other_image=False)
    task.make_batch(make_generator(1), 20)
    assert all(a == b for a, b in pairs)


def test_conditions_are_dropped_at_the_configured_rates(stack: Path) -> None:
    rates = {"caption_dropout": 0.2, "face_dropout": 0.3, "face_and_caption_dropout": 0.1}
    task = base_stack.make_adapter_task("arcface", stack, cached_samples=10, **rates)
    batch = task.make_batch(make_generator(2), 1000)
    empty = clip_pair.tokenize_texts(task.tokenizer, [""])[0]
    drop_caption = torch.tensor([row == empty for row in batch["tokens"]])
    drop_face = batch["drop_face"]
    found = [(drop_caption & ~drop_face), (drop_face & ~drop_caption), (drop_caption & drop_face)]
    assert [float(mask.float().mean()) for mask in found] == pytest.approx([0.2, 0.3, 0.1], abs=0.04)
    features = task.get_face_features(batch)
    assert not features[drop_face].any() and torch.equal(features[~drop_face], batch["face_features"][~drop_face])
    image = base_stack.make_adapter_task("image", stack, cached_samples=10, **rates)
    batch = image.make_batch(make_generator(2), 12)
    dropped = image.get_face_features(batch)[batch["drop_face"]]
    reader: Any = image.reader
    assert len(dropped) and torch.equal(dropped, reader.make_uncond_features().expand_as(dropped))
    fused = base_stack.make_adapter_task("clean", stack, cached_samples=10)
    assert not fused.make_batch(make_generator(2), 200)["drop_face"].any()


def test_heads_have_a_larger_loss_weight(stack: Path) -> None:
    plain, task = (
        base_stack.make_adapter_task("arcface", stack, cached_samples=10, face_loss_weight=weight)
        for weight in (1.0, 3.0)
    )
    batch = task.make_batch(make_generator(2), 6)
    assert "loss_weights" not in plain.make_batch(make_generator(2), 6)
    size = task.settings.resolution
    samples = [task.source.load_annotated_image(index, size) for index in batch["target_indices"]]
    expected = torch.stack([unet.compute_loss_weights(sample, 3.0) for sample in samples])
    assert torch.equal(batch["loss_weights"], expected)
    assert float(loss(task).detach()) != float(loss(plain).detach())


def test_an_interrupted_run_resumes_to_the_same_weights(stack: Path, tmp_path: Path) -> None:
    options: dict[str, Any] = {"steps": 6, "batch_size": 4, "warmup_steps": 0, "save_every": 2}

    def make_task() -> AdapterTask[Any]:
        return base_stack.make_adapter_task("image", stack, cached_samples=10)

    def make_interrupted_task() -> AdapterTask[Any]:
        task, num_batches = make_task(), [0]

        def interrupt(*_: Any) -> None:
            num_batches[0] += 1
            if num_batches[0] == 4:
                raise KeyboardInterrupt

        task.register_forward_pre_hook(interrupt)
        return task

    uninterrupted, _ = train_few_steps(make_task, tmp_path / "uninterrupted", **options)
    with pytest.raises(KeyboardInterrupt):
        train_few_steps(make_interrupted_task, tmp_path / "interrupted", **options)
    resumed, _ = train_few_steps(make_task, tmp_path / "interrupted", **options)
    a, b = (load_file(model_folder / "made.safetensors") for model_folder in (uninterrupted, resumed))
    assert a.keys() == b.keys() and all(torch.equal(value, b[name]) for name, value in a.items())
    assert "image_proj.latents" in a and "ip_adapter.31.to_v_ip.weight" in a


@pytest.mark.parametrize("kind", [*KINDS, "infinite"])
def test_an_adapter_starts_from_a_file(stack: Path, tmp_path: Path, kind: str) -> None:
    """All trained tensors are loaded, and no others."""
    first, plain = base_stack.make_adapter_task(kind, stack), base_stack.make_adapter_task(kind, stack)
    with torch.no_grad():
        for value in base_stack.get_trainable_parameters(first).values():
            value.add_(torch.randn(value.shape, generator=make_generator(7)).to(value) * 0.01)
    first.save_model(tmp_path, {})
    (file,) = tmp_path.glob("*.safetensors")
    second = type(plain)(replace(plain.settings, init_from=str(file)), plain.source, 5)
    saved, loaded = base_stack.get_trainable_parameters(first), base_stack.get_trainable_parameters(second)
    assert saved.keys() == loaded.keys() and saved
    assert all(torch.equal(loaded[name], saved[name].half().float()) for name in saved)
    others = {name: value for name, value in second.state_dict().items() if name not in loaded}
    assert all(torch.equal(value, plain.state_dict()[name]) for name, value in others.items())
    key, value = max(load_file(file).items(), key=lambda item: item[1].numel())
    save_file({**load_file(file), key: value[:1]}, tmp_path / "short.safetensors")
    with pytest.raises(ValueError, match=f"short.safetensors, in which {key} has the shape .* expected the shape"):
        type(plain)(replace(plain.settings, init_from=str(tmp_path / "short.safetensors")), plain.source, 5)
    file.write_bytes(file.read_bytes()[:-100])
    with pytest.raises(ValueError, match=f"got {file} .*; expected an adapter file of another run"):
        type(plain)(replace(plain.settings, init_from=str(file)), plain.source, 5)


def test_invalid_configs_are_rejected(stack: Path, tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=r"as data in \[run\]; expected a folder of shards"):
        decoupled.DecoupledTask(base_stack.make_adapter_task("arcface", stack).settings, DISC_WORLD, 0)
    with pytest.raises(ValueError, match="got no person with two images among the first 4;"):
        base_stack.make_adapter_task("clean", stack, cached_samples=4)
    with pytest.raises(ValueError, match=r"got encoder_type = 'voice' in \[task\]; expected arcface or image or omni"):
        replace(base_stack.make_adapter_task("arcface", stack).settings, encoder_type="voice")
    with pytest.raises(ValueError, match=r"got stream_noise = 'loud' in \[task\]; expected match or clean"):
        replace(base_stack.make_adapter_task("clean", stack).settings, stream_noise="loud")
    with pytest.raises(ValueError, match="which does not exist; expected a face recognizer"):
        face_encoders.ArcFaceReader(tmp_path / "none.onnx", "demo")
    with pytest.raises(ValueError, match="expected a vision tower; fetch or train it"):
        face_encoders.load_clip_vision_file(stack / clip_pair.TEXT_FILE)


def test_the_metadata_of_a_trained_file_is_validated(stack: Path, folder: Path) -> None:
    task = base_stack.make_adapter_task("image", stack)
    assert isinstance(task, decoupled.DecoupledTask)
    task.save_model(folder / "ipadapter", {"steps": 2})
    loaded, report = adapter_loader.load_adapter_file("made.safetensors")
    assert loaded.spec == task.spec and loaded.spec.needs == (Feature("clip.vit-128-4-16-128", "penultimate", "head"),)
    assert "IP-Adapter Plus-Face for SD1.5, 4 tokens per face, 16 layers" in report
    tensors = load_file(folder / "ipadapter" / "made.safetensors")
    metadata = {
        "kind": "decoupled",
        "version": 1,
        "base": "SD1.5",
        "notes": {},
        "adapter": "plus",
        "needs": ["omni_id.a.b"],
    }
    renamed = {f"layers.{n}.{part}.weight": torch.zeros(8, 8) for n in range(1, 32, 2) for part in "kv"}
    with pytest.raises(ValueError, match=r"got f without projector.latents; expected a whole projector"):
        native_decoupled.read_native_decoupled_spec(renamed, metadata, "f")
    with pytest.raises(ValueError, match="adapter 'pulid'"):
        native_decoupled.read_native_decoupled_spec(renamed, {**metadata, "adapter": "pulid"}, "f")
    complete = renamed | {
        name: torch.zeros(1, 4, 8) for name in native_decoupled.NATIVE_SIGNATURES["plus"].required_tensors
    }
    with pytest.raises(ValueError, match="got f, which needs 'face'; expected <network>.<layer>.<crop>"):
        native_decoupled.read_native_decoupled_spec(complete, {**metadata, "needs": ["face"]}, "f")
    with pytest.raises(ValueError, match="got f, whose projector is misshapen; expected that of plus"):
        native_decoupled.read_native_decoupled_spec({**complete, "projector.latents": torch.zeros(4)}, metadata, "f")
    assert native_decoupled.read_native_decoupled_spec(complete, metadata, "f").tokens == 4 and len(tensors) > 40
