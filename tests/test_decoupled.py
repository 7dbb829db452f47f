"""Projectors, attention and whole UNets against the official code's outputs."""

from __future__ import annotations

import json
from dataclasses import replace
from typing import Any

import comfy.ops
import pytest
import torch
from comfyui_likeness.likeness import curves, decoupled, detect, keymaps, pulid
from comfyui_likeness.likeness.resampler import Resampler
from comfyui_likeness.likeness.spec import AdapterSpec, Feature
from comfyui_likeness.nodes.attention import decoupled as nodes
from comfyui_likeness.nodes.attention.injection import GIVEN, Bank, Call, Place, Term, Window
from comfyui_likeness.nodes.attention.patch import attach, host_attention
from comfyui_likeness.nodes.attention.slots import KEY, Active, Now, Slot
from comfyui_likeness.nodes.types import LoadedAdapter
from golden import GOLDEN, Case, assert_close, cases
from identities import identity
from models import patcher
from torch import Tensor

PROJECTORS = cases("ip_adapter", "projector")
ATTENTION = cases("ip_adapter", "attention")
UNETS = cases("ip_adapter", "unet")
OPERATIONS = comfy.ops.manual_cast


def projector(case: Case, kind: str) -> torch.nn.Module:
    weights = {key.removeprefix("image_proj."): value for key, value in case.weights().items()}
    module = decoupled.KINDS[kind].projector(detect.shapes_of(weights), OPERATIONS)
    keymaps.load(module, weights)
    return module.requires_grad_(False)


@pytest.mark.parametrize("name", ["proj_faceid_plus_sd15", "proj_faceid_plus_batch_sd15"])
def test_face_plus(name: str) -> None:
    case = PROJECTORS[name]
    module, stored = projector(case, "faceid_plus"), case.outputs()
    face, hidden, grey = case.input("faceid"), case.input("clip_hidden"), case.input("clip_hidden_uncond")
    branches = {"cond": (face, hidden), "uncond": (torch.zeros_like(face), grey)}
    checked = 0
    for key, value in stored.items():
        what, branch, *rest = key.split("_")
        shortcut = float(rest[0][1:]) if what == "v2" else None
        assert_close(module(*branches[branch], shortcut=shortcut), value)
        checked += 1
    assert checked == len(stored) > 0


def test_face() -> None:
    case = PROJECTORS["proj_faceid_sd15"]
    module, stored, face = projector(case, "faceid"), case.outputs(), case.input("faceid")
    assert_close(module(face), stored["cond"])
    assert_close(module(torch.zeros_like(face)), stored["uncond"])
    assert_close(module(22 * face), stored["module_only_x22"])


def test_portrait_makes_one_sequence_of_all_faces() -> None:
    case = PROJECTORS["proj_faceid_portrait_sd15"]
    module, stored, faces = projector(case, "portrait"), case.outputs(), case.input("faceid")[0]
    cond, uncond = module(faces), module(torch.zeros_like(faces))
    assert_close(decoupled.rows(cond, uncond, (True,), 1, False), stored["cond"])
    assert_close(decoupled.rows(cond, uncond, (False,), 1, False), stored["uncond"])


@pytest.mark.parametrize(
    ("name", "kind"), [("proj_instantid", "instantid"), ("proj_faceid_portrait_unnorm_sdxl", "portrait_unnorm")]
)
def test_raw_face_resampler(name: str, kind: str) -> None:
    case = PROJECTORS[name]
    module, stored, face = projector(case, kind), case.outputs(), case.input("face_embedding")
    assert_close(module(face), stored["cond"])
    assert_close(module(torch.zeros_like(face)), stored["uncond"])


def test_image() -> None:
    case = PROJECTORS["proj_image_sd15"]
    module, stored, embeds = projector(case, "image"), case.outputs(), case.input("image_embeds")
    assert_close(module(embeds), stored["cond"])
    assert_close(module(torch.zeros_like(embeds)), stored["uncond"])


