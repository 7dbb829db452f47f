"""The demo that needs no downloads: its models as the host's objects, its people, where shipped files are found."""

from __future__ import annotations

import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import comfy.sample
import comfy.sd
import comfy.sd1_clip
import folder_paths
import numpy as np
import pytest
import reports
import stacks
import torch
from analyzers import folder as folder
from comfy.model_patcher import ModelPatcher
from comfyui_likeness.likeness.spec import AdapterSpec
from comfyui_likeness.nodes.attention import unet as sites
from comfyui_likeness.nodes.encode import EncodeIdentity, HostEncoder
from comfyui_likeness.nodes.identity import path_of
from comfyui_likeness.nodes.loaders import adapter, demo, face_analyzer, files, small
from comfyui_likeness.training import cast, ship
from comfyui_likeness.training.adapters import readers
from comfyui_likeness.training.base import clip, unet
from comfyui_likeness.training.task import start
from models import SAMPLING, patcher
from safetensors.torch import load_file, save_file
from torch import Tensor
from trainings import DISCS

WEIGHTS = Path(__file__).resolve().parents[1] / "weights"
PACK = Path("insightface", "models", "demo")


@pytest.fixture(scope="module")
def weights(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The weights that ship, with a UNet and a detector from seeds where these are not there yet."""
    place = tmp_path_factory.mktemp("pack") / "weights"
    shutil.copytree(WEIGHTS, place)
    if not (place / "demo" / unet.FILE).is_file():
        told = {name: str(place / "demo" / f"{name}.safetensors") for name in ("vae", "text")}
        task = unet.TextToImage(unet.Settings(**stacks.UNET, **told), DISCS, 0)
        start(task.model.diffusion_model, 4)
        task.save(place / "demo", {})
    if not (place / PACK / "detector.onnx").is_file():
        reports.detector(place / PACK / "detector.onnx")
    return place


@pytest.fixture
def shipped(weights: Path, folder: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setattr(folder_paths, "folder_names_and_paths", {})
    monkeypatch.setattr(files, "SHIPPED", weights)
    files.register()
    return weights


@pytest.fixture(scope="module")
def models(weights: Path) -> Iterator[tuple[ModelPatcher, Any, Any, Any]]:
    """What Load Demo Models gives."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(files, "SHIPPED", weights)
        yield demo.LoadDemo.execute().args


def words(clip_: Any, text: str) -> list[Any]:
    return clip_.encode_from_tokens_scheduled(clip_.tokenize(text))


def paint(model: ModelPatcher, clip_: Any) -> Tensor:
    noise = torch.randn(1, 4, 16, 16, generator=torch.Generator().manual_seed(1))
    told = {"positive": words(clip_, "a photo of a person in a forest"), "negative": words(clip_, "")}
    with torch.inference_mode():
        return comfy.sample.sample(
            model, noise, latent_image=torch.zeros_like(noise), disable_pbar=True, seed=1, **told, **SAMPLING
        )


def test_the_host_paints_with_the_demos_models(models: Any) -> None:
    model, clip_, vae, _ = models
    with torch.inference_mode():
        picture = vae.decode(paint(model, clip_))
    assert picture.shape == (1, 128, 128, 3) and bool(picture.isfinite().all()) and float(picture.std()) > 0.01
    assert {type(one) for one in (clip_, vae)} == {comfy.sd.CLIP, comfy.sd.VAE}


def test_a_lora_acts_on_a_clone_alone(models: Any) -> None:
    model, clip_, *_ = models
    before = paint(model, clip_)
    name = "lora_unet_down_blocks_0_attentions_0_transformer_blocks_0_attn2_to_k"
    weight = model.model.diffusion_model.input_blocks[1][1].transformer_blocks[0].attn2.to_k.weight
    up, down = torch.ones(weight.shape[0], 1), torch.ones(1, weight.shape[1])
    lora = {f"{name}.lora_up.weight": up, f"{name}.lora_down.weight": down}
    changed, _ = comfy.sd.load_lora_for_models(model.clone(), None, lora, 1.0, 0.0)
    assert changed is not None and not torch.equal(paint(changed, clip_), before)
    assert torch.equal(paint(model, clip_), before)


def test_prompts_are_read_as_any_clips(models: Any, weights: Path) -> None:
    clip_ = models[1]

    def read(text: str, by: Any = clip_) -> Tensor:
        with torch.inference_mode():
            return words(by, text)[0][0].float()

    own, plain = small.load_text(weights / "demo" / clip.TEXT), comfy.sd1_clip.SDTokenizer()
    for text in ("a photo of a person in a forest", ""):
        with torch.inference_mode():
            assert torch.allclose(read(text), own(clip.tokenize(plain, [text]))[0], atol=2e-3)
    assert not torch.equal(read("a (forest:1.3)"), read("a forest"))
    assert torch.equal(read("a zebra"), read("a tractor")) and not torch.equal(read("a zebra"), read("a forest"))
    assert read("a forest " * 100).shape[1] > 77
    earlier = clip_.clone()
    earlier.clip_layer(-2)
    assert not torch.equal(read("a forest", earlier), read("a forest")) and earlier.layer_idx != clip_.layer_idx


@pytest.mark.parametrize("size", [(128, 128), (64, 96)])
def test_the_vae_gives_back_what_it_takes(models: Any, size: tuple[int, int]) -> None:
    asked = demo.photos("Ada")[:1, : size[0], : size[1]]
    latent = models[2].encode(asked)
    assert latent.shape == (1, 4, size[0] // 8, size[1] // 8)
    assert float((models[2].decode(latent) - asked).square().mean()) < 10**-2.2


def test_identities_hold_what_trained_adapters_read(models: Any, shipped: Path) -> None:
    pack, tower = shipped / PACK / "recogniser.onnx", shipped / "demo" / clip.VISION
    analyzer, report = face_analyzer.load("demo", "cpu")
    assert analyzer.network == "arcface.demo" and "arcface.demo" in report
    assert HostEncoder(models[3]).architecture == "vit-128-4-16-128"
    read = readers.ArcFace(pack, "demo"), readers.Vision(tower)
    who = EncodeIdentity.execute(
        {"photo_0": demo.photos("Bo")}, "Bo", "largest", "stop", face_analyzer=analyzer, image_encoder=models[3]
    ).args[0]
    ids = {one.feature.id(one.hash) for one in read}
    assert len(who) == 4 and ids <= who.embeddings.keys() and read[1].feature.id(read[1].hash) in who.zeros


@pytest.mark.parametrize("name", demo.MODELS)
def test_a_file_that_is_not_whole_is_one_error(weights: Path, tmp_path: Path, name: str) -> None:
    load = [small.load_unet, small.load_clip, small.load_vae, small.load_vision][demo.MODELS.index(name)]
    whole, file = weights / "demo" / name, tmp_path / name
    with pytest.raises(ValueError, match=f"got {file} .*; expected a .*; fetch or train it again"):
        load(file)
    file.write_bytes(whole.read_bytes()[:-1000])
    with pytest.raises(ValueError, match=f"got {file} .*; expected a "):
        load(file)
    shutil.copy(weights / "demo" / demo.MODELS[demo.MODELS.index(name) - 1], file)
    with pytest.raises(ValueError, match=f"got {file} .*; expected a "):
        load(file)
    tensors = load_file(whole)
    tensors.pop(next(key for key in tensors if key.endswith(".weight") and "token" not in key))
    with small.safe_open(whole, "pt") as opened:
        save_file(tensors, file, opened.metadata())
    with pytest.raises(ValueError, match=f"got {file} .*; expected a "):
        load(file)


def test_what_ships_lies_behind_the_users_own(shipped: Path, folder: Path) -> None:
    for name in files.SHIPPED_FOLDERS:
        assert files.roots(name)[0] == folder / name and files.roots(name)[-1] == shipped / name
    assert "demo" in face_analyzer.packs()
    (folder / PACK).mkdir(parents=True)
    (folder / PACK / "mine.onnx").touch()
    assert face_analyzer.pack("demo") == folder / PACK
    (shipped / "ipadapter").mkdir(exist_ok=True)
    (shipped / "ipadapter" / "demo_x.safetensors").touch()
    assert "demo_x.safetensors" in files.names(*adapter.FOLDERS)
    assert files.find("demo_x.safetensors", *adapter.FOLDERS).is_relative_to(shipped)
    (folder / "ipadapter" / "demo_x.safetensors").touch()
    assert files.find("demo_x.safetensors", *adapter.FOLDERS).is_relative_to(folder)
    with pytest.raises(ValueError, match=f"expected a file in {folder / 'ipadapter'}; put it there"):
        files.find("nothing.safetensors", "ipadapter")
    assert path_of("Ada").is_relative_to(folder)


def test_another_base_is_said(models: Any) -> None:
    hidden = tuple(site.hidden for site in sites.sites(models[0].model.diffusion_model))
    real = AdapterSpec("portrait", "SD1.5", 4, 768, hidden, ())
    with pytest.raises(ValueError, match=r"adapter for SD1.5 .* width 768\); expected one for Portrait World, .* 128;"):
        sites.fitting(real, models[0])
    own = AdapterSpec("portrait", "SD1.5", 4, 128, hidden, ())
    assert len(sites.fitting(own, models[0])) == 16
    with pytest.raises(ValueError, match=r"for Portrait World .* this model, .* width 64; .* a Portrait World model"):
        sites.fitting(own, patcher())


def test_people_are_the_casts(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    assert tuple(cast.CAST) == demo.PEOPLE
    shown = [demo.DemoPerson.execute(name).args[0] for name in demo.PEOPLE]
    assert all(photos.shape == (4, 128, 128, 3) for photos in shown)
    assert all(not torch.equal(a, b) for i, a in enumerate(shown) for b in shown[:i])
    painted = torch.from_numpy(np.asarray(cast.strip(cast.CAST["Ada"]))).float() / 255
    assert float((torch.cat(list(shown[0]), 1) - painted).abs().max()) < 0.02
    monkeypatch.setattr(files, "SHIPPED", tmp_path)
    with pytest.raises(ValueError, match=r"got no photos of Bo .*; expected .*Bo.png; fetch the pack again"):
        demo.photos("Bo")


def test_finished_files_are_shipped(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    runs, place = tmp_path / "runs", tmp_path / "weights"
    made = {"vae/model/vae.safetensors": 4, "decoupled_arcface/model/demo_faceid.safetensors": 5, "vae/log": 6}
    compared = ("decoupled_as_fused/model/demo_image_as_fused", "flashface_both/model/demo_flashface_both")
    made |= {f"{name}.safetensors": 7 for name in compared}
    for name, size in made.items():
        (runs / name).parent.mkdir(parents=True, exist_ok=True)
        (runs / name).write_bytes(bytes(size))
    (place / "demo").mkdir(parents=True)
    (place / "demo" / "vae.safetensors").write_bytes(bytes(100))
    monkeypatch.setattr(ship, "LIMIT", 8)
    with pytest.raises(ValueError, match="MB of weights; expected at most"):
        ship.ship(runs, place)
    assert (place / "demo" / "vae.safetensors").stat().st_size == 100
    monkeypatch.setattr(ship, "LIMIT", 9)
    *lines, total = ship.ship(runs, place)
    assert [line.split()[2] for line in lines] == ["demo/vae.safetensors", "ipadapter/demo_faceid.safetensors"]
    assert total.endswith("in all") and (place / "demo" / "vae.safetensors").stat().st_size == 4
