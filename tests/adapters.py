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


def _projector(kind: str, width: int) -> dict[str, tuple[int, ...]]:
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
    }[kind]


def tensors(kind: str, family: str = "SD1.5", seed: int = 0) -> dict[str, Tensor]:
    """A file's tensors under their published names."""
    generator = torch.Generator().manual_seed(seed)
    found = sites(patcher(family).model.diffusion_model)
    shapes = {f"image_proj.{key}": shape for key, shape in _projector(kind, found[0].context).items()}
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


SHAPES = {"image": (1024,), "faceid": (512,), "portrait": (512,)}


def person(given: LoadedAdapter, faces: int = 1, seed: int = 0) -> Identity:
    return identity(given.spec.needs, (SHAPES[given.file.split()[0]],), faces, seed)


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
