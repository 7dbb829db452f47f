"""FLUX blocks with terms against their equations, written with torch.einsum."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from comfy.model_patcher import ModelPatcher
from comfyui_likeness.likeness.methods.ip_adapter import project_identity
from comfyui_likeness.nodes.types import LoadedAdapter
from support.flux_adapters import (
    FLUX_FAMILY,
    HOST_PASSES_QUERIES,
    NUM_DOUBLE_BLOCKS,
    OMNI_ID_KIND,
    apply_flux_adapter,
    make_flux_adapter,
    make_flux_identity,
)
from support.host_models import all_close, make_small_model, sample_latent
from torch import Tensor
from torch.nn.functional import gelu, layer_norm, silu

pytestmark = pytest.mark.skipif(
    not HOST_PASSES_QUERIES, reason="this ComfyUI does not pass the queries of FLUX to patches"
)

HEADS, TEXT = 2, 7


def attend(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    """softmax(q k^T / sqrt(C)) v of [B, H, N, C], with the heads concatenated."""
    weights = (torch.einsum("bhnc,bhmc->bhnm", q, k) / q.shape[-1] ** 0.5).softmax(-1)
    return torch.einsum("bhnm,bhmc->bnhc", weights, v).flatten(2)


def split(x: Tensor) -> Tensor:
    return x.unflatten(-1, (HEADS, -1)).transpose(1, 2)


def apply_rope(x: Tensor, pe: Tensor) -> Tensor:
    """RoPE: pairs of channels times the rotations pe [B, 1, N, C / 2, 2, 2]."""
    return torch.einsum("bhncij,bhncj->bhnci", pe.expand(-1, HEADS, -1, -1, -1, -1), x.unflatten(-1, (-1, 2))).flatten(
        -2
    )


def rms(x: Tensor, weight: Tensor | float, eps: float) -> Tensor:
    return x / (x.pow(2).mean(-1, keepdim=True) + eps).sqrt() * weight


def norm(x: Tensor) -> Tensor:
    return layer_norm(x, x.shape[-1:], eps=1e-6)


class Weights:
    """A block's tensors by name, and its linear layers."""

    def __init__(self, block: torch.nn.Module) -> None:
        self.of = block.state_dict()

    def linear(self, name: str, x: Tensor) -> Tensor:
        return x @ self.of[f"{name}.weight"].T + self.of[f"{name}.bias"]

    def modulation(self, name: str, vec: Tensor, parts: int) -> tuple[Tensor, ...]:
        return self.linear(name, silu(vec))[:, None].chunk(parts, -1)

    def qkv(self, packed: Tensor, path: str) -> tuple[Tensor, Tensor, Tensor]:
        q, k, v = (split(part) for part in packed.chunk(3, -1))
        return (
            rms(q, self.of[f"{path}.query_norm.weight"], 1e-6), rms(k, self.of[f"{path}.key_norm.weight"], 1e-6), v,
        )  # fmt: skip


def compute_term(adapter: LoadedAdapter, name: str, q: Tensor) -> Tensor:
    """The second attention of a layer, with K' and V' of the identity tokens."""
    module = adapter.patcher.model
    tokens = project_identity(module, adapter.spec, make_flux_identity(adapter.spec.kind), torch.device("cpu")).cond
    weights = module.layers.get_submodule(name).state_dict()
    k, v = (split(tokens @ weights[f"{part}.weight"].T + weights.get(f"{part}.bias", 0)) for part in "kv")
    if adapter.spec.kind == "instantx":
        k, v = rms(k, 1.0, 1e-5), rms(v, 1.0, 1e-5)
    return attend(q, k.expand(len(q), -1, -1, -1), v.expand(len(q), -1, -1, -1))


