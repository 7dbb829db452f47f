"""AdaFace training: losses, tasks, output files, and agreement of the nodes with training."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from comfy.model_base import ModelType
from comfyui_likeness.likeness.encoders import clip_text
from comfyui_likeness.likeness.methods import adaface, arc2face
from comfyui_likeness.likeness.spec import Identity
from comfyui_likeness.nodes import prompt
from comfyui_likeness.nodes.loaders import adaface_loader, native_models
from comfyui_likeness.training.adaface import (
    composition_distillation,
    face_distillation,
    losses,
    prompt_tokens,
    teacher,
)
from comfyui_likeness.training.adaface.attention_features import record_cross_attentions
from comfyui_likeness.training.adaface.face_task import FaceTask
from comfyui_likeness.training.adaface.model_expansion import expand_text_model
from comfyui_likeness.training.base_models import clip_pair, unet
from comfyui_likeness.training.task import make_generator
from safetensors.torch import load_file
from support import base_stack
from support.adaface_models import make_clip
from support.toy_tasks import train_few_steps
from torch import Tensor
from torch.nn.functional import normalize

CPU = torch.device("cpu")
TRAINED_PREFIXES = {"arc2face": ("text.", "model."), "adaface": ("inverter.",), "compose": ("inverter.",)}


@pytest.fixture(scope="module")
def stack(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The base model, and a teacher with perturbed weights."""
    folder = base_stack.make_base_stack(tmp_path_factory.mktemp("stack"))
    task = base_stack.make_face_task("arc2face", folder)
    with torch.no_grad():
        for name, value in task.named_parameters():
            value += 0.02 * torch.randn(value.shape, generator=make_generator(len(name)))
    task.save_model(folder, {})
    return folder


def test_orthogonal_subtraction_by_hand() -> None:
    out = losses.subtract_projection(torch.tensor([[3.0, 4.0]]), torch.tensor([[2.0, 0.0]]))
    assert torch.equal(out, torch.tensor([[0.0, 4.0]]))
    a, b = torch.randn(2, 3, 5, generator=make_generator(1))
    assert (losses.subtract_projection(a, b) * b).sum(-1).abs().max() < 1e-5
    # The norm of the base has no effect.
    assert torch.allclose(losses.subtract_projection(a, 7 * b), losses.subtract_projection(a, b), atol=1e-5)


def test_the_delta_loss_by_hand() -> None:
    x, y, z = torch.eye(3)
    assert losses.delta_loss(x, x + y, 2 * x, 5 * x + 3 * y).item() == pytest.approx(0, abs=1e-5)
    assert losses.delta_loss(x, x + y, x, x + z).item() == pytest.approx(1, abs=1e-5)
    assert losses.delta_loss(x, x + y, x, x - y).item() == pytest.approx(2, abs=1e-5)
    assert losses.delta_loss(y, x + y, x, x + z).item() == pytest.approx(1, abs=1e-5)
    # A feature that the composition does not change is ignored, and has no gradient.
    single, composed = torch.stack((x, x)), torch.stack((x + y, x)).requires_grad_(True)
    value = losses.delta_loss(single, composed, single, torch.stack((x + z + y, x)))
    assert value.item() == pytest.approx(1 - 0.5**0.5, abs=1e-5)
    value.backward()
    assert composed.grad is not None and composed.grad.isfinite().all()
    assert composed.grad[0].any() and not composed.grad[1].any()
    assert losses.delta_loss(single, single, single, composed.detach()).item() == 0


