"""Adapters for FLUX against the official code's outputs: projectors, attention, whole models of the host."""

from __future__ import annotations

import comfy.ops
import pytest
import torch
from comfy.model_patcher import ModelPatcher
from comfyui_likeness.likeness import curves, decoupled, detect, keymaps, pulid
from comfyui_likeness.likeness.keys_values import NormedKeysValues
from comfyui_likeness.likeness.spec import AdapterSpec, Feature, Identity
from comfyui_likeness.nodes.attention import decoupled as nodes
from comfyui_likeness.nodes.attention.injection import ALWAYS
from comfyui_likeness.nodes.attention.patch import attach, host_attention
from comfyui_likeness.nodes.types import LoadedAdapter
from fluxes import SHOWN
from golden import Case, assert_close, cases
from identities import identity
from models import patcher
from torch import Tensor

PROJECTORS = cases("ip_adapter", "projector")
FLUXES = cases("ip_adapter", "flux")
OPERATIONS = comfy.ops.manual_cast
ROWS, COLUMNS, PATCH = 3, 4, 2  # of the cases' pictures


@pytest.mark.parametrize(
    ("name", "kind", "given"),
    [("proj_xlabs_v2", "xlabs", "image_embeds"), ("proj_instantx_tiny", "instantx", "pooled")],
)
def test_projectors(name: str, kind: str, given: str) -> None:
    case = PROJECTORS[name]
    weights = keymaps.under(keymaps.rename(case.weights(), keymaps.IP_ADAPTER), "projector.")
    module = decoupled.KINDS[kind].projector(detect.shapes_of(weights), OPERATIONS)
    keymaps.load(module, weights)
    assert_close(module.requires_grad_(False)(case.input(given)), case.outputs()["tokens"])


def test_attention() -> None:
    case = cases("ip_adapter", "attention")["attn_instantx"]
    query, tokens, stored = case.input("query"), case.input("image_tokens"), case.outputs()
    layer = NormedKeysValues(tokens.shape[-1], 256, OPERATIONS).requires_grad_(False)
    keymaps.load(layer, keymaps.under(keymaps.rename(case.weights(), keymaps.IP_ADAPTER), "layers.0."))
    for scale in case.data["scalars"]["scale"]:
        k, v = decoupled.SCALINGS["V only"](*layer(tokens), scale, 1.0)
        assert_close(host_attention(query, k, v, {}), stored[f"out_s{scale}"])


def loaded(case: Case, kind: str, tokens: int) -> LoadedAdapter:
    """The case's adapter, which begins with its tokens: its projector gives what it gets."""
    tensors = keymaps.rename(case.weights(1), keymaps.IP_ADAPTER)
    names, layers, width = detect.flux_layers_of(detect.shapes_of(tensors), "golden", detect.FLUX_KINDS[kind])
    needs = detect.NEEDS[kind]({})[:1]
    spec = AdapterSpec(kind, detect.FLUX, tokens, width, layers, needs, names=names)
    projector = torch.nn.Flatten(0, 1) if decoupled.KINDS[kind].sequence else torch.nn.Identity()
    module = decoupled.DecoupledAdapter(spec, projector, OPERATIONS)
    for name, hidden in zip(names, layers, strict=True) if "pulid_ca" in case.config else ():
        size = case.config["pulid_ca"]
        layer = pulid.FluxAttention(width, hidden, OPERATIONS, size["heads"], size["dim_head"])
        module.layers[name] = layer  # of heads that no released file has
    keymaps.load(module, tensors)
    cpu = torch.device("cpu")
    return LoadedAdapter(spec, ModelPatcher(module.requires_grad_(False), cpu, cpu), {}, "golden")


def holding(needs: tuple[Feature, ...], tokens: Tensor) -> Identity:
    one = identity((*needs, detect.BLACK), (tuple(tokens.shape[1:]),) * (len(needs) + 1))
    return type(one)(
        "golden", one.box, one.kps, one.score, one.weight, embeddings=dict.fromkeys(one.embeddings, tokens)
    )


def run(model: ModelPatcher, case: Case) -> Tensor:
    """One call of the model as the host's samplers make it. The case's picture is in tokens, a cell of 2x2 each."""
    cells = case.input("img").view(1, ROWS, COLUMNS, -1, PATCH, PATCH)
    picture = cells.permute(0, 3, 1, 4, 2, 5).reshape(1, -1, ROWS * PATCH, COLUMNS * PATCH)
    options = {**model.model_options["transformer_options"], "wrappers": model.wrappers, "cond_or_uncond": [0]}
    with torch.inference_mode():
        out = model.model.diffusion_model(
            picture, case.input("timesteps"), context=case.input("txt"), y=case.input("y"),
            guidance=case.input("guidance"), transformer_options=options,
        )  # fmt: skip
    cells = out.view(1, -1, ROWS, PATCH, COLUMNS, PATCH).permute(0, 2, 4, 1, 3, 5)
    return cells.reshape(1, ROWS * COLUMNS, -1)


@pytest.mark.parametrize(
    ("name", "kind", "tokens", "scalar", "out"),
    [
        ("flux_xlabs", "xlabs", "image_tokens", "ip_scale", "out_s"),
        ("flux_instantx", "instantx", "image_tokens", "scale", "out_s"),
        ("flux_pulid", "pulid_flux", "id_tokens", "id_weight", "out_w"),
    ],
)
def test_whole_model(name: str, kind: str, tokens: str, scalar: str, out: str) -> None:
    if not SHOWN and kind != "pulid_flux":
        pytest.skip("the host shows FLUX's queries to no patch")
    case = FLUXES[name]
    stored, config = case.outputs(), case.config["comfy_flux_config"]
    base = patcher("FLUX.1", case.weights(0), **config)
    assert_close(run(base, case), stored["base"])
    given = case.input(tokens)
    adapter, term = loaded(case, kind, given.shape[1]), nodes.TERMS.get(kind, nodes.Decoupled)
    person = holding(adapter.spec.needs, given)
    for scale in case.data["scalars"][scalar]:
        shares = {site: curves.Share(1.0) for site in nodes.fitting(adapter.spec, base)}
        injection = term(adapter, person, shares, scale, "V only", 1.0, False, None, ALWAYS)
        assert_close(run(attach(base, injection), case), stored[f"{out}{scale}"])