def run_double_block(block: Any, args: dict[str, Any], adapter: LoadedAdapter, name: str) -> Tensor:
    """The image stream behind a double block."""
    w, img, txt, vec = Weights(block), args["img"], args["txt"], args["vec"]
    shift, scale, gate, shift2, scale2, gate2 = w.modulation("img_mod.lin", vec, 6)
    text_shift, text_scale, *_ = w.modulation("txt_mod.lin", vec, 6)
    image = w.qkv(w.linear("img_attn.qkv", norm(img) * (1 + scale) + shift), "img_attn.norm")
    text = w.qkv(w.linear("txt_attn.qkv", norm(txt) * (1 + text_scale) + text_shift), "txt_attn.norm")
    q, k, v = (torch.cat(pair, dim=2) for pair in zip(text, image, strict=True))
    attn = attend(apply_rope(q, args["pe"]), apply_rope(k, args["pe"]), v)[:, TEXT:]
    added = compute_term(adapter, name, image[0])
    attn = attn if adapter.spec.kind == "xlabs" else attn + added
    img = img + gate * w.linear("img_attn.proj", attn)
    inner = gelu(w.linear("img_mlp.0", norm(img) * (1 + scale2) + shift2), approximate="tanh")
    img = img + gate2 * w.linear("img_mlp.2", inner)
    return img + added if adapter.spec.kind == "xlabs" else img


def run_single_block(block: Any, args: dict[str, Any], adapter: LoadedAdapter, name: str) -> Tensor:
    """The joint stream behind a single block."""
    w, x = Weights(block), args["img"]
    shift, scale, gate = w.modulation("modulation.lin", args["vec"], 3)
    packed = w.linear("linear1", norm(x) * (1 + scale) + shift)
    q, k, v = w.qkv(packed[..., : 3 * x.shape[-1]], "norm")
    attn = attend(apply_rope(q, args["pe"]), apply_rope(k, args["pe"]), v)
    start = TEXT if adapter.spec.kind == OMNI_ID_KIND else 0
    attn = torch.cat((attn[:, :start], attn[:, start:] + compute_term(adapter, name, q[:, :, start:])), dim=1)
    inner = gelu(packed[..., 3 * x.shape[-1] :], approximate="tanh")
    return x + gate * w.linear("linear2", torch.cat((attn, inner), dim=-1))


def capture_block(model: ModelPatcher, kind: str, index: int) -> tuple[dict[str, Any], Tensor]:
    """The arguments of a block and its output stream, captured while ComfyUI samples."""
    calls: list[Any] = []
    options = model.model_options["transformer_options"]
    previous = options.get("patches_replace", {}).get("dit", {}).get((f"{kind}_block", index))

    def record(args: dict[str, Any], extra: dict[str, Any]) -> dict[str, Any]:
        inputs = {key: value.clone() if isinstance(value, Tensor) else value for key, value in args.items()}
        out = extra["original_block"](args) if previous is None else previous(args, extra)
        calls.append((inputs, out["img"].clone()))
        return out

    watched = model.clone()
    watched.set_model_patch_replace(record, "dit", f"{kind}_block", index)
    sample_latent(watched, FLUX_FAMILY, steps=1, cfg=1.0, batch_size=2)
    return calls[0]


@pytest.mark.parametrize("kind", ["xlabs", "instantx", OMNI_ID_KIND])
def test_double_block(kind: str) -> None:
    base, adapter = make_small_model(FLUX_FAMILY), make_flux_adapter(kind)
    name = "1" if kind == "instantx" else "double_blocks.1"
    args, out = capture_block(apply_flux_adapter(base, adapter, custom_layers="1:1"), "double", 1)
    expected = run_double_block(base.model.diffusion_model.double_blocks[1], args, adapter, name)
    assert all_close(out, expected)
    assert not all_close(capture_block(base, "double", 1)[1], expected, 1e-3)


@pytest.mark.parametrize("kind", ["instantx", OMNI_ID_KIND])
def test_single_block(kind: str) -> None:
    base, adapter = make_small_model(FLUX_FAMILY), make_flux_adapter(kind)
    name = f"{NUM_DOUBLE_BLOCKS + 2}" if kind == "instantx" else "single_blocks.2"
    args, out = capture_block(
        apply_flux_adapter(base, adapter, custom_layers=f"{NUM_DOUBLE_BLOCKS + 2}:1"), "single", 2
    )
    expected = run_single_block(base.model.diffusion_model.single_blocks[2], args, adapter, name)
    assert all_close(out, expected)
    assert not all_close(capture_block(base, "single", 2)[1], expected, 1e-3)