def test_face_preserving_by_hand() -> None:
    queries = 20 * torch.eye(3)[None]
    moved = queries[:, [1, 2, 0]]
    matches = losses.match_queries(queries, moved)
    assert torch.allclose(matches[0], torch.eye(3)[:, [1, 2, 0]], atol=1e-5)
    features = torch.tensor([[[1.0, 0.0], [0.0, 1.0], [1.0, 1.0]]])
    full_mask = torch.ones(1, 3)
    # Features that move with their queries have no loss; without matching, all positions in the mask count.
    loss = losses.face_preserving_loss(matches, features[:, [1, 2, 0]], features, full_mask)
    assert loss.item() == pytest.approx(0, abs=1e-5)
    unmatched = losses.face_preserving_loss(torch.eye(3)[None], features[:, [1, 2, 0]], features, full_mask)
    half = 0.5**0.5
    assert unmatched.item() == pytest.approx((1 + (1 - half) + (1 - half)) / 3, abs=1e-5)
    mask = torch.tensor([[1.0, 0.0, 0.0]])
    masked = losses.face_preserving_loss(torch.eye(3)[None], features[:, [1, 2, 0]], features, mask)
    assert masked.item() == pytest.approx(1)


def test_cross_attentions_are_recorded(stack: Path) -> None:
    task = base_stack.make_face_task("adaface", stack)
    model = task.frozen.model
    noisy = torch.randn(2, 8, 16, 16, generator=make_generator(1))
    text = torch.randn(2, 77, 32, generator=make_generator(2))
    with torch.no_grad():
        plain = model.apply_model(noisy, torch.ones(2), c_crossattn=text)
        with record_cross_attentions(model.diffusion_model) as layers:
            assert torch.equal(model.apply_model(noisy, torch.ones(2), c_crossattn=text), plain)
        recorded = [layer.outputs for layer in layers]
        model.apply_model(2 * noisy, torch.ones(2), c_crossattn=text)
    assert len(layers) == 16 and all(layer.outputs is out for layer, out in zip(layers, recorded, strict=True))
    attention = model.diffusion_model.get_submodule("input_blocks.1.1.transformer_blocks.0.attn2")
    first = layers[0]
    v = attention.to_v(text).unflatten(-1, (attention.heads, -1)).transpose(1, 2)
    assert torch.allclose(first.attention_maps.sum(2), torch.ones(2, attention.heads, 256), atol=1e-5)
    expected = attention.to_out((first.attention_maps.mT @ v).transpose(1, 2).flatten(2))
    assert torch.allclose(expected, first.outputs, atol=1e-4)


@pytest.mark.parametrize("kind", base_stack.FACE_TASKS)
def test_only_the_task_is_trained(stack: Path, tmp_path: Path, kind: str) -> None:
    tasks: list[FaceTask[Any]] = []

    def make_task() -> FaceTask[Any]:
        tasks.append(base_stack.make_face_task(kind, stack))
        return tasks[0]

    options = {"warmup_steps": 0, "sample_every": 9, "ema_decay": 0.0}
    train_few_steps(make_task, tmp_path, steps=5, batch_size=4, learning_rate=2e-3, **options)
    (task,), fresh = tasks, base_stack.make_face_task(kind, stack)

    def compute_loss(of: FaceTask[Any]) -> Tensor:
        return torch.stack([*of(of.make_batch(make_generator(9), 6)).values()]).sum()

    initial_loss = compute_loss(fresh)
    assert float(compute_loss(task).detach()) < float(initial_loss.detach())
    initial_loss.backward()
    weights = base_stack.get_trainable_parameters(fresh)
    assert all(name.startswith(TRAINED_PREFIXES[kind]) for name in weights)
    assert [name for name, value in weights.items() if value.grad is None] == []
    if kind != "arc2face":
        before, after = fresh.frozen.model.state_dict(), task.frozen.model.state_dict()
        assert all(torch.equal(value, after[name]) for name, value in before.items())