@pytest.mark.parametrize(("name", "kind"), [("proj_full_face_sd15", "full_face"), ("proj_plus_sd15", "plus")])
def test_hidden_states(name: str, kind: str) -> None:
    case = PROJECTORS[name]
    assert_close(projector(case, kind)(case.input("clip_hidden")), case.outputs()["tokens"])


def resampler(case: Case, weights: dict[str, Tensor], config: dict[str, int]) -> Resampler:
    """A resampler whose head width no released file has: the shapes alone do not tell it."""
    kind = type("Resampler", (Resampler,), {"head_width": config["dim_head"]})
    module = kind(
        config["dim"],
        config["depth"],
        config["heads"],
        config["num_queries"],
        config["embedding_dim"],
        config["output_dim"],
        OPERATIONS,
    )
    keymaps.load(module, weights)
    return module.requires_grad_(False)


def test_tiny_resampler() -> None:
    case = PROJECTORS["proj_plus_tiny"]
    module = resampler(case, keymaps.under(case.weights(), "image_proj."), case.config)
    assert_close(module(case.input("clip_hidden")), case.outputs()["tokens"])


def lora_applied(weights: dict[str, Tensor], strength: float) -> dict[str, Tensor]:
    out = dict(weights)
    for n, attention in enumerate(("attn1", "attn2")):
        for part, name in nodes.LORA_PARTS.items():
            down, up = (weights.get(f"ip_adapter.{n}.to_{part}_lora.{side}.weight") for side in ("down", "up"))
            if down is not None and up is not None:
                out[f"{attention}.{name}.weight"] = out[f"{attention}.{name}.weight"] + strength * up @ down
    return out


def slot_output(
    weights: dict[str, Tensor], case: Case, scale: float, mode: pulid.Mode = pulid.PLAIN, tokens: str = "image_tokens"
) -> tuple[Tensor, Tensor]:
    """What our slot gives in place of a cross-attention, before and after the layer's output projection."""
    hidden, text = case.input("hidden"), case.input("text")
    q, k, v = (
        hidden @ weights["attn2.to_q.weight"].T,
        text @ weights["attn2.to_k.weight"].T,
        text @ weights["attn2.to_v.weight"].T,
    )
    key, value = (case.input(tokens) @ weights[f"ip_adapter.1.to_{part}_ip.weight"].T for part in "kv")
    key, value = decoupled.SCALINGS["V only"](key, value, scale, q.shape[-1])
    key, value = mode.drained(key), mode.drained(value)
    place = Place("attn2", ("input", 1), 0, False)

    class Fixed(Term):
        window, bank, patchers, places = None, Bank(), [], [place]

        def prepare(self, call: Call) -> dict[Place, object]:
            return {place: True}

        def term(self, state: object, q: Tensor, options: dict[str, object]) -> Tensor:
            return mode.mix(options[GIVEN], host_attention(q, key, value, options), q, key, case.config["heads"])

    fixed, call = Fixed(), Call(("positive",), len(q), q.dtype, q.device, torch.zeros(len(q)), None, None)
    options = {
        "n_heads": case.config["heads"],
        KEY: Now(call, {id(fixed): Active(fixed.prepare(call), None)}, None),
    }
    pre = Slot(place, host_attention, None, (fixed,))(q, k, v, options)
    return pre, pre @ weights["attn2.to_out.0.weight"].T + weights["attn2.to_out.0.bias"]


@pytest.mark.parametrize("name", ["attn_ip_4tok", "attn_ip_16tok", "attn_instantid"])
def test_attention(name: str) -> None:
    case = ATTENTION[name]
    weights = {
        key if "." in key and key.split(".")[0] in ("attn1", "attn2", "ip_adapter") else f"attn2.{key}": value
        for key, value in case.weights().items()
    }
    stored = case.outputs()
    scales = case.data["scalars"]["scale"]
    for scale in scales if isinstance(scales, list) else [scales]:
        pre, out = slot_output(weights, case, scale)
        assert_close(out, stored[f"out_{scale}" if f"out_{scale}" in stored else "out"])
        if f"pre_{scale}" in stored:
            assert_close(pre, stored[f"pre_{scale}"])


