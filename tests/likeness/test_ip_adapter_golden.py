"""Projectors, attention and complete UNets, against the outputs of the official code."""

from __future__ import annotations

import json
from dataclasses import replace
from typing import Any

import comfy.ops
import pytest
import torch
from comfyui_likeness.likeness.attention import layer_weights
from comfyui_likeness.likeness.checkpoints import checkpoint_detection, key_maps
from comfyui_likeness.likeness.methods import ip_adapter, pulid
from comfyui_likeness.likeness.methods.resampler import Perceiver, Resampler
from comfyui_likeness.likeness.spec import AdapterSpec, Feature
from comfyui_likeness.nodes.attention import apply_decoupled
from comfyui_likeness.nodes.attention.injection import AttentionTerm, PatchPlace, RunCache
from comfyui_likeness.nodes.attention.model_call import ModelCall
from comfyui_likeness.nodes.attention.patch import attach_injection, run_attention_backend
from comfyui_likeness.nodes.attention.schedule import ALWAYS_ON
from comfyui_likeness.nodes.attention.slots import (
    LIKENESS_KEY,
    ActiveInjection,
    AttentionSlot,
    CallState,
    get_layer_tensors,
)
from comfyui_likeness.nodes.types import LoadedAdapter
from support.golden import GOLDEN_FOLDER, GoldenCase, assert_close, read_golden_cases
from support.host_models import make_small_model
from support.identities import make_identity
from torch import Tensor

PROJECTORS = read_golden_cases("ip_adapter", "projector")
ATTENTION = read_golden_cases("ip_adapter", "attention")
UNETS = read_golden_cases("ip_adapter", "unet")
OPERATIONS = comfy.ops.manual_cast


def build_projector(case: GoldenCase, kind: str) -> torch.nn.Module:
    weights = {key.removeprefix("image_proj."): value for key, value in case.build_weights().items()}
    module = ip_adapter.ADAPTER_KINDS[kind].projector(checkpoint_detection.get_tensor_shapes(weights), OPERATIONS)
    key_maps.load_module_weights(module, weights)
    return module.requires_grad_(False)


@pytest.mark.parametrize("name", ["proj_faceid_plus_sd15", "proj_faceid_plus_batch_sd15"])
def test_face_plus(name: str) -> None:
    case = PROJECTORS[name]
    module, stored = build_projector(case, "faceid_plus"), case.load_outputs()
    face, hidden, zero_image = (
        case.build_input("faceid"),
        case.build_input("clip_hidden"),
        case.build_input("clip_hidden_uncond"),
    )
    branches = {"cond": (face, hidden), "uncond": (torch.zeros_like(face), zero_image)}
    checked = 0
    for key, value in stored.items():
        version, branch, *rest = key.split("_")
        shortcut = float(rest[0][1:]) if version == "v2" else None
        assert_close(module(*branches[branch], shortcut=shortcut), value)
        checked += 1
    assert checked == len(stored) > 0


def test_face() -> None:
    case = PROJECTORS["proj_faceid_sd15"]
    module, stored, face = build_projector(case, "faceid"), case.load_outputs(), case.build_input("faceid")
    assert_close(module(face), stored["cond"])
    assert_close(module(torch.zeros_like(face)), stored["uncond"])
    assert_close(module(22 * face), stored["module_only_x22"])


def test_portrait_makes_one_sequence_of_all_faces() -> None:
    case = PROJECTORS["proj_faceid_portrait_sd15"]
    module, stored, faces = build_projector(case, "portrait"), case.load_outputs(), case.build_input("faceid")[0]
    cond, uncond = module(faces), module(torch.zeros_like(faces))
    assert_close(ip_adapter.arrange_batch_rows(cond, uncond, (True,), (0,), False), stored["cond"])
    assert_close(ip_adapter.arrange_batch_rows(cond, uncond, (False,), (0,), False), stored["uncond"])


@pytest.mark.parametrize(
    ("name", "kind"), [("proj_instantid", "instantid"), ("proj_faceid_portrait_unnorm_sdxl", "portrait_unnorm")]
)
def test_raw_face_resampler(name: str, kind: str) -> None:
    case = PROJECTORS[name]
    module, stored, face = build_projector(case, kind), case.load_outputs(), case.build_input("face_embedding")
    assert_close(module(face), stored["cond"])
    assert_close(module(torch.zeros_like(face)), stored["uncond"])


def test_image() -> None:
    case = PROJECTORS["proj_image_sd15"]
    module, stored, embeds = build_projector(case, "image"), case.load_outputs(), case.build_input("image_embeds")
    assert_close(module(embeds), stored["cond"])
    assert_close(module(torch.zeros_like(embeds)), stored["uncond"])


