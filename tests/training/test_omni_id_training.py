"""Omni-ID training: few-to-many sampling, the masked stage, the flow stage, and the adapter on a frozen encoder."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from comfyui_likeness.likeness.faces import alignment
from comfyui_likeness.nodes import encode
from comfyui_likeness.nodes.loaders import adapter_loader, omni_id_loader
from comfyui_likeness.portrait_world import world_album
from comfyui_likeness.training.adapters import face_encoders
from comfyui_likeness.training.base_models import clip_pair
from comfyui_likeness.training.data import shards
from comfyui_likeness.training.data.shard_source import ShardSource
from comfyui_likeness.training.omni_id import encoder, flow_stage, masked_stage, views
from comfyui_likeness.training.task import make_generator
from safetensors.torch import load_file
from support import base_stack
from support.base_stack import get_trainable_parameters, make_selected_face
from support.toy_tasks import DISC_WORLD, read_logged_values, train_few_steps
from torch import Tensor
from torch.testing import assert_close

IMAGES_PER_PERSON = 4
SIZES: dict[str, Any] = {
    "trunk_width": 64,
    "trunk_heads": 2,
    "patch_size": 28,
    "trunk_layers": 2,
    "num_tokens": 6,
    "width": 32,
    "num_heads": 2,
    "mlp_width": 32,
}
CONFIG = masked_stage.MaskedStageConfig(
    **SIZES,
    images_per_person=IMAGES_PER_PERSON,
    num_targets=IMAGES_PER_PERSON,
    decoder_patch_size=28,
    decoder_cross_blocks=2,
    decoder_self_blocks=1,
    mask_ratio=0.8,
)


@pytest.fixture(scope="module")
def stack(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return base_stack.make_base_stack(tmp_path_factory.mktemp("stack"))


@pytest.fixture(scope="module")
def faces(tmp_path_factory: pytest.TempPathFactory) -> ShardSource:
    """Four views each of three people."""
    folder = tmp_path_factory.mktemp("views")
    album = world_album.WorldAlbum("train", 64, 3, IMAGES_PER_PERSON, min_pose_distance=views.MIN_POSE_DISTANCE)
    shards.write_shards(album, folder, IMAGES_PER_PERSON, lossless=True)
    return ShardSource(folder)


def test_few_to_many_sampling(faces: ShardSource) -> None:
    clusters = views.list_complete_clusters(faces, 0, 9, IMAGES_PER_PERSON)
    person_of = {index: person for person, cluster in enumerate(clusters) for index in cluster}
    counts, num_targets = set(), 0
    for seed in range(40):
        few, many = views.sample_few_to_many(make_generator(seed), clusters, 5, (1, 3), IMAGES_PER_PERSON)
        counts.add(len(few[0]))
        for inputs, targets in zip(few, many, strict=True):
            assert len(inputs) == len(few[0]) and len({*inputs}) == len(inputs)
            assert {*targets} == {*clusters[person_of[inputs[0]]]}
        _, (targets,) = views.sample_few_to_many(make_generator(seed), clusters, 1, (1, 1), 1)
        num_targets += len(targets)
    assert counts == {1, 2, 3} and num_targets == 40
    assert (
        views.list_complete_clusters(faces, 0, 2, IMAGES_PER_PERSON) == clusters[:2]
        and views.list_complete_clusters(faces, 11, 9, 3) != clusters
    )


def test_face_crops_match_the_encode_node(faces: ShardSource) -> None:
    sample = faces.load_original_image(2)
    crop = views.crop_view_face(sample, 112)
    aligned = alignment.align_face(make_selected_face(sample).photo, sample.kps, 112)
    assert torch.equal(crop[..., :3], (aligned * 255).round().to(torch.uint8))
    mask, points = crop[..., 3] > 127, alignment.make_arcface_template(112).round().long()
    assert mask[points[:, 1], points[:, 0]].all() and not mask[0, 0] and 0.2 < float(mask.float().mean()) < 0.95


def compute_loss(task: masked_stage.MaskedStageTask) -> float:
    with torch.no_grad():
        return float(task(task.make_batch(make_generator(5), 3))["masked"])


def test_the_masked_stage_trains_an_encoder_file_for_the_node(faces: ShardSource, folder: Path, tmp_path: Path) -> None:
    tasks: list[masked_stage.MaskedStageTask] = []

    def make_task() -> masked_stage.MaskedStageTask:
        tasks.append(masked_stage.MaskedStageTask(CONFIG, faces, 1))
        return tasks[0]

    options = {"warmup_steps": 0, "sample_every": 30, "ema_decay": 0.0}
    train_few_steps(make_task, tmp_path, steps=30, batch_size=3, learning_rate=3e-3, **options)
    (task,), new = tasks, masked_stage.MaskedStageTask(CONFIG, faces, 1)
    assert compute_loss(task) < 0.8 * compute_loss(new)
    trained = get_trainable_parameters(task)
    assert [name for name, value in get_trainable_parameters(new).items() if torch.equal(trained[name], value)] == []
    assert {name for name, value in task.named_parameters() if not value.requires_grad} == {
        "encoder.trunk.proj", "encoder.trunk.ln_post.weight", "encoder.trunk.ln_post.bias"
    }  # fmt: skip
    assert len(list((tmp_path / "samples").glob("reconstructions-*.png"))) == 1
    assert 0 < read_logged_values(tmp_path, "l1_with_1_photos")[29] < 1
    assert 0 < read_logged_values(tmp_path, "l1_with_3_photos")[29] < 1
    task.save_model(folder / "likeness", {"steps": 30})
    loaded = omni_id_loader.load_omni_id_encoder(encoder.ENCODER_FILE)
    assert loaded.spec == replace(CONFIG.spec, notes={"steps": 30})
    photos = [make_selected_face(faces.load_original_image(number)) for number in (0, 3)]
    with torch.no_grad():
        crops = torch.stack([views.crop_view_face(faces.load_original_image(number), 112) for number in (0, 3)])
        expected = encoder.encode_face_tokens(task.encoder, encoder.extract_face_states(task.encoder, crops), 1)
    (tokens,) = encode.encode_joint_tokens(photos, loaded)[0].values()
    assert (tokens.float() - expected).norm() < 1e-2 * expected.norm()
    file = str(folder / "likeness" / encoder.ENCODER_FILE)
    second = masked_stage.MaskedStageTask(replace(CONFIG, init_from=file, num_tokens=99), faces, 2)
    assert second.encoder.spec.tokens == 6 and all(value.requires_grad for value in second.encoder.cross.parameters())
    assert torch.allclose(second.encoder.queries, task.encoder.queries, atol=1e-3)


def test_hidden_patches_and_the_face_mask(faces: ShardSource) -> None:
    task = masked_stage.MaskedStageTask(CONFIG, faces, 1)
    batch = task.make_batch(make_generator(1), 2)
    hidden, targets = batch["hidden_patches"], batch["targets"]
    assert hidden.shape == (2, IMAGES_PER_PERSON, 16) and (hidden.sum(-1) == 13).all()
    assert len({tuple(row.tolist()) for row in hidden.flatten(0, 1)}) > 4
    hidden_pixels = hidden.view(2, IMAGES_PER_PERSON, 4, 4).repeat_interleave(28, 2).repeat_interleave(28, 3)

    def reconstruct(targets: Tensor, inputs: Tensor = batch["input_faces"]) -> Tensor:
        with torch.no_grad():
            return masked_stage.reconstruct_faces(task.encoder, task.decoder, inputs, targets, hidden)

    images = reconstruct(targets)
    assert torch.equal(reconstruct(torch.where(hidden_pixels[..., None], 255 - targets, targets)), images)
    inverted = reconstruct(torch.where(hidden_pixels[..., None], targets, 255 - targets))
    assert not torch.allclose(inverted, images, atol=1e-3)
    assert not torch.allclose(reconstruct(targets, 255 - batch["input_faces"]), images, atol=1e-4)
    exact = targets[..., :3].movedim(-1, 2).float() / 255
    assert float(masked_stage.masked_l1_loss(exact, targets)) == 0.0
    outside = (targets[..., 3] == 0)[:, :, None]
    assert float(masked_stage.masked_l1_loss(torch.where(outside, exact + 1, exact), targets)) == 0.0
    assert float(masked_stage.masked_l1_loss(exact + 0.25, targets)) == pytest.approx(0.25, abs=1e-4)


@pytest.mark.parametrize(("mask_ratio", "num_visible"), [(0.85, 10), (0.95, 3), (0.99, 1)])
def test_the_mask_ratio_never_hides_all_patches(faces: ShardSource, mask_ratio: float, num_visible: int) -> None:
    task = masked_stage.MaskedStageTask(replace(CONFIG, mask_ratio=mask_ratio, decoder_patch_size=14), faces, 1)
    assert ((~task._sample_hidden_patches(make_generator(1), 3, 8)).sum(-1) == num_visible).all()


def test_targets_are_reconstructed_from_their_own_persons_tokens(faces: ShardSource) -> None:
    """All targets of a person share one l, and do not depend on another person's."""
    task = masked_stage.MaskedStageTask(CONFIG, faces, 1)
    batch = task.make_batch(make_generator(1), 2)
    inputs, targets, hidden = (batch[name] for name in ("input_faces", "targets", "hidden_patches"))

    def reconstruct(*args: Tensor) -> Tensor:
        with torch.no_grad():
            return masked_stage.reconstruct_faces(task.encoder, task.decoder, *args)

    together = reconstruct(inputs, targets, hidden)
    one_person = reconstruct(inputs[1:], targets[1:], hidden[1:])
    one_target = reconstruct(inputs, targets[:, 2:3], hidden[:, 2:3])
    swapped = reconstruct(inputs.flip(0), targets, hidden)
    assert torch.allclose(together[1:], one_person, atol=1e-5)
    assert torch.allclose(together[:, 2:3], one_target, atol=1e-5)
    assert not torch.allclose(swapped, together, atol=1e-4)


