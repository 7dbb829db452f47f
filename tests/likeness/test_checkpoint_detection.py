"""Detection of adapter files by their tensors, and errors for other files."""

from __future__ import annotations

import json

import comfy.ops
import pytest
import torch
from comfyui_likeness.likeness.checkpoints import checkpoint_detection, key_maps
from comfyui_likeness.likeness.spec import Feature, parse_encoder_id
from comfyui_likeness.tools.standins.models import LAYOUT_FOLDER
from support.ip_adapters import make_ip_adapter_tensors

BUFFALO, ANTELOPE = "arcface.buffalo_l.raw.face112", "arcface.antelopev2.raw.face112"
PHOTO, HEAD, FACE = (f"clip.vit-h-14.penultimate.{crop}" for crop in ("photo", "head", "face224"))
EVA = ("clip.eva02-l-14-336.projected.ffhq512", "clip.eva02-l-14-336.levels.ffhq512")

# layout -> kind, base, tokens, needs, LoRA rank, guessed
EXPECTED = {
    "ip-adapter_sd15": ("image", "SD1.5", 4, ["clip.vit-h-14.projected.photo"], 0, False),
    "ip-adapter_sd15_vit-G": ("image", "SD1.5", 4, ["clip.vit-bigg-14.projected.photo"], 0, False),
    "ip-adapter-plus_sd15": ("plus", "SD1.5", 16, [PHOTO], 0, True),
    "ip-adapter-full-face_sd15": ("full_face", "SD1.5", 257, [HEAD], 0, False),
    "ip-adapter_sdxl": ("image", "SDXL", 4, ["clip.vit-bigg-14.projected.photo"], 0, False),
    "ip-adapter_sdxl_vit-h": ("image", "SDXL", 4, ["clip.vit-h-14.projected.photo"], 0, False),
    "ip-adapter-plus_sdxl_vit-h": ("plus", "SDXL", 16, [PHOTO], 0, True),
    "ip-adapter-faceid_sd15": ("faceid", "SD1.5", 4, [BUFFALO], 128, False),
    "ip-adapter-faceid_sdxl": ("faceid", "SDXL", 4, [BUFFALO], 128, False),
    "ip-adapter-faceid-plus_sd15": ("faceid_plus", "SD1.5", 4, [BUFFALO, FACE], 128, True),
    "ip-adapter-faceid-plusv2_sdxl": ("faceid_plus_v2", "SDXL", 4, [BUFFALO, FACE], 128, True),
    "ip-adapter-faceid-portrait_sd15": ("portrait", "SD1.5", 16, [BUFFALO], 0, False),
    "ip-adapter-faceid-portrait_sdxl": ("portrait", "SDXL", 16, [BUFFALO], 0, False),
    "ip-adapter-faceid-portrait_sdxl_unnorm": ("portrait_unnorm", "SDXL", 16, [BUFFALO], 0, True),
    "pulid_v1": ("pulid", "SDXL", 10, [ANTELOPE, *EVA], 0, False),
    "pulid_v1.1": ("pulid_v1_1", "SDXL", 32, [ANTELOPE, *EVA], 0, False),
    "pulid_flux_v0.9.x": ("pulid_flux", "FLUX.1", 32, [ANTELOPE, *EVA], 0, False),
    "xlabs_flux_ip_adapter_v1": ("xlabs", "FLUX.1", 4, ["clip.vit-l-14.projected.photo"], 0, False),
    "xlabs_flux_ip_adapter_v2": ("xlabs", "FLUX.1", 16, ["clip.vit-l-14.projected.photo"], 0, False),
    "instantx_flux_ip_adapter": ("instantx", "FLUX.1", 128, ["siglip.so400m-14-384.pooled.photo"], 0, False),
    "instantid_ip-adapter": ("instantid", "SDXL", 16, [ANTELOPE], 0, True),
}


def load_layout(name: str) -> dict[str, torch.Tensor]:
    shapes = json.loads((LAYOUT_FOLDER / f"{name}.json").read_text())
    return {key: torch.empty(shape, device="meta") for key, shape in shapes.items()}


def test_every_layout_is_expected() -> None:
    assert {path.stem for path in LAYOUT_FOLDER.glob("*.json")} - {"index"} == EXPECTED.keys()


@pytest.mark.parametrize("name", EXPECTED)
def test_published_layouts_at_full_size(name: str) -> None:
    kind, base, tokens, needs, rank, guessed = EXPECTED[name]
    renamed = key_maps.rename_keys(load_layout(name), key_maps.IP_ADAPTER)
    spec, guess = checkpoint_detection.detect_adapter_spec(renamed, f"models/{name}.bin")
    assert (spec.kind, spec.base, spec.tokens, [str(n) for n in spec.needs], spec.lora_rank) == (
        kind,
        base,
        tokens,
        needs,
        rank,
    )
    assert guess is guessed
    assert spec.width == {"pulid_flux": 2048}.get(kind, {"SD1.5": 768, "SDXL": 2048, "FLUX.1": 4096}[base])
    module = checkpoint_detection.build_ip_adapter(spec, renamed, comfy.ops.manual_cast)
    kept = {f"lora.{key}" for key in key_maps.select_prefix(renamed, "lora.")} | module.state_dict().keys()
    assert kept == renamed.keys()


