"""FlashFace training: trained parameters, faces per row, and agreement of the nodes with training."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from comfy.model_base import ModelType
from comfy.model_patcher import ModelPatcher
from comfyui_likeness.likeness.checkpoints import native_flashface
from comfyui_likeness.likeness.faces import alignment, reference_faces
from comfyui_likeness.likeness.spec import FlashFaceSpec, Identity
from comfyui_likeness.nodes.attention.flashface.apply_reference import ApplyReference
from comfyui_likeness.nodes.attention.patch import attach_injection, training_options
from comfyui_likeness.nodes.loaders import adapter_loader, native_models, native_vae
from comfyui_likeness.nodes.loaders.flashface_loader import LoadFlashFace
from comfyui_likeness.training import task_registry
from comfyui_likeness.training.adapters.flashface import (
    ADDED_LAYER_PLACEMENTS,
    INPUT_CONV_WEIGHT,
    FlashFaceConfig,
    FlashFaceTask,
)
from comfyui_likeness.training.base_models import clip_pair, latents, unet
from comfyui_likeness.training.data.clusters import crop_and_resize
from comfyui_likeness.training.data.shard_source import ShardSource
from comfyui_likeness.training.task import make_generator
from safetensors.torch import load_file
from support import base_stack
from support.toy_tasks import train_few_steps
from torch import Tensor

CPU = torch.device("cpu")
CONFIGS = Path(__file__).resolve().parents[2] / "portrait_world" / "configs"
FACE_SIZE = 96
PLACEMENTS_BY_CONFIG = {"flashface_encoder": "encoder", "flashface_both": "both"}


@pytest.fixture(scope="module")
def stack(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Path]:
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(latents, "IMAGES_PER_FILE", 10)  # as many as there are images
        patch.setitem(unet.SAMPLING_OPTIONS, "steps", 2)
        yield base_stack.make_base_stack(tmp_path_factory.mktemp("stack"))


def make_task(folder: Path, **options: Any) -> FlashFaceTask:
    settings: dict[str, Any] = {name: str(folder / file) for name, file in base_stack.BASE_FILES.items()}
    settings |= {"file": "made", "resolution": base_stack.IMAGE_SIZE, "face_size": FACE_SIZE, **options}
    return FlashFaceTask(FlashFaceConfig(**settings), ShardSource(folder), 5)


def randomize(task: FlashFaceTask) -> FlashFaceTask:
    """Give the added layers and the face position random weights, as if trained."""
    with torch.no_grad():
        if task.main is not None:
            task.main.diffusion_model.get_parameter(INPUT_CONV_WEIGHT)[:, 8] = 0.5
        for number, value in enumerate(task.added.parameters()):
            value.copy_(torch.randn(value.shape, generator=make_generator(number)) / 4)
    return task


def denoise(model: ModelPatcher, sigma: Tensor, text: Tensor, **model_kwargs: Tensor) -> Tensor:
    """The denoised latents of noise at `sigma` [n], seeded by sigma."""
    noise = torch.stack(
        [torch.randn(8, 16, 16, generator=make_generator(int(100 * value))) * value for value in sigma.tolist()]
    )
    with torch.no_grad():
        return model.model.apply_model(
            noise,
            sigma,
            c_crossattn=text.expand(len(sigma), -1, -1),
            **model_kwargs,
            **training_options(model, float(sigma.max())),
        )


def encode_text(task: FlashFaceTask) -> Tensor:
    return task.frozen.encode_tokens(clip_pair.tokenize_texts(task.tokenizer, ["a smiling person"]), CPU)


def is_close(a: Tensor, b: Tensor, tolerance: float = 1e-4) -> bool:
    return float((a - b).norm()) < tolerance * float(b.norm())


@pytest.mark.parametrize("train_unet", [False, True])
def test_training_leaves_the_base_model_unchanged(stack: Path, tmp_path: Path, train_unet: bool) -> None:
    tasks: list[FlashFaceTask] = []

    def make_listed_task() -> FlashFaceTask:
        tasks.append(make_task(stack, cached_samples=10, max_references=2, train_unet=train_unet))
        return tasks[0]

    options = {"warmup_steps": 0, "sample_every": 8, "ema_decay": 0.0}
    train_few_steps(make_listed_task, tmp_path, steps=8, batch_size=4, learning_rate=3e-3, **options)
    (trained,), fresh = tasks, make_task(stack, cached_samples=10, max_references=2, train_unet=train_unet)
    batch = fresh.make_batch(make_generator(9), 4)
    assert float(trained(batch)["noise"]) < 0.99 * float(fresh(batch)["noise"])
    assert len(list((tmp_path / "samples").glob("images-*.png"))) == 1
    old, new = base_stack.get_trainable_parameters(fresh), base_stack.get_trainable_parameters(trained)
    assert {name.split(".")[0] for name in old} == {"net", "added", *(["main"] if train_unet else [])}
    assert [name for name, value in old.items() if torch.equal(new[name], value)] == []
    before, after = fresh.frozen.model.state_dict(), trained.frozen.model.state_dict()
    assert all(torch.equal(value, after[name]) for name, value in before.items())
    assert not any(value.requires_grad for value in trained.frozen.model.parameters())


@pytest.mark.parametrize("placement", ADDED_LAYER_PLACEMENTS)
def test_used_parameters_have_gradients_and_unused_ones_are_frozen(stack: Path, placement: str) -> None:
    task = randomize(make_task(stack, cached_samples=10, placement=placement))
    blocks = {name.split("/")[0].split("_")[0] for name in task.added.layers}
    assert blocks == set(ADDED_LAYER_PLACEMENTS[placement])
    task(task.make_batch(make_generator(2), 3))["noise"].backward()
    trained = base_stack.get_trainable_parameters(task)
    assert [name for name, value in trained.items() if value.grad is None or not value.grad.any()] == []
    frozen = {name for name, _ in task.named_parameters()} - set(trained)
    assert all(name.startswith("net.diffusion_model.") for name in frozen)
    last = "middle_block.1" if placement == "encoder" else "output_blocks.11.1"
    assert f"net.diffusion_model.{last}.transformer_blocks.0.attn1.to_q.weight" in frozen
    assert f"net.diffusion_model.{last}.transformer_blocks.0.norm1.weight" in trained
    assert "net.diffusion_model.out.2.weight" in frozen
    assert any(name.startswith("net.diffusion_model.output_blocks") for name in trained) == (placement != "encoder")


def test_initialization_from_the_base_model(stack: Path) -> None:
    task = make_task(stack)
    base = task.frozen.model.diffusion_model.state_dict()
    net = task.net.diffusion_model.state_dict()
    assert net.keys() == base.keys() and all(torch.equal(value, net[name]) for name, value in base.items())
    sigma, text = task.frozen.model.model_sampling.sigma(torch.tensor([400])), encode_text(task)
    with torch.no_grad():
        features = task.read_sample_faces([task.source.load_original_image(0)])
    model, base_model = task.get_base_patcher(CPU), task.frozen.unet_patchers.get_patcher(CPU)
    injected = attach_injection(model, task.make_injection(model, features))
    assert torch.equal(denoise(injected, sigma, text), denoise(base_model, sigma, text))
    path = "middle_block.1.transformer_blocks.0"
    layer = task.added.get_layer(path)
    assert layer is not None and torch.equal(layer.q.weight, base[f"{path}.attn1.to_q.weight"])
    copied = make_task(stack, train_unet=True).added.get_layer(path)  # the authors copy the output projection too
    assert copied is not None and torch.equal(copied.o.weight, base[f"{path}.attn1.to_out.0.weight"])


def test_training_starts_from_a_file(stack: Path, tmp_path: Path) -> None:
    first = randomize(make_task(stack))
    first.save_model(tmp_path, {})
    second = make_task(stack, init_from=str(tmp_path / "made.safetensors"))
    saved, loaded = base_stack.get_trainable_parameters(first), base_stack.get_trainable_parameters(second)
    assert saved.keys() == loaded.keys() and saved
    assert all(torch.equal(loaded[name], value.half().float()) for name, value in saved.items())


def test_a_v_prediction_unet_cannot_be_trained(stack: Path, tmp_path: Path) -> None:
    file = str(base_stack.make_v_prediction_unet(stack, tmp_path / "velocity.safetensors"))
    assert make_task(stack, unet=file).get_base_patcher(CPU).model.model_type == ModelType.V_PREDICTION
    with pytest.raises(
        ValueError, match="got train_unet in .task. with .*velocity.safetensors, which is not epsilon-prediction"
    ):
        make_task(stack, unet=file, train_unet=True)


def make_identity(task: FlashFaceTask, numbers: list[int]) -> Identity:
    """The identity that Encode Identity makes of some images: head crops, with the face's box and key points."""
    selected = [base_stack.make_selected_face(task.source.load_original_image(number)) for number in numbers]
    crops, faces = zip(*(alignment.crop_head(one.photo, one.face) for one in selected), strict=True)
    boxes, points = torch.stack([face.box for face in faces]), torch.stack([face.kps for face in faces])
    return Identity("x", boxes, points, torch.ones(len(faces)), torch.ones(len(faces)), torch.stack(crops))


