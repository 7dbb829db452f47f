"""Random IP-Adapters for the small models of host_models.py, in the format of the published files."""

from __future__ import annotations

from typing import Any

import comfy.ops
import torch
from comfy.model_patcher import ModelPatcher
from comfyui_likeness.likeness.checkpoints import checkpoint_detection, key_maps
from comfyui_likeness.likeness.spec import Identity
from comfyui_likeness.nodes.attention import apply_decoupled
from comfyui_likeness.nodes.attention.unet_layers import list_unet_layers
from comfyui_likeness.nodes.types import LoadedAdapter
from torch import Tensor

from support.host_models import make_small_model
from support.identities import make_identity

LORA_RANK = 4


def make_projector_shapes(kind: str, width: int) -> dict[str, tuple[int, ...]]:
    """The tensor shapes of a small projector for tokens of this width."""
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
        "pulid": _mapping_shapes({
            "body": (1280, 5 * width), **_level_shapes(width), **_level_shapes(width, "mapping_patch"),
        }),
        "pulid_v1_1": {
            "latents": (1, 6, 64), "proj_out": (64, width), **_perceiver_shapes(),
            **_mapping_shapes({"id_embedding_mapping": (1280, 3 * 64), **_level_shapes(64)}),
        },
    }[kind]  # fmt: skip


def _level_shapes(out: int, name: str = "mapping") -> dict[str, tuple[int, int]]:
    return {f"{name}_{i}": (32, out) for i in range(5)}


def _mapping_shapes(sizes: dict[str, tuple[int, int]]) -> dict[str, tuple[int, ...]]:
    """The tensor shapes of PuLID's mappings, from their input and output widths."""
    shapes: dict[str, tuple[int, ...]] = {}
    for name, (features, out) in sizes.items():
        for i, shape in enumerate(((16, features), (16,), (), (16, 16), (16,), (), (out, 16))):
            if shape:
                shapes |= {f"{name}.{i}.weight": shape, f"{name}.{i}.bias": shape[:1]}
    return shapes


def _perceiver_shapes(width: int = 64) -> dict[str, tuple[int, ...]]:
    """Five perceiver layers of one head."""
    layer = {
        "0.norm1.weight": (width,), "0.norm1.bias": (width,), "0.norm2.weight": (width,), "0.norm2.bias": (width,),
        "0.to_q.weight": (width, width), "0.to_kv.weight": (2 * width, width), "0.to_out.weight": (width, width),
        "1.0.weight": (width,), "1.0.bias": (width,), "1.1.weight": (2 * width, width),
        "1.3.weight": (width, 2 * width),
    }  # fmt: skip
    return {f"layers.{i}.{key}": shape for i in range(5) for key, shape in layer.items()}


def make_ip_adapter_tensors(kind: str, family: str = "SD1.5", seed: int = 0) -> dict[str, Tensor]:
    """The tensors of a file, by their published names."""
    generator = torch.Generator().manual_seed(seed)
    layers = list_unet_layers(make_small_model(family).model.diffusion_model)
    shapes = {f"image_proj.{key}": shape for key, shape in make_projector_shapes(kind, layers[0].context_dim).items()}
    for layer in layers:
        n = layer.file_index
        shapes |= {f"ip_adapter.{n}.to_{part}_ip.weight": (layer.hidden_size, layer.context_dim) for part in "kv"}
        for number, input_width in ((n - 1, layer.hidden_size), (n, layer.context_dim)) if kind == "faceid" else ():
            for part in ("q", "k", "v", "out"):
                width = input_width if part in "kv" else layer.hidden_size
                shapes[f"ip_adapter.{number}.to_{part}_lora.down.weight"] = (LORA_RANK, width)
                shapes[f"ip_adapter.{number}.to_{part}_lora.up.weight"] = (layer.hidden_size, LORA_RANK)
    return {key: torch.randn(shape, generator=generator) / (shape[-1] ** 0.5) for key, shape in shapes.items()}


def make_ip_adapter(kind: str = "image", family: str = "SD1.5", seed: int = 0) -> LoadedAdapter:
    """The adapter, loaded as the loader node does."""
    renamed = key_maps.rename_keys(make_ip_adapter_tensors(kind, family, seed), key_maps.IP_ADAPTER)
    spec, _ = checkpoint_detection.detect_adapter_spec(renamed)
    module = checkpoint_detection.build_ip_adapter(spec, renamed, comfy.ops.manual_cast).requires_grad_(False)
    patcher = ModelPatcher(module, torch.device("cpu"), torch.device("cpu"))
    return LoadedAdapter(spec, patcher, key_maps.select_prefix(renamed, "lora."), f"{kind} {seed}")


ARCFACE_SHAPE = (512,)
PULID_SHAPES = (ARCFACE_SHAPE, (768,), (5, 17, 32))
EMBEDDING_SHAPES = {
    "image": ((1024,),),
    "faceid": (ARCFACE_SHAPE,),
    "portrait": (ARCFACE_SHAPE,),
    "pulid": PULID_SHAPES,
    "pulid_v1_1": PULID_SHAPES,
}


def make_ip_adapter_identity(loaded_adapter: LoadedAdapter, faces: int = 1, seed: int = 0) -> Identity:
    return make_identity(loaded_adapter.spec.needs, EMBEDDING_SHAPES[loaded_adapter.file.split()[0]], faces, seed)


def apply_ip_adapter(
    model: ModelPatcher, loaded_adapter: LoadedAdapter | None = None, identity_or_people: Any = None, **changes: Any
) -> ModelPatcher:
    """The model with people applied by the node."""
    loaded_adapter = loaded_adapter or make_ip_adapter()
    values: dict[str, Any] = {
        "strength": 1.0,
        "start_percent": 0.0,
        "end_percent": 1.0,
        "layer_weights": "linear",
        "scaling": "V only",
        **changes,
    }
    return apply_decoupled.ApplyDecoupled.execute(
        model, loaded_adapter, identity_or_people or make_ip_adapter_identity(loaded_adapter), **values
    ).args[0]