def test_trainable_parts_of_the_teachers_unet(stack: Path) -> None:
    names: dict[str, set[str]] = {}
    for part in teacher.TRAINABLE_UNET_PARTS:
        task = base_stack.make_face_task("arc2face", stack, trainable_unet_part=part)
        names[part] = {name for name in base_stack.get_trainable_parameters(task) if name.startswith("model.")}
    assert not names["nothing"] and names["attentions"] < names["all"]
    assert {name.split(".attn2.")[1] for name in names["attentions"]} == {
        "to_q.weight", "to_k.weight", "to_v.weight", "to_out.0.weight", "to_out.0.bias",
    }  # fmt: skip
    with pytest.raises(ValueError, match="got trainable_unet_part = 'some'"):
        base_stack.make_face_task("arc2face", stack, trainable_unet_part="some")


def test_the_teachers_text_encoder_has_its_own_learning_rate_scale(stack: Path) -> None:
    task = base_stack.make_face_task("arc2face", stack, encoder_lr_scale=0.25)
    scales = {
        name.partition(".")[0]: task.learning_rate_scale(name) for name in base_stack.get_trainable_parameters(task)
    }
    assert scales == {"text": 0.25, "model": 1.0}


def make_identity(task: FaceTask[Any], embedding: Tensor) -> Identity:
    """An identity with a face embedding, as Encode Identity makes it."""
    box, kps = torch.zeros(1, 4), torch.zeros(1, 5, 2)
    key = task.reader.feature.format_encoder_id(task.reader.hash)
    return Identity("anna", box, kps, torch.ones(1), torch.ones(1), embeddings={key: embedding})


def test_the_nodes_reproduce_training(stack: Path, folder: Path) -> None:
    task = base_stack.make_face_task("adaface", stack)
    assert isinstance(task, face_distillation.FaceDistillationTask)
    for saved in (base_stack.make_face_task("arc2face", stack), task):
        saved.save_model(folder / "likeness", {"steps": 3})
    (folder / "likeness" / "made_arc2face.safetensors").write_bytes((stack / "made_arc2face.safetensors").read_bytes())
    loaded = adaface_loader.load_prompter("made_adaface.safetensors", "made_arc2face.safetensors")
    assert loaded.spec is not None and loaded.spec.base == "demo" and loaded.spec.notes == {"steps": 3}
    assert loaded.spec.towers == {"l": 32} and loaded.face_features == (task.reader.feature,)
    with torch.no_grad():
        embedding = task.read_sample_faces([task.source.load_original_image(4)])
        teacher_states = task.encode_teacher_prompt(normalize(embedding, dim=-1))
        vectors = task.invert_prompt(teacher_states)
    identity = make_identity(task, embedding)
    states = prompt.Arc2FaceConditioning.execute(loaded, identity).args[0][0][0]
    assert torch.allclose(states, teacher_states, atol=2e-2)
    assert not torch.allclose(states[:, 8], states[:, 30], atol=0.1)
    rows = prompt.compute_token_embeddings(loaded, identity, adaface.FaceEmbeddingOptions())["l"]
    assert torch.allclose(rows, vectors[0], atol=2e-2)
    text = load_file(stack / clip_pair.TEXT_FILE)
    weights = {key: value.float() for key, value in expand_token_table(text).items()}
    clip = make_clip(32, 2, 1, weights)
    options: dict[str, Any] = {"strength": 1.0, "class_word": "person"}
    text_prompt = "a photo of @anna in a forest"
    conditioning = prompt.PromptWithIdentity.execute(clip, loaded, identity, text_prompt, **options).args[0][0][0]
    with torch.no_grad():
        expected = task.encode_rows(task.make_caption_rows(["a photo of person in a forest"]), vectors)
    assert torch.allclose(conditioning, expected, atol=5e-2)
    wide = make_clip(64, 2, 1)
    with pytest.raises(
        ValueError,
        match="with token embeddings of width 64; made_adaface.safetensors makes them with width 32",
    ):
        prompt.PromptWithIdentity.execute(wide, loaded, identity, "@anna", **options)


def expand_token_table(text: dict[str, Tensor]) -> dict[str, Tensor]:
    """A text encoder's tensors with the full token table."""
    from comfyui_likeness.likeness.encoders import token_embedding

    return {
        key: value for key, value in token_embedding.expand_token_table(text).items() if key.startswith("text_model.")
    }