@pytest.mark.parametrize(
    ("name", "file", "kind"),
    [
        ("ip-adapter-faceid-plus_sd15", "my-FaceID_PlusV2.bin", "faceid_plus_v2"),
        ("ip-adapter-faceid-plus_sd15", "renamed.bin", "faceid_plus"),
        ("ip-adapter-plus_sd15", "ip-adapter-plus-face_sd15.safetensors", "plus_face"),
        ("instantid_ip-adapter", "instantid/ip-adapter.bin", "instantid"),
    ],
)
def test_ambiguous_variants_are_guessed_by_name_and_chosen_by_the_user(name: str, file: str, kind: str) -> None:
    renamed = key_maps.rename_keys(load_layout(name), key_maps.IP_ADAPTER)
    assert checkpoint_detection.detect_adapter_spec(renamed, file)[0].kind == kind
    signature, _, _ = checkpoint_detection.detect_adapter_kind(checkpoint_detection.get_tensor_shapes(renamed))
    for variant in (signature.kind, *checkpoint_detection.list_variants(signature.kind)):
        spec, guessed = checkpoint_detection.detect_adapter_spec(renamed, file, variant)
        assert spec.kind == variant and not guessed
    with pytest.raises(ValueError, match="got variant image"):
        checkpoint_detection.detect_adapter_spec(renamed, file, "image")


def test_kolors_is_rejected_by_name() -> None:
    for shapes in (
        {
            "projector.latents": (1, 16, 2048),
            "projector.proj_in.weight": (2048, 1024),
            "projector.proj_out.weight": (2048, 2048),
        },
        {
            "projector.proj.0.weight": (1024, 512),
            "projector.proj.2.weight": (6 * 4096, 1024),
            "projector.norm.weight": (4096,),
            "projector.perceiver_resampler.proj_in.weight": (4096, 1024),
        },
    ):
        with pytest.raises(ValueError, match="Kolors"):
            checkpoint_detection.detect_adapter_kind(shapes)


def test_a_lora_is_not_an_adapter() -> None:
    with pytest.raises(ValueError, match="no table of this pack knows"):
        key_maps.rename_keys({"lora_unet_down.weight": torch.zeros(1)}, key_maps.IP_ADAPTER)
    with pytest.raises(ValueError, match="fit no adapter"):
        checkpoint_detection.detect_adapter_spec({"projector.unknown": torch.zeros(1)})


def test_two_layouts_in_one_file_collide() -> None:
    with pytest.raises(ValueError, match="mixes two layouts"):
        key_maps.rename_keys(
            {f"{g}.1.to_k_ip.weight": torch.zeros(1) for g in ("ip_adapter", "adapter_modules")}, key_maps.IP_ADAPTER
        )


def test_a_partial_file_names_its_keys() -> None:
    whole = key_maps.rename_keys(make_ip_adapter_tensors("image"), key_maps.IP_ADAPTER)
    spec, _ = checkpoint_detection.detect_adapter_spec(whole)
    for change, message in (
        ({"layers.1.v.weight": None}, "misses layers.1.v.weight"),
        ({"layers.1.x": torch.zeros(1)}, "has unknown layers.1.x"),
        ({"layers.3.v.weight": torch.zeros(3, 3)}, "has misshapen layers.3.v.weight"),
        ({"projector.norm.bias": None}, "misses projector.norm.bias"),
    ):
        broken = {key: value for key, value in {**whole, **change}.items() if value is not None}
        with pytest.raises(ValueError, match=message):
            checkpoint_detection.build_ip_adapter(spec, broken, comfy.ops.manual_cast)
    for n in range(1, 32, 2):
        whole.pop(f"layers.{n}.k.weight", None), whole.pop(f"layers.{n}.v.weight", None)
        with pytest.raises(ValueError, match="cross-attentions"):
            checkpoint_detection.detect_adapter_spec(whole)


def test_encoder_ids() -> None:
    feature = Feature("clip.vit-h-14", "penultimate", "face224")
    assert parse_encoder_id(feature.format_encoder_id("0123abcd" + "f" * 56)) == (feature, "0123abcd")
    for text in ("", "clip", "clip.x.y-xyz", "a.b.c-0123456", "../a.b.c-01234567"):
        with pytest.raises(ValueError, match="not an encoder id"):
            parse_encoder_id(text)
