"""Omni-ID encoders from seeds: a small OpenCLIP trunk, the paper's attention blocks, files in the native format."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from comfyui_likeness.likeness.checkpoints import key_maps
from comfyui_likeness.likeness.methods import omni_id
from comfyui_likeness.likeness.spec import OmniIDSpec
from comfyui_likeness.nodes.loaders import vision_towers
from safetensors.torch import save_file
from torch import Tensor
from torch.nn.functional import scaled_dot_product_attention

SMALL_SPEC = OmniIDSpec(
    image_size=112, patch_size=28, trunk_width=64, trunk_heads=2, tokens=24, width=160, heads=20, mlp_width=96,
    notes={"trained": "no"},
)  # fmt: skip
FULL_WIDTH_SPEC = replace(SMALL_SPEC, tokens=256, width=1280)
TRUNK_LAYERS, TRUNK_OUTPUT_WIDTH = 3, 16


def make_encoder_shapes(spec: OmniIDSpec = SMALL_SPEC, num_positions: int = 17) -> dict[str, tuple[int, ...]]:
    """The shapes of the tensors in a file with this spec."""
    f, c, inner = spec.trunk_width, spec.width, spec.mlp_width
    shapes: dict[str, tuple[int, ...]] = {
        "queries": (1, spec.tokens, c), "norm.weight": (c,), "norm.bias": (c,), "trunk.class_embedding": (f,),
        "trunk.positional_embedding": (num_positions, f),
        "trunk.conv1.weight": (f, 3, spec.patch_size, spec.patch_size),
        "trunk.proj": (f, TRUNK_OUTPUT_WIDTH),
    }  # fmt: skip

    def layer(name: str, rows: int, columns: int = 0) -> None:
        shapes[f"{name}.weight"], shapes[f"{name}.bias"] = ((rows, columns) if columns else (rows,)), (rows,)

    for norm in ("ln_pre", "ln_post"):
        layer(f"trunk.{norm}", f)
    for i in range(TRUNK_LAYERS):
        at = f"trunk.transformer.resblocks.{i}"
        shapes |= {f"{at}.attn.in_proj_weight": (3 * f, f), f"{at}.attn.in_proj_bias": (3 * f,)}
        layer(f"{at}.ln_1", f), layer(f"{at}.ln_2", f), layer(f"{at}.attn.out_proj", f, f)
        layer(f"{at}.mlp.c_fc", 4 * f, f), layer(f"{at}.mlp.c_proj", f, 4 * f)
    for part, count, source in (("cross", spec.cross_blocks, f), ("self", spec.self_blocks, c)):
        for at in (f"{part}.{i}" for i in range(count)):
            layer(f"{at}.norm_q", c), layer(f"{at}.norm_mlp", c)
            layer(f"{at}.q", c, c), layer(f"{at}.out", c, c), layer(f"{at}.k", c, source), layer(f"{at}.v", c, source)
            layer(f"{at}.mlp.0", inner, c), layer(f"{at}.mlp.2", c, inner)
            if part == "cross":
                layer(f"{at}.norm_z", f)
    return shapes


def make_encoder_tensors(spec: OmniIDSpec = SMALL_SPEC, seed: int = 0, num_positions: int = 17) -> dict[str, Tensor]:
    generator = torch.Generator().manual_seed(seed)
    return {
        key: torch.randn(shape, generator=generator) / (shape[-1] ** 0.5 if len(shape) > 1 else 4) + ("norm" in key)
        for key, shape in make_encoder_shapes(spec, num_positions).items()
    }


def make_encoder_metadata(spec: OmniIDSpec = SMALL_SPEC, **changes: Any) -> dict[str, Any]:
    return json.loads(omni_id.make_omni_id_metadata(spec)["likeness"]) | changes


def write_encoder_file(path: Path, spec: OmniIDSpec = SMALL_SPEC, seed: int = 0, **changes: Any) -> Path:
    """Write an encoder file, with changes to its metadata."""
    save_file(make_encoder_tensors(spec, seed), path, {"likeness": json.dumps(make_encoder_metadata(spec, **changes))})
    return path


def plain_attention(q: Tensor, k: Tensor, v: Tensor, num_heads: int, bias: Tensor | None) -> Tensor:
    """PyTorch's attention."""
    q, k, v = (part.unflatten(-1, (num_heads, -1)).transpose(1, 2) for part in (q, k, v))
    mask = None if bias is None else bias[:, None]
    return scaled_dot_product_attention(q, k, v, attn_mask=mask).transpose(1, 2).flatten(2)


def make_omni_id_encoder(
    spec: OmniIDSpec = SMALL_SPEC,
    state_dict: dict[str, Tensor] | None = None,
    attention: omni_id.MultiHeadAttentionFunction = plain_attention,
) -> omni_id.OmniIDModel:
    """The module with PyTorch's attention, as in training."""
    weights = omni_id.interpolate_position_embeddings(
        make_encoder_tensors(spec) if state_dict is None else state_dict, spec
    )
    trunk = vision_towers.build_vision_tower(
        key_maps.select_prefix(weights, "trunk."), "a file", spec.activation, num_heads=spec.trunk_heads
    ).module
    module = omni_id.build_omni_id_model(spec, weights, trunk, torch.nn, attention)
    return module.eval().requires_grad_(False)


def make_face_images(count: int, seed: int = 0, size: int = SMALL_SPEC.image_size) -> Tensor:
    """Noise images [n, S, S, 3] in 0..1, each with a different gradient."""
    generator = torch.Generator().manual_seed(seed)
    ramp = torch.linspace(0, 1, size)[None, :, None, None] * torch.rand(count, 1, 1, 3, generator=generator)
    return (ramp + torch.rand(count, size, size, 3, generator=generator)) / 2


def encode_face_images(module: omni_id.OmniIDModel, images: Tensor, weight: list[float] | None = None) -> Tensor:
    """Encode images as Encode Identity does: without duplicates, in chunks."""
    distinct, shares = omni_id.select_distinct_images(images, weight or [1.0] * len(images))
    return module(omni_id.normalize_images(images[distinct]).split(omni_id.PHOTOS_PER_CHUNK), shares)
