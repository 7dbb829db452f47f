"""Image encoders: OpenCLIP checkpoints and the host's CLIP_VISION give the official features, and the same ones."""

from __future__ import annotations

import hashlib
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import towers
from comfyui_likeness.likeness import clip, keymaps
from comfyui_likeness.nodes.encode import HostEncoder
from comfyui_likeness.nodes.loaders import image_encoder
from comfyui_likeness.nodes.loaders import towers as towers_of
from comfyui_likeness.nodes.loaders.image_encoder import LoadImageEncoder
from golden import assert_close, cases
from portraits import portrait
from safetensors.torch import save_file
from torch import Tensor

pytest_plugins = ["analyzers"]

GOLDEN = cases("ip_adapter", "encoder")["clip_vision_tiny"]
EVA = cases("ip_adapter", "encoder")["eva_clip_tiny"]


@pytest.fixture
def file(folder: Path) -> Path:
    path = folder / "clip_vision" / "tiny.safetensors"
    save_file(towers.checkpoint(towers.open_clip()), path)
    return path


@torch.inference_mode()
def test_the_hosts_encoder_gives_the_official_features() -> None:
    vision = towers.host(GOLDEN.weights(), **GOLDEN.config)
    encoder, stored = HostEncoder(vision), GOLDEN.outputs()
    zero, black = encoder.zero(), encoder.encode(torch.zeros(1, 80, 60, 3))
    for got, name in ((zero, "zero_pixels"), (black, "black")):
        assert_close(got["penultimate"], stored[f"penultimate_{name}"])
        assert_close(got["projected"], stored[f"image_embeds_{name}"])
    assert encoder.architecture == "vit-64-5-14-56"


@torch.inference_mode()
def test_both_layouts_of_one_network_give_the_same(file: Path) -> None:
    ours = LoadImageEncoder.execute(file.name).args[0]
    hosts = HostEncoder(towers.twin(towers.open_clip()))
    assert ours.architecture == hosts.architecture == "vit-128-3-14-56"
    pictures = torch.stack((portrait()[:300], portrait().flip(1)[:300]))
    for a, b in ((ours.encode(pictures), hosts.encode(pictures)), (ours.zero(), hosts.zero())):
        assert a.keys() == b.keys() == {"projected", "penultimate", "last"}
        for name in a:
            assert_close(a[name], b[name])
    made = ours.encode(pictures)
    assert made["projected"].shape == (2, towers.OUT)
    assert made["penultimate"].shape == made["last"].shape == (2, 17, towers.WIDTH)
    assert not torch.allclose(made["penultimate"], made["last"], atol=0.1)
    assert not torch.allclose(made["projected"][0], made["projected"][1], atol=1e-3)


@torch.inference_mode()
def test_the_features_are_those_of_open_clip_itself(file: Path) -> None:
    from open_clip.transform import PreprocessCfg, image_transform_v2
    from PIL import Image

    photo = (portrait()[:400] * 255).byte()
    pixels = image_transform_v2(PreprocessCfg(size=towers.SIZE), is_train=False)(Image.fromarray(photo.numpy()))
    assert isinstance(pixels, Tensor)
    expected = towers.open_clip()(pixels[None])
    got = image_encoder.load(file.name).encode(photo[None].float() / 255)["projected"]
    assert torch.cosine_similarity(got, expected) > 0.999  # PIL and torch resize alike to a grey level or so
    assert not torch.equal(got, expected)


def test_alpha_is_left_out(file: Path) -> None:
    encoder = image_encoder.load(file.name)
    plain = torch.rand(1, 60, 60, 3)
    opaque = torch.cat((plain, torch.rand(1, 60, 60, 1)), dim=-1)
    assert torch.equal(encoder.encode(plain)["last"], encoder.encode(opaque)["last"])


def test_only_the_image_tower_is_kept_and_the_host_moves_it(file: Path) -> None:
    encoder = image_encoder.load(file.name)
    kept = set(encoder.patcher.model.state_dict())
    assert kept == set(towers.open_clip().state_dict()) and encoder.patcher.model_size() > 0
    assert encoder.sha256 == hashlib.sha256(file.read_bytes()).hexdigest()


@pytest.mark.parametrize(("name", "prefix"), [("a.bin", ""), ("a.pt", "module.")])
def test_other_containers_hold_the_same(file: Path, name: str, prefix: str) -> None:
    torch.save(towers.checkpoint(towers.open_clip(), prefix), file.with_name(name))
    a, b = image_encoder.load(file.name).zero(), image_encoder.load(name).zero()
    assert all(torch.equal(a[key], b[key]) for key in a)


