"""AdaFace at real scale: the published shapes, a step of each task on no device, and configs that follow each other."""

from __future__ import annotations

import json
import math
from pathlib import Path
from typing import Any

import pytest
import torch
from comfy.model_patcher import ModelPatcher
from comfyui_likeness.likeness import adaface, arc2face, keymaps
from comfyui_likeness.training import loop, tasks
from comfyui_likeness.training.adaface import compose, teacher, words
from comfyui_likeness.training.adaface.expand import expanded
from comfyui_likeness.training.adaface.features import watching
from comfyui_likeness.training.base import clip, unet
from golden import GOLDEN
from test_training_scale import EIGHT_GPUS, META, ROOT, sd15
from torch import Tensor, nn

RUNS = {
    "arc2face": "arc2face", "adaface": "adaface", "adaface_wider": "adaface", "adaface_widest": "adaface",
    "adaface_compose": "adaface_compose",
}  # fmt: skip


def about(name: str, folder: str = "eight_gpus") -> Any:
    return tasks.settings(RUNS[name], ROOT / "training" / "configs" / folder / f"{name}.toml")


def manifest(name: str) -> dict[str, tuple[int, ...]]:
    told = json.loads((GOLDEN / "adaface" / "manifests" / f"{name}.json").read_text())
    return {key: tuple(shape) for key, shape in told.items()}


def shapes(tensors: dict[str, Tensor]) -> dict[str, tuple[int, ...]]:
    return {key: tuple(value.shape) for key, value in tensors.items()}


def clip_l() -> Any:
    towers = tasks.settings("clip", EIGHT_GPUS / "clip.toml")[1]
    with META:
        text = clip.text_encoder(clip.text_config(towers), range(49408)).requires_grad_(False)
    clip.keep_for_gradient(text)
    return text.to(META)


def wrong(held: ModelPatcher, text: Tensor) -> Tensor:
    """What a UNet's step of a text [n, 77, 768] comes to."""
    latent = torch.zeros(len(text), 4, 64, 64, device=META)
    return unet.wrong_noise(
        held.model, unet.Noised(latent, torch.ones(len(text), device=META), latent), math.inf, c_crossattn=text
    )


def stepped(loss: Tensor, module: nn.Module) -> None:
    loss.backward()
    trained = [value for value in module.parameters() if value.requires_grad]
    assert trained and all(value.grad is not None for value in trained)
    torch.optim.SGD(loop.groups(module, 0.01), lr=0.1).step()


def test_the_teacher_is_arc2faces_text_encoder(monkeypatch: pytest.MonkeyPatch) -> None:
    run, told = about("arc2face")
    assert (run.batch, run.rate, told.trains, told.side) == (4, 1e-6, "all", 512)
    held, model = sd15(monkeypatch), words.text_model(clip_l())
    net: Any = held.model
    for name, value in net.named_parameters():
        value.requires_grad_(teacher.TRAINS[told.trains](name))
    module = nn.ModuleDict({"text": model, "net": net.diffusion_model})
    stepped(wrong(held, arc2face.tokens(model, torch.zeros(2, 512, device=META))), module)
    assert shapes(words.tensors_of(model, words.ENCODER)) == manifest("clip_text_clipL")
    assert words.base_of(model) == "SD1.5"


def test_the_inverter_grows_to_the_published_one(monkeypatch: pytest.MonkeyPatch) -> None:
    text, copies = clip_l(), (1,) * 12
    tensors = keymaps.under(text.transformer.state_dict(), words.ENCODER)
    for name in ("adaface", "adaface_wider", "adaface_widest"):
        told = about(name)[1]
        if told.copies:
            assert all(new % old == 0 and new >= old for old, new in zip(copies, told.copies, strict=True))
            copies = told.copies
            tensors = expanded(tensors, copies, told.spread, 0)
    assert copies == (8, 8, 8, *[4] * 9)
    made = adaface.PromptInverter(words.text_model(text, tensors), {})
    # With the tables of words and places: as the published file is said to have.
    assert sum(value.numel() for value in made.parameters()) == pytest.approx(179.8e6, rel=1e-3)
    names = words.tensors_of(made.text, adaface.TEXT).keys() | {"hidden_state_layer_weights"}
    assert names == manifest("inverter_clipL_2x2x2x1x1x1x1x1x1x1x1x1").keys()
    held = sd15(monkeypatch)
    vectors = made.vectors(torch.zeros(2, 16, 768, device=META))
    row = clip_rows()
    stepped(wrong(held, words.encode(text, [row] * 2, vectors)), made)


def clip_rows() -> list[int]:
    return words.row(clip.SDTokenizer(), ["a photo of ", 0, ""], [words.PLACE] * adaface.VECTORS)


def test_composition_takes_a_step(monkeypatch: pytest.MonkeyPatch) -> None:
    held, text = sd15(monkeypatch), clip_l()
    made = adaface.PromptInverter(words.text_model(text), {})
    vectors = made.vectors(torch.zeros(1, 16, 768, device=META)).repeat(2, 1, 1)
    said = words.encode(text, [clip_rows()] * 2, vectors)
    model: Any = held.model
    with watching(model.diffusion_model) as layers:
        wrong(held, said)
    assert [layer.maps.shape[-1] for layer in layers][:3] == [4096, 4096, 1024] and len(layers) == 16
    masks = torch.zeros(1, 512, 512, device=META)
    losses = [compose.preserved(layer, masks) + compose.delta(layer.maps, layer.maps.detach()) for layer in layers]
    stepped(torch.stack([*losses, compose.delta(said, said.detach())]).sum(), made)


@pytest.mark.parametrize("folder", ["two_cores", "eight_gpus"])
def test_each_config_reads_what_the_ones_before_it_made(folder: str) -> None:
    made: set[Path] = set()
    for name in RUNS:
        if not (ROOT / "training" / "configs" / folder / f"{name}.toml").is_file():
            continue
        run, told = about(name, folder)
        given = [getattr(told, field, "") for field in ("teacher", "teacher_unet", "begin")]
        assert {Path(file) for file in given if file} <= made, name
        place = Path(run.folder) / "model"
        made |= {place / f"{told.file}.safetensors", place / f"{told.file}{teacher.UNET}"}
    assert len(made) == (6 if folder == "two_cores" else 10)