@pytest.mark.parametrize(("name", "kind"), [("proj_full_face_sd15", "full_face"), ("proj_plus_sd15", "plus")])
def test_hidden_states(name: str, kind: str) -> None:
    case = PROJECTORS[name]
    assert_close(build_projector(case, kind)(case.build_input("clip_hidden")), case.load_outputs()["tokens"])


def build_resampler(case: GoldenCase, weights: dict[str, Tensor], config: dict[str, int]) -> Resampler:
    """A resampler with a head_dim that no published file has; the shapes do not determine it."""
    kind = type("Resampler", (Resampler,), {"head_dim": config["dim_head"]})
    module = kind(
        config["dim"],
        config["depth"],
        config["heads"],
        config["num_queries"],
        config["embedding_dim"],
        config["output_dim"],
        OPERATIONS,
    )
    key_maps.load_module_weights(module, weights)
    return module.requires_grad_(False)


@pytest.mark.parametrize("inner", [96, 128, 1000])
def test_feed_forwards_of_any_width_are_read_from_the_shapes(inner: int) -> None:
    """Of IP-Adapter Plus and FaceID-Plus, whose published files have 4 times the width."""
    expected = Resampler(128, 2, 2, 4, 48, 32, torch.nn, inner)
    weights = {key: torch.randn_like(value) for key, value in expected.state_dict().items()}
    shapes = checkpoint_detection.get_tensor_shapes(weights)
    assert shapes["layers.0.1.1.weight"] == (inner, 128)
    for build in (Resampler.from_shapes, Perceiver.from_shapes):
        module = build(shapes, torch.nn)
        assert {key: value.shape for key, value in module.state_dict().items()}.items() <= {
            key: value.shape for key, value in weights.items()
        }.items()
    expected.load_state_dict(weights)
    module = Resampler.from_shapes(shapes, torch.nn)
    module.load_state_dict(weights)
    hidden = torch.randn(1, 7, 48)
    with torch.no_grad():
        assert torch.equal(module(hidden), expected(hidden))


def test_queries_that_are_not_whole_heads_are_refused() -> None:
    weights = Resampler(128, 2, 2, 4, 48, 32, torch.nn).state_dict()
    shapes = checkpoint_detection.get_tensor_shapes(weights) | {"layers.0.0.to_q.weight": (100, 128)}
    with pytest.raises(ValueError, match="queries of 100 channels, expected a multiple of 64"):
        Resampler.from_shapes(shapes, torch.nn)


def test_tiny_resampler() -> None:
    case = PROJECTORS["proj_plus_tiny"]
    module = build_resampler(case, key_maps.select_prefix(case.build_weights(), "image_proj."), case.config)
    assert_close(module(case.build_input("clip_hidden")), case.load_outputs()["tokens"])


def apply_lora(weights: dict[str, Tensor], strength: float) -> dict[str, Tensor]:
    applied = dict(weights)
    for n, attention in enumerate(("attn1", "attn2")):
        for part, name in apply_decoupled.LORA_PROJECTION_NAMES.items():
            down, up = (weights.get(f"ip_adapter.{n}.to_{part}_lora.{side}.weight") for side in ("down", "up"))
            if down is not None and up is not None:
                applied[f"{attention}.{name}.weight"] = weights[f"{attention}.{name}.weight"] + strength * up @ down
    return applied


def run_slot(
    weights: dict[str, Tensor],
    case: GoldenCase,
    scale: float,
    mode: pulid.PuLIDMode = pulid.PLAIN_MODE,
    tokens: str = "image_tokens",
) -> tuple[Tensor, Tensor]:
    """The output of our slot in place of a cross-attention, before and after the output projection."""
    hidden, text = case.build_input("hidden"), case.build_input("text")
    q, k, v = (
        hidden @ weights["attn2.to_q.weight"].T,
        text @ weights["attn2.to_k.weight"].T,
        text @ weights["attn2.to_v.weight"].T,
    )
    key, value = (case.build_input(tokens) @ weights[f"ip_adapter.1.to_{part}_ip.weight"].T for part in "kv")
    key, value = ip_adapter.STRENGTH_SCALINGS["V only"](key, value, scale, q.shape[-1])
    key, value = mode.append_zero_tokens(key), mode.append_zero_tokens(value)
    place = PatchPlace("attn2", ("input", 1), 0, False)

    class Fixed(AttentionTerm):
        schedule, run_cache, patchers, places = None, RunCache(), [], [place]

        def prepare_states(self, call: ModelCall) -> dict[PatchPlace, object]:
            return {place: True}

        def compute_term(self, state: object, q: Tensor, options: dict[str, object]) -> Tensor:
            return mode.orthogonalize(
                get_layer_tensors(options).attention_output,
                run_attention_backend(q, key, value, options),
                q,
                key,
                case.config["heads"],
            )

    fixed, call = Fixed(), ModelCall(("positive",), tuple(range(len(q))), q.dtype, q.device, torch.zeros(len(q)))
    options = {
        "n_heads": case.config["heads"],
        LIKENESS_KEY: CallState(call, {id(fixed): ActiveInjection(fixed.prepare_states(call), None)}, None),
    }
    pre = AttentionSlot(place, run_attention_backend, None, (fixed,))(q, k, v, options)
    return pre, pre @ weights["attn2.to_out.0.weight"].T + weights["attn2.to_out.0.bias"]


