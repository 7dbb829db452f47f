"""The configs at published scale, on the meta device; and training on Portrait World by the command."""

from __future__ import annotations

import json
import math
import subprocess
import sys
from dataclasses import replace
from pathlib import Path
from typing import Any

import comfy.ldm.modules.attention as attention
import comfy.ops
import pytest
import torch
from comfy import model_base, supported_models
from comfy.model_patcher import ModelPatcher
from comfyui_likeness.likeness.attention.feature_cache import ReferenceFeatureCache
from comfyui_likeness.likeness.checkpoints import key_maps, native_decoupled, native_flashface, native_omni_adapter
from comfyui_likeness.likeness.encoders import clip_vision
from comfyui_likeness.likeness.faces import alignment
from comfyui_likeness.likeness.methods import flashface, fused_kv, infinite_id, omni_id
from comfyui_likeness.likeness.spec import AdapterSpec, Feature, FusedKVSpec, Identity, OmniIDSpec
from comfyui_likeness.nodes.attention import apply_decoupled, apply_fused, patch
from comfyui_likeness.nodes.attention.flashface.added_layers import attach_added_layers
from comfyui_likeness.nodes.attention.injection import Injection
from comfyui_likeness.nodes.attention.schedule import ALWAYS_ON
from comfyui_likeness.nodes.attention.unet_layers import list_unet_layers
from comfyui_likeness.nodes.loaders.flashface_loader import add_face_position_channels
from comfyui_likeness.nodes.types import LoadedAdapter, LoadedFusedKV, LoadedReferenceNet
from comfyui_likeness.portrait_world import world_album
from comfyui_likeness.tools.standins import models
from comfyui_likeness.training import task_registry, trainer
from comfyui_likeness.training.adapters import decoupled
from comfyui_likeness.training.adapters import flashface as adapters_flashface
from comfyui_likeness.training.adapters import fused as adapters_fused
from comfyui_likeness.training.adapters import infinite_id as adapters_infinite_id
from comfyui_likeness.training.base_models import clip_pair, face_recognizer, unet, vae
from comfyui_likeness.training.data import clusters, image_source
from comfyui_likeness.training.data import shards as data_shards
from comfyui_likeness.training.omni_id import encoder, masked_stage
from PIL import Image
from support.golden import GOLDEN_FOLDER
from support.toy_tasks import DISC_WORLD
from torch import Tensor, nn

ROOT = Path(__file__).resolve().parents[2]
CONFIGS = ROOT / "training" / "configs"
META = torch.device("meta")


def test_the_demo_unet_has_the_attentions_of_sd15() -> None:
    _, config = task_registry.read_task_config("unet", ROOT / "portrait_world" / "configs" / "unet.toml")
    with torch.device("meta"):
        net = unet.build_base_model(unet.build_unet_config(config, config.text_width, 8)).diffusion_model
    weights = sum(value.numel() for value in net.parameters())
    names = [name for name, _ in net.named_modules() if name.endswith("attn2")]
    assert names == [
        name.removesuffix(".to_q.weight") for name in list_sd15_shapes() if name.endswith("attn2.to_q.weight")
    ]
    assert 8e6 < weights < 10e6


def test_the_demos_vision_tower_is_known_to_the_nodes() -> None:
    """Encode Identity reads what the demo's adapters need, and Omni-ID's trunk has the tower's sizes and heads."""
    configs = ROOT / "portrait_world" / "configs"
    towers = task_registry.read_task_config("clip", configs / "clip.toml")[1]
    name = clip_vision.name_architecture(towers.vision_width, towers.vision_layers, towers.patch, towers.resolution)
    assert set(clip_vision.LAYERS_BY_ARCHITECTURE[name]) == {"photo", "head", "face224"}
    assert towers.vision_width // clip_vision.HEAD_DIMS[towers.vision_width] == towers.vision_num_heads
    omni = task_registry.read_task_config("omni_masked", configs / "omni_masked.toml")[1]
    sizes = omni.trunk_width, omni.trunk_layers, omni.patch_size
    assert sizes == (towers.vision_width, towers.vision_layers, towers.patch)


