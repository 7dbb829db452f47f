"""Infinite-ID is trained by the code that runs it, without the text or with it; what the node makes of its file."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import prompters
import pytest
import stacks
import torch
from analyzers import folder as folder
from comfy.model_patcher import ModelPatcher
from comfyui_likeness.likeness import own_file
from comfyui_likeness.likeness.spec import Identity
from comfyui_likeness.nodes import encode
from comfyui_likeness.nodes.attention import mixed
from comfyui_likeness.nodes.attention.patch import attach, directly
from comfyui_likeness.nodes.loaders import adapter
from comfyui_likeness.nodes.loaders.face_analyzer import FaceAnalyzer
from comfyui_likeness.training.adapters import infinite_id, readers
from comfyui_likeness.training.adapters.infinite_id import InfiniteID
from comfyui_likeness.training.base import clip, sdxl, unet, vae
from comfyui_likeness.training.base.portraits import Shards
from comfyui_likeness.training.task import chance
from mixeds import SETTINGS
from models import close, patcher
from safetensors import safe_open
from torch import Tensor
from trainings import fit

CPU = torch.device("cpu")
TEXTS = ("a smiling person", "a bronze statue at a beach")


@pytest.fixture(scope="module")
def stack(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return stacks.make(tmp_path_factory.mktemp("stack"))


def task(stack: Path, **told: Any) -> InfiniteID:
    made = stacks.task("infinite", stack, **told)
    assert isinstance(made, InfiniteID)
    return made


def said(model: ModelPatcher, sigma: Tensor, text: Tensor) -> Tensor:
    """What a model makes of noise [n, 4, 16, 16] of these spreads [n]."""
    noise = torch.randn(len(sigma), 4, 16, 16, generator=chance(3)) * sigma[:, None, None, None]
    with torch.no_grad():
        return model.model.apply_model(noise, sigma, c_crossattn=text, **directly(model, float(sigma.max())))


def words(trained: InfiniteID, text: str, rows: int = 1) -> Tensor:
    return trained.frozen.words(clip.tokenize(trained.tokenizer, [text]), CPU).expand(rows, -1, -1)


def spreads(trained: InfiniteID, *times: int) -> Tensor:
    sampling: Any = trained.frozen.model.model_sampling
    return sampling.sigma(torch.tensor(times))


@pytest.mark.parametrize("enhanced", [True, False])
def test_mappers_and_cross_attention_learn_and_nothing_else(stack: Path, tmp_path: Path, enhanced: bool) -> None:
    made: list[InfiniteID] = []

    def make() -> InfiniteID:
        made.append(task(stack, pool=10, enhanced=enhanced))
        return made[0]

    fit(make, tmp_path, steps=8, batch=8, rate=5e-3, warmup=0, draw_every=8, ema=0.0)
    (trained,), fresh = made, task(stack, pool=10, enhanced=enhanced)
    batch = fresh.batch(chance(9), 8)
    loss = fresh(batch)["noise"]
    assert float(trained(batch)["noise"].detach()) < 0.99 * float(loss.detach())
    assert len(list((tmp_path / "drawn").glob("pictures-*.png"))) == 1
    loss.backward()
    weights, own = stacks.trained(fresh), stacks.trained(trained)
    assert {name.split(".")[1] for name in weights} == {"projector", "layers"}
    assert {".".join(name.split(".")[2:3]) for name in weights if ".projector." in name} == {"clip", "face"}
    assert [name for name, value in weights.items() if value.grad is None or not value.grad.any()] == []
    assert [name for name, value in weights.items() if torch.equal(own[name], value)] == []
    before, after = fresh.frozen.model.state_dict(), trained.frozen.model.state_dict()
    assert all(torch.equal(value, after[name]) for name, value in before.items())


def test_enhanced_training_is_deaf_to_the_text(stack: Path) -> None:
    sigma = None
    for enhanced in (True, False):
        trained = task(stack, enhanced=enhanced)
        held, read = trained.frozen.unet.on(CPU), trained.look([trained.source.view(4)])
        sigma = spreads(trained, 400)
        patched = attach(held, trained.injection(held, read))
        one, other = (said(patched, sigma, words(trained, text)) for text in TEXTS)
        assert close(one, other, 1e-5) is enhanced
        batch = trained.batch(chance(2), 12)
        silent = clip.tokenize(trained.tokenizer, [""])[0]
        assert all(row == silent for row in batch["tokens"]) is enhanced
    with_text = said(trained.frozen.unet.on(CPU), sigma, words(trained, TEXTS[0]))  # what is off is the text alone
    assert not close(with_text, one, 1e-3)


def test_the_text_is_replaced_and_not_the_layers_bias(stack: Path) -> None:
    """Keys and values of the text itself, in the identity's place, give the model as it is."""
    trained = task(stack)
    held, sigma = trained.frozen.unet.on(CPU), spreads(trained, 300)
    text = words(trained, TEXTS[1])
    read = trained.look([trained.source.view(4)])
    trained.adapter.projector.forward = lambda *_: text  # type: ignore[method-assign]
    assert close(said(attach(held, trained.injection(held, read)), sigma, words(trained, TEXTS[0])),
                 said(held, sigma, text), 1e-4)  # fmt: skip


