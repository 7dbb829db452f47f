"""Adapters from seeds for the small models of `models.py`, in the layout of the published files."""

from __future__ import annotations

from typing import Any

import comfy.ops
import torch
from comfy.model_patcher import ModelPatcher
from comfyui_likeness.likeness import detect, keymaps
from comfyui_likeness.likeness.spec import Identity
from comfyui_likeness.nodes.attention import decoupled as nodes
from comfyui_likeness.nodes.attention.unet import sites
from comfyui_likeness.nodes.types import LoadedAdapter
from identities import identity
from models import patcher
from torch import Tensor

RANK = 4


def projector(kind: str, width: int) -> dict[str, tuple[int, ...]]:
    """The shapes of a small projector that makes tokens of this width."""
    mlp = {
        "proj.0.weight": (64, 512),
        "proj.0.bias": (64,),
        "proj.2.weight": (4 * width, 64),
        "proj.2.bias": (4 * width,),
    }
    norm = {"norm.weight": (width,), "norm.bias": (width,)}
    return {
        "image": {"proj.weight": (4 * width, 1024), "proj.bias": (4 * width,), **norm},
        "faceid": {**mlp, **norm},
        "portrait": {**mlp, **norm},
        "pulid": _mappings({"body": (1280, 5 * width), **_levels(width), **_levels(width, "mapping_patch")}),
        "pulid_v1_1": {
            "latents": (1, 6, 64), "proj_out": (64, width), **_layers(),
            **_mappings({"id_embedding_mapping": (1280, 3 * 64), **_levels(64)}),
        },
    }[kind]  # fmt: skip


def _levels(out: int, name: str = "mapping") -> dict[str, tuple[int, int]]:
    return {f"{name}_{i}": (32, out) for i in range(5)}


def _mappings(sizes: dict[str, tuple[int, int]]) -> dict[str, tuple[int, ...]]:
    """PuLID's small networks, by what they read and give."""
    shapes: dict[str, tuple[int, ...]] = {}
    for name, (features, out) in sizes.items():
        for i, shape in enumerate(((16, features), (16,), (), (16, 16), (16,), (), (out, 16))):
            if shape:
                shapes |= {f"{name}.{i}.weight": shape, f"{name}.{i}.bias": shape[:1]}
    return shapes


def _layers(width: int = 64) -> dict[str, tuple[int, ...]]:
    """Five perceiver layers of one head."""
    one = {
        "0.norm1.weight": (width,), "0.norm1.bias": (width,), "0.norm2.weight": (width,), "0.norm2.bias": (width,),
        "0.to_q.weight": (width, width), "0.to_kv.weight": (2 * width, width), "0.to_out.weight": (width, width),
        "1.0.weight": (width,), "1.0.bias": (width,), "1.1.weight": (2 * width, width),
        "1.3.weight": (width, 2 * width),
    }  # fmt: skip
    return {f"layers.{i}.{key}": shape for i in range(5) for key, shape in one.items()}


def tensors(kind: str, family: str = "SD1.5", seed: int = 0) -> dict[str, Tensor]:
    """A file's tensors under their published names."""
    generator = torch.Generator().manual_seed(seed)
    found = sites(patcher(family).model.diffusion_model)
    shapes = {f"image_proj.{key}": shape for key, shape in projector(kind, found[0].context).items()}
    for site in found:
        n = site.number
        shapes |= {f"ip_adapter.{n}.to_{part}_ip.weight": (site.hidden, site.context) for part in "kv"}
        for number, source in ((n - 1, site.hidden), (n, site.context)) if kind == "faceid" else ():
            for part in ("q", "k", "v", "out"):
                read = source if part in "kv" else site.hidden
                shapes[f"ip_adapter.{number}.to_{part}_lora.down.weight"] = (RANK, read)
                shapes[f"ip_adapter.{number}.to_{part}_lora.up.weight"] = (site.hidden, RANK)
    return {key: torch.randn(shape, generator=generator) / (shape[-1] ** 0.5) for key, shape in shapes.items()}


def adapter(kind: str = "image", family: str = "SD1.5", seed: int = 0) -> LoadedAdapter:
    """The same, loaded as the loader node does it."""
    renamed = keymaps.rename(tensors(kind, family, seed), keymaps.IP_ADAPTER)
    spec, _ = detect.read_spec(renamed)
    module = detect.build(spec, renamed, comfy.ops.manual_cast).requires_grad_(False)
    held = ModelPatcher(module, torch.device("cpu"), torch.device("cpu"))
    return LoadedAdapter(spec, held, keymaps.under(renamed, "lora."), f"{kind} {seed}")


FACE = (512,)
PULID = (FACE, (768,), (5, 17, 32))
SHAPES = {"image": ((1024,),), "faceid": (FACE,), "portrait": (FACE,), "pulid": PULID, "pulid_v1_1": PULID}


def person(given: LoadedAdapter, faces: int = 1, seed: int = 0) -> Identity:
    return identity(given.spec.needs, SHAPES[given.file.split()[0]], faces, seed)


def applied(
    model: ModelPatcher, given: LoadedAdapter | None = None, who: Identity | None = None, **changes: Any
) -> ModelPatcher:
    given = given or adapter()
    values: dict[str, Any] = {
        "strength": 1.0,
        "start_percent": 0.0,
        "end_percent": 1.0,
        "layer_weights": "linear",
        "scaling": "V only",
        **changes,
    }
    return nodes.ApplyDecoupled.execute(model, given, who or person(given), **values).args[0]
