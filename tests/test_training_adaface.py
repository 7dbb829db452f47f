"""AdaFace is trained through the words that a node would write: its losses, its tasks, its files."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import stacks
import torch
from analyzers import folder as folder
from comfy.model_base import ModelType
from comfyui_likeness.likeness import adaface, arc2face, clip_text
from comfyui_likeness.likeness.spec import Identity
from comfyui_likeness.nodes import prompt as nodes
from comfyui_likeness.nodes.loaders import adaface as loader
from comfyui_likeness.training.adaface import compose, inverter, losses, teacher, words
from comfyui_likeness.training.adaface.expand import expanded
from comfyui_likeness.training.adaface.faces import FaceTask
from comfyui_likeness.training.adaface.features import watching
from comfyui_likeness.training.base import clip, unet
from comfyui_likeness.training.task import chance
from prompters import clip as host_clip
from safetensors.torch import load_file
from torch import Tensor
from torch.nn.functional import normalize
from trainings import fit

CPU = torch.device("cpu")
TRAINED = {"arc2face": ("text.", "model."), "adaface": ("inverter.",), "compose": ("inverter.",)}


@pytest.fixture(scope="module")
def stack(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The base stack, and a teacher that differs from it."""
    made = stacks.make(tmp_path_factory.mktemp("stack"))
    task = stacks.words("arc2face", made)
    with torch.no_grad():
        for name, value in task.named_parameters():
            value += 0.02 * torch.randn(value.shape, generator=chance(len(name)))
    task.save(made, {})
    return made


def test_orthogonal_subtraction_by_hand() -> None:
    made = losses.orthogonal(torch.tensor([[3.0, 4.0]]), torch.tensor([[2.0, 0.0]]))
    assert torch.equal(made, torch.tensor([[0.0, 4.0]]))
    a, b = torch.randn(2, 3, 5, generator=chance(1))
    assert (losses.orthogonal(a, b) * b).sum(-1).abs().max() < 1e-5
    assert torch.allclose(losses.orthogonal(a, 7 * b), losses.orthogonal(a, b), atol=1e-5)  # whatever its length


def test_the_delta_loss_by_hand() -> None:
    x, y, z = torch.eye(3)
    assert losses.delta(x, x + y, 2 * x, 5 * x + 3 * y).item() == pytest.approx(0, abs=1e-5)
    assert losses.delta(x, x + y, x, x + z).item() == pytest.approx(1, abs=1e-5)
    assert losses.delta(x, x + y, x, x - y).item() == pytest.approx(2, abs=1e-5)
    assert losses.delta(y, x + y, x, x + z).item() == pytest.approx(1, abs=1e-5)
    # A feature that the composition leaves alone counts in no way, nor has it a gradient.
    single, composed = torch.stack((x, x)), torch.stack((x + y, x)).requires_grad_(True)
    value = losses.delta(single, composed, single, torch.stack((x + z + y, x)))
    assert value.item() == pytest.approx(1 - 0.5**0.5, abs=1e-5)
    value.backward()
    assert composed.grad is not None and composed.grad.isfinite().all()
    assert composed.grad[0].any() and not composed.grad[1].any()
    assert losses.delta(single, single, single, composed.detach()).item() == 0


def test_face_preserving_by_hand() -> None:
    one = 20 * torch.eye(3)[None]
    turned = one[:, [1, 2, 0]]
    match = losses.matching(one, turned)
    assert torch.allclose(match[0], torch.eye(3)[:, [1, 2, 0]], atol=1e-5)
    features = torch.tensor([[[1.0, 0.0], [0.0, 1.0], [1.0, 1.0]]])
    whole = torch.ones(1, 3)
    # Moved as the queries are, nothing is lost; left where it was, all that the mask shows counts.
    assert losses.preserving(match, features[:, [1, 2, 0]], features, whole).item() == pytest.approx(0, abs=1e-5)
    still = losses.preserving(torch.eye(3)[None], features[:, [1, 2, 0]], features, whole)
    half = 0.5**0.5
    assert still.item() == pytest.approx((1 + (1 - half) + (1 - half)) / 3, abs=1e-5)
    mask = torch.tensor([[1.0, 0.0, 0.0]])
    assert losses.preserving(torch.eye(3)[None], features[:, [1, 2, 0]], features, mask).item() == pytest.approx(1)