def test_gradient_checkpointing_keeps_the_gradients(faces: ShardSource) -> None:
    configs = [replace(CONFIG, gradient_checkpointing=saves_memory) for saves_memory in (False, True)]
    tasks = [masked_stage.MaskedStageTask(config, faces, 1) for config in configs]
    for task in tasks:
        task(task.make_batch(make_generator(2), 2))["masked"].backward()
    plain, checkpointed = (get_trainable_parameters(task) for task in tasks)
    assert all(torch.allclose(value.grad, checkpointed[name].grad, atol=1e-7) for name, value in plain.items())


def test_cached_faces_are_cropped_once(faces: ShardSource) -> None:
    tasks = [masked_stage.MaskedStageTask(replace(CONFIG, cached_samples=count), faces, 1) for count in (12, 0)]
    cached, uncached = (task.make_batch(make_generator(3), 2) for task in tasks)
    assert all(torch.equal(value, uncached[name]) for name, value in cached.items())
    (file,) = faces.folder.glob("faces-*/*.safetensors")
    stamp = file.stat().st_mtime_ns
    masked_stage.MaskedStageTask(replace(CONFIG, cached_samples=12), faces, 1)
    assert file.stat().st_mtime_ns == stamp


def test_the_trunk_is_initialized_from_an_open_clip_file(tmp_path: Path) -> None:
    from safetensors.torch import save_file

    small = encoder.OmniIDEncoderConfig(**SIZES)
    source = encoder.build_trainable_encoder(replace(small, image_size=224), 3).trunk.state_dict()
    file = tmp_path / "clip.safetensors"
    save_file({f"visual.{key}": value.half() for key, value in source.items()}, file)
    module, plain = (
        encoder.build_trainable_encoder(replace(small, init_trunk_from=trunk), 7) for trunk in (str(file), "")
    )
    trunk = module.trunk.state_dict()
    assert trunk["positional_embedding"].shape == (17, 64) and source["positional_embedding"].shape == (65, 64)
    assert all(torch.allclose(trunk[key], value, atol=2e-3) for key, value in source.items() if "positional" not in key)
    assert torch.equal(module.queries, plain.queries) and module.trunk.conv1.weight.requires_grad
    with pytest.raises(ValueError, match="whose sizes differ from those in .task."):
        encoder.build_trainable_encoder(replace(small, init_trunk_from=str(file), trunk_layers=3), 7)
    with pytest.raises(ValueError, match="expected a CLIP vision tower"):
        encoder.build_trainable_encoder(replace(small, init_trunk_from=str(tmp_path / "none")), 7)


