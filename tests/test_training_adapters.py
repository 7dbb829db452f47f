"""Adapters are trained by the code that runs them: their gradients, their files, and what the nodes make of these."""

from __future__ import annotations

import shutil
from dataclasses import replace
from pathlib import Path
from typing import Any

import comfy.sd
import pytest
import stacks
import torch
from analyzers import folder as folder
from comfy.model_patcher import ModelPatcher
from comfyui_likeness.likeness import own_decoupled
from comfyui_likeness.likeness.spec import Feature, Identity
from comfyui_likeness.nodes import encode
from comfyui_likeness.nodes.attention import decoupled as decoupled_node
from comfyui_likeness.nodes.attention import fused as fused_node
from comfyui_likeness.nodes.attention.injection import Injection
from comfyui_likeness.nodes.attention.patch import attach, directly
from comfyui_likeness.nodes.loaders import adapter, omni_id
from comfyui_likeness.nodes.loaders.face_analyzer import FaceAnalyzer
from comfyui_likeness.training.adapters import decoupled, readers
from comfyui_likeness.training.adapters.stack import AdapterTask
from comfyui_likeness.training.base import clip, unet
from comfyui_likeness.training.base.portraits import Shards
from comfyui_likeness.training.data import View
from comfyui_likeness.training.omni_id import encoder
from comfyui_likeness.training.task import chance
from safetensors.torch import load_file, save_file
from torch import Tensor
from trainings import DISCS, fit

CPU = torch.device("cpu")
KINDS = ["arcface", "image", "omni", "clean", "match"]  # which are trained just as the nodes apply them
APPLY: dict[str, Any] = {"strength": 1.0, "start_percent": 0.0, "end_percent": 1.0}