def test_what_the_cross_attentions_see(stack: Path) -> None:
    task = stacks.words("adaface", stack)
    model = task.frozen.model
    noisy, text = torch.randn(2, 4, 16, 16, generator=chance(1)), torch.randn(2, 77, 32, generator=chance(2))
    with torch.no_grad():
        plain = model.apply_model(noisy, torch.ones(2), c_crossattn=text)
        with watching(model.diffusion_model) as layers:
            assert torch.equal(model.apply_model(noisy, torch.ones(2), c_crossattn=text), plain)
        seen = [layer.outputs for layer in layers]
        model.apply_model(2 * noisy, torch.ones(2), c_crossattn=text)
    assert len(layers) == 16 and all(layer.outputs is one for layer, one in zip(layers, seen, strict=True))
    site = model.diffusion_model.get_submodule("input_blocks.1.1.transformer_blocks.0.attn2")
    first = layers[0]
    v = site.to_v(text).unflatten(-1, (site.heads, -1)).transpose(1, 2)
    assert torch.allclose(first.maps.sum(2), torch.ones(2, site.heads, 256), atol=1e-5)
    assert torch.allclose(site.to_out((first.maps.mT @ v).transpose(1, 2).flatten(2)), first.outputs, atol=1e-4)


@pytest.mark.parametrize("kind", stacks.WORDS)
def test_the_task_learns_and_nothing_else(stack: Path, tmp_path: Path, kind: str) -> None:
    made: list[FaceTask[Any]] = []

    def again() -> FaceTask[Any]:
        made.append(stacks.words(kind, stack))
        return made[0]

    fit(again, tmp_path, steps=5, batch=4, rate=2e-3, warmup=0, draw_every=9, ema=0.0)
    (task,), fresh = made, stacks.words(kind, stack)

    def loss(of: FaceTask[Any]) -> Tensor:
        return torch.stack([*of(of.batch(chance(9), 6)).values()]).sum()

    wrong = loss(fresh)
    assert float(loss(task).detach()) < float(wrong.detach())
    wrong.backward()
    weights = stacks.trained(fresh)
    assert all(name.startswith(TRAINED[kind]) for name in weights)
    assert [name for name, value in weights.items() if value.grad is None] == []
    if kind != "arc2face":
        before, after = fresh.frozen.model.state_dict(), task.frozen.model.state_dict()
        assert all(torch.equal(value, after[name]) for name, value in before.items())


def test_what_of_the_teachers_unet_is_trained(stack: Path) -> None:
    named = {
        how: {name for name in stacks.trained(stacks.words("arc2face", stack, trains=how)) if name.startswith("model.")}
        for how in teacher.TRAINS
    }
    assert not named["nothing"] and named["attentions"] < named["all"]
    assert {name.split(".attn2.")[1] for name in named["attentions"]} == {
        "to_q.weight", "to_k.weight", "to_v.weight", "to_out.0.weight", "to_out.0.bias",
    }  # fmt: skip
    with pytest.raises(ValueError, match="got trains = 'some'"):
        stacks.words("arc2face", stack, trains="some")


def test_the_teachers_text_encoder_may_learn_more_slowly(stack: Path) -> None:
    task = stacks.words("arc2face", stack, slower=0.25)
    shares = {name.partition(".")[0]: task.share(name) for name in stacks.trained(task)}
    assert shares == {"text": 0.25, "model": 1.0}


def identity(task: FaceTask[Any], read: Tensor) -> Identity:
    """Somebody as Encode Identity tells them."""
    two = torch.zeros(1, 4), torch.zeros(1, 5, 2)
    key = task.reader.feature.id(task.reader.hash)
    return Identity("anna", *two, torch.ones(1), torch.ones(1), embeddings={key: read})


