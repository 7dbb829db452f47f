"""Image encoders: OpenCLIP checkpoints and CLIP_VISION give the official features, and equal ones."""

from __future__ import annotations

import hashlib
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from comfyui_likeness.likeness.checkpoints import key_maps
from comfyui_likeness.likeness.encoders import clip_vision
from comfyui_likeness.nodes.encode import ClipVisionEncoder
from comfyui_likeness.nodes.loaders import image_encoder, vision_towers
from comfyui_likeness.nodes.loaders.image_encoder import LoadImageEncoder
from safetensors.torch import save_file
from support.golden import assert_close, read_golden_cases
from support.photos import load_portrait
from support.vision_towers import (
    ARCHITECTURE_KEY,
    IMAGE_SIZE,
    PROJECTION_WIDTH,
    TOWER_WIDTH,
    convert_to_clip_vision,
    make_clip_vision,
    make_open_clip_checkpoint,
    make_open_clip_tower,
)
from torch import Tensor

GOLDEN = read_golden_cases("ip_adapter", "encoder")["clip_vision_tiny"]
EVA = read_golden_cases("ip_adapter", "encoder")["eva_clip_tiny"]


@pytest.fixture
def file(folder: Path) -> Path:
    path = folder / "clip_vision" / "tiny.safetensors"
    save_file(make_open_clip_checkpoint(make_open_clip_tower()), path)
    return path


@torch.inference_mode()
def test_clip_vision_gives_the_official_features() -> None:
    vision = make_clip_vision(GOLDEN.build_weights(), **GOLDEN.config)
    encoder, stored = ClipVisionEncoder(vision), GOLDEN.load_outputs()
    zero, black = encoder.encode_zero_image(), encoder.encode(torch.zeros(1, 80, 60, 3))
    for output, name in ((zero, "zero_pixels"), (black, "black")):
        assert_close(output["penultimate"], stored[f"penultimate_{name}"])
        assert_close(output["projected"], stored[f"image_embeds_{name}"])
    assert encoder.architecture == "vit-64-5-14-56"


@torch.inference_mode()
def test_both_layouts_of_a_network_give_equal_features(file: Path) -> None:
    open_clip = LoadImageEncoder.execute(file.name).args[0]
    comfy_clip = ClipVisionEncoder(convert_to_clip_vision(make_open_clip_tower()))
    assert open_clip.architecture == comfy_clip.architecture == "vit-128-3-14-56"
    images = torch.stack((load_portrait()[:300], load_portrait().flip(1)[:300]))
    for a, b in (
        (open_clip.encode(images), comfy_clip.encode(images)),
        (open_clip.encode_zero_image(), comfy_clip.encode_zero_image()),
    ):
        assert a.keys() == b.keys() == {"projected", "penultimate", "last"}
        for name in a:
            assert_close(a[name], b[name])
    output = open_clip.encode(images)
    assert output["projected"].shape == (2, PROJECTION_WIDTH)
    assert output["penultimate"].shape == output["last"].shape == (2, 17, TOWER_WIDTH)
    assert not torch.allclose(output["penultimate"], output["last"], atol=0.1)
    assert not torch.allclose(output["projected"][0], output["projected"][1], atol=1e-3)


@torch.inference_mode()
def test_features_agree_with_open_clip(file: Path) -> None:
    from open_clip.transform import PreprocessCfg, image_transform_v2
    from PIL import Image

    photo = (load_portrait()[:400] * 255).byte()
    pixels = image_transform_v2(PreprocessCfg(size=IMAGE_SIZE), is_train=False)(Image.fromarray(photo.numpy()))
    assert isinstance(pixels, Tensor)
    expected = make_open_clip_tower()(pixels[None])
    output = image_encoder.load_image_encoder(file.name).encode(photo[None].float() / 255)["projected"]
    assert torch.cosine_similarity(output, expected) > 0.999  # PIL and torch resize differently by about a grey level
    assert not torch.equal(output, expected)


def test_alpha_is_ignored(file: Path) -> None:
    encoder = image_encoder.load_image_encoder(file.name)
    plain = torch.rand(1, 60, 60, 3)
    opaque = torch.cat((plain, torch.rand(1, 60, 60, 1)), dim=-1)
    assert torch.equal(encoder.encode(plain)["last"], encoder.encode(opaque)["last"])


def test_only_the_vision_tower_is_kept(file: Path) -> None:
    encoder = image_encoder.load_image_encoder(file.name)
    names = set(encoder.patcher.model.state_dict())
    assert names == set(make_open_clip_tower().state_dict()) and encoder.patcher.model_size() > 0
    assert encoder.sha256 == hashlib.sha256(file.read_bytes()).hexdigest()


@pytest.mark.parametrize(("name", "prefix"), [("a.bin", ""), ("a.pt", "module.")])
def test_other_containers_give_equal_features(file: Path, name: str, prefix: str) -> None:
    torch.save(
        make_open_clip_checkpoint(make_open_clip_tower(), prefix),
        file.with_name(name),
    )
    a, b = (
        image_encoder.load_image_encoder(file.name).encode_zero_image(),
        image_encoder.load_image_encoder(name).encode_zero_image(),
    )
    assert all(torch.equal(a[key], b[key]) for key in a)