@pytest.mark.parametrize("train_unet", [False, True])
def test_the_nodes_reproduce_training(stack: Path, folder: Path, train_unet: bool) -> None:
    task = randomize(make_task(stack, train_unet=train_unet))
    task.save_model(folder / "likeness", {"steps": 2})
    samples = [task.source.load_original_image(number) for number in (4, 7)]
    crops = torch.stack([task.reader.crop_face(sample) for sample in samples]).movedim(-1, 1).float() / 255
    with torch.no_grad():
        features = latents.encode_latents(task.frozen.autoencoder, crops)
    assert is_close(task.read_sample_faces(samples), features, 0.02)  # computed in bfloat16
    sigma, text = task.frozen.model.model_sampling.sigma(torch.tensor([400])), encode_text(task)
    empty = [[task.empty_prompt_embedding, {}]]
    position = reference_faces.make_face_position_mask((samples[0].box / 128).tolist(), 128, 128)
    model_kwargs = {"c_concat": position[None, None]} if train_unet else {}
    patcher = task.get_base_patcher(CPU)
    injected = attach_injection(patcher, task.make_injection(patcher, features))
    expected, plain = (denoise(one, sigma, text, **model_kwargs) for one in (injected, patcher))
    moved = (expected - plain).norm()
    assert moved > 1e-2 * plain.norm()
    base = None if train_unet else ModelPatcher(native_models.load_unet(stack / unet.UNET_FILE), CPU, CPU)
    model, reference_net = LoadFlashFace.execute("made.safetensors", base).args
    assert reference_net.spec == FlashFaceSpec(heads=2, face_size=FACE_SIZE, notes={"steps": 2})
    vae = native_vae.wrap_vae(native_models.load_vae(Path(task.settings.vae)))
    with torch.inference_mode():
        node = ApplyReference.execute(
            model, reference_net, make_identity(task, [4, 7]), vae,
            strength=1.0, reference_guidance=0.0, start_percent=0.0, end_percent=1.0, show_at_least=1,
            reference_text=empty,
        ).args[0]  # fmt: skip
        got = denoise(node, sigma, text, **model_kwargs)
    assert (got - expected).norm() < 0.01 * moved
    if train_unet:
        without_position = denoise(node, sigma, text, c_concat=torch.zeros(1, 1, 16, 16))
        assert not is_close(without_position, got, 1e-2)