def test_the_trunk_is_initialized_from_the_transformers_layout(stack: Path) -> None:
    tower, clip = face_encoders.CLIPVisionReader(stack / clip_pair.VISION_FILE, "last"), base_stack.CLIP_PAIR_CONFIG
    config = encoder.OmniIDEncoderConfig(
        image_size=clip.resolution, patch_size=clip.patch, trunk_width=clip.vision_width,
        trunk_layers=clip.vision_layers, projection_width=clip.width, activation="quick_gelu",
        init_trunk_from=str(stack / clip_pair.VISION_FILE),
    )  # fmt: skip
    module, size = encoder.build_trainable_encoder(config, 1), clip.resolution
    images = torch.randint(256, (2, size, size, 3), dtype=torch.uint8, generator=make_generator(4))
    with torch.no_grad():
        assert_close(encoder.extract_face_states(module, images), tower.read_faces(images, torch.device("cpu")))


def make_flow_task(stack: Path, **options: Any) -> flow_stage.FlowStageTask:
    task = base_stack.make_adapter_task("flow", stack, **options)
    assert isinstance(task, flow_stage.FlowStageTask)
    return task


def test_the_flow_stage_trains_encoder_and_adapter(stack: Path, folder: Path, tmp_path: Path) -> None:
    tasks: list[flow_stage.FlowStageTask] = []

    def make_task() -> flow_stage.FlowStageTask:
        tasks.append(make_flow_task(stack, cached_samples=10))
        return tasks[0]

    options = {"warmup_steps": 0, "sample_every": 8, "ema_decay": 0.0}
    train_few_steps(make_task, tmp_path, steps=8, batch_size=2, learning_rate=3e-3, **options)
    (task,), new = tasks, make_flow_task(stack, cached_samples=10)
    batch = new.make_batch(make_generator(9), 3)
    with torch.no_grad():
        after, before = (float(model(batch)["noise"]) for model in (task, new))
    assert after < 0.99 * before
    trained, initial = get_trainable_parameters(task), get_trainable_parameters(new)
    assert {name.partition(".")[0] for name in initial} == {"adapter", "trained"}
    assert [name for name, value in initial.items() if torch.equal(trained[name], value)] == []
    base_before, base_after = new.frozen.model.state_dict(), task.frozen.model.state_dict()
    assert all(torch.equal(value, base_after[name]) for name, value in base_before.items())
    assert len(list((tmp_path / "samples").glob("images-*.png"))) == 1
    task.save_model(folder / "likeness", {"steps": 8})
    assert not torch.equal(
        load_file(folder / "likeness" / encoder.ENCODER_FILE)["queries"],
        load_file(stack / encoder.ENCODER_FILE)["queries"],
    )
    _, report = adapter_loader.load_adapter_file("made.safetensors")
    assert "Omni-ID for SD1.5, 6 tokens per identity, 16 layers" in report
    assert "The negative prompt sees no tokens" in report
    make_flow_task(stack, cached_samples=10, encoder_output="omni_id_3_1").save_model(folder / "likeness", {"steps": 0})
    assert (folder / "likeness" / "omni_id_3_1.safetensors").is_file()