def identity(trained: InfiniteID, number: int) -> Identity:
    """Whom Encode Identity makes of a picture, with this task's encoders."""
    from insightface.model_zoo import get_model

    one, both = stacks.taken(trained.source.view(number)), trained.reader
    heads = stacks.crop(trained.source.view(number))[None]
    network = get_model(str(both.face.file), providers=["CPUExecutionProvider"])
    vectors, hashes = encode.arcface([one], FaceAnalyzer("arcface.demo", both.face.hash, None, network))
    seen = encode.image_features(
        [one], heads, encode.HostEncoder(readers.load_vision(Path(trained.settings.vision))), True
    )
    zero = torch.zeros(1, 4), torch.zeros(1, 5, 2), torch.ones(1), torch.ones(1)
    return Identity("x", *zero, embeddings=vectors | seen.embeddings, zeros=seen.zeros, hashes=hashes | seen.hashes)


def test_the_file_runs_by_the_node_as_it_was_trained(stack: Path, folder: Path) -> None:
    trained = task(stack, enhanced=False)
    trained.save(folder / "likeness", {"steps": 2})
    loaded, report = adapter.load("made.safetensors")
    assert loaded.spec == trained.spec and loaded.spec.tokens == 65 + 4
    assert "Infinite-ID for SD1.5, 69 tokens per face, 16 layers" in report and "steps: 2" in report
    assert "arcface.demo.raw.face112 and clip.vit-128-4-16-128.last.face224" in report
    held, read = trained.frozen.unet.on(CPU), trained.look([trained.source.view(4)])
    model = ModelPatcher(unet.load(stack / unet.FILE), CPU, CPU)
    sigma, text = spreads(trained, 400), words(trained, TEXTS[0])
    plain = said(model, sigma, text)
    expected = said(attach(held, trained.injection(held, read)), sigma, text)
    moved = (expected - plain).norm()
    assert moved > 1e-2 * plain.norm()
    who = identity(trained, 4)
    with torch.inference_mode():
        made = mixed.ApplyMixed.execute(model, loaded, who, **{**SETTINGS, "attention": "off"}).args[0]
        assert (said(made, sigma, text) - expected).norm() < 0.02 * moved
    assert torch.equal(said(model, sigma, text), plain)


def test_what_is_drawn_is_what_the_node_makes_with_a_text_stream(stack: Path, folder: Path) -> None:
    trained = task(stack)
    trained.save(folder / "likeness", {"steps": 2})
    loaded, _ = adapter.load("made.safetensors")
    model = ModelPatcher(unet.load(stack / unet.FILE), CPU, CPU)
    held, read = trained.frozen.unet.on(CPU), trained.look([trained.source.view(n) for n in (4, 5)])
    noise = torch.randn(2, 4, 16, 16, generator=chance(5))
    prompts = [[[words(trained, text), {}]] for text in (TEXTS[0], "")]
    with torch.no_grad():
        drawn = unet.sample(trained.applied(held, read), noise, *prompts)
        off = unet.sample(attach(held, trained.injection(held, read)), noise, *prompts)
        for row, number in enumerate((4, 5)):
            node = mixed.ApplyMixed.execute(model, loaded, identity(trained, number), **SETTINGS).args[0]
            assert close(unet.sample(node, noise[row : row + 1], *prompts), drawn[row : row + 1], 0.05)
    assert not close(drawn, off, 0.05) and not close(drawn[:1], drawn[1:], 0.05)