def test_each_row_attends_to_its_own_faces_at_its_own_noise_level(stack: Path) -> None:
    task = randomize(make_task(stack))
    with torch.no_grad():
        # Two faces for each of three rows.
        features = task.read_sample_faces([task.source.load_original_image(number) for number in range(6)])
    sigma, text = task.frozen.model.model_sampling.sigma(torch.tensor([50, 500, 900])), encode_text(task)
    model = task.get_base_patcher(CPU)
    together = denoise(attach_injection(model, task.make_injection(model, features)), sigma, text)
    for row in range(3):
        single = attach_injection(model, task.make_injection(model, features[2 * row : 2 * row + 2]))
        assert is_close(denoise(single, sigma[row : row + 1], text)[0], together[row])
    visible = torch.tensor([1.0, 0.0, 1.0])[:, None, None]
    dropped = denoise(attach_injection(model, task.make_injection(model, features, visible)), sigma, text)
    plain = denoise(model, sigma, text)
    assert is_close(dropped[1], plain[1], 1e-6) and is_close(dropped[0], together[0], 1e-6)
    assert not is_close(together[1], plain[1], 1e-3)


def test_one_to_four_distinct_faces_without_the_target_image(stack: Path) -> None:
    task = make_task(stack, cached_samples=10)
    batches = [task.make_batch(make_generator(number), 2) for number in range(200)]
    counts = [len(batch["face_features"]) // 2 for batch in batches]
    assert {count: counts.count(count) / 200 for count in sorted(counts)} == pytest.approx(
        dict.fromkeys((1, 2, 3, 4), 0.25), abs=0.1
    )
    numbers, found = [3, 5, 7, 11, 13, 17], set()
    for first in range(6):
        for second in range(120):
            target, *faces = task._select_images(numbers, first, second, 4)
            assert target == numbers[first] and len({target, *faces}) == 5
            found.add((target, *faces))
    assert len(found) == 6 * 120  # all ordered selections
    assert sorted(task._select_images([1, 2, 3], 0, 0, 4)[1:]) == [2, 2, 3, 3]  # repeated when there are too few


def test_conditions_are_dropped_independently(stack: Path) -> None:
    rates = {"caption_dropout": 0.3, "face_dropout": 0.2, "position_dropout": 0.4}
    task = make_task(stack, cached_samples=10, max_references=1, train_unet=True, **rates)
    samples = [task.source.load_original_image(number) for number in range(10)]
    task.source.load_original_image = samples.__getitem__  # type: ignore[method-assign]
    batch = task.make_batch(make_generator(2), 1000)
    empty = clip_pair.tokenize_texts(task.tokenizer, [""])[0]
    no_caption = torch.tensor([row == empty for row in batch["tokens"]])
    no_position = ~batch["face_position"].flatten(1).any(1)
    masks = [
        batch["drop_face"], no_caption, no_caption & batch["drop_face"], no_position, no_position & no_caption,
    ]  # fmt: skip
    assert [float(mask.float().mean()) for mask in masks] == pytest.approx([0.2, 0.3, 0.06, 0.4, 0.12], abs=0.04)
    row, size = int((~no_position).nonzero()[0]), base_stack.IMAGE_SIZE
    box = crop_and_resize(task.source.load_original_image(batch["target_indices"][row]), size).box / size
    expected = reference_faces.make_face_position_mask(box.tolist(), size, size)
    assert torch.equal(batch["face_position"][row, 0], expected)
    assert {tuple(position.shape) for position in batch["face_position"]} == {(1, 16, 16)}


def test_an_interrupted_run_resumes_to_the_same_weights(stack: Path, tmp_path: Path) -> None:
    options: dict[str, Any] = {"steps": 3, "batch_size": 2, "warmup_steps": 0, "save_every": 2}

    def make_small_task() -> FlashFaceTask:
        return make_task(stack, cached_samples=10, max_references=1)

    def make_interrupted_task() -> FlashFaceTask:
        task, num_batches = make_small_task(), [0]

        def interrupt(*_: Any) -> None:
            num_batches[0] += 1
            if num_batches[0] == 3:
                raise KeyboardInterrupt

        task.register_forward_pre_hook(interrupt)
        return task

    uninterrupted, _ = train_few_steps(make_small_task, tmp_path / "uninterrupted", **options)
    with pytest.raises(KeyboardInterrupt):
        train_few_steps(make_interrupted_task, tmp_path / "interrupted", **options)
    resumed, _ = train_few_steps(make_small_task, tmp_path / "interrupted", **options)
    a, b = (load_file(model_folder / "made.safetensors") for model_folder in (uninterrupted, resumed))
    assert a.keys() == b.keys() and all(torch.equal(value, b[name]) for name, value in a.items())


def test_invalid_configs_and_files_are_rejected(stack: Path, folder: Path) -> None:
    task = make_task(stack)
    with pytest.raises(ValueError, match=r"got placement = 'roof' in \[task\]; expected one of encoder, decoder, both"):
        replace(task.settings, placement="roof")
    task.save_model(folder / "likeness", {})
    with pytest.raises(ValueError, match="with Load FlashFace, or .* a FlashFace file; expected an identity adapter"):
        adapter_loader.load_adapter_file("made.safetensors")
    with pytest.raises(ValueError, match="has no main UNet; expected a base model; connect"):
        LoadFlashFace.execute("made.safetensors")
    metadata = {"kind": "flashface", "version": 1, "base": "SD1.5", "notes": {}, "heads": 2, "face_size": FACE_SIZE}
    tensors = load_file(folder / "likeness" / "made.safetensors")
    spec, parts = native_flashface.read_native_flashface(tensors, metadata, "f")
    assert spec == task.spec and parts.main_unet is None and len(parts.added_layers) == 50
    for changes, message in (
        ({"heads": 0}, "0 heads"),
        ({"face_size": 100}, "100 pixels"),
        ({"base": "SDXL"}, "SD1.5"),
    ):
        with pytest.raises(ValueError, match=message):
            native_flashface.read_native_flashface(tensors, {**metadata, **changes}, "f")
    with pytest.raises(ValueError, match="the tensor 'x'; expected both"):
        native_flashface.read_native_flashface({**tensors, "x": torch.zeros(1)}, metadata, "f")
    with pytest.raises(ValueError, match="no reference net or no added layers"):
        native_flashface.read_native_flashface({"added.a.q.weight": torch.zeros(1)}, metadata, "f")


def test_the_demo_configs_differ_in_placement() -> None:
    found = {
        name: task_registry.read_task_config("flashface", CONFIGS / f"{name}.toml")
        for name in ("flashface", *PLACEMENTS_BY_CONFIG)
    }
    run, config = found["flashface"]
    assert config.placement == "decoder" and not config.train_unet and config.file == "demo_flashface"
    for name, placement in PLACEMENTS_BY_CONFIG.items():
        expected_config = replace(config, file=f"demo_{name}", placement=placement)
        assert found[name] == (replace(run, folder=f"artifacts/portrait_world/{name}"), expected_config)
