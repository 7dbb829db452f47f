"""Weights and caches under ComfyUI's memory management."""

from __future__ import annotations

import comfy.model_management
import torch
from comfy.model_patcher import ModelPatcher, get_key_weight
from torch import Tensor, nn

from ...likeness.attention.feature_cache import DEFAULT_CACHE_BYTES, ReferenceFeatureCache

FEATURE_CACHE_BYTES = DEFAULT_CACHE_BYTES
ENCODER_DTYPES = (torch.float32, torch.float16, torch.bfloat16)


def make_feature_cache(max_bytes: int) -> ReferenceFeatureCache:
    """A cache in system memory that also shrinks when free memory runs low."""

    def get_free_memory() -> int:
        return int(comfy.model_management.get_free_memory(torch.device("cpu")))  # pyright: ignore[reportArgumentType]

    return ReferenceFeatureCache(max_bytes, get_free_memory)


def make_model_patcher(module: nn.Module) -> ModelPatcher:
    """A ModelPatcher for inference: ComfyUI loads, offloads and frees the module."""
    return ModelPatcher(
        module.eval().requires_grad_(False),
        load_device=comfy.model_management.get_torch_device(),
        offload_device=comfy.model_management.unet_offload_device(),
    )


def make_encoder_patcher(module: nn.Module) -> ModelPatcher:
    """The same for an encoder, which computes in the dtype of its weights: in float32 if float16 is slow or unsupported
    on its device, and never in float8 or float64."""
    device = comfy.model_management.text_encoder_device()
    if comfy.model_management.should_use_fp16(device) is False:
        module.float()
    elif next(module.parameters()).dtype not in ENCODER_DTYPES:
        module.half()
    return ModelPatcher(
        module.eval().requires_grad_(False), device, comfy.model_management.text_encoder_offload_device()
    )


def read_unpatched_weight(model: ModelPatcher, key: str) -> Tensor:
    """A weight of the model without LoRAs and hooks, dequantized, on the CPU, in 16 bits or more.

    Clones share the modules, so these may hold weights that another clone patched when it ran. ComfyUI keeps the
    original then. (`get_key_patches` finds it, too, but fails on quantized models.) Raises ValueError if the weight
    has a format that ComfyUI does not convert.
    """
    weight, _, convert = get_key_weight(model.model, key)
    if key in model.backup:
        weight = model.backup[key].weight
    if key in model.hook_backup:
        weight = model.hook_backup[key][0]
    weight = weight.detach()
    weight = (weight if convert is None else convert(weight)).cpu()
    if not weight.is_floating_point():
        raise ValueError(
            f"load this checkpoint with one of ComfyUI's loaders; got {key} as {weight.dtype} values, which ComfyUI "
            "does not convert; expected floating-point weights, or weights that ComfyUI has quantized"
        )
    return weight.half() if weight.dtype.itemsize < 2 else weight
