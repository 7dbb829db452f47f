"""FLUX adapters against outputs of the official code: projectors, attention, full models in ComfyUI."""

from __future__ import annotations

import comfy.ops
import pytest
import torch
from comfy.model_patcher import ModelPatcher
from comfyui_likeness.likeness.attention import layer_weights
from comfyui_likeness.likeness.attention.key_value_projections import NormalizedKeyValueProjection
from comfyui_likeness.likeness.checkpoints import checkpoint_detection, key_maps
from comfyui_likeness.likeness.methods import ip_adapter, pulid
from comfyui_likeness.likeness.spec import AdapterSpec, Feature, Identity
from comfyui_likeness.nodes.attention import apply_decoupled
from comfyui_likeness.nodes.attention.patch import attach_injection, run_attention_backend
from comfyui_likeness.nodes.attention.schedule import ALWAYS_ON
from comfyui_likeness.nodes.types import LoadedAdapter
from support.flux_adapters import HOST_PASSES_QUERIES
from support.golden import GoldenCase, assert_close, read_golden_cases
from support.host_models import make_small_model
from support.identities import make_identity
from torch import Tensor

PROJECTORS = read_golden_cases("ip_adapter", "projector")
FLUXES = read_golden_cases("ip_adapter", "flux")
OPERATIONS = comfy.ops.manual_cast
ROWS, COLUMNS, PATCH = 3, 4, 2  # token grid and patch size of the cases


@pytest.mark.parametrize(
    ("name", "kind", "input_name"),
    [("proj_xlabs_v2", "xlabs", "image_embeds"), ("proj_instantx_tiny", "instantx", "pooled")],
)
def test_projectors(name: str, kind: str, input_name: str) -> None:
    case = PROJECTORS[name]
    weights = key_maps.select_prefix(key_maps.rename_keys(case.build_weights(), key_maps.IP_ADAPTER), "projector.")
    module = ip_adapter.ADAPTER_KINDS[kind].projector(checkpoint_detection.get_tensor_shapes(weights), OPERATIONS)
    key_maps.load_module_weights(module, weights)
    assert_close(module.requires_grad_(False)(case.build_input(input_name)), case.load_outputs()["tokens"])


def test_attention() -> None:
    case = read_golden_cases("ip_adapter", "attention")["attn_instantx"]
    query, tokens, stored = case.build_input("query"), case.build_input("image_tokens"), case.load_outputs()
    layer = NormalizedKeyValueProjection(tokens.shape[-1], 256, OPERATIONS).requires_grad_(False)
    key_maps.load_module_weights(
        layer, key_maps.select_prefix(key_maps.rename_keys(case.build_weights(), key_maps.IP_ADAPTER), "layers.0.")
    )
    for scale in case.data["scalars"]["scale"]:
        k, v = ip_adapter.STRENGTH_SCALINGS["V only"](*layer(tokens), scale, 1.0)
        assert_close(run_attention_backend(query, k, v, {}), stored[f"out_s{scale}"])


def load_case_adapter(case: GoldenCase, kind: str, tokens: int) -> LoadedAdapter:
    """The adapter of a case, which starts from tokens: its projector is the identity."""
    tensors = key_maps.rename_keys(case.build_weights(1), key_maps.IP_ADAPTER)
    names, layers, width = checkpoint_detection.read_flux_layers(
        checkpoint_detection.get_tensor_shapes(tensors), "golden", checkpoint_detection.FLUX_LAYER_MATRICES[kind]
    )
    needs = checkpoint_detection.REQUIRED_FEATURES[kind]({})[:1]
    spec = AdapterSpec(kind, checkpoint_detection.FLUX_BASE, tokens, width, layers, needs, layer_names=names)
    projector = torch.nn.Flatten(0, 1) if ip_adapter.ADAPTER_KINDS[kind].faces_as_sequence else torch.nn.Identity()
    module = ip_adapter.DecoupledAdapter(spec, projector, OPERATIONS)
    for name, hidden in zip(names, layers, strict=True) if "pulid_ca" in case.config else ():
        size = case.config["pulid_ca"]
        layer = pulid.PuLIDFluxAttention(width, hidden, OPERATIONS, size["heads"], size["dim_head"])
        module.layers[name] = layer  # number of heads differs from the released file
    key_maps.load_module_weights(module, tensors)
    cpu = torch.device("cpu")
    return LoadedAdapter(spec, ModelPatcher(module.requires_grad_(False), cpu, cpu), {}, "golden")


def make_tokens_identity(needs: tuple[Feature, ...], tokens: Tensor) -> Identity:
    """An identity whose embeddings are the tokens of a case."""
    identity = make_identity((*needs, checkpoint_detection.CLIP_L_BLACK), (tuple(tokens.shape[1:]),) * (len(needs) + 1))
    return type(identity)(
        "golden",
        identity.box,
        identity.kps,
        identity.score,
        identity.weight,
        embeddings=dict.fromkeys(identity.embeddings, tokens),
    )


def run(model: ModelPatcher, case: GoldenCase) -> Tensor:
    """One call of the model, as ComfyUI's samplers make it. The image of a case is given as tokens of 2x2 latents."""
    cells = case.build_input("img").view(1, ROWS, COLUMNS, -1, PATCH, PATCH)
    latent = cells.permute(0, 3, 1, 4, 2, 5).reshape(1, -1, ROWS * PATCH, COLUMNS * PATCH)
    options = {**model.model_options["transformer_options"], "wrappers": model.wrappers, "cond_or_uncond": [0]}
    with torch.inference_mode():
        out = model.model.diffusion_model(
            latent, case.build_input("timesteps"), context=case.build_input("txt"), y=case.build_input("y"),
            guidance=case.build_input("guidance"), transformer_options=options,
        )  # fmt: skip
    cells = out.view(1, -1, ROWS, PATCH, COLUMNS, PATCH).permute(0, 2, 4, 1, 3, 5)
    return cells.reshape(1, ROWS * COLUMNS, -1)


@pytest.mark.parametrize(
    ("name", "kind", "tokens_name", "scalar", "out"),
    [
        ("flux_xlabs", "xlabs", "image_tokens", "ip_scale", "out_s"),
        ("flux_instantx", "instantx", "image_tokens", "scale", "out_s"),
        ("flux_pulid", "pulid_flux", "id_tokens", "id_weight", "out_w"),
    ],
)
def test_full_model(name: str, kind: str, tokens_name: str, scalar: str, out: str) -> None:
    if not HOST_PASSES_QUERIES and kind != "pulid_flux":
        pytest.skip("this ComfyUI does not pass the queries of FLUX to patches")
    case = FLUXES[name]
    stored, config = case.load_outputs(), case.config["comfy_flux_config"]
    base = make_small_model("FLUX.1", case.build_weights(0), **config)
    assert_close(run(base, case), stored["base"])
    tokens = case.build_input(tokens_name)
    adapter = load_case_adapter(case, kind, tokens.shape[1])
    term = apply_decoupled.TERM_CLASSES.get(kind, apply_decoupled.DecoupledTerm)
    identity = make_tokens_identity(adapter.spec.needs, tokens)
    for scale in case.data["scalars"][scalar]:
        weights = {
            layer: layer_weights.LayerWeight(1.0) for layer in apply_decoupled.match_adapter_layers(adapter.spec, base)
        }
        injection = term(adapter, identity, weights, scale, "V only", 1.0, False, None, ALWAYS_ON)
        assert_close(run(attach_injection(base, injection), case), stored[f"{out}{scale}"])
