"""FlashFace is trained by the code that runs it: what learns, who sees which faces, and what the nodes make of it."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import comfy.sd
import pytest
import stacks
import torch
from analyzers import folder as folder
from comfy.model_base import ModelType
from comfy.model_patcher import ModelPatcher
from comfyui_likeness.likeness import own_flashface, reference_faces
from comfyui_likeness.likeness.spec import FlashFaceSpec, Identity
from comfyui_likeness.nodes.attention.patch import attach, directly
from comfyui_likeness.nodes.attention.reference import ApplyReference
from comfyui_likeness.nodes.loaders import adapter
from comfyui_likeness.nodes.loaders.flashface import LoadFlashFace
from comfyui_likeness.training import tasks
from comfyui_likeness.training.adapters.flashface import FIRST, PLACEMENTS, FlashFace, Settings
from comfyui_likeness.training.base import clip, latents, unet
from comfyui_likeness.training.base.portraits import Shards
from comfyui_likeness.training.data import fit as fitted
from comfyui_likeness.training.task import chance
from safetensors.torch import load_file
from torch import Tensor
from trainings import fit

CPU = torch.device("cpu")
CONFIGS = Path(__file__).resolve().parents[1] / "training" / "configs" / "two_cores"
FACE = 96


@pytest.fixture(scope="module")
def stack(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Path]:
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(latents, "PIECE", 10)  # there are no more pictures
        patch.setitem(unet.SAMPLING, "steps", 2)
        yield stacks.make(tmp_path_factory.mktemp("stack"))


def task(folder: Path, **told: Any) -> FlashFace:
    files = {name: str(folder / file) for name, file in stacks.FILES.items()}
    return FlashFace(
        Settings(**{"file": "made", "side": stacks.SIDE, "face": FACE, **files, **told}), Shards(folder), 5
    )


def woken(made: FlashFace) -> FlashFace:
    """As after some training: the added layers' outputs are not 0 any more, and the face's place counts."""
    with torch.no_grad():
        if made.main is not None:
            made.main.diffusion_model.get_parameter(FIRST)[:, 4] = 0.5
        for number, value in enumerate(made.added.parameters()):
            value.copy_(torch.randn(value.shape, generator=chance(number)) / 4)
    return made


def said(model: ModelPatcher, sigma: Tensor, text: Tensor, **told: Tensor) -> Tensor:
    """What a model makes of noise of these spreads [n], the row of each by the spread itself."""
    noise = torch.stack([torch.randn(4, 16, 16, generator=chance(int(100 * one))) * one for one in sigma.tolist()])
    with torch.no_grad():
        return model.model.apply_model(
            noise, sigma, c_crossattn=text.expand(len(sigma), -1, -1), **told, **directly(model, float(sigma.max()))
        )


def words(made: FlashFace) -> Tensor:
    return made.frozen.words(clip.tokenize(made.tokenizer, ["a smiling person"]), CPU)


def alike(a: Tensor, b: Tensor, part: float = 1e-4) -> bool:
    return float((a - b).norm()) < part * float(b.norm())


@pytest.mark.parametrize("tuned", [False, True])
def test_it_learns_and_the_base_stays(stack: Path, tmp_path: Path, tuned: bool) -> None:
    made: list[FlashFace] = []

    def make() -> FlashFace:
        made.append(task(stack, pool=10, references=2, tuned=tuned))
        return made[0]

    fit(make, tmp_path, steps=8, batch=4, rate=3e-3, warmup=0, draw_every=8, ema=0.0)
    (learnt,), fresh = made, task(stack, pool=10, references=2, tuned=tuned)
    batch = fresh.batch(chance(9), 4)
    assert float(learnt(batch)["noise"]) < 0.99 * float(fresh(batch)["noise"])
    assert len(list((tmp_path / "drawn").glob("pictures-*.png"))) == 1
    begun, ended = stacks.trained(fresh), stacks.trained(learnt)
    assert {name.split(".")[0] for name in begun} == {"net", "added", *(["main"] if tuned else [])}
    assert [name for name, value in begun.items() if torch.equal(ended[name], value)] == []
    before, after = fresh.frozen.model.state_dict(), learnt.frozen.model.state_dict()
    assert all(torch.equal(value, after[name]) for name, value in before.items())
    assert not any(value.requires_grad for value in learnt.frozen.model.parameters())


@pytest.mark.parametrize("placement", PLACEMENTS)
def test_what_stands_where_has_gradients_and_what_is_not_read_has_none(stack: Path, placement: str) -> None:
    made = woken(task(stack, pool=10, placement=placement))
    sides = {name.split("/")[0].split("_")[0] for name in made.added.layers}
    assert sides == set(PLACEMENTS[placement])
    made(made.batch(chance(2), 3))["noise"].backward()
    trained = stacks.trained(made)
    assert [name for name, value in trained.items() if value.grad is None or not value.grad.any()] == []
    resting = {name for name, _ in made.named_parameters()} - set(trained)
    assert all(name.startswith("net.diffusion_model.") for name in resting)
    last = "middle_block.1" if placement == "encoder" else "output_blocks.11.1"
    assert f"net.diffusion_model.{last}.transformer_blocks.0.attn1.to_q.weight" in resting
    assert f"net.diffusion_model.{last}.transformer_blocks.0.norm1.weight" in trained
    assert "net.diffusion_model.out.2.weight" in resting
    assert any(name.startswith("net.diffusion_model.output_blocks") for name in trained) == (placement != "encoder")


def test_it_begins_as_the_base_model(stack: Path) -> None:
    made = task(stack)
    base = made.frozen.model.diffusion_model.state_dict()
    net = made.net.diffusion_model.state_dict()
    assert net.keys() == base.keys() and all(torch.equal(value, net[name]) for name, value in base.items())
    sigma, text = made.frozen.model.model_sampling.sigma(torch.tensor([400])), words(made)
    with torch.no_grad():
        read = made.look([made.source.view(0)])
    ours, plain = made.painter(CPU), made.frozen.unet.on(CPU)
    assert torch.equal(said(attach(ours, made.injection(ours, read)), sigma, text), said(plain, sigma, text))
    path = "middle_block.1.transformer_blocks.0"
    layer = made.added.at(path)
    assert layer is not None and torch.equal(layer.q.weight, base[f"{path}.attn1.to_q.weight"])
    copied = task(stack, tuned=True).added.at(path)  # the authors copy the output as well
    assert copied is not None and torch.equal(copied.o.weight, base[f"{path}.attn1.to_out.0.weight"])


def test_it_goes_on_from_a_file(stack: Path, tmp_path: Path) -> None:
    first = woken(task(stack))
    first.save(tmp_path, {})
    there, here = (stacks.trained(one) for one in (first, task(stack, begin=str(tmp_path / "made.safetensors"))))
    assert there.keys() == here.keys() and there
    assert all(torch.equal(here[name], value.half().float()) for name, value in there.items())


def test_its_files_hold_no_unet_that_says_the_velocity(stack: Path, tmp_path: Path) -> None:
    file = str(stacks.velocity(stack, tmp_path / "velocity.safetensors"))
    assert task(stack, unet=file).painter(CPU).model.model_type == ModelType.V_PREDICTION
    with pytest.raises(ValueError, match="got tuned in .task. for .*velocity.safetensors, which says no noise"):
        task(stack, unet=file, tuned=True)


def person(made: FlashFace, numbers: list[int]) -> Identity:
    """Whom Encode Identity makes of some pictures: crops of the head, with the face's place in them."""
    found = [stacks.taken(made.source.view(number)) for number in numbers]
    cut = [reference_head(one) for one in found]
    crops, boxes, points = (torch.stack(part) for part in zip(*cut, strict=True))
    return Identity("x", boxes, points, torch.ones(len(found)), torch.ones(len(found)), crops)