def test_the_published_configs_build_and_take_a_step(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(attention, "optimized_attention", attention.attention_pytorch)  # as in training
    _, config = task_registry.read_task_config("unet", CONFIGS / "unet.toml")
    _, towers = task_registry.read_task_config("clip", CONFIGS / "clip.toml")
    _, faces = task_registry.read_task_config("recogniser", CONFIGS / "recogniser.toml")
    with torch.device("meta"):
        net = unet.build_base_model(unet.build_unet_config(config, towers.width, 4)).diffusion_model.requires_grad_(
            True
        )
        pair = clip_pair.CLIPPair(towers, DISC_WORLD, 0)
        network = face_recognizer.build_recognizer(faces)
        face = train_step(network, torch.zeros(2, 3, 112, 112))
        seen = train_step(pair.vision, torch.zeros(2, 3, 224, 224))[2]
        noise = train_step(net, torch.zeros(2, 4, 64, 64), torch.zeros(2), context=torch.zeros(2, 77, 768))
    assert seen.shape == (2, 768) and noise.shape == (2, 4, 64, 64)
    names = {key: tuple(value.shape) for key, value in net.state_dict().items()}
    assert names == list_sd15_shapes()
    assert sum(value.numel() for value in pair.vision.parameters()) == 303966208  # CLIP ViT-L/14's, with its projection
    assert face.shape == (2, 512)


def build_sd15(monkeypatch: pytest.MonkeyPatch) -> ModelPatcher:
    """The frozen UNet of SD1.5 as a MODEL on the meta device."""
    for module in (attention, patch):
        monkeypatch.setattr(module, "optimized_attention", attention.attention_pytorch)  # as in training
    config = task_registry.read_task_config("unet", CONFIGS / "unet.toml")[1]
    with META:
        model = unet.build_base_model(
            {**unet.build_unet_config(config, 768, 4), "use_checkpoint": False}
        ).requires_grad_(False)
    return ModelPatcher(model, META, META)


def train_adapter_step(model: ModelPatcher, injection: Injection, *adapters: nn.Module, **model_kwargs: Tensor) -> None:
    """Train the modules of an adapter for one step with two rows."""
    width, adm_channels = list_unet_layers(model.model.diffusion_model)[0].context_dim, model.model.adm_channels
    latent, text = torch.zeros(2, 4, 64, 64, device=META), torch.zeros(2, 77, width, device=META)
    noised = unet.NoisedLatents(latent, torch.ones(2, device=META), latent)
    model_kwargs |= {"c_crossattn": text} | ({"y": torch.zeros(2, adm_channels, device=META)} if adm_channels else {})
    options = patch.training_options(patch.attach_injection(model, injection), 1.0)
    unet.denoising_loss(model.model, noised, math.inf, **model_kwargs, **options).backward()
    adapter = nn.ModuleList(adapters)
    assert all(value.grad is not None for value in adapter.parameters() if value.requires_grad)
    torch.optim.SGD(trainer.make_parameter_groups(adapter, 0.01), lr=0.1).step()


@pytest.mark.parametrize(
    ("name", "features", "layout"),
    [("arcface", (512,), "ip-adapter-faceid_sd15"), ("image", (257, 1280), "ip-adapter-plus_sd15")],
)
def test_decoupled_attention_is_the_published_one_and_takes_a_step(
    monkeypatch: pytest.MonkeyPatch, name: str, features: tuple[int, ...], layout: str
) -> None:
    run, config = task_registry.read_task_config("decoupled", CONFIGS / f"decoupled_{name}.toml")
    assert (run.batch_size, run.learning_rate, run.weight_decay, run.steps, config.snr_gamma) == (
        8,
        1e-4,
        0.01,
        1000000,
        math.inf,
    )
    model, kind, feature = (
        build_sd15(monkeypatch),
        decoupled.ENCODER_TYPES[config.encoder_type].kind,
        Feature("x", "y", "z"),
    )
    unet_layers = list_unet_layers(model.model.diffusion_model)
    spec = AdapterSpec(
        kind, "SD1.5", config.num_tokens, 768, tuple(layer.hidden_size for layer in unet_layers), (feature,)
    )
    with META:
        module = decoupled.build_decoupled_adapter(config, spec, features[-1]).requires_grad_(True)
        rows, zero = torch.zeros(2, *features), torch.zeros(1, *features)
    key, two = feature.format_encoder_id("0" * 64), torch.ones(2)
    identity = Identity("batch", two, two, two, two, embeddings={key: rows}, zero_embeddings={key: zero})
    loaded = LoadedAdapter(spec, ModelPatcher(module, META, META), {}, name)
    layer_weights = apply_decoupled.compute_layer_weights(unet_layers, "SD1.5", "linear", "")
    injection = apply_decoupled.DecoupledTerm(
        loaded, identity, layer_weights, 1.0, "V only", 1.0, True, None, ALWAYS_ON
    )
    train_adapter_step(model, injection, module)
    saved = key_maps.rename_keys(module.state_dict(), native_decoupled.PUBLISHED_KEY_RULES)
    shapes = json.loads((models.LAYOUT_FOLDER / f"{layout}.json").read_text())
    published = {key: tuple(shape) for key, shape in shapes.items() if "_lora." not in key}
    assert {key: tuple(value.shape) for key, value in saved.items()} == published


def test_fused_kv_takes_a_step(monkeypatch: pytest.MonkeyPatch) -> None:
    _, config = task_registry.read_task_config("fused", CONFIGS / "fused.toml")
    model = build_sd15(monkeypatch)
    layers = {layer.module_path: layer.hidden_size for layer in list_unet_layers(model.model.diffusion_model)}
    spec = FusedKVSpec("SD1.5", config.stream_noise, config.face_size, layers)
    with META:
        module = fused_kv.FusedKVAdapter(spec, torch.zeros(77, 768), None, comfy.ops.disable_weight_init)
        faces = torch.zeros(2, 4, config.face_size // 8, config.face_size // 8)
    loaded = LoadedFusedKV(spec, ModelPatcher(module, META, META), ReferenceFeatureCache(0), "fused")
    people = [apply_fused.FaceLatents(faces, [1.0] * 2, None, "")]
    places = apply_fused.match_fused_kv_layers(spec, model)
    train_adapter_step(
        model, adapters_fused.BatchFusedKVExtension(loaded, model, places, people, "all", ALWAYS_ON), module
    )


def test_infinite_id_takes_a_step(monkeypatch: pytest.MonkeyPatch) -> None:
    run, config = task_registry.read_task_config("infinite_id", CONFIGS / "infinite_id.toml")
    settings = (
        run.batch_size,
        run.learning_rate,
        run.weight_decay,
        run.steps,
        config.snr_gamma,
        config.identity_enhanced,
    )
    assert settings == (4, 1e-4, 0.01, 1000000, math.inf, True)
    for module in (attention, patch):
        monkeypatch.setattr(module, "optimized_attention", attention.attention_pytorch)
    wide = {**models.SDXL_CONFIG, "model_channels": 320, "channel_mult": [1, 2, 4]}
    with META:
        settings = supported_models.SDXL(dict(wide))
        settings.unet_config |= {key: wide[key] for key in ("num_heads", "num_head_channels")}
        settings.set_inference_dtype(torch.float32, None)
        model = ModelPatcher(model_base.SDXL(settings, device=META).requires_grad_(False), META, META)
        unet_layers = list_unet_layers(model.model.diffusion_model)
        layers = tuple(layer.hidden_size for layer in unet_layers)
        spec = AdapterSpec(infinite_id.KIND, "SDXL", 257 + config.num_tokens, 2048, layers, infinite_id.PAPER_FEATURES)
        module = adapters_infinite_id.build_infinite_id_adapter(config, spec, 1280).requires_grad_(True)
        read = {
            spec.needs[0].format_encoder_id("0" * 64): torch.zeros(2, 512),
            spec.needs[1].format_encoder_id("0" * 64): torch.zeros(2, 257, 1280),
        }
    assert len(unet_layers) == 70 and spec.layers.count(1280) == 60  # of each a pair of keys and values (Sec. 4.1)
    loaded = LoadedAdapter(spec, ModelPatcher(module, META, META), {}, "infinite_id")
    train_adapter_step(
        model,
        adapters_infinite_id.make_infinite_id_term(
            adapters_infinite_id.CROSS_ATTENTION_TERMS[config.identity_enhanced], loaded, read, unet_layers
        ),
        module,
    )


def test_flashface_has_the_published_shapes_and_takes_a_step(monkeypatch: pytest.MonkeyPatch) -> None:
    run, config = task_registry.read_task_config("flashface", CONFIGS / "flashface.toml")
    assert (8 * run.batch_size, run.learning_rate, run.steps, config.resolution, config.max_references) == (
        32,
        2e-5,
        50000,
        768,
        4,
    )
    assert config.train_unet and (config.caption_dropout, config.face_dropout, config.position_dropout) == (
        0.1,
        0.1,
        0.1,
    )
    base = build_sd15(monkeypatch).model
    with META:
        net, added = adapters_flashface.build_flashface_modules(base, config, 8)
        main = adapters_flashface.build_trainable_unet(base, 8)
    shapes = json.loads((GOLDEN_FOLDER / "flashface" / "manifest_sd15.json").read_text())["parameters"]
    published = flashface.split_flashface_checkpoint(
        {key: torch.empty(shape, device=META) for key, shape in shapes.items()}
    )
    for mine, theirs in ((main, published.main_unet), (net, published.reference_unet)):
        assert {key: value.shape for key, value in mine.diffusion_model.state_dict().items()} == {
            key: value.shape for key, value in theirs.items()
        }
    saved = native_flashface.collect_native_flashface_tensors({}, added, {})
    assert {key: value.shape for key, value in saved.items()} == {
        f"added.{key}": value.shape for key, value in published.added_layers.items()
    }
    reference, added_layers = (ModelPatcher(module, META, META) for module in (net, added))
    loaded = LoadedReferenceNet(reference, added_layers, ReferenceFeatureCache(0), "flashface")
    painter = attach_added_layers(add_face_position_channels(ModelPatcher(main, META, META)), added_layers)
    read, text = (
        torch.zeros(2 * 3, 4, config.face_size // 8, config.face_size // 8, device=META),
        torch.zeros(1, 77, 768, device=META),
    )
    seen = torch.ones(2, 1, 1, device=META)
    place = torch.zeros(2, 1, 64, 64, device=META)
    shown = adapters_flashface.make_reference_term(painter, loaded, read, seen, text)
    train_adapter_step(painter, shown, net, added, main, c_concat=place)


def test_omni_id_is_the_papers_and_takes_a_step() -> None:
    run, config = task_registry.read_task_config("omni_masked", CONFIGS / "omni_masked.toml")
    assert (
        run.batch_size,
        run.learning_rate,
        config.mask_ratio,
        config.min_images,
        config.max_images,
        config.num_targets,
    ) == (
        32,
        1e-4,
        0.95,
        1,
        3,
        8,
    )
    assert replace(config.spec, image_size=224) == OmniIDSpec() and config.spec.image_size == 448
    with META:
        module = encoder.build_trainable_encoder(replace(config, init_trunk_from=""), 0)
        decoder = masked_stage.MaskedDecoder(config.spec, replace(config, gradient_checkpointing=False))
        seen, targets = (torch.zeros(1, n, 448, 448, 4, dtype=torch.uint8) for n in (3, 2))
        hidden = torch.zeros(1, 2, 1024, dtype=torch.bool)
        masked_stage.masked_l1_loss(
            masked_stage.reconstruct_faces(module, decoder, seen, targets, hidden), targets
        ).backward()
    parts = {name: sum(w.numel() for w in part.parameters()) // 10**6 for name, part in module.named_children()}
    # ViT-H/14's 632 millions, and its positions for images twice as large.
    assert parts == {"trunk": 633, "cross": 39, "self": 39, "norm": 0} and len(decoder.cross) == 6 == 3 * len(
        decoder.self
    )
    for part in (module, decoder):
        assert all((value.grad is not None) == value.requires_grad for value in part.parameters())
        torch.optim.SGD(trainer.make_parameter_groups(part, 0.01), lr=0.1).step()


def test_the_adapter_to_omni_id_takes_a_step(monkeypatch: pytest.MonkeyPatch) -> None:
    _, config = task_registry.read_task_config("decoupled", CONFIGS / "omni_adapter.toml")
    run, second = task_registry.read_task_config("omni_flow", CONFIGS / "omni_flow.toml")
    assert (run.batch_size * 8, run.steps, second.num_targets, config.max_photos) == (32, 5000, 8, 3)
    model, omni_spec = build_sd15(monkeypatch), OmniIDSpec()
    unet_layers = list_unet_layers(model.model.diffusion_model)
    widths = tuple(layer.hidden_size for layer in unet_layers)
    spec = AdapterSpec(
        native_omni_adapter.KIND,
        "SD1.5",
        omni_spec.tokens,
        768,
        widths,
        (omni_id.OMNI_ID_FEATURE,),
        matches_text_width=False,
    )
    with META:
        module = decoupled.build_decoupled_adapter(config, spec, omni_spec.width).requires_grad_(True)
        rows = torch.zeros(2, omni_spec.tokens, omni_spec.width, requires_grad=True)
    two, key = torch.ones(2), omni_id.OMNI_ID_FEATURE.format_encoder_id("0" * 64)
    identity = Identity("batch", two, two, two, two, embeddings={key: rows})
    layer_weights = apply_decoupled.compute_layer_weights(unet_layers, "SD1.5", "linear", "")
    loaded = LoadedAdapter(spec, ModelPatcher(module, META, META), {}, "omni")
    injection = apply_decoupled.DecoupledTerm(
        loaded, identity, layer_weights, 1.0, "V only", 1.0, True, None, ALWAYS_ON
    )
    train_adapter_step(model, injection, module)
    assert rows.grad is not None  # and with it the encoder's, in the second stage
    written = json.loads(native_omni_adapter.make_omni_adapter_metadata(spec, {})["likeness"])
    assert native_omni_adapter.read_omni_adapter_spec(module.state_dict(), written, "a file") == spec


def train_step(module: nn.Module, *inputs: Tensor, **options: Tensor) -> Any:
    """Train a module for one step, in which all its weights get a gradient. Returns its output."""
    output = module(*inputs, **options)
    (output if isinstance(output, Tensor) else output[2]).square().mean().backward()
    assert all(value.grad is not None for value in module.parameters())
    torch.optim.SGD(
        trainer.make_parameter_groups(module, 0.01), lr=0.1
    ).step()  # AdamW counts its steps, which fails on the meta device
    return output


def list_sd15_shapes() -> dict[str, tuple[int, ...]]:
    """The shapes of SD1.5's UNet, by which ComfyUI detects the model."""
    full = {**models.SD15_CONFIG, "channel_mult": [1, 2, 4, 4]}
    return models.get_unet_shapes(full)


def test_shards_are_a_source(tmp_path: Path) -> None:
    album = world_album.WorldAlbum("train", 64, num_people=3)
    data_shards.write_shards(album, tmp_path, images_per_person=2, lossless=True)
    pairs = world_album.WorldAlbum("train", 64, num_people=2, people_per_image=2)
    data_shards.write_shard(pairs, range(2), tmp_path / "pairs.tar", 1, lossless=True)
    order = [(album, 0, 0), (album, 1, 0), (album, 2, 0), (pairs, 0, 0), (pairs, 1, 0), (album, 0, 1), (album, 1, 1)]
    shards = image_source.open_source(str(tmp_path))
    for number, (of, person, index) in enumerate([*order, (album, 2, 1), (album, 0, 0)]):
        view = of.load_annotated_image(person, index)
        assert torch.equal(shards.load_image(number, 64), clusters.crop_and_resize(view, 64).image)
        assert shards.load_caption(number) == view.caption
        assert shards.load_detailed_captions(number) == list(view.detailed_captions)
    assert shards.load_image(0, 32).shape == (32, 32, 3) and shards.load_image(3, 64, 1.5).shape == (64, 96, 3)
    view = album.load_annotated_image(1, 1)
    crop = alignment.convert_to_uint8(alignment.align_face(view.image.double() / 255, view.kps, 112))
    assert torch.equal(shards.load_aligned_face(4, 1), crop) and not torch.equal(shards.load_aligned_face(4, 0), crop)
    captions = [
        caption
        for number in range(8)
        for caption in (shards.load_caption(number), *shards.load_detailed_captions(number))
    ]
    words = {word.strip(",") for caption in captions for word in caption.split()}
    assert shards.caption_words == sorted(words)
    assert list(clip_pair.list_known_tokens(clip_pair.SDTokenizer(), None)) == list(range(49408))
    with pytest.raises(ValueError, match="0 shards"):
        image_source.open_source(str(tmp_path / "none"))


def test_portrait_world_is_a_source(tmp_path: Path) -> None:
    world = image_source.open_source("portrait_world.world_source:open_train_split")
    image = world.load_image(8, 64)
    assert image.shape == (64, 64, 3) and image.dtype == torch.uint8
    assert torch.equal(image, world.load_image(8, 64)) and not torch.equal(image, world.load_image(9, 64))
    assert world.load_aligned_face(1, 5).shape == (112, 112, 3)
    captions = [world.load_caption(number) for number in range(64)]
    described = [text for number in range(64) for text in world.load_detailed_captions(number)]
    words = {word.strip(",") for text in captions + described for word in text.split()}
    assert words <= set(world.caption_words) and all(" with " in text for text in described)
    for texts in (captions, described):
        assert ["person on the right" in text for text in texts] == [number % 8 == 0 for number in range(64)]
    assert world.load_image(8, 64, 1.5).shape == (64, 96, 3)
    config = tmp_path / "vae.toml"
    config.write_text(
        f'[run]\nfolder = "{tmp_path}/run"\nsteps = 1\nbatch_size = 1\nlearning_rate = 1e-3\nmixed_precision = "bf16"\n'
        "[task]\nresolution = 32\nwidths = [16, 16, 16]\n"
    )
    done = subprocess.run(
        [sys.executable, "-m", "training", "vae", "--config", str(config)], cwd=ROOT, capture_output=True
    )
    assert done.returncode == 0, done.stderr.decode()
    assert (tmp_path / "run" / "model" / vae.VAE_FILE).is_file()
    samples = Image.open(tmp_path / "run" / "samples" / "images-00000001.png")
    assert samples.size == (vae.NUM_SHOWN_IMAGES * 32, 3 * 32)