def test_token_rows_match_comfyui(stack: Path) -> None:
    task = base_stack.make_face_task("compose", stack)
    assert isinstance(task, composition_distillation.CompositionDistillationTask)
    (row,) = task.make_caption_rows(["a photo of a smiling person in a red tee, at a beach"])
    at = row.index(prompt_tokens.PERSON_TOKEN)
    assert (
        row[at : at + adaface.NUM_FACE_VECTORS] == [prompt_tokens.PERSON_TOKEN] * adaface.NUM_FACE_VECTORS
        and row.count(prompt_tokens.PERSON_TOKEN) == 16
    )
    plain = clip_pair.tokenize_texts(task.tokenizer, ["a photo of a smiling person in a red tee, at a beach"])[0]
    assert row[:at] == plain[:at] and row[at + 16 :] == plain[at + 1 : 77 - 15]
    (class_row,) = task.make_caption_rows(["a photo of a smiling person in a red tee, at a beach"], task.class_word_ids)
    assert class_row[:at] == row[:at] and class_row[at + 16 :] == row[at + 16 :]
    assert class_row[at : at + 16] == [plain[at], *[adaface.COMMA_TOKEN_ID] * 15]
    (without_class_word,) = task.make_caption_rows(["two dogs"])
    assert (
        without_class_word[1] == prompt_tokens.PERSON_TOKEN
        and without_class_word[17:19] == clip_pair.tokenize_texts(task.tokenizer, ["two dogs"])[0][1:3]
    )
    (truncated,) = task.make_caption_rows([f"{'very ' * 65} person"])
    assert (
        len(truncated) == 77
        and truncated.count(prompt_tokens.PERSON_TOKEN) == 10
        and truncated[-1] == clip_text.END_TOKEN_ID
    )


def test_the_teacher_keeps_the_prediction_type(stack: Path, tmp_path: Path) -> None:
    file = base_stack.make_v_prediction_unet(stack, tmp_path / "unet.safetensors")
    base_stack.make_face_task("arc2face", stack, unet=str(file)).save_model(tmp_path, {})
    copy = native_models.load_unet(tmp_path / f"made_arc2face{teacher.UNET_FILE_SUFFIX}")
    assert copy.model_type == ModelType.V_PREDICTION


def test_a_face_embedding_spans_several_tokens_of_a_narrow_encoder(stack: Path) -> None:
    task = base_stack.make_face_task("arc2face", stack)
    assert isinstance(task, teacher.Arc2FaceTask)
    faces = normalize(torch.randn(1, 512, generator=make_generator(1)), dim=-1)
    inputs: list[Tensor] = []
    with torch.no_grad():
        hook = task.text.register_forward_pre_hook(lambda _, args: inputs.append(args[0]))
        arc2face.encode_face_prompt(task.text, faces)
        hook.remove()
        ids = clip_text.pad_token_ids(
            (*arc2face.PROMPT_PREFIX_IDS, *[arc2face.ID_TOKEN_ID] * 16, *arc2face.PROMPT_SUFFIX_IDS)
        )
        plain = task.text.embed_tokens(ids, CPU)
    assert torch.equal(inputs[0][0, 4:20].flatten(), faces[0])
    assert torch.equal(inputs[0][0, :4], plain[0, :4]) and torch.equal(inputs[0][0, 20:], plain[0, 20:])