def reference_head(one: Any) -> tuple[Tensor, Tensor, Tensor]:
    picture, face = stacks.head(one.photo, one.face)
    return picture, face.box, face.kps


@pytest.mark.parametrize("tuned", [False, True])
def test_the_file_runs_as_it_was_trained(stack: Path, folder: Path, tuned: bool) -> None:
    made, told = woken(task(stack, tuned=tuned)), {}
    made.save(folder / "likeness", {"steps": 2})
    views = [made.source.view(number) for number in (4, 7)]
    cuts = torch.stack([made.reader.cut(view) for view in views]).movedim(-1, 1).float() / 255
    with torch.no_grad():
        read = latents.encode(made.frozen.autoencoder, cuts)
    assert alike(made.look(views), read, 0.02)  # in bfloat16
    sigma, text, empty = made.frozen.model.model_sampling.sigma(torch.tensor([400])), words(made), [[made.text, {}]]
    if tuned:
        told = {"c_concat": reference_faces.position((views[0].box / 128).tolist(), 128, 128)[None, None]}
    ours = made.painter(CPU)
    expected, plain = (said(one, sigma, text, **told) for one in (attach(ours, made.injection(ours, read)), ours))
    moved = (expected - plain).norm()
    assert moved > 1e-2 * plain.norm()
    base = None if tuned else ModelPatcher(unet.load(stack / unet.FILE), CPU, CPU)
    model, net = LoadFlashFace.execute("made.safetensors", base).args
    assert net.spec == FlashFaceSpec(heads=2, face_size=FACE, notes={"steps": 2})
    with torch.inference_mode():
        node = ApplyReference.execute(
            model, net, person(made, [4, 7]), comfy.sd.VAE(sd=load_file(made.settings.vae)), strength=1.0,
            reference_guidance=0.0, start_percent=0.0, end_percent=1.0, show_at_least=1, reference_text=empty,
        ).args[0]  # fmt: skip
        got = said(node, sigma, text, **told)
    assert (got - expected).norm() < 0.01 * moved
    if tuned:
        nowhere = said(node, sigma, text, c_concat=torch.zeros(1, 1, 16, 16))
        assert not alike(nowhere, got, 1e-2)