@pytest.mark.parametrize("name", ["attn_ip_4tok", "attn_ip_16tok", "attn_instantid"])
def test_attention(name: str) -> None:
    case = ATTENTION[name]
    weights = {
        key if "." in key and key.split(".")[0] in ("attn1", "attn2", "ip_adapter") else f"attn2.{key}": value
        for key, value in case.build_weights().items()
    }
    stored = case.load_outputs()
    scales = case.data["scalars"]["scale"]
    for scale in scales if isinstance(scales, list) else [scales]:
        pre, out = run_slot(weights, case, scale)
        assert_close(out, stored[f"out_{scale}" if f"out_{scale}" in stored else "out"])
        if f"pre_{scale}" in stored:
            assert_close(pre, stored[f"pre_{scale}"])


def test_attention_with_lora() -> None:
    case = ATTENTION["attn_faceid_lora"]
    stored = case.load_outputs()
    for scale, strength in case.data["scalars"]["scale_and_lora_scale"]:
        _, out = run_slot(apply_lora(case.build_weights(), strength), case, scale)
        assert_close(out, stored[f"attn2_s{scale}_lora{strength}"])


def make_mode(entry: dict[str, Any]) -> pulid.PuLIDMode:
    """The mode of a golden case's entry."""
    name = "style" if entry["ortho"] else "fidelity" if entry["ortho_v2"] else "plain"
    return pulid.PuLIDMode(entry["num_zero"], pulid.PULID_MODES[name].orthogonalize)


def test_pulid_attention() -> None:
    case = ATTENTION["attn_pulid"]
    stored = case.load_outputs()
    weights = {
        key.replace("id_adapter_attn_layers.1.id_to_", "ip_adapter.1.to_").replace(".weight", "_ip.weight")
        if key.startswith("id_adapter")
        else key: value
        for key, value in case.build_weights().items()
    }
    for entry in case.data["scalars"]["modes"]:
        pre, out = run_slot(weights, case, entry["id_scale"], make_mode(entry), "id_tokens")
        assert_close(pre, stored[f"pre_{entry['name']}"])
        assert_close(out, stored[f"out_{entry['name']}"])


def build_ldm_weights(case: GoldenCase, family: str) -> dict[str, Tensor]:
    names = json.loads(
        (GOLDEN_FOLDER / "ip_adapter" / "maps" / f"unet_tiny_{family}.diffusers_to_ldm.json").read_text()
    )
    return {names[key]: value for key, value in case.build_weights(0).items()}


FACE = Feature("arcface.buffalo_l", "raw", "face112")
IMAGE = Feature("clip.vit-h-14", "projected", "photo")
HIDDEN = Feature("clip.vit-h-14", "penultimate", "photo")


@pytest.mark.parametrize(
    ("name", "family", "kind", "feature", "inputs"),
    [
        ("unet_sd15_ip", "SD1.5", "image", IMAGE, ("image", None)),
        ("unet_sd15_faceid", "SD1.5", "faceid", FACE, ("faceid", None)),
        ("unet_sdxl_plus", "SDXL", "plus", HIDDEN, ("image", "image_uncond")),
    ],
)
def test_complete_unet(name: str, family: str, kind: str, feature: Feature, inputs: tuple[str, str | None]) -> None:
    case = UNETS[name]
    stored = case.load_outputs()
    changes = {"adm_in_channels": 80} if family == "SDXL" else {}
    base = make_small_model(family, build_ldm_weights(case, "sdxl" if family == "SDXL" else "sd15"), **changes)
    adapter = load_adapter(case, kind, feature)
    person = make_identity((feature,), (tuple(case.build_input(inputs[0]).shape[1:]),))
    key = feature.format_encoder_id("0" * 64)
    zero = case.build_input(inputs[1]) if inputs[1] else torch.zeros_like(case.build_input(inputs[0]))
    person = type(person)(
        name="golden",
        box=person.box,
        kps=person.kps,
        score=person.score,
        weight=person.weight,
        embeddings={key: case.build_input(inputs[0])},
        zero_embeddings={key: zero},
    )
    tokens = ip_adapter.project_identity(adapter.patcher.model, adapter.spec, person, torch.device("cpu"))
    assert_close(tokens.cond, stored["tokens_cond"])
    assert_close(tokens.uncond, stored["tokens_uncond"])
    assert_close(run_unet(base, case, stored), stored["base"], 1e-4)
    for scale in case.data["scalars"]["scale"]:
        layers = apply_decoupled.match_adapter_layers(adapter.spec, base)
        weights = {layer: layer_weights.LayerWeight(1.0) for layer in layers}
        injection = apply_decoupled.DecoupledTerm(
            adapter, person, weights, scale, "V only", 1.0, False, None, ALWAYS_ON
        )
        model = attach_injection(apply_decoupled.apply_adapter_lora(base, adapter, layers, 1.0), injection)
        model.patch_model()
        try:
            assert_close(run_unet(model, case, stored), stored[f"noise_s{scale}"], 1e-4)
        finally:
            model.unpatch_model()