@pytest.fixture(scope="module")
def stack(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return stacks.make(tmp_path_factory.mktemp("stack"))


def loss(task: AdapterTask[Any], rows: int = 8) -> Tensor:
    return task(task.batch(chance(9), rows))["noise"]


def said(model: ModelPatcher, sigma: Tensor, text: Tensor) -> Tensor:
    """What a model makes of noise [n, 4, 16, 16] of these spreads [n]."""
    noise = torch.randn(len(sigma), 4, 16, 16, generator=chance(3)) * sigma[:, None, None, None]
    with torch.no_grad():
        return model.model.apply_model(noise, sigma, c_crossattn=text, **directly(model, float(sigma.max())))


def words(task: AdapterTask[Any], rows: int) -> Tensor:
    text = task.frozen.words(clip.tokenize(task.tokenizer, ["a smiling person"]), CPU)
    return text.expand(rows, -1, -1)


@pytest.mark.parametrize("kind", KINDS)
def test_the_adapter_learns_and_nothing_else(stack: Path, tmp_path: Path, kind: str) -> None:
    made: list[AdapterTask[Any]] = []

    def make() -> AdapterTask[Any]:
        made.append(stacks.task(kind, stack, pool=10))
        return made[0]

    fit(make, tmp_path, steps=8, batch=8, rate=5e-3, warmup=0, draw_every=8, ema=0.0)
    (task,), fresh = made, stacks.task(kind, stack, pool=10)
    assert float(loss(task).detach()) < 0.99 * float(loss(fresh).detach())
    assert len(list((tmp_path / "drawn").glob("pictures-*.png"))) == 1
    loss(fresh).backward()
    weights = stacks.trained(fresh)
    assert all(name.startswith("adapter.") for name in weights)
    assert [name for name, value in weights.items() if value.grad is None or not value.grad.any()] == []
    own = stacks.trained(task)
    assert [name for name, value in weights.items() if torch.equal(own[name], value)] == []
    before, after = fresh.frozen.model.state_dict(), task.frozen.model.state_dict()
    assert all(torch.equal(value, after[name]) for name, value in before.items())
    assert not any(value.requires_grad for value in task.frozen.model.parameters())


@torch.no_grad()
def looked(task: AdapterTask[Any], *views: View) -> Tensor:
    """What an adapter is bound to of one picture a row."""
    return task.faces({"read": task.look(views), "faceless": torch.zeros(len(views), dtype=torch.bool)})


def identity(task: AdapterTask[Any], view: View) -> Identity:
    """Whom Encode Identity makes of a picture, with this task's encoder."""
    one = stacks.taken(view)
    heads = stacks.crop(view)[None]
    whole = Identity("x", torch.zeros(1, 4), torch.zeros(1, 5, 2), torch.ones(1), torch.ones(1), heads)
    reader = task.reader
    if isinstance(reader, readers.ArcFace):
        from insightface.model_zoo import get_model

        network = get_model(str(reader.file), providers=["CPUExecutionProvider"])
        analyzer = FaceAnalyzer("arcface.demo", reader.hash, None, network)
        vectors, hashes = encode.arcface([one], analyzer)
        return replace(whole, embeddings=vectors, hashes=hashes)
    if isinstance(reader, readers.Vision):
        tower = encode.HostEncoder(readers.load_vision(Path(task.settings.encoder)))
        features = encode.image_features([one], heads, tower, True)
        return replace(whole, embeddings=features.embeddings, zeros=features.zeros, hashes=features.hashes)
    if isinstance(reader, readers.Omni):
        together, hashes = encode.joint([one], omni_id.load(Path(task.settings.encoder).name))
        return replace(whole, joint=together, hashes=hashes)
    return whole


def by_node(task: AdapterTask[Any], model: ModelPatcher, file: str, who: Identity, **changes: Any) -> ModelPatcher:
    """The model with an adapter's file applied by the ordinary nodes."""
    loaded, report = adapter.load(file)
    assert "16" in report and "steps: 2" in report
    told = {**APPLY, **changes}
    if isinstance(task, decoupled.Decoupled):
        node = decoupled_node.ApplyDecoupled
        return node.execute(model, loaded, who, layer_weights="linear", scaling="V only", **told).args[0]
    eyes = comfy.sd.VAE(sd=load_file(task.settings.vae))
    return fused_node.ApplyFused.execute(model, loaded, who, eyes, outside="all", **told).args[0]


@pytest.mark.parametrize("kind", KINDS)
def test_the_file_runs_as_it_was_trained(stack: Path, folder: Path, kind: str) -> None:
    task = stacks.task(kind, stack)
    shutil.copy(stack / encoder.FILE, folder / "likeness")
    place = folder / ("ipadapter" if kind in ("arcface", "image") else "likeness")
    task.save(place, {"steps": 2})
    view = task.source.view(4)
    read = looked(task, view)
    model = ModelPatcher(unet.load(stack / unet.FILE), CPU, CPU)
    text, sigma = words(task, 1), task.frozen.model.model_sampling.sigma(torch.tensor([400]))
    expected = said(attach(task.frozen.unet.on(CPU), task.injection(task.frozen.unet.on(CPU), read)), sigma, text)
    plain = said(model, sigma, text)
    # How far the adapter moves the picture is what its copies have to agree in.
    moved = (expected - plain).norm()
    assert moved > 1e-2 * plain.norm()
    who = identity(task, view)
    with torch.inference_mode():
        made = said(by_node(task, model, "made.safetensors", who), sigma, text)
    assert (made - expected).norm() < 0.02 * moved
    assert by_node(task, model, "made.safetensors", who, strength=0.0) is model
    assert torch.equal(said(model, sigma, text), plain)


def alone(task: AdapterTask[Any], read: Tensor) -> Injection:
    """The adapter bound to one face by no batch: as the nodes bind it."""
    injection: Any = task.injection(task.frozen.unet.on(CPU), read)
    return replace(injection, unfold=False, bank=type(injection.bank)())


@pytest.mark.parametrize("kind", KINDS)
def test_each_row_sees_its_own_face_at_its_own_noise(stack: Path, kind: str) -> None:
    task = stacks.task(kind, stack)
    held = task.frozen.unet.on(CPU)
    read = looked(task, *(task.source.view(number) for number in (0, 1, 2)))
    sigma = task.frozen.model.model_sampling.sigma(torch.tensor([50, 500, 900]))
    text = words(task, 3)
    together = said(attach(held, task.injection(held, read)), sigma, text)
    noise = torch.randn(3, 4, 16, 16, generator=chance(3)) * sigma[:, None, None, None]
    for row in range(3):
        patched, own = attach(held, alone(task, read[row : row + 1])), sigma[row : row + 1]
        with torch.no_grad():
            one = held.model.apply_model(
                noise[row : row + 1], own, c_crossattn=text[:1], **directly(patched, float(own))
            )
        assert torch.allclose(together[row], one[0], atol=2e-4 * float(one.abs().max()))
    turned = said(attach(held, task.injection(held, read[[2, 1, 0]])), sigma, text)
    assert torch.equal(turned[1], together[1]) or torch.allclose(turned[1], together[1], atol=1e-5)
    assert not torch.allclose(turned[0], together[0], atol=1e-3)


@pytest.mark.parametrize("kind", ["arcface", "image", "omni", "clean"])
def test_a_pool_is_read_once_and_trains_alike(stack: Path, kind: str) -> None:
    pooled, whole = stacks.task(kind, stack, pool=10), stacks.task(kind, stack)
    batch, other = pooled.batch(chance(1), 6), whole.batch(chance(1), 6)
    assert {"latents", "read"} <= set(batch) and {"pictures", "cuts"} <= set(other)
    assert batch["tokens"] == other["tokens"] and torch.equal(batch["noise"], other["noise"])
    assert float(pooled(batch)["noise"].detach()) == pytest.approx(float(whole(other)["noise"].detach()), rel=2e-2)
    files = list(stack.glob("faces-*/*.safetensors"))
    stamps = {file: file.stat().st_mtime_ns for file in files}
    again = stacks.task(kind, stack, pool=10)
    assert files and {file: file.stat().st_mtime_ns for file in stack.glob("faces-*/*.safetensors")} == stamps
    assert all(torch.equal(value, again.frozen.faces[number]) for number, value in pooled.frozen.faces.items())


def test_the_face_is_another_picture_of_the_same_person(stack: Path) -> None:
    task = stacks.task("arcface", stack)
    source = task.source
    assert isinstance(source, Shards)
    assert task.clusters == [[0, 4, 7], [1, 5, 8], [2, 6, 9]]  # 3 is the pair's
    assert source.clusters(7, 9, 9) == [[0, 4], [1, 5], [2, 6]] and source.clusters(10, 2, 2) == [[0, 4], [1, 5]]
    assert source.clusters(4, 9, 9) == []
    asked: list[list[int]] = []
    shown = task._shown

    def listen(made: list[int], seen: list[int]) -> dict[str, Tensor]:
        asked.extend([*pair] for pair in zip(made, seen, strict=True))
        return shown(made, seen)

    task._shown = listen  # type: ignore[method-assign]
    task.batch(chance(1), 150)
    of = {number: person for person, numbers in enumerate(task.clusters) for number in numbers}
    assert all(a != b and of[a] == of[b] for a, b in asked) and len({tuple(pair) for pair in asked}) == 18
    asked.clear()
    task.settings = replace(task.settings, other=False)
    task.batch(chance(1), 20)
    assert all(a == b for a, b in asked)


def test_conditions_are_dropped_as_told(stack: Path) -> None:
    parts = {"no_text": 0.2, "no_face": 0.3, "neither": 0.1}
    task = stacks.task("arcface", stack, pool=10, **parts)
    batch = task.batch(chance(2), 1000)
    empty = clip.tokenize(task.tokenizer, [""])[0]
    silent = torch.tensor([row == empty for row in batch["tokens"]])
    faceless = batch["faceless"]
    shares = [(silent & ~faceless), (faceless & ~silent), (silent & faceless)]
    assert [float(one.float().mean()) for one in shares] == pytest.approx([0.2, 0.3, 0.1], abs=0.04)
    read = task.faces(batch)
    assert not read[faceless].any() and torch.equal(read[~faceless], batch["read"][~faceless])
    image = stacks.task("image", stack, pool=10, **parts)
    batch = image.batch(chance(2), 12)
    grey = image.faces(batch)[batch["faceless"]]
    assert len(grey) and torch.equal(grey, image.reader.zero().expand_as(grey))
    assert not stacks.task("clean", stack, pool=10).batch(chance(2), 200)["faceless"].any()


def test_heads_count_more(stack: Path) -> None:
    plain, task = (stacks.task("arcface", stack, pool=10, heads_count=n) for n in (1.0, 3.0))
    batch = task.batch(chance(2), 6)
    assert "counts" not in plain.batch(chance(2), 6)
    side = task.settings.side
    views = [task.source.shown(number, side) for number in batch["made"]]
    assert torch.equal(batch["counts"], torch.stack([unet.counts(view, side, 3.0) for view in views]))
    assert float(loss(task).detach()) != float(loss(plain).detach())


def test_a_broken_run_goes_on_to_the_same_weights(stack: Path, tmp_path: Path) -> None:
    told: dict[str, Any] = {"steps": 6, "batch": 4, "warmup": 0, "save_every": 2}
    whole, _ = fit(lambda: stacks.task("image", stack, pool=10), tmp_path / "whole", **told)

    def breaks() -> AdapterTask[Any]:
        task, batch = stacks.task("image", stack, pool=10), [0]

        def stop(*_: Any) -> None:
            batch[0] += 1
            if batch[0] == 4:
                raise KeyboardInterrupt

        task.register_forward_pre_hook(stop)
        return task

    with pytest.raises(KeyboardInterrupt):
        fit(breaks, tmp_path / "broken", **told)
    again, _ = fit(lambda: stacks.task("image", stack, pool=10), tmp_path / "broken", **told)
    a, b = (load_file(place / "made.safetensors") for place in (whole, again))
    assert a.keys() == b.keys() and all(torch.equal(value, b[name]) for name, value in a.items())
    assert "image_proj.latents" in a and "ip_adapter.31.to_v_ip.weight" in a


@pytest.mark.parametrize("kind", [*KINDS, "infinite"])
def test_an_adapter_goes_on_from_a_file(stack: Path, tmp_path: Path, kind: str) -> None:
    """All that was trained is taken over, and nothing else, as what the UNet and the text encoder say is their own."""
    first, plain = stacks.task(kind, stack), stacks.task(kind, stack)
    with torch.no_grad():
        for value in stacks.trained(first).values():
            value.add_(torch.randn(value.shape, generator=chance(7)).to(value) * 0.01)
    first.save(tmp_path, {})
    (file,) = tmp_path.glob("*.safetensors")
    next_one = type(plain)(replace(plain.settings, begin=str(file)), plain.source, 5)
    there, here = stacks.trained(first), stacks.trained(next_one)
    assert there.keys() == here.keys() and there
    assert all(torch.equal(here[name], there[name].half().float()) for name in there)
    others = {name: value for name, value in next_one.state_dict().items() if name not in here}
    assert all(torch.equal(value, plain.state_dict()[name]) for name, value in others.items())
    key, value = max(load_file(file).items(), key=lambda item: item[1].numel())
    save_file({**load_file(file), key: value[:1]}, tmp_path / "short.safetensors")
    with pytest.raises(ValueError, match=f"short.safetensors, in which {key} is of the shape .* expected the shape"):
        type(plain)(replace(plain.settings, begin=str(tmp_path / "short.safetensors")), plain.source, 5)
    file.write_bytes(file.read_bytes()[:-100])
    with pytest.raises(ValueError, match=f"got {file} .*; expected an adapter that another run has made"):
        type(plain)(replace(plain.settings, begin=str(file)), plain.source, 5)


def test_what_cannot_be_trained_is_said(stack: Path, tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=r'got data = "world" in \[run\]; expected a folder of shards'):
        decoupled.Decoupled(stacks.task("arcface", stack).settings, DISCS, 0)
    with pytest.raises(ValueError, match="got nobody with two of the first 4 pictures"):
        stacks.task("clean", stack, pool=4)
    with pytest.raises(ValueError, match=r"got reads = 'voice' in \[task\]; expected arcface or image or omni"):
        replace(stacks.task("arcface", stack).settings, reads="voice")
    with pytest.raises(ValueError, match=r"got noise = 'loud' in \[task\]; expected match or clean"):
        replace(stacks.task("clean", stack).settings, noise="loud")
    with pytest.raises(ValueError, match="which is not there; expected a recogniser"):
        readers.ArcFace(tmp_path / "none.onnx", "demo")
    with pytest.raises(ValueError, match="expected a vision tower; fetch or train it"):
        readers.load_vision(stack / clip.TEXT)


def test_the_metadata_of_a_trained_file_is_checked(stack: Path, folder: Path) -> None:
    task = stacks.task("image", stack)
    assert isinstance(task, decoupled.Decoupled)
    task.save(folder / "ipadapter", {"steps": 2})
    loaded, report = adapter.load("made.safetensors")
    assert loaded.spec == task.spec and loaded.spec.needs == (Feature("clip.vit-128-4-16-128", "penultimate", "head"),)
    assert "IP-Adapter Plus-Face for SD1.5, 4 tokens per face, 16 layers" in report
    tensors = load_file(folder / "ipadapter" / "made.safetensors")
    told = {
        "kind": "decoupled",
        "version": 1,
        "base": "SD1.5",
        "notes": {},
        "adapter": "plus",
        "needs": ["omni_id.a.b"],
    }
    renamed = {f"layers.{n}.{part}.weight": torch.zeros(8, 8) for n in range(1, 32, 2) for part in "kv"}
    with pytest.raises(ValueError, match=r"got f without projector.latents; expected a whole projector"):
        own_decoupled.read_spec(renamed, told, "f")
    with pytest.raises(ValueError, match="adapter 'pulid'"):
        own_decoupled.read_spec(renamed, {**told, "adapter": "pulid"}, "f")
    whole = renamed | {name: torch.zeros(1, 4, 8) for name in own_decoupled.ROWS["plus"].names}
    with pytest.raises(ValueError, match="got f, which needs 'face'; expected <network>.<layer>.<crop>"):
        own_decoupled.read_spec(whole, {**told, "needs": ["face"]}, "f")
    with pytest.raises(ValueError, match="got f, whose projector is misshapen; expected that of plus"):
        own_decoupled.read_spec({**whole, "projector.latents": torch.zeros(4)}, told, "f")
    assert own_decoupled.read_spec(whole, told, "f").tokens == 4 and len(tensors) > 40