def test_each_row_sees_its_own_faces_at_its_own_noise(stack: Path) -> None:
    made = woken(task(stack))
    with torch.no_grad():
        read = made.look([made.source.view(number) for number in range(6)])  # two of each of three rows
    sigma, text, ours = (
        made.frozen.model.model_sampling.sigma(torch.tensor([50, 500, 900])),
        words(made),
        made.painter(CPU),
    )
    together = said(attach(ours, made.injection(ours, read)), sigma, text)
    for row in range(3):
        alone = attach(ours, made.injection(ours, read[2 * row : 2 * row + 2]))
        assert alike(said(alone, sigma[row : row + 1], text)[0], together[row])
    seen = torch.tensor([1.0, 0.0, 1.0])[:, None, None]
    dropped = said(attach(ours, made.injection(ours, read, seen)), sigma, text)
    plain = said(ours, sigma, text)
    assert alike(dropped[1], plain[1], 1e-6) and alike(dropped[0], together[0], 1e-6)
    assert not alike(together[1], plain[1], 1e-3)


def test_one_to_four_faces_none_of_them_twice_or_the_picture_that_is_made(stack: Path) -> None:
    made = task(stack, pool=10)
    counts = [len(batch["read"]) // 2 for batch in (made.batch(chance(number), 2) for number in range(200))]
    assert {count: counts.count(count) / 200 for count in sorted(counts)} == pytest.approx(
        dict.fromkeys((1, 2, 3, 4), 0.25), abs=0.1
    )
    numbers, found = [3, 5, 7, 11, 13, 17], set()
    for first in range(6):
        for second in range(120):
            here, *faces = made._row(numbers, first, second, 4)
            assert here == numbers[first] and len({here, *faces}) == 5
            found.add((here, *faces))
    assert len(found) == 6 * 120  # every order of every choice
    assert sorted(made._row([1, 2, 3], 0, 0, 4)[1:]) == [2, 2, 3, 3]  # shown again where there are no more


def test_conditions_are_dropped_each_by_itself(stack: Path) -> None:
    made = task(stack, pool=10, references=1, no_text=0.3, no_face=0.2, no_place=0.4, tuned=True)
    views = [made.source.view(number) for number in range(10)]
    made.source.view = views.__getitem__  # type: ignore[method-assign]
    batch = made.batch(chance(2), 1000)
    empty = clip.tokenize(made.tokenizer, [""])[0]
    silent = torch.tensor([row == empty for row in batch["tokens"]])
    placeless = ~batch["place"].flatten(1).any(1)
    shares = [batch["faceless"], silent, silent & batch["faceless"], placeless, placeless & silent]
    assert [float(one.float().mean()) for one in shares] == pytest.approx([0.2, 0.3, 0.06, 0.4, 0.12], abs=0.04)
    row = int((~placeless).nonzero()[0])
    box = fitted(made.source.view(batch["made"][row]), stacks.SIDE).box / stacks.SIDE
    assert torch.equal(batch["place"][row, 0], reference_faces.position(box.tolist(), stacks.SIDE, stacks.SIDE))
    assert {tuple(place.shape) for place in batch["place"]} == {(1, 16, 16)}


def test_a_broken_run_goes_on_to_the_same_weights(stack: Path, tmp_path: Path) -> None:
    told: dict[str, Any] = {"steps": 3, "batch": 2, "warmup": 0, "save_every": 2}
    whole, _ = fit(lambda: task(stack, pool=10, references=1), tmp_path / "whole", **told)

    def breaks() -> FlashFace:
        made, seen = task(stack, pool=10, references=1), [0]

        def stop(*_: Any) -> None:
            seen[0] += 1
            if seen[0] == 3:
                raise KeyboardInterrupt

        made.register_forward_pre_hook(stop)
        return made

    with pytest.raises(KeyboardInterrupt):
        fit(breaks, tmp_path / "broken", **told)
    again, _ = fit(lambda: task(stack, pool=10, references=1), tmp_path / "broken", **told)
    a, b = (load_file(place / "made.safetensors") for place in (whole, again))
    assert a.keys() == b.keys() and all(torch.equal(value, b[name]) for name, value in a.items())


def test_what_does_not_fit_is_refused(stack: Path, folder: Path) -> None:
    made = task(stack)
    with pytest.raises(ValueError, match=r"got placement = 'roof' in \[task\]; expected one of encoder, decoder, both"):
        replace(made.settings, placement="roof")
    made.save(folder / "likeness", {})
    with pytest.raises(ValueError, match="a FlashFace file; expected an adapter; load it with Load FlashFace"):
        adapter.load("made.safetensors")
    with pytest.raises(ValueError, match="brings no UNet that paints; expected a base model for it; connect"):
        LoadFlashFace.execute("made.safetensors")
    told = {"kind": "flashface", "version": 1, "base": "SD1.5", "notes": {}, "heads": 2, "face_size": FACE}
    tensors = load_file(folder / "likeness" / "made.safetensors")
    spec, parts = own_flashface.read(tensors, told, "f")
    assert spec == made.spec and parts.main is None and len(parts.added) == 50
    for wrong, says in (({"heads": 0}, "0 heads"), ({"face_size": 100}, "100 pixels"), ({"base": "SDXL"}, "SD1.5")):
        with pytest.raises(ValueError, match=says):
            own_flashface.read(tensors, {**told, **wrong}, "f")
    with pytest.raises(ValueError, match="the tensor 'x'; expected both"):
        own_flashface.read({**tensors, "x": torch.zeros(1)}, told, "f")
    with pytest.raises(ValueError, match="no reference net or no added layers"):
        own_flashface.read({"added.a.q.weight": torch.zeros(1)}, told, "f")


def test_the_demos_differ_in_where_the_layers_stand() -> None:
    found = {name: tasks.settings("flashface", CONFIGS / f"{name}.toml") for name in ("flashface", *NAMES)}
    (run, about) = found["flashface"]
    assert about.placement == "decoder" and not about.tuned and about.file == "demo_flashface"
    for name, placement in NAMES.items():
        own = {"file": f"demo_{name}", "placement": placement}
        assert found[name] == (replace(run, folder=f"artifacts/training/two_cores/{name}"), replace(about, **own))


NAMES = {"flashface_encoder": "encoder", "flashface_both": "both"}