def test_complete_pulid_unet() -> None:
    case = UNETS["unet_sdxl_pulid"]
    stored = case.load_outputs()
    base = make_small_model("SDXL", build_ldm_weights(case, "sdxl"), adm_in_channels=80)
    adapter = load_adapter(case, "plus", IMAGE, torch.nn.Identity())  # the inputs of the case are tokens
    key = IMAGE.format_encoder_id("0" * 64)
    person = replace(
        make_identity((), ()),
        embeddings={key: case.build_input("id_cond")},
        zero_embeddings={key: case.build_input("id_uncond")},
    )
    assert_close(run_unet(base, case, stored), stored["base"], 1e-4)
    layers = apply_decoupled.match_adapter_layers(adapter.spec, base)
    weights = {layer: layer_weights.LayerWeight(1.0) for layer in layers}
    for entry in case.data["scalars"]["modes"]:
        mode, window = make_mode(entry), ALWAYS_ON
        injection = apply_decoupled.DecoupledTerm(
            adapter, person, weights, entry["id_scale"], "V only", 1.0, False, None, window, mode
        )
        assert_close(run_unet(attach_injection(base, injection), case, stored), stored[f"noise_{entry['name']}"], 1e-4)


def build_tiny_projector(case: GoldenCase, kind: str, weights: dict[str, Tensor]) -> torch.nn.Module:
    if kind != "plus":
        return ip_adapter.ADAPTER_KINDS[kind].projector(checkpoint_detection.get_tensor_shapes(weights), OPERATIONS)
    config = {
        "dim": 80,
        "depth": 2,
        "dim_head": 16,
        "heads": 5,
        "num_queries": 16,
        "embedding_dim": 48,
        "output_dim": 64,
    }
    return build_resampler(case, weights, config)


def load_adapter(case: GoldenCase, kind: str, feature: Feature, module: torch.nn.Module | None = None) -> LoadedAdapter:
    tensors = key_maps.rename_keys(case.build_weights(1), key_maps.IP_ADAPTER)
    shapes = checkpoint_detection.get_tensor_shapes(tensors)
    numbers = sorted({int(key.split(".")[1]) for key in tensors if key.startswith("layers.")})
    spec = AdapterSpec(
        kind,
        checkpoint_detection.BASES_BY_LAYER_COUNT[len(numbers)],
        4,
        64,
        tuple(shapes[f"layers.{n}.k.weight"][0] for n in numbers),
        (feature,),
    )
    weights = {key: value for key, value in tensors.items() if not key.startswith("lora.")}
    projector_weights = key_maps.select_prefix(weights, "projector.")
    adapter = ip_adapter.DecoupledAdapter(
        spec, module or build_tiny_projector(case, kind, projector_weights), OPERATIONS
    )
    key_maps.load_module_weights(adapter, weights)
    patcher = apply_decoupled.ModelPatcher(adapter.requires_grad_(False), torch.device("cpu"), torch.device("cpu"))
    return LoadedAdapter(spec, patcher, key_maps.select_prefix(tensors, "lora."), "golden")


def run_unet(model: object, case: GoldenCase, stored: dict[str, Tensor]) -> Tensor:
    """One call of the UNet as ComfyUI's samplers make it: row 0 without, row 1 with the identity."""
    wrappers = model.wrappers  # pyright: ignore[reportAttributeAccessIssue]
    options = {**model.model_options["transformer_options"], "wrappers": wrappers, "cond_or_uncond": [1, 0]}  # pyright: ignore[reportAttributeAccessIssue]
    with torch.inference_mode():
        return model.model.diffusion_model(  # pyright: ignore[reportAttributeAccessIssue]
            case.build_input("sample"),
            case.build_input("timesteps"),
            context=case.build_input("text"),
            y=stored.get("y"),
            transformer_options=options,
        )