def test_the_distillation_loss_follows_the_teachers_trajectory(stack: Path) -> None:
    task = base_stack.make_face_task("adaface", stack, random_face_fraction=0.0)
    assert isinstance(task, face_distillation.FaceDistillationTask)
    batch = task.make_batch(make_generator(3), 2)
    batch["timesteps"] = torch.tensor([[900, 700], [300, 200]])
    with torch.no_grad():
        total = task.compute_distillation_loss(batch)
        encoded = FaceTask.encode_batch(task, batch)
        teacher_states = arc2face.encode_face_prompt(task.teacher.text_encoder, encoded["face_features"])
        text = task.encode_rows([task.prompt_ids] * 2, task.invert_prompt(teacher_states))
        model, teacher_model, expected = task.frozen.model, task.teacher.model, 0.0
        noisy, noise = encoded["latents"], batch["noise"]
        for timesteps in batch["timesteps"]:
            sigma = model.model_sampling.sigma(timesteps)[:, None, None, None]
            x = noisy + sigma * noise
            clean = teacher_model.apply_model(x, sigma.flatten(), c_crossattn=teacher_states)
            predicted = (x - model.apply_model(x, sigma.flatten(), c_crossattn=text)) / sigma
            expected += float((predicted - (x - clean) / sigma).square().mean())
            noisy, noise = clean, (x - clean) / sigma
    assert float(total) == pytest.approx(expected, rel=1e-3)


def test_a_fraction_of_faces_is_random_with_noise_as_images(stack: Path) -> None:
    task = base_stack.make_face_task("adaface", stack, random_face_fraction=0.4, max_denoising_steps=3)
    batch = task.make_batch(make_generator(2), 400)
    is_random = batch["is_random"]
    assert float(is_random.float().mean()) == pytest.approx(0.4, abs=0.06)
    encoded, plain = task.encode_batch(batch), FaceTask.encode_batch(task, batch)
    assert torch.allclose(encoded["face_features"].norm(dim=-1), torch.ones(400), atol=1e-4)
    assert torch.equal(encoded["face_features"][~is_random], plain["face_features"][~is_random])
    assert torch.equal(encoded["latents"][~is_random], plain["latents"][~is_random])
    assert float((encoded["latents"][is_random]).std()) == pytest.approx(1, abs=0.02)
    counts = [len(task.make_batch(make_generator(number), 1)["timesteps"]) for number in range(40)]
    assert set(counts) == {1, 2, 3}
    assert all((steps[:-1] >= steps[1:]).all() for steps in [task.make_batch(make_generator(7), 9)["timesteps"]])


@pytest.mark.parametrize("projection", clip_text.EXPANDED_PROJECTIONS)
def test_expansion_preserves_the_inverters_output(stack: Path, tmp_path: Path, projection: str) -> None:
    first = base_stack.make_face_task("adaface", stack)
    first.save_model(tmp_path, {})
    file = str(tmp_path / "made_adaface.safetensors")
    expansion: dict[str, Any] = {"init_from": file, "expanded_projection": projection}
    same = base_stack.make_face_task("adaface", stack, **expansion, copies_per_layer=(4,), expansion_noise=0.0)
    wide = base_stack.make_face_task("adaface", stack, **expansion, copies_per_layer=(4,))
    teacher_states = torch.randn(2, 77, 32, generator=make_generator(1))
    with torch.no_grad():
        old, exact, new = (task.invert_prompt(teacher_states) for task in (first, same, wide))
    assert torch.allclose(exact, old, atol=1e-2) and not torch.equal(new, exact)
    assert (new - exact).norm() < 0.2 * exact.norm()
    part = f"{clip_text.EXPANDED_PROJECTIONS[projection][0]}.weight"
    copies = wide.inverter.text.layers[0].self_attn.get_parameter(part).unflatten(0, (4, -1)).detach()
    assert torch.equal(copies[0], same.inverter.text.layers[0].self_attn.get_parameter(part)[:32])
    assert all(float((copies[i] - copies[0]).std()) > 0 for i in (1, 2, 3)) and not torch.equal(copies[1], copies[2])
    # It can be saved and expanded again.
    wide.save_model(tmp_path, {})
    again = base_stack.make_face_task("adaface", stack, **expansion, copies_per_layer=(8,))
    attention = again.inverter.text.layers[0].self_attn
    assert (attention.num_copies, attention.expanded_projection) == (8, projection)
    assert attention.get_parameter(part).shape == (256, 32)
    for num_copies, message in (
        ((2, 2), "copies_per_layer for 2 layers"),
        ((6,), r"copies_per_layer = 6 for layer 0 in \[task\]; expected a multiple of its present 4"),
    ):
        with pytest.raises(ValueError, match=message):
            base_stack.make_face_task("adaface", stack, **expansion, copies_per_layer=num_copies)
    other = {"keys": "queries", "queries": "keys"}[projection]
    with pytest.raises(ValueError, match="values of different sizes"):
        base_stack.make_face_task("adaface", stack, init_from=file, copies_per_layer=(8,), expanded_projection=other)
    with pytest.raises(ValueError, match="got expanded_projection = 'heads'"):
        base_stack.make_face_task("adaface", stack, expanded_projection="heads")


