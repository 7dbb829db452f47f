"""The demo models as ComfyUI objects, the demo people, and the folders of shipped files."""

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
import torch
from comfy.model_patcher import ModelPatcher
from comfyui_likeness.likeness.encoders import clip_vision
from comfyui_likeness.likeness.spec import AdapterSpec
from comfyui_likeness.nodes.attention import unet_layers
from comfyui_likeness.nodes.encode import ClipVisionEncoder, EncodeIdentity
from comfyui_likeness.nodes.identity import get_identity_path
from comfyui_likeness.nodes.loaders import adapter_loader, demo_loader, face_analyzer, files, native_models
from comfyui_likeness.portrait_world import make_demo_people, publish_weights
from comfyui_likeness.training.adapters import face_encoders
from comfyui_likeness.training.base_models import clip_pair, unet
from comfyui_likeness.training.task import init_weights
from safetensors.torch import load_file, save_file
from support import base_stack, report_stack
from support.host_models import SAMPLER_DEFAULTS, make_small_model
from support.toy_tasks import DISC_WORLD
from torch import Tensor

WEIGHTS = Path(__file__).resolve().parents[2] / "weights"
PACK = Path("insightface", "models", "demo")


@pytest.fixture(scope="module")
def weights(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The shipped weights, with a random UNet and detector if these do not exist yet."""
    folder = tmp_path_factory.mktemp("pack") / "weights"
    shutil.copytree(WEIGHTS, folder)
    if not (folder / "demo" / unet.UNET_FILE).is_file():
        paths = {name: str(folder / "demo" / f"{name}.safetensors") for name in ("vae", "text")}
        task = unet.TextToImage(unet.UNetConfig(**base_stack.UNET_OPTIONS, **paths), DISC_WORLD, 0)
        init_weights(task.model.diffusion_model, 4)
        task.save_model(folder / "demo", {})
    if not (folder / PACK / "detector.onnx").is_file():
        report_stack.write_detector(folder / PACK / "detector.onnx")
    return folder


@pytest.fixture
def shipped(weights: Path, folder: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setattr(folder_paths, "folder_names_and_paths", {})
    monkeypatch.setattr(files, "SHIPPED_WEIGHTS", weights)
    files.register_model_folders()
    return weights


@pytest.fixture(scope="module")
def models(weights: Path) -> Iterator[tuple[ModelPatcher, Any, Any, Any]]:
    """The outputs of Load Demo Models."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(files, "SHIPPED_WEIGHTS", weights)
        yield demo_loader.LoadDemoModels.execute().args


def encode_text(clip_: Any, text: str) -> list[Any]:
    return clip_.encode_from_tokens_scheduled(clip_.tokenize(text))


def sample(model: ModelPatcher, clip_: Any) -> Tensor:
    channels = model.model.latent_format.latent_channels
    noise = torch.randn(1, channels, 16, 16, generator=torch.Generator().manual_seed(1))
    prompts = {
        "positive": encode_text(clip_, "a photo of a person in a forest"),
        "negative": encode_text(clip_, ""),
    }
    with torch.inference_mode():
        return comfy.sample.sample(
            model, noise, latent_image=torch.zeros_like(noise), disable_pbar=True, seed=1, **prompts, **SAMPLER_DEFAULTS
        )


def test_comfyui_samples_with_the_demo_models(models: Any) -> None:
    model, clip_, vae, _ = models
    with torch.inference_mode():
        image = vae.decode(sample(model, clip_))
    assert image.shape == (1, 128, 128, 3) and bool(image.isfinite().all()) and float(image.std()) > 0.01
    assert {type(one) for one in (clip_, vae)} == {comfy.sd.CLIP, comfy.sd.VAE}


def test_lora_changes_only_the_clone(models: Any) -> None:
    model, clip_, *_ = models
    before = sample(model, clip_)
    name = "lora_unet_down_blocks_0_attentions_0_transformer_blocks_0_attn2_to_k"
    weight = model.model.diffusion_model.input_blocks[1][1].transformer_blocks[0].attn2.to_k.weight
    up, down = torch.ones(weight.shape[0], 1), torch.ones(1, weight.shape[1])
    lora = {f"{name}.lora_up.weight": up, f"{name}.lora_down.weight": down}
    changed, _ = comfy.sd.load_lora_for_models(model.clone(), None, lora, 1.0, 0.0)
    assert changed is not None and not torch.equal(sample(changed, clip_), before)
    assert torch.equal(sample(model, clip_), before)


def test_clip_supports_weights_long_prompts_and_clip_skip(models: Any, weights: Path) -> None:
    clip_ = models[1]

    def read(text: str, by: Any = clip_) -> Tensor:
        with torch.inference_mode():
            return encode_text(by, text)[0][0].float()

    own, plain = native_models.load_text_encoder(weights / "demo" / clip_pair.TEXT_FILE), comfy.sd1_clip.SDTokenizer()
    for text in ("a photo of a person in a forest", ""):
        with torch.inference_mode():
            assert torch.allclose(read(text), own(clip_pair.tokenize_texts(plain, [text]))[0], atol=2e-3)
    assert not torch.equal(read("a (forest:1.3)"), read("a forest"))
    assert torch.equal(read("a zebra"), read("a tractor")) and not torch.equal(read("a zebra"), read("a forest"))
    assert read("a forest " * 100).shape[1] > 77
    earlier = clip_.clone()
    earlier.clip_layer(-2)
    assert not torch.equal(read("a forest", earlier), read("a forest")) and earlier.layer_idx != clip_.layer_idx


@pytest.mark.parametrize("size", [(128, 128), (64, 96)])
def test_vae_reconstructs_images(models: Any, size: tuple[int, int]) -> None:
    image = demo_loader.load_demo_photos("Ada")[:1, : size[0], : size[1]]
    latent = models[2].encode(image)
    channels = models[0].model.latent_format.latent_channels
    assert latent.shape == (1, channels, size[0] // 8, size[1] // 8)
    assert float((models[2].decode(latent) - image).square().mean()) < 10**-2.2


def test_identities_contain_the_embeddings_of_trained_adapters(models: Any, shipped: Path) -> None:
    pack, tower = shipped / PACK / "recogniser.onnx", shipped / "demo" / clip_pair.VISION_FILE
    analyzer, report = face_analyzer.load_face_analyzer("demo", "cpu")
    assert analyzer.network == "arcface.demo" and "arcface.demo" in report
    layers_by_crop = clip_vision.LAYERS_BY_ARCHITECTURE[ClipVisionEncoder(models[3]).architecture]
    assert layers_by_crop == clip_vision.PORTRAIT_WORLD_LAYERS
    readers = face_encoders.ArcFaceReader(pack, "demo"), face_encoders.CLIPVisionReader(tower)
    identity = EncodeIdentity.execute(
        {"photo_0": demo_loader.load_demo_photos("Bo")},
        "Bo",
        "largest",
        "stop",
        face_analyzer=analyzer,
        image_encoder=models[3],
    ).args[0]
    ids = {one.feature.format_encoder_id(one.hash) for one in readers}
    assert (
        len(identity) == 4
        and ids <= identity.embeddings.keys()
        and readers[1].feature.format_encoder_id(readers[1].hash) in identity.zero_embeddings
    )


@pytest.mark.parametrize("name", demo_loader.DEMO_MODEL_FILES)
def test_damaged_file_is_one_error(weights: Path, tmp_path: Path, name: str) -> None:
    load = [native_models.load_unet, native_models.load_clip, native_models.load_vae, native_models.load_clip_vision][
        demo_loader.DEMO_MODEL_FILES.index(name)
    ]
    whole, file = weights / "demo" / name, tmp_path / name
    with pytest.raises(ValueError, match=f"got {file} .*; expected a .*; fetch or train it again"):
        load(file)
    file.write_bytes(whole.read_bytes()[:-1000])
    with pytest.raises(ValueError, match=f"got {file} .*; expected a "):
        load(file)
    shutil.copy(weights / "demo" / demo_loader.DEMO_MODEL_FILES[demo_loader.DEMO_MODEL_FILES.index(name) - 1], file)
    with pytest.raises(ValueError, match=f"got {file} .*; expected a "):
        load(file)
    tensors = load_file(whole)
    tensors.pop(next(key for key in tensors if key.endswith(".weight") and "token" not in key))
    with native_models.safe_open(whole, "pt") as opened:
        save_file(tensors, file, opened.metadata())
    with pytest.raises(ValueError, match=f"got {file} .*; expected a "):
        load(file)


def test_shipped_files_come_after_the_files_of_the_user(shipped: Path, folder: Path) -> None:
    for name in files.SHIPPED_FOLDERS:
        assert files.list_folder_paths(name)[0] == folder / name and files.list_folder_paths(name)[-1] == shipped / name
    assert "demo" in face_analyzer.list_model_packs()
    (folder / PACK).mkdir(parents=True)
    (folder / PACK / "mine.onnx").touch()
    assert face_analyzer.find_model_pack("demo") == folder / PACK
    (shipped / "ipadapter").mkdir(exist_ok=True)
    (shipped / "ipadapter" / "demo_x.safetensors").touch()
    assert "demo_x.safetensors" in files.list_weight_files(*adapter_loader.ADAPTER_FOLDERS)
    assert files.find_model_file("demo_x.safetensors", *adapter_loader.ADAPTER_FOLDERS).is_relative_to(shipped)
    (folder / "ipadapter" / "demo_x.safetensors").touch()
    assert files.find_model_file("demo_x.safetensors", *adapter_loader.ADAPTER_FOLDERS).is_relative_to(folder)
    with pytest.raises(ValueError, match=f"expected a file in {folder / 'ipadapter'}; put it there"):
        files.find_model_file("nothing.safetensors", "ipadapter")
    assert get_identity_path("Ada").is_relative_to(folder)


def test_error_names_both_base_models(models: Any) -> None:
    hidden = tuple(site.hidden_size for site in unet_layers.list_unet_layers(models[0].model.diffusion_model))
    real = AdapterSpec("portrait", "SD1.5", 4, 768, hidden, ())
    with pytest.raises(ValueError, match=r"adapter for SD1.5 .* width 768\); expected one for Portrait World, .* 128;"):
        unet_layers.match_unet_layers(real, models[0])
    own = AdapterSpec("portrait", "SD1.5", 4, 128, hidden, ())
    assert len(unet_layers.match_unet_layers(own, models[0])) == 16
    with pytest.raises(ValueError, match=r"for Portrait World .* this model, .* width 64; .* a Portrait World model"):
        unet_layers.match_unet_layers(own, make_small_model())


def test_demo_photos_match_the_demo_people(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    assert tuple(make_demo_people.DEMO_PEOPLE) == demo_loader.DEMO_PERSON_NAMES
    shown = [demo_loader.DemoPerson.execute(name).args[0] for name in demo_loader.DEMO_PERSON_NAMES]
    assert all(photos.shape == (4, 128, 128, 3) for photos in shown)
    assert all(not torch.equal(a, b) for i, a in enumerate(shown) for b in shown[:i])
    painted = (
        torch.from_numpy(np.asarray(make_demo_people.paint_photo_strip(make_demo_people.DEMO_PEOPLE["Ada"]))).float()
        / 255
    )
    assert float((torch.cat(list(shown[0]), 1) - painted).abs().max()) < 0.02
    monkeypatch.setattr(files, "SHIPPED_WEIGHTS", tmp_path)
    with pytest.raises(ValueError, match=r"the photos of Bo .*; expected .*Bo.png; install the pack again"):
        demo_loader.load_demo_photos("Bo")


def test_finished_weights_are_published(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    runs, weights_folder = tmp_path / "runs", tmp_path / "weights"
    sizes = {"vae/model/vae.safetensors": 4, "decoupled_arcface/model/demo_faceid.safetensors": 5, "vae/log": 6}
    compared = ("decoupled_as_fused/model/demo_image_as_fused", "flashface_both/model/demo_flashface_both")
    sizes |= {f"{name}.safetensors": 7 for name in compared}
    for name, size in sizes.items():
        (runs / name).parent.mkdir(parents=True, exist_ok=True)
        (runs / name).write_bytes(bytes(size))
    (weights_folder / "demo").mkdir(parents=True)
    (weights_folder / "demo" / "vae.safetensors").write_bytes(bytes(100))
    monkeypatch.setattr(publish_weights, "MAX_TOTAL_BYTES", 8)
    with pytest.raises(ValueError, match="MB of weights; expected at most"):
        publish_weights.copy_finished_weights(runs, weights_folder)
    assert (weights_folder / "demo" / "vae.safetensors").stat().st_size == 100
    monkeypatch.setattr(publish_weights, "MAX_TOTAL_BYTES", 9)
    *lines, total = publish_weights.copy_finished_weights(runs, weights_folder)
    assert [line.split()[2] for line in lines] == ["demo/vae.safetensors", "ipadapter/demo_faceid.safetensors"]
    assert total.endswith("in total") and (weights_folder / "demo" / "vae.safetensors").stat().st_size == 4