def test_the_files_load_and_say_what_was_trained(stack: Path, folder: Path) -> None:
    face, task = stacks.words("arc2face", stack), stacks.words("adaface", stack)
    assert isinstance(task, inverter.FaceDistillation)
    for one in (face, task):
        one.save(folder / "likeness", {"steps": 3})
    (folder / "likeness" / "made_arc2face.safetensors").write_bytes((stack / "made_arc2face.safetensors").read_bytes())
    loaded = loader.load("made_adaface.safetensors", "made_arc2face.safetensors")
    assert loaded.spec is not None and loaded.spec.base == "demo" and loaded.spec.notes == {"steps": 3}
    assert loaded.spec.towers == {"l": 32} and loaded.faces == (task.reader.feature,)
    with torch.no_grad():
        read = task.look([task.source.view(4)])
        taught = task.taught(normalize(read, dim=-1))
        vectors = task.vectors(taught)
    who = identity(task, read)
    made = nodes.Arc2FaceConditioning.execute(loaded, who).args[0][0][0]
    assert torch.allclose(made, taught, atol=2e-2) and not torch.allclose(made[:, 8], made[:, 30], atol=0.1)
    rows = nodes.word_vectors(loaded, who, adaface.Wording())["l"]
    assert torch.allclose(rows, vectors[0], atol=2e-2)
    text = load_file(stack / clip.TEXT)
    weights = {key: value.float() for key, value in nodes_table(text).items()}
    host = host_clip(32, 2, 1, weights)
    told: dict[str, Any] = {"strength": 1.0, "class_word": "person"}
    said = nodes.PromptWithIdentity.execute(host, loaded, who, "a photo of @anna in a forest", **told).args[0][0][0]
    with torch.no_grad():
        expected = task.read(task.composed(["a photo of person in a forest"]), vectors)
    assert torch.allclose(said, expected, atol=5e-2)
    wide = host_clip(64, 2, 1)
    with pytest.raises(
        ValueError, match="got a CLIP whose words are 64 wide; made_adaface.safetensors makes words for 32"
    ):
        nodes.PromptWithIdentity.execute(wide, loaded, who, "@anna", **told)


def nodes_table(text: dict[str, Tensor]) -> dict[str, Tensor]:
    """A text encoder's tensors as a checkpoint holds them."""
    from comfyui_likeness.likeness import vocabulary

    return {key: value for key, value in vocabulary.whole(text).items() if key.startswith("text_model.")}


def test_rows_of_tokens_are_the_hosts(stack: Path) -> None:
    task = stacks.words("compose", stack)
    assert isinstance(task, compose.CompositionDistillation)
    (row,) = task.composed(["a photo of a smiling person in red, at a beach"])
    at = row.index(words.PLACE)
    assert row[at : at + adaface.VECTORS] == [words.PLACE] * adaface.VECTORS and row.count(words.PLACE) == 16
    plain = clip.tokenize(task.tokenizer, ["a photo of a smiling person in red, at a beach"])[0]
    assert row[:at] == plain[:at] and row[at + 16 :] == plain[at + 1 : 77 - 15]
    (other,) = task.composed(["a photo of a smiling person in red, at a beach"], task.class_word)
    assert other[:at] == row[:at] and other[at + 16 :] == row[at + 16 :]
    assert other[at : at + 16] == [plain[at], *[adaface.COMMA] * 15]
    (first,) = task.composed(["two dogs"])
    assert first[1] == words.PLACE and first[17:19] == clip.tokenize(task.tokenizer, ["two dogs"])[0][1:3]
    (cut,) = task.composed([f"{'very ' * 65} person"])
    assert len(cut) == 77 and cut.count(words.PLACE) == 10 and cut[-1] == clip_text.END


def test_the_teacher_says_what_the_base_does(stack: Path, tmp_path: Path) -> None:
    stacks.words("arc2face", stack, unet=str(stacks.velocity(stack, tmp_path / "unet.safetensors"))).save(tmp_path, {})
    assert unet.load(tmp_path / f"made_arc2face{teacher.UNET}").model_type == ModelType.V_PREDICTION