def test_the_activation_is_detected_or_chosen(file: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    quick = make_open_clip_tower(quick_gelu=True)
    with torch.inference_mode():
        expected = quick(torch.zeros(1, 3, IMAGE_SIZE, IMAGE_SIZE))
    plain, chosen = (
        image_encoder.load_image_encoder(file.name),
        image_encoder.load_image_encoder(file.name, "quick_gelu"),
    )
    assert_close(chosen.encode_zero_image()["projected"], expected)
    assert not torch.allclose(plain.encode_zero_image()["projected"], expected, atol=1e-3)
    named = file.with_name("ViT-openai.safetensors")
    named.write_bytes(file.read_bytes())
    assert_close(image_encoder.load_image_encoder(named.name).encode_zero_image()["projected"], expected)
    monkeypatch.setitem(clip_vision.VIT_ARCHITECTURES, ARCHITECTURE_KEY, "vit-l-14-336")
    assert_close(image_encoder.load_image_encoder(file.name).encode_zero_image()["projected"], expected)
    assert_close(
        image_encoder.load_image_encoder(file.name, "gelu").encode_zero_image()["projected"],
        plain.encode_zero_image()["projected"],
    )


def test_architectures_and_heads_match_open_clip() -> None:
    import open_clip
    from open_clip.transformer import VisionTransformer

    architectures: set[str] = set()
    for name in open_clip.list_models():
        vision = open_clip.get_model_config(name)["vision_cfg"]
        if not isinstance(vision.get("layers"), int):  # a ResNet
            continue
        width, size = vision["width"], vision["image_size"]
        head_dim = clip_vision.HEAD_DIMS[width]
        assert head_dim == vision.get("head_width", 64), name
        architectures.add(clip_vision.name_architecture(width, vision["layers"], vision["patch_size"], size))
        mlp_width = int(width * vision.get("mlp_ratio", 4.0))
        with torch.device("meta"):
            tower = VisionTransformer(
                size, vision["patch_size"], width, 1, width // head_dim, (mlp_width + 0.5) / width
            )
        assert tower.state_dict()["transformer.resblocks.0.mlp.c_fc.weight"].shape == (mlp_width, width)
    assert architectures >= set(clip_vision.VIT_ARCHITECTURES.values())
    assert {"vit-h-14", "vit-bigg-14", "vit-l-14-336"} <= set(clip_vision.VIT_ARCHITECTURES.values())


def test_a_tower_of_another_width_is_refused(file: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Its tensors do not tell how many heads it has."""
    monkeypatch.delitem(clip_vision.HEAD_DIMS, TOWER_WIDTH)
    with pytest.raises(ValueError, match="got tiny.safetensors, of width 128, whose number of attention heads"):
        image_encoder.load_image_encoder(file.name)


def rename_to_open_clip(weights: dict[str, Tensor]) -> dict[str, Tensor]:
    named = key_maps.rename_keys(key_maps.select_prefix(weights, "visual."), key_maps.EVA_CLIP)
    return {f"visual.trunk.{key}": value for key, value in named.items()}


def add_rotary_angles(weights: dict[str, Tensor]) -> dict[str, Tensor]:
    """Like the published checkpoint: with rotary angles in the tower and in its blocks, and text tensors."""
    angles = {f"visual.{place}rope.freqs_cos": torch.ones(9, 16) for place in ("", "blocks.0.attn.", "blocks.7.attn.")}
    return weights | angles | {"logit_scale": torch.ones(()), "text.token_embedding.weight": torch.ones(7, 4)}


@pytest.fixture
def eva(folder: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """The path for a small EVA-CLIP tower with a head dimension of 16."""
    monkeypatch.setitem(clip_vision.HEAD_DIMS, EVA.config["embed_dim"], 16)
    return folder / "clip_vision" / "EVA02_tiny.pt"


@torch.inference_mode()
@pytest.mark.parametrize("layout", [add_rotary_angles, rename_to_open_clip])
def test_eva_clip_gives_the_official_levels(
    eva: Path, layout: Callable[[dict[str, Tensor]], dict[str, Tensor]]
) -> None:
    torch.save(layout(EVA.build_weights()), eva)
    encoder, stored = image_encoder.load_image_encoder(eva.name), EVA.load_outputs()
    assert encoder.architecture == "eva02-32-21-14-42" and encoder.encode_zero_image() == {}
    output = encoder._run_tower(EVA.build_input("pixels"))
    assert_close(output["projected"], stored["pooled"])
    assert_close(torch.nn.functional.normalize(output["projected"]), stored["pooled_normed"])
    assert_close(output["levels"][0], torch.cat([stored[f"hidden_{i}"] for i in range(5)]))
    assert output["last"].shape == output["penultimate"].shape == (1, 10, 32)
    assert encoder.encode(load_portrait()[None])["levels"].shape == (1, 5, 10, 32)


def test_eva_clip_at_full_size_is_detected() -> None:
    import open_clip

    with torch.device("meta"):
        trunk = open_clip.create_model("EVA02-L-14-336", pretrained=None, device="meta").visual.trunk  # pyright: ignore
    tower = vision_towers.build_vision_tower(
        {f"trunk.{key}": value for key, value in trunk.state_dict().items()}, "eva.pt", "auto"
    )
    assert tower.architecture == "eva02-l-14-336" and tower.image_size == 336
    shapes = {key: value.shape for key, value in tower.module.state_dict().items()}
    assert shapes == {key: value.shape for key, value in trunk.state_dict().items()}
    assert torch.equal(tower.module.rope.pos_embed, build_eva02().rope.pos_embed)


def build_eva02() -> Any:
    """timm's tower of that name with a single block, which is enough for its rotary angles."""
    from timm.models.eva import eva02_large_patch14_clip_336

    return eva02_large_patch14_clip_336(depth=1)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"visual.blocks.3.attn.q_bias": None}, "misses blocks.3.attn.q_proj.bias"),
        ({"visual.head.weight": None}, "misses 'head.weight'; expected an OpenCLIP checkpoint"),
        ({"visual.blocks.1.mlp.w4.weight": torch.ones(2)}, "has unknown blocks.1.mlp.w4.weight"),
        ({f"visual.blocks.{i}": None for i in range(9, 21)}, "an EVA-CLIP with 9 blocks; expected EVA02-CLIP-L-14-336"),
    ],
)
def test_incomplete_eva_clips_are_refused(eva: Path, change: dict[str, Tensor | None], message: str) -> None:
    missing = tuple(key for key, value in change.items() if value is None)
    weights = (
        {key: value for key, value in EVA.build_weights().items() if not key.startswith(missing)}
        if missing
        else EVA.build_weights()
    )
    torch.save(weights | {key: value for key, value in change.items() if value is not None}, eva)
    with pytest.raises(ValueError, match=message):
        image_encoder.load_image_encoder(eva.name)