def test_attention_with_lora() -> None:
    case = ATTENTION["attn_faceid_lora"]
    stored = case.outputs()
    for scale, strength in case.data["scalars"]["scale_and_lora_scale"]:
        _, out = slot_output(lora_applied(case.weights(), strength), case, scale)
        assert_close(out, stored[f"attn2_s{scale}_lora{strength}"])


MIXES = {name: mode.mix for name, mode in pulid.MODES.items()}


def mode_of(entry: dict[str, Any]) -> pulid.Mode:
    """A mode as the cases spell it."""
    mix = MIXES["style"] if entry["ortho"] else MIXES["fidelity"] if entry["ortho_v2"] else MIXES["plain"]
    return pulid.Mode(entry["num_zero"], mix)


def test_attention_of_pulid() -> None:
    case = ATTENTION["attn_pulid"]
    stored = case.outputs()
    weights = {
        key.replace("id_adapter_attn_layers.1.id_to_", "ip_adapter.1.to_").replace(".weight", "_ip.weight")
        if key.startswith("id_adapter")
        else key: value
        for key, value in case.weights().items()
    }
    for entry in case.data["scalars"]["modes"]:
        pre, out = slot_output(weights, case, entry["id_scale"], mode_of(entry), "id_tokens")
        assert_close(pre, stored[f"pre_{entry['name']}"])
        assert_close(out, stored[f"out_{entry['name']}"])


def diffusers_to_ldm(case: Case, family: str) -> dict[str, Tensor]:
    names = json.loads((GOLDEN / "ip_adapter" / "maps" / f"unet_tiny_{family}.diffusers_to_ldm.json").read_text())
    return {names[key]: value for key, value in case.weights(0).items()}


FEATURE = Feature("arcface.buffalo_l", "raw", "face112")
IMAGE = Feature("clip.vit-h-14", "projected", "photo")
HIDDEN = Feature("clip.vit-h-14", "penultimate", "photo")


@pytest.mark.parametrize(
    ("name", "family", "kind", "feature", "inputs"),
    [
        ("unet_sd15_ip", "SD1.5", "image", IMAGE, ("image", None)),
        ("unet_sd15_faceid", "SD1.5", "faceid", FEATURE, ("faceid", None)),
        ("unet_sdxl_plus", "SDXL", "plus", HIDDEN, ("image", "image_uncond")),
    ],
)
def test_whole_unet(name: str, family: str, kind: str, feature: Feature, inputs: tuple[str, str | None]) -> None:
    case = UNETS[name]
    stored = case.outputs()
    changes = {"adm_in_channels": 80} if family == "SDXL" else {}
    base = patcher(family, diffusers_to_ldm(case, "sdxl" if family == "SDXL" else "sd15"), **changes)
    adapter = loaded(case, kind, feature)
    person = identity((feature,), (tuple(case.input(inputs[0]).shape[1:]),))
    key = feature.id("0" * 64)
    zero = case.input(inputs[1]) if inputs[1] else torch.zeros_like(case.input(inputs[0]))
    person = type(person)(
        name="golden",
        box=person.box,
        kps=person.kps,
        score=person.score,
        weight=person.weight,
        embeddings={key: case.input(inputs[0])},
        zeros={key: zero},
    )
    made = decoupled.tokens(adapter.patcher.model, adapter.spec, person, torch.device("cpu"))
    assert_close(made.cond, stored["tokens_cond"])
    assert_close(made.uncond, stored["tokens_uncond"])
    assert_close(run(base, case, stored), stored["base"], 1e-4)
    for scale in case.data["scalars"]["scale"]:
        found = nodes.fitting(adapter.spec, base)
        shares = {site: curves.Share(1.0) for site in found}
        injection = nodes.Decoupled(adapter, person, shares, scale, "V only", 1.0, False, None, Window(1e9, -1.0))
        model = attach(nodes.with_lora(base, adapter, found, 1.0), injection)
        model.patch_model()
        try:
            assert_close(run(model, case, stored), stored[f"noise_s{scale}"], 1e-4)
        finally:
            model.unpatch_model()