def test_expanded_weights_by_hand() -> None:
    tensors = {
        f"encoder.layers.0.self_attn.{part}.{what}": torch.ones(2, *[2] * (what == "weight"))
        for part in ("q_proj", "k_proj", "v_proj")
        for what in ("weight", "bias")
    }
    expanded = expand_text_model(tensors, (3,), 0.5, 1)
    assert expanded["encoder.layers.0.self_attn.k_proj.weight"].shape == (6, 2)
    assert torch.equal(expanded["encoder.layers.0.self_attn.v_proj.bias"], torch.ones(6))
    assert torch.equal(expanded["encoder.layers.0.self_attn.q_proj.weight"], torch.ones(2, 2))


def test_composition_losses_and_their_weights(stack: Path) -> None:
    task = base_stack.make_face_task("compose", stack)
    assert isinstance(task, composition_distillation.CompositionDistillationTask)
    batch = task.make_batch(make_generator(4), 3)
    assert (
        batch["masks"].shape == (3, base_stack.IMAGE_SIZE, base_stack.IMAGE_SIZE)
        and 0.01 < batch["masks"].float().mean() < 0.5
    )
    found = task(batch)
    assert list(found) == ["prompts", "maps", "outputs", "preserved", "distillation"]
    assert all(value.isfinite() and value > 0 for value in found.values())
    weights = {"distillation_weight": 0.0, "delta_weight": 2.0, "preserving_weight": 0.5}
    weighed = base_stack.make_face_task("compose", stack, **weights)(batch)
    assert list(weighed) == list(found)[:-1]
    for name, factor in (("prompts", 2.0), ("maps", 2.0), ("outputs", 2.0), ("preserved", 0.5)):
        assert float(weighed[name].detach()) == pytest.approx(factor * float(found[name].detach()), rel=1e-4)


def test_progress_on_a_fixed_batch(stack: Path) -> None:
    task = base_stack.make_face_task("adaface", stack)
    assert isinstance(task, face_distillation.FaceDistillationTask)
    with torch.no_grad():
        first, second = task.measure_progress(make_generator(0)), task.measure_progress(make_generator(0))
        for value in task.inverter.parameters():
            value += 0.1
        third = task.measure_progress(make_generator(0))
    assert list(first) == ["check_distillation"] and float(second["gain"]) == pytest.approx(0, abs=1e-5)
    assert (
        float(third["gain"])
        == pytest.approx(1 - float(third["check_distillation"] / first["check_distillation"]), abs=1e-5)
        != 0
    )


def test_invalid_configs_are_rejected(stack: Path) -> None:
    task = base_stack.make_face_task("adaface", stack)
    with pytest.raises(ValueError, match="expected @ in the prompt"):
        replace(task.settings, prompt="a photo")
    with pytest.raises(ValueError, match="got text.safetensors, which is not Arc2Face's text encoder"):
        base_stack.make_face_task("adaface", stack, teacher=str(stack / clip_pair.TEXT_FILE))
    assert isinstance(task.frozen.model, type(native_models.load_unet(stack / unet.UNET_FILE)))