def drop_key(key: str) -> Callable[[dict[str, Tensor]], dict[str, Tensor]]:
    return lambda weights: {name: value for name, value in weights.items() if name != key}


DAMAGES: dict[str, tuple[Callable[[dict[str, Tensor]], dict[str, Tensor]], str]] = {
    "missing": (drop_key("visual.transformer.resblocks.1.ln_2.bias"), r"misses transformer.resblocks.1.ln_2.bias"),
    "no patches": (drop_key("visual.conv1.weight"), "misses 'conv1.weight'; expected an OpenCLIP checkpoint"),
    "unknown": (lambda w: w | {"visual.attn_pool.query": torch.ones(2)}, "has unknown attn_pool.query"),
    "misshapen": (lambda w: w | {"visual.ln_pre.bias": torch.ones(3)}, r"has misshapen ln_pre.bias \[3\] for \[128\]"),
    "nan": (lambda w: w | {"visual.ln_pre.bias": torch.full((128,), torch.nan)}, "visual.ln_pre.bias holds NaN"),
    "foreign": (lambda w: {"vision_model.pre_layrnorm.weight": torch.ones(4)}, "own Load CLIP Vision"),
}


@pytest.mark.parametrize("how", DAMAGES)
def test_damaged_files_are_refused(file: Path, how: str) -> None:
    change, message = DAMAGES[how]
    save_file(change(make_open_clip_checkpoint(make_open_clip_tower())), file)
    with pytest.raises(ValueError, match=message) as error:
        image_encoder.load_image_encoder(file.name)
    assert "tiny.safetensors" in str(error.value)


def test_without_open_clip_the_error_says_what_to_install(file: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "open_clip.transformer", None)
    assert LoadImageEncoder.INPUT_TYPES()["required"]["file"][1]["options"] == [file.name]
    with pytest.raises(ValueError, match="pip install -r requirements.txt"):
        LoadImageEncoder.execute(file.name)


def test_changed_files_are_loaded_again(file: Path) -> None:
    before = LoadImageEncoder.fingerprint_inputs(file.name)
    save_file(make_open_clip_checkpoint(make_open_clip_tower(1)), file)
    assert LoadImageEncoder.fingerprint_inputs(file.name) != before


def test_weights_hash_ignores_precision() -> None:
    one, other = (convert_to_clip_vision(make_open_clip_tower(seed)) for seed in (0, 1))
    assert ClipVisionEncoder(one).sha256 == ClipVisionEncoder(convert_to_clip_vision(make_open_clip_tower())).sha256
    assert ClipVisionEncoder(one).sha256 != ClipVisionEncoder(other).sha256 and len(ClipVisionEncoder(one).sha256) == 64
    half = {key: value.half() for key, value in one.get_sd().items()}
    assert clip_vision.hash_weights(half) == clip_vision.hash_weights(one.get_sd())