def test_the_activation_is_the_networks(file: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    quick = towers.open_clip(quick=True)
    with torch.inference_mode():
        expected = quick(torch.zeros(1, 3, towers.SIZE, towers.SIZE))
    plain, chosen = image_encoder.load(file.name), image_encoder.load(file.name, "quick_gelu")
    assert_close(chosen.zero()["projected"], expected)
    assert not torch.allclose(plain.zero()["projected"], expected, atol=1e-3)
    named = file.with_name("ViT-openai.safetensors")
    named.write_bytes(file.read_bytes())
    assert_close(image_encoder.load(named.name).zero()["projected"], expected)
    monkeypatch.setitem(clip.ARCHITECTURES, towers.NUMBERS, "vit-l-14-336")
    assert_close(image_encoder.load(file.name).zero()["projected"], expected)
    assert_close(image_encoder.load(file.name, "gelu").zero()["projected"], plain.zero()["projected"])


def test_architectures_and_heads_are_open_clips() -> None:
    import open_clip
    from open_clip.transformer import VisionTransformer

    seen: set[str] = set()
    for name in open_clip.list_models():
        vision = open_clip.get_model_config(name)["vision_cfg"]
        if not isinstance(vision.get("layers"), int):  # a ResNet
            continue
        width, size = vision["width"], vision["image_size"]
        heads = clip.HEAD_WIDTHS.get(width, 64)
        assert heads == vision.get("head_width", 64), name
        seen.add(clip.architecture(width, vision["layers"], vision["patch_size"], size))
        inner = int(width * vision.get("mlp_ratio", 4.0))
        with torch.device("meta"):
            tower = VisionTransformer(size, vision["patch_size"], width, 1, width // heads, (inner + 0.5) / width)
        assert tower.state_dict()["transformer.resblocks.0.mlp.c_fc.weight"].shape == (inner, width)
    assert seen >= set(clip.ARCHITECTURES.values())
    assert {"vit-h-14", "vit-bigg-14", "vit-l-14-336"} <= set(clip.ARCHITECTURES.values())


def in_open_clips_names(weights: dict[str, Tensor]) -> dict[str, Tensor]:
    named = keymaps.rename(keymaps.under(weights, "visual."), keymaps.EVA_CLIP)
    return {f"visual.trunk.{key}": value for key, value in named.items()}


def with_angles(weights: dict[str, Tensor]) -> dict[str, Tensor]:
    """As the published checkpoint has them: the angles in the tower and in every block, and half a text tower."""
    angles = {f"visual.{place}rope.freqs_cos": torch.ones(9, 16) for place in ("", "blocks.0.attn.", "blocks.7.attn.")}
    return weights | angles | {"logit_scale": torch.ones(()), "text.token_embedding.weight": torch.ones(7, 4)}


@pytest.fixture
def eva(folder: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A place for EVA-CLIP's small tower, whose heads are of 16."""
    monkeypatch.setitem(clip.HEAD_WIDTHS, EVA.config["embed_dim"], 16)
    return folder / "clip_vision" / "EVA02_tiny.pt"


@torch.inference_mode()
@pytest.mark.parametrize("layout", [with_angles, in_open_clips_names])
def test_eva_clip_gives_the_official_levels(
    eva: Path, layout: Callable[[dict[str, Tensor]], dict[str, Tensor]]
) -> None:
    torch.save(layout(EVA.weights()), eva)
    encoder, stored = image_encoder.load(eva.name), EVA.outputs()
    assert encoder.architecture == "eva02-32-21-14-42" and encoder.zero() == {}
    made = encoder._run(EVA.input("pixels"))
    assert_close(made["projected"], stored["pooled"])
    assert_close(torch.nn.functional.normalize(made["projected"]), stored["pooled_normed"])
    assert_close(made["levels"][0], torch.cat([stored[f"hidden_{i}"] for i in range(5)]))
    assert made["last"].shape == made["penultimate"].shape == (1, 10, 32)
    assert encoder.encode(portrait()[None])["levels"].shape == (1, 5, 10, 32)


def test_eva_clip_at_full_size_is_known_by_its_numbers() -> None:
    import open_clip

    with torch.device("meta"):
        trunk = open_clip.create_model("EVA02-L-14-336", pretrained=None, device="meta").visual.trunk  # pyright: ignore
    tower = towers_of.tower_of({f"trunk.{key}": value for key, value in trunk.state_dict().items()}, "eva.pt", "auto")
    assert tower.architecture == "eva02-l-14-336" and tower.size == 336
    shapes = {key: value.shape for key, value in tower.module.state_dict().items()}
    assert shapes == {key: value.shape for key, value in trunk.state_dict().items()}
    assert torch.equal(tower.module.rope.pos_embed, eva02().rope.pos_embed)


def eva02() -> Any:
    """timm's own tower of that name, of one block, as its angles need no more."""
    from timm.models.eva import eva02_large_patch14_clip_336

    return eva02_large_patch14_clip_336(depth=1)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"visual.blocks.3.attn.q_bias": None}, "misses blocks.3.attn.q_proj.bias"),
        ({"visual.head.weight": None}, "misses 'head.weight'; expected an OpenCLIP checkpoint"),
        ({"visual.blocks.1.mlp.w4.weight": torch.ones(2)}, "has unknown blocks.1.mlp.w4.weight"),
        ({f"visual.blocks.{i}": None for i in range(9, 21)}, "an EVA-CLIP of 9 blocks; expected EVA02-CLIP-L-14-336"),
    ],
)
def test_eva_clips_that_are_not_right_are_one_error(eva: Path, change: dict[str, Tensor | None], message: str) -> None:
    gone = tuple(key for key, value in change.items() if value is None)
    weights = (
        {key: value for key, value in EVA.weights().items() if not key.startswith(gone)} if gone else EVA.weights()
    )
    torch.save(weights | {key: value for key, value in change.items() if value is not None}, eva)
    with pytest.raises(ValueError, match=message):
        image_encoder.load(eva.name)