def test_whole_unet_of_pulid() -> None:
    case = UNETS["unet_sdxl_pulid"]
    stored = case.outputs()
    base = patcher("SDXL", diffusers_to_ldm(case, "sdxl"), adm_in_channels=80)
    adapter = loaded(case, "plus", IMAGE, torch.nn.Identity())  # the case begins with the tokens
    key = IMAGE.id("0" * 64)
    person = replace(identity((), ()), embeddings={key: case.input("id_cond")}, zeros={key: case.input("id_uncond")})
    assert_close(run(base, case, stored), stored["base"], 1e-4)
    shares = {site: curves.Share(1.0) for site in nodes.fitting(adapter.spec, base)}
    for entry in case.data["scalars"]["modes"]:
        mode, window = mode_of(entry), Window(1e9, -1.0)
        injection = nodes.Decoupled(
            adapter, person, shares, entry["id_scale"], "V only", 1.0, False, None, window, mode
        )
        assert_close(run(attach(base, injection), case, stored), stored[f"noise_{entry['name']}"], 1e-4)


def tiny_projector(case: Case, kind: str, weights: dict[str, Tensor]) -> torch.nn.Module:
    if kind != "plus":
        return decoupled.KINDS[kind].projector(detect.shapes_of(weights), OPERATIONS)
    config = {
        "dim": 80,
        "depth": 2,
        "dim_head": 16,
        "heads": 5,
        "num_queries": 16,
        "embedding_dim": 48,
        "output_dim": 64,
    }
    return resampler(case, weights, config)


def loaded(case: Case, kind: str, feature: Feature, module: torch.nn.Module | None = None) -> LoadedAdapter:
    tensors = keymaps.rename(case.weights(1), keymaps.IP_ADAPTER)
    shapes = detect.shapes_of(tensors)
    numbers = sorted({int(key.split(".")[1]) for key in tensors if key.startswith("layers.")})
    spec = AdapterSpec(
        kind, detect.BASES[len(numbers)], 4, 64, tuple(shapes[f"layers.{n}.k.weight"][0] for n in numbers), (feature,)
    )
    weights = {key: value for key, value in tensors.items() if not key.startswith("lora.")}
    inner = keymaps.under(weights, "projector.")
    adapter = decoupled.DecoupledAdapter(spec, module or tiny_projector(case, kind, inner), OPERATIONS)
    keymaps.load(adapter, weights)
    held = nodes.ModelPatcher(adapter.requires_grad_(False), torch.device("cpu"), torch.device("cpu"))
    return LoadedAdapter(spec, held, keymaps.under(tensors, "lora."), "golden")


def run(model: object, case: Case, stored: dict[str, Tensor]) -> Tensor:
    """One call of the UNet as the host's samplers make it: row 0 without, row 1 with the identity."""
    wrappers = model.wrappers  # pyright: ignore[reportAttributeAccessIssue]
    options = {**model.model_options["transformer_options"], "wrappers": wrappers, "cond_or_uncond": [1, 0]}  # pyright: ignore[reportAttributeAccessIssue]
    with torch.inference_mode():
        return model.model.diffusion_model(  # pyright: ignore[reportAttributeAccessIssue]
            case.input("sample"),
            case.input("timesteps"),
            context=case.input("text"),
            y=stored.get("y"),
            transformer_options=options,
        )