def test_each_row_sees_its_own_face(stack: Path) -> None:
    trained = task(stack)
    held, sigma = trained.frozen.unet.on(CPU), spreads(trained, 50, 500, 900)
    with torch.no_grad():
        read = trained.look([trained.source.view(number) for number in (4, 5, 6)])
    together = said(attach(held, trained.injection(held, read)), sigma, words(trained, "", 3))
    turned = said(attach(held, trained.injection(held, read[[2, 1, 0]])), sigma, words(trained, "", 3))
    assert close(turned[1], together[1], 1e-5) and not close(turned[0], together[0], 1e-3)


def test_conditions_are_dropped_as_told(stack: Path) -> None:
    parts = {"no_text": 0.2, "no_face": 0.3, "neither": 0.1}
    enhanced, plain = (task(stack, pool=10, enhanced=on, **parts) for on in (True, False))
    assert enhanced.parts == pytest.approx((0.6, 0.0, 0.4)) and plain.parts == (0.2, 0.3, 0.1)
    batch = enhanced.batch(chance(2), 500)
    gone, read = batch["faceless"], enhanced.faces(batch)
    assert float(gone.float().mean()) == pytest.approx(0.4, abs=0.06)
    assert not read[gone].any() and torch.equal(read[~gone], batch["read"][~gone])


def test_a_pool_is_read_once_and_trains_alike(stack: Path) -> None:
    pooled, whole = task(stack, pool=10), task(stack)
    batch, other = pooled.batch(chance(1), 6), whole.batch(chance(1), 6)
    assert batch["read"].shape == (6, 512 + 65 * 128) and other["cuts"].shape == (6, 3 * (112**2 + 224**2))
    assert float(pooled(batch)["noise"].detach()) == pytest.approx(float(whole(other)["noise"].detach()), rel=2e-2)


def test_sdxl_is_a_base(stack: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    both = prompters.clip_xl()
    inside: Any = both.cond_stage_model
    text = sdxl.Text(inside.clip_l, inside.clip_g)
    denoiser = patcher("SDXL", context_dim=64 + 512, adm_in_channels=512 + 6 * 256).model
    monkeypatch.setattr(sdxl, "load", lambda _: (text, vae.load(stack / vae.FILE), denoiser))
    told = replace(task(stack).settings, vae="one", text="one", unet="one")
    trained = InfiniteID(told, Shards(stack), 5)
    assert trained.spec.base == "SDXL" and len(trained.spec.layers) == 70 and trained.spec.width == 576
    words, projected = both.encode_from_tokens(both.tokenize(TEXTS[0]), return_pooled=True)
    tokens = clip.tokenize(trained.tokenizer, [TEXTS[0], TEXTS[1]])
    assert close(trained.frozen.words(tokens, CPU)[:1], words, 1e-5) and close(text(tokens)[1][:1], projected, 1e-5)
    conds = denoiser.extra_conds(pooled_output=projected, cross_attn=words, width=128, height=128)
    assert close(trained.frozen.told(tokens[:1], 128, CPU)["y"], conds["y"].cond, 1e-5)
    trained(trained.batch(chance(1), 2))["noise"].backward()
    weights = stacks.trained(trained)
    assert len(weights) > 140 and [name for name, value in weights.items() if value.grad is None] == []
    with pytest.raises(ValueError, match="expected a checkpoint of SDXL"):
        monkeypatch.undo()
        sdxl.load(stack / "none.safetensors")


def test_what_cannot_be_trained_or_read_is_said(stack: Path, tmp_path: Path) -> None:
    trained = task(stack)
    with pytest.raises(ValueError, match=r"got unconditional = 'some' in \[task\]; expected zero or none"):
        replace(trained.settings, unconditional="some")
    trained.save(tmp_path, {})
    with safe_open(tmp_path / "made.safetensors", "pt") as opened:
        told = json.loads(opened.metadata()["likeness"])
    assert told["needs"] == [str(feature) for feature in trained.spec.needs] and told["clip_tokens"] == 65
    with pytest.raises(ValueError, match="got f, which needs 'face'; expected <network>.<layer>.<crop>"):
        own_file.features(["face"], "f")
    assert infinite_id.CROSS[True] is infinite_id.Alone