def drop(key: str) -> Callable[[dict[str, Tensor]], dict[str, Tensor]]:
    return lambda weights: {name: value for name, value in weights.items() if name != key}


BAD: dict[str, tuple[Callable[[dict[str, Tensor]], dict[str, Tensor]], str]] = {
    "missing": (drop("visual.transformer.resblocks.1.ln_2.bias"), r"misses transformer.resblocks.1.ln_2.bias"),
    "no patches": (drop("visual.conv1.weight"), "misses 'conv1.weight'; expected an OpenCLIP checkpoint"),
    "unknown": (lambda w: w | {"visual.attn_pool.query": torch.ones(2)}, "has unknown attn_pool.query"),
    "misshapen": (lambda w: w | {"visual.ln_pre.bias": torch.ones(3)}, r"has misshapen ln_pre.bias \[3\] for \[128\]"),
    "nan": (lambda w: w | {"visual.ln_pre.bias": torch.full((128,), torch.nan)}, "visual.ln_pre.bias holds NaN"),
    "foreign": (lambda w: {"vision_model.pre_layrnorm.weight": torch.ones(4)}, "own Load CLIP Vision"),
}


@pytest.mark.parametrize("how", BAD)
def test_files_that_are_not_right_are_one_error(file: Path, how: str) -> None:
    change, message = BAD[how]
    save_file(change(towers.checkpoint(towers.open_clip())), file)
    with pytest.raises(ValueError, match=message) as error:
        image_encoder.load(file.name)
    assert "tiny.safetensors" in str(error.value)


def test_without_open_clip_the_node_says_what_to_install(file: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "open_clip.transformer", None)
    assert LoadImageEncoder.INPUT_TYPES()["required"]["file"][1]["options"] == [file.name]
    with pytest.raises(ValueError, match="pip install -r requirements.txt"):
        LoadImageEncoder.execute(file.name)


def test_the_host_reloads_a_file_that_has_changed(file: Path) -> None:
    before = LoadImageEncoder.fingerprint_inputs(file.name)
    save_file(towers.checkpoint(towers.open_clip(1)), file)
    assert LoadImageEncoder.fingerprint_inputs(file.name) != before


def test_the_weights_hash_tells_networks_apart_and_not_precisions() -> None:
    one, other = (towers.twin(towers.open_clip(seed)) for seed in (0, 1))
    assert HostEncoder(one).sha256 == HostEncoder(towers.twin(towers.open_clip())).sha256
    assert HostEncoder(one).sha256 != HostEncoder(other).sha256 and len(HostEncoder(one).sha256) == 64
    half = {key: value.half() for key, value in one.get_sd().items()}
    assert clip.weights_hash(half) == clip.weights_hash(one.get_sd())