def test_the_adapter_starts_without_effect_and_the_encoder_learns_more_slowly(stack: Path) -> None:
    task = make_flow_task(stack, cached_samples=10, encoder_lr_scale=0.25)
    batch, other = task.make_batch(make_generator(1), 2), task.make_batch(make_generator(2), 2)
    losses = [task({**batch, "face_crops": crops})["noise"] for crops in (batch["face_crops"], other["face_crops"])]
    assert torch.equal(*losses) and losses[0] > 0
    scales = {name: task.learning_rate_scale(name) for name in get_trainable_parameters(task)}
    assert {scale for name, scale in scales.items() if name.startswith("adapter.")} == {1.0}
    assert {scale for name, scale in scales.items() if name.startswith("trained.")} == {0.25}


def test_all_targets_of_a_person_share_the_same_tokens(stack: Path) -> None:
    cached, uncached = make_flow_task(stack, cached_samples=10), make_flow_task(stack)
    batch, other = cached.make_batch(make_generator(1), 2), uncached.make_batch(make_generator(1), 2)
    assert len(batch["noise"]) == 6 and not batch["drop_face"].any()
    text = clip_pair.tokenize_texts(cached.tokenizer, ["photo of a person"])[0]
    assert batch["tokens"] == [text] * 6 == other["tokens"]
    tokens = cached.get_face_features(batch)
    assert tokens.requires_grad and torch.equal(batch["face_crops"][..., :3], other["face_crops"].float())
    assert all(torch.equal(tokens[0], row) for row in tokens[:3])
    assert not torch.allclose(tokens[3], tokens[0], atol=1e-4) and torch.equal(tokens[3], tokens[5])
    assert float(cached(batch)["noise"].detach()) == pytest.approx(float(uncached(other)["noise"].detach()), rel=2e-2)