def test_a_face_fills_as_many_words_as_it_needs(stack: Path) -> None:
    task = stacks.words("arc2face", stack)
    assert isinstance(task, teacher.Teacher)
    faces = normalize(torch.randn(1, 512, generator=chance(1)), dim=-1)
    seen: list[Tensor] = []
    with torch.no_grad():
        hook = task.text.register_forward_pre_hook(lambda _, given: seen.append(given[0]))
        arc2face.tokens(task.text, faces)
        hook.remove()
        ids = clip_text.padded((*arc2face.BEFORE, *[arc2face.ID] * 16, *arc2face.AFTER))
        plain = task.text.words(ids, CPU)
    assert torch.equal(seen[0][0, 4:20].flatten(), faces[0])
    assert torch.equal(seen[0][0, :4], plain[0, :4]) and torch.equal(seen[0][0, 20:], plain[0, 20:])


def test_the_distance_is_that_of_noises_along_the_teachers_way(stack: Path) -> None:
    task = stacks.words("adaface", stack, random=0.0)
    assert isinstance(task, inverter.FaceDistillation)
    batch = task.batch(chance(3), 2)
    batch["times"] = torch.tensor([[900, 700], [300, 200]])
    with torch.no_grad():
        total = task.distilled(batch)
        seen = FaceTask.looked(task, batch)
        taught = arc2face.tokens(task.teaching.text, seen["read"])
        text = task.read([task.asked] * 2, task.vectors(taught))
        model, master, expected = task.frozen.model, task.teaching.model, 0.0
        noisy, noise = seen["latents"] * 0.18215, batch["noise"]
        for times in batch["times"]:
            sigma = model.model_sampling.sigma(times)[:, None, None, None]
            x = noisy + sigma * noise
            clean = master.apply_model(x, sigma.flatten(), c_crossattn=taught)
            mine = (x - model.apply_model(x, sigma.flatten(), c_crossattn=text)) / sigma
            expected += float((mine - (x - clean) / sigma).square().mean())
            noisy, noise = clean, (x - clean) / sigma
    assert float(total) == pytest.approx(expected, rel=1e-3)


def test_random_faces_are_a_part_and_their_pictures_noise(stack: Path) -> None:
    task = stacks.words("adaface", stack, random=0.4, denoise=3)
    batch = task.batch(chance(2), 400)
    drawn = batch["random"]
    assert float(drawn.float().mean()) == pytest.approx(0.4, abs=0.06)
    seen, plain = task.looked(batch), FaceTask.looked(task, batch)
    assert torch.allclose(seen["read"].norm(dim=-1), torch.ones(400), atol=1e-4)
    assert torch.equal(seen["read"][~drawn], plain["read"][~drawn])
    assert torch.equal(seen["latents"][~drawn], plain["latents"][~drawn])
    assert float((seen["latents"][drawn] * 0.18215).std()) == pytest.approx(1, abs=0.02)
    counts = [len(task.batch(chance(number), 1)["times"]) for number in range(40)]
    assert set(counts) == {1, 2, 3}
    assert all((one[:-1] >= one[1:]).all() for one in [task.batch(chance(7), 9)["times"]])


