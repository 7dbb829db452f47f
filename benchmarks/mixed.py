"""Mixed attention (Infinite-ID): the unpatched model with one image and with two, and each kind of text stream."""

from __future__ import annotations

import argparse

from comfy.model_patcher import ModelPatcher

from ..nodes.attention.apply_mixed import ApplyMixed
from ..nodes.attention.unet_layers import list_unet_layers
from ..nodes.loaders.native_adapters import load_native_adapter
from ..nodes.types import LoadedAdapter
from ..tools.standins import models
from .compare import BASELINE_CASE, BenchmarkCase, compare_cases
from .models import build_unet_model, make_random_identity

TWO_IMAGES_CASE = "model only, two images"
EMBEDDING_SHAPES = {"raw": (512,), "last": (257, 1280)}


def apply_mixed(
    model: ModelPatcher, adapter: LoadedAdapter, attention: str = "mixed", text_stream: str = "own"
) -> ModelPatcher:
    identity = make_random_identity({feature: EMBEDDING_SHAPES[feature.layer] for feature in adapter.spec.needs})
    return ApplyMixed.execute(
        model, adapter, identity, 1.0, "AdaIN-mean", attention, text_stream, start_percent=0.0, end_percent=1.0
    ).args[0]


def build_infinite_id_adapter(model: ModelPatcher, size: str) -> LoadedAdapter:
    """An adapter with random weights that fits the model."""
    tensors = models.make_infinite_id(models.SD15_CONFIG, 16)
    for layer in list_unet_layers(model.model.diffusion_model):
        shape = (layer.hidden_size, layer.context_dim)
        for part in "kv":
            weight = models.make_weight(f"{layer.file_index}{part}", shape)
            tensors[f"layers.{layer.file_index}.{part}.weight"] = weight
    metadata = {"kind": "infinite_id", "version": 1, "base": "SD1.5", "unconditional": "zero", "notes": {"size": size}}
    adapter, _ = load_native_adapter({key: value.float() for key, value in tensors.items()}, metadata, "random weights")
    return adapter


def make_mixed_cases(size: str, resolution: int) -> list[BenchmarkCase]:
    model = build_unet_model("sd15", size)
    adapter = build_infinite_id_adapter(model, size)
    patched = {
        "Infinite-ID, own text stream": apply_mixed(model, adapter),
        "Infinite-ID, shared text stream": apply_mixed(model, adapter, text_stream="shared"),
        "Infinite-ID without a text stream": apply_mixed(model, adapter, attention="off"),
    }
    return [
        BenchmarkCase(BASELINE_CASE, model, resolution=resolution),
        BenchmarkCase(TWO_IMAGES_CASE, model, resolution=resolution, num_images=2),
        *(BenchmarkCase(name, adapted, resolution=resolution) for name, adapted in patched.items()),
    ]


def measure_mixed(arguments: argparse.Namespace) -> str:
    return compare_cases(make_mixed_cases(arguments.size, arguments.resolution), arguments.repeats, BASELINE_CASE)