def test_photos_of_one_person_are_encoded_jointly(stack: Path) -> None:
    task = base_stack.make_adapter_task("omni", stack, cached_samples=10)
    batches = [task.make_batch(make_generator(seed), 4) for seed in range(8)]
    assert {len(batch["face_features"]) // 4 for batch in batches} == {1, 2}
    batch = task.make_batch(make_generator(3), 4)
    tokens, reader = task.get_face_features(batch), task.reader
    assert isinstance(reader, face_encoders.OmniIDReader) and tokens.shape == (4, 6, 32)
    num_photos = len(batch["face_features"]) // 4
    present = [row for row in range(4) if not batch["drop_face"][row]]
    for row in present:
        states = batch["face_features"][row * num_photos : (row + 1) * num_photos]
        assert torch.allclose(tokens[row], reader.join_photos(states, 1)[0], atol=1e-5)
    dropped = task.get_face_features({**batch, "drop_face": torch.ones(4, dtype=torch.bool)})
    assert not dropped.any() and present


def test_invalid_configs_are_rejected(faces: ShardSource, stack: Path, tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=r"expected a folder of shards.*--min-pose-distance 8 --images-per-person 4"):
        masked_stage.MaskedStageTask(CONFIG, DISC_WORLD, 0)
    with pytest.raises(ValueError, match="got no person with 5 images among the first 12;"):
        masked_stage.MaskedStageTask(replace(CONFIG, images_per_person=5), faces, 0)
    with pytest.raises(ValueError, match="expected 1 <= min_images <= max_images <= images_per_person"):
        replace(CONFIG, max_images=5)
    with pytest.raises(ValueError, match="a decoder_patch_size that divides 112"):
        replace(CONFIG, decoder_patch_size=15)
    with pytest.raises(ValueError, match=r"got max_photos = 3 with encoder_type = 'image' in .task.; expected 1, or"):
        replace(base_stack.make_adapter_task("image", stack).settings, max_photos=3)
    with pytest.raises(ValueError, match="expected omni, the encoder to train"):
        replace(base_stack.make_adapter_task("flow", stack).settings, encoder_type="image")
    with pytest.raises(ValueError, match="train omni_masked first"):
        encoder.load_encoder_file(tmp_path / "none")