@pytest.mark.parametrize("widens", clip_text.WIDENS)
def test_expansion_keeps_what_the_inverter_says(stack: Path, tmp_path: Path, widens: str) -> None:
    first = stacks.words("adaface", stack)
    first.save(tmp_path, {})
    file = str(tmp_path / "made_adaface.safetensors")
    same, wide = (
        stacks.words("adaface", stack, begin=file, copies=(4,), widens=widens, spread=0.0),
        stacks.words("adaface", stack, begin=file, copies=(4,), widens=widens),
    )
    taught = torch.randn(2, 77, 32, generator=chance(1))
    with torch.no_grad():
        old, exact, new = (task.vectors(taught) for task in (first, same, wide))
    assert torch.allclose(exact, old, atol=1e-2) and not torch.equal(new, exact)
    assert (new - exact).norm() < 0.2 * exact.norm()
    part = f"{clip_text.WIDENS[widens][0]}.weight"
    copies = wide.inverter.text.layers[0].self_attn.get_parameter(part).unflatten(0, (4, -1)).detach()
    assert torch.equal(copies[0], same.inverter.text.layers[0].self_attn.get_parameter(part)[:32])
    assert all(float((copies[i] - copies[0]).std()) > 0 for i in (1, 2, 3)) and not torch.equal(copies[1], copies[2])
    # It is saved, and widened once more, as it was.
    wide.save(tmp_path, {})
    again = stacks.words("adaface", stack, begin=file, copies=(8,), widens=widens)
    attention = again.inverter.text.layers[0].self_attn
    assert (attention.copies, attention.widens) == (8, widens)
    assert attention.get_parameter(part).shape == (256, 32)
    for copies_, message in (
        ((2, 2), "copies for 2 layers"),
        ((6,), r"copies = 6 for layer 0 in \[task\], which has 4"),
    ):
        with pytest.raises(ValueError, match=message):
            stacks.words("adaface", stack, begin=file, copies=copies_, widens=widens)
    other = {"keys": "queries", "queries": "keys"}[widens]
    with pytest.raises(ValueError, match="values of unequal or odd width"):
        stacks.words("adaface", stack, begin=file, copies=(8,), widens=other)
    with pytest.raises(ValueError, match="got widens = 'heads'"):
        stacks.words("adaface", stack, widens="heads")


def test_widened_weights_by_hand() -> None:
    tensors = {
        f"encoder.layers.0.self_attn.{part}.{what}": torch.ones(2, *[2] * (what == "weight"))
        for part in ("q_proj", "k_proj", "v_proj")
        for what in ("weight", "bias")
    }
    made = expanded(tensors, (3,), 0.5, 1)
    assert made["encoder.layers.0.self_attn.k_proj.weight"].shape == (6, 2)
    assert torch.equal(made["encoder.layers.0.self_attn.v_proj.bias"], torch.ones(6))
    assert torch.equal(made["encoder.layers.0.self_attn.q_proj.weight"], torch.ones(2, 2))


def test_composition_sees_the_same_noise_and_the_face(stack: Path) -> None:
    task = stacks.words("compose", stack)
    assert isinstance(task, compose.CompositionDistillation)
    batch = task.batch(chance(4), 3)
    assert batch["masks"].shape == (3, stacks.SIDE, stacks.SIDE) and 0.01 < batch["masks"].float().mean() < 0.5
    found = task(batch)
    assert list(found) == ["prompts", "maps", "outputs", "preserved", "face"]
    assert all(value.isfinite() and value > 0 for value in found.values())
    lone = stacks.words("compose", stack, face=0.0, delta=2.0, preserve=0.5)
    weighed = lone(batch)
    assert list(weighed) == list(found)[:-1]
    for name, factor in (("prompts", 2.0), ("maps", 2.0), ("outputs", 2.0), ("preserved", 0.5)):
        assert float(weighed[name].detach()) == pytest.approx(factor * float(found[name].detach()), rel=1e-4)


def test_it_tells_whether_it_still_gains(stack: Path) -> None:
    task = stacks.words("adaface", stack)
    assert isinstance(task, inverter.FaceDistillation)
    with torch.no_grad():
        first, second = task.progress(chance(0)), task.progress(chance(0))
        for value in task.inverter.parameters():
            value += 0.1
        third = task.progress(chance(0))
    assert list(first) == ["kept_face"] and float(second["gain"]) == pytest.approx(0, abs=1e-5)
    assert float(third["gain"]) == pytest.approx(1 - float(third["kept_face"] / first["kept_face"]), abs=1e-5) != 0


def test_what_cannot_be_trained_is_said(stack: Path) -> None:
    task = stacks.words("adaface", stack)
    with pytest.raises(ValueError, match="expected @ in the prompt"):
        replace(task.settings, prompt="a photo")
    with pytest.raises(ValueError, match="got text.safetensors, which is not Arc2Face's text encoder"):
        stacks.words("adaface", stack, teacher=str(stack / clip.TEXT))
    assert isinstance(task.frozen.model, type(unet.load(stack / unet.FILE)))
