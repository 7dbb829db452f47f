"""FLUX: the unpatched model and each adapter kind, sampled without CFG like FLUX.1 [dev]."""

from __future__ import annotations

import argparse
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import comfy.model_base
import comfy.ops
import comfy.supported_models
import comfy_extras.nodes_custom_sampler as custom_sampler
import torch
from comfy.model_patcher import ModelPatcher
from torch import Tensor

from ..likeness.checkpoints import checkpoint_detection, key_maps
from ..nodes.attention.apply_decoupled import ApplyDecoupled
from ..nodes.loaders.model_management import make_model_patcher
from ..nodes.loaders.native_adapters import load_native_adapter
from ..nodes.types import LoadedAdapter
from ..tools.standins import flux_models, models
from ..tools.standins.build import FILE_METADATA
from .compare import BASELINE_CASE, BenchmarkCase, compare_cases, sample_latent
from .models import choose_dtype, fill_model, make_random_identity

NUM_PROMPT_TOKENS = {"small": 64, "full": 512}
# `full` is the published size; `small` has a fifth of its width and depth, and adapters that fit it.
FLUX_SIZES: dict[str, dict[str, Any]] = {
    "small": {"hidden_size": 640, "num_heads": 5, "depth": 4, "depth_single_blocks": 8, "context_in_dim": 768},
    "full": {"hidden_size": 3072, "num_heads": 24, "depth": 19, "depth_single_blocks": 38, "context_in_dim": 4096},
}
PUBLISHED_FLUX_LAYOUTS = {
    "XLabs v2": "xlabs_flux_ip_adapter_v2", "InstantX": "instantx_flux_ip_adapter", "PuLID-FLUX": "pulid_flux_v0.9.x",
}  # fmt: skip
NARROWED_ADAPTERS = ("XLabs v2", "InstantX")  # their published keys read more than the small model's width
OMNI_ID_ADAPTER = "Omni-ID"
# Embedding shapes per adapter kind, in the order of the features it reads; the last is that of the black image.
EMBEDDING_SHAPES: dict[str, tuple[tuple[int, ...], ...]] = {
    "xlabs": ((768,), (768,)), "instantx": ((1152,), (768,)), "omni_id_adapter": ((256, 1280), (768,)),
    "pulid_flux": ((512,), (768,), (5, 577, 1024), (768,)),
}  # fmt: skip


@dataclass(frozen=True)
class FluxBenchmarkCase(BenchmarkCase):
    """A case with one prompt of `num_prompt_tokens` tokens."""

    num_prompt_tokens: int = 64
    text_width: int = 768

    def run(self, steps: int, callback: Callable[..., None] | None = None) -> Tensor:
        self.before_run()
        guider: Any = custom_sampler.Guider_Basic(self.model)
        prompt = torch.full((1, self.num_prompt_tokens, self.text_width), 0.1)
        guider.set_conds([[prompt, {"pooled_output": torch.zeros(1, 768)}]])
        latent = torch.zeros(self.num_images, 16, self.resolution // 8, self.resolution // 8)
        return sample_latent(guider, latent, "simple", steps, callback)


def get_flux_config(size: str) -> dict[str, Any]:
    return flux_models.FLUX_CONFIG | FLUX_SIZES[size]


def build_flux_model(size: str) -> ModelPatcher:
    """FLUX with random weights, in half precision on a GPU."""
    dtype = choose_dtype(torch.bfloat16)
    settings = comfy.supported_models.Flux({"image_model": "flux", **get_flux_config(size)})
    settings.set_inference_dtype(dtype, None)
    return fill_model(comfy.model_base.Flux(settings, device=torch.device("cpu")), dtype)


def build_flux_adapter(name: str, size: str) -> LoadedAdapter:
    """An adapter with random weights that fits the model, in its published or native layout."""
    config = get_flux_config(size)
    if name == OMNI_ID_ADAPTER:
        tensors = models.fill_shapes(flux_models.get_omni_id_flux_shapes(config))
        return load_native_adapter(tensors, FILE_METADATA["omni_id_flux.safetensors"], name)[0]
    text_width = 256 if size == "small" and name in NARROWED_ADAPTERS else flux_models.TEXT_WIDTH
    layout = models.read_layout(PUBLISHED_FLUX_LAYOUTS[name])
    tensors = models.fill_shapes(flux_models.fit_adapter_shapes(layout, config, text_width))
    tensors = key_maps.rename_keys(tensors, key_maps.IP_ADAPTER)
    spec, _ = checkpoint_detection.detect_adapter_spec(tensors)
    patcher = make_model_patcher(checkpoint_detection.build_ip_adapter(spec, tensors, comfy.ops.manual_cast))
    return LoadedAdapter(spec, patcher, {}, name)


def apply_flux_adapter(model: ModelPatcher, adapter: LoadedAdapter) -> ModelPatcher:
    features = (*adapter.spec.needs, checkpoint_detection.CLIP_L_BLACK)
    identity = make_random_identity(dict(zip(features, EMBEDDING_SHAPES[adapter.spec.kind], strict=True)))
    return ApplyDecoupled.execute(model, adapter, identity, 1.0, 0.0, 1.0, "linear", "V only").args[0]


def make_flux_cases(size: str, resolution: int) -> list[BenchmarkCase]:
    model = build_flux_model(size)
    cases = {BASELINE_CASE: model}
    for name in (*PUBLISHED_FLUX_LAYOUTS, OMNI_ID_ADAPTER):
        cases[name] = apply_flux_adapter(model, build_flux_adapter(name, size))
    return [
        FluxBenchmarkCase(
            name,
            patched,
            resolution=resolution,
            num_prompt_tokens=NUM_PROMPT_TOKENS[size],
            text_width=FLUX_SIZES[size]["context_in_dim"],
        )
        for name, patched in cases.items()
    ]


def measure_flux(arguments: argparse.Namespace) -> str:
    return compare_cases(make_flux_cases(arguments.size, arguments.resolution), arguments.repeats, BASELINE_CASE)
