"""Omni-ID encoders from seeds: a small trunk of open_clip's own kind, the paper's heads, files in the pack's layout."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from comfyui_likeness.likeness import keymaps, omni_id
from comfyui_likeness.likeness.spec import OmniIDSpec
from comfyui_likeness.nodes.loaders import towers
from safetensors.torch import save_file
from torch import Tensor
from torch.nn.functional import scaled_dot_product_attention

SPEC = OmniIDSpec(
    image_size=112, patch=28, features=64, tokens=24, width=160, heads=20, inner=96, notes={"trained": "no"}
)
WHOLE = replace(SPEC, tokens=256, width=1280)
LAYERS, OUT = 3, 16


def shapes(spec: OmniIDSpec = SPEC, positions: int = 17) -> dict[str, tuple[int, ...]]:
    """What a file of this spec holds."""
    f, c, inner = spec.features, spec.width, spec.inner
    out: dict[str, tuple[int, ...]] = {
        "queries": (1, spec.tokens, c), "norm.weight": (c,), "norm.bias": (c,), "trunk.class_embedding": (f,),
        "trunk.positional_embedding": (positions, f), "trunk.conv1.weight": (f, 3, spec.patch, spec.patch),
        "trunk.proj": (f, OUT),
    }  # fmt: skip

    def layer(name: str, rows: int, columns: int = 0) -> None:
        out[f"{name}.weight"], out[f"{name}.bias"] = ((rows, columns) if columns else (rows,)), (rows,)

    for norm in ("ln_pre", "ln_post"):
        layer(f"trunk.{norm}", f)
    for i in range(LAYERS):
        at = f"trunk.transformer.resblocks.{i}"
        out |= {f"{at}.attn.in_proj_weight": (3 * f, f), f"{at}.attn.in_proj_bias": (3 * f,)}
        layer(f"{at}.ln_1", f), layer(f"{at}.ln_2", f), layer(f"{at}.attn.out_proj", f, f)
        layer(f"{at}.mlp.c_fc", 4 * f, f), layer(f"{at}.mlp.c_proj", f, 4 * f)
    for part, count, source in (("cross", spec.cross_blocks, f), ("self", spec.self_blocks, c)):
        for at in (f"{part}.{i}" for i in range(count)):
            layer(f"{at}.norm_q", c), layer(f"{at}.norm_mlp", c)
            layer(f"{at}.q", c, c), layer(f"{at}.out", c, c), layer(f"{at}.k", c, source), layer(f"{at}.v", c, source)
            layer(f"{at}.mlp.0", inner, c), layer(f"{at}.mlp.2", c, inner)
            if part == "cross":
                layer(f"{at}.norm_z", f)
    return out


def tensors(spec: OmniIDSpec = SPEC, seed: int = 0, positions: int = 17) -> dict[str, Tensor]:
    generator = torch.Generator().manual_seed(seed)
    return {
        key: torch.randn(shape, generator=generator) / (shape[-1] ** 0.5 if len(shape) > 1 else 4) + ("norm" in key)
        for key, shape in shapes(spec, positions).items()
    }


def told(spec: OmniIDSpec = SPEC, **changes: Any) -> dict[str, Any]:
    return json.loads(omni_id.metadata(spec)["likeness"]) | changes


def write(path: Path, spec: OmniIDSpec = SPEC, seed: int = 0, **changes: Any) -> Path:
    """A file of an encoder, its metadata changed."""
    save_file(tensors(spec, seed), path, {"likeness": json.dumps(told(spec, **changes))})
    return path


def attention(q: Tensor, k: Tensor, v: Tensor, heads: int, bias: Tensor | None) -> Tensor:
    """Plain torch's."""
    q, k, v = (part.unflatten(-1, (heads, -1)).transpose(1, 2) for part in (q, k, v))
    mask = None if bias is None else bias[:, None]
    return scaled_dot_product_attention(q, k, v, attn_mask=mask).transpose(1, 2).flatten(2)


def encoder(
    spec: OmniIDSpec = SPEC, given: dict[str, Tensor] | None = None, attention: omni_id.Attention = attention
) -> omni_id.OmniID:
    """The module under plain torch, as training has it."""
    weights = omni_id.fitted(tensors(spec) if given is None else given, spec)
    trunk = towers.tower_of(keymaps.under(weights, "trunk."), "a file", spec.activation).module
    module = omni_id.build(spec, weights, trunk, torch.nn, attention)
    return module.eval().requires_grad_(False)


def photos(count: int, seed: int = 0, size: int = SPEC.image_size) -> Tensor:
    """Pictures of noise [n, S, S, 3] in 0..1, each with a gradient of its own."""
    generator = torch.Generator().manual_seed(seed)
    ramp = torch.linspace(0, 1, size)[None, :, None, None] * torch.rand(count, 1, 1, 3, generator=generator)
    return (ramp + torch.rand(count, size, size, 3, generator=generator)) / 2


def encoded(module: omni_id.OmniID, pictures: Tensor, weight: list[float] | None = None) -> Tensor:
    """What the module makes of some pictures, as Encode Identity has it: alike ones once, chunk by chunk."""
    read, shares = omni_id.distinct(pictures, weight or [1.0] * len(pictures))
    return module(omni_id.normed(pictures[read]).split(omni_id.CHUNK), shares)
