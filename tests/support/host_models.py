"""Small models of ComfyUI's own classes, SD1.5, SDXL and FLUX, as ModelPatchers, and a function to sample them."""

from __future__ import annotations

import copy
from typing import Any

import comfy.cldm.cldm
import comfy.controlnet
import comfy.ldm.flux.controlnet
import comfy.model_base
import comfy.model_management
import comfy.model_patcher
import comfy.ops
import comfy.sample
import comfy.supported_models
import comfy.utils
import torch
from comfy.model_patcher import ModelPatcher
from torch import Tensor

SD15_CONFIG: dict[str, Any] = {
    "image_size": 16, "in_channels": 4, "out_channels": 4, "model_channels": 32, "num_res_blocks": [2, 2, 2, 2],
    "channel_mult": [1, 2, 2, 2], "transformer_depth": [1, 1, 1, 1, 1, 1, 0, 0],
    "transformer_depth_output": [1, 1, 1, 1, 1, 1, 1, 1, 1, 0, 0, 0], "transformer_depth_middle": 1, "context_dim": 64,
    "num_heads": 8, "use_spatial_transformer": True, "legacy": False,
}  # fmt: skip
SDXL_CONFIG: dict[str, Any] = {
    "image_size": 16, "in_channels": 4, "out_channels": 4, "model_channels": 32, "num_res_blocks": [2, 2, 2],
    "channel_mult": [1, 2, 2], "transformer_depth": [0, 0, 2, 2, 10, 10],
    "transformer_depth_output": [0, 0, 0, 2, 2, 2, 10, 10, 10], "transformer_depth_middle": 10, "context_dim": 64,
    "num_heads": -1, "num_head_channels": 16, "use_linear_in_transformer": True, "use_spatial_transformer": True,
    "legacy": False, "num_classes": "sequential", "adm_in_channels": 2816,
}  # fmt: skip
FLUX_CONFIG: dict[str, Any] = {
    "image_model": "flux", "in_channels": 16, "out_channels": 16, "vec_in_dim": 64, "context_in_dim": 64,
    "hidden_size": 256, "mlp_ratio": 2.0, "num_heads": 2, "depth": 2, "depth_single_blocks": 4,
    "axes_dim": [16, 56, 56], "theta": 10000, "patch_size": 2, "qkv_bias": True, "guidance_embed": True,
    "txt_ids_dims": [],
}  # fmt: skip
MODEL_FAMILIES = {
    "SD1.5": (SD15_CONFIG, comfy.supported_models.SD15, comfy.model_base.BaseModel),
    "SDXL": (SDXL_CONFIG, comfy.supported_models.SDXL, comfy.model_base.SDXL),
    "FLUX.1": (FLUX_CONFIG, comfy.supported_models.Flux, comfy.model_base.Flux),
}


def make_small_model(family: str = "SD1.5", weights: dict[str, Tensor] | None = None, **changes: Any) -> ModelPatcher:
    """A small model of this family. Without `weights`, they are random. They may be quantized, as in a file."""
    config, supported, base = MODEL_FAMILIES[family]
    config = copy.deepcopy(config) | changes  # ComfyUI's modules consume the lists
    heads = {key: config[key] for key in ("num_heads", "num_head_channels") if key in config}
    settings = supported(dict(config))
    settings.unet_config |= heads
    settings.quant_config = comfy.utils.detect_layer_quantization(weights or {}, "")
    settings.set_inference_dtype(torch.float32, torch.float32 if settings.quant_config else None)
    model = base(settings, device=torch.device("cpu"))
    unet = model.diffusion_model
    if weights is None:
        generator = torch.Generator().manual_seed(7)
        weights = {key: make_random_weight(key, value.shape, generator) for key, value in unet.state_dict().items()}
    unet.load_state_dict(weights)
    unet.eval().requires_grad_(False)
    return comfy.model_patcher.ModelPatcher(model, torch.device("cpu"), torch.device("cpu"))


def make_random_weight(key: str, shape: torch.Size, generator: torch.Generator) -> Tensor:
    if len(shape) < 2:
        return torch.ones(shape) if key.endswith("weight") else torch.zeros(shape)
    return torch.randn(shape, generator=generator) / (torch.Size(shape[1:]).numel() ** 0.5)


def make_conditioning(seed: int, family: str = "SD1.5", num_tokens: int = 7, **extra: Any) -> list[Any]:
    """Random conditioning for a small model."""
    generator = torch.Generator().manual_seed(seed)
    pooled = torch.randn(1, 1280, generator=generator)
    config = MODEL_FAMILIES[family][0]
    text = torch.randn(1, num_tokens, config.get("context_dim") or config["context_in_dim"], generator=generator)
    return [[text, {"pooled_output": pooled, **extra}]]


SAMPLER_DEFAULTS: dict[str, Any] = {"steps": 2, "cfg": 4.0, "sampler_name": "euler", "scheduler": "normal"}


def sample_latent(
    model: ModelPatcher, family: str = "SD1.5", *, batch_size: int = 1, size: tuple[int, int] = (8, 8), **changes: Any
) -> Tensor:
    """A latent [batch_size, C, *size] from comfy.sample.sample, which gets the `changes`."""
    latent = torch.zeros(batch_size, model.model.latent_format.latent_channels, *size)
    noise = torch.cat([comfy.sample.prepare_noise(latent[:1], 5 + i) for i in range(batch_size)])
    options = {
        **SAMPLER_DEFAULTS,
        "positive": make_conditioning(1, family),
        "negative": make_conditioning(2, family),
        **changes,
    }
    with torch.inference_mode():
        return comfy.sample.sample(model, noise, latent_image=latent, disable_pbar=True, seed=5, **options)


def all_close(a: torch.Tensor, b: torch.Tensor, tolerance: float = 1e-5) -> bool:
    """Equal up to the rounding of a few float32 steps, relative to the largest value."""
    return float((a - b).abs().max()) <= tolerance * float(b.abs().max())


def add_controlnet(positive: list[Any], **changes: Any) -> list[Any]:
    """A prompt with a small random ControlNet that visibly changes the image."""
    config = {key: value for key, value in copy.deepcopy(SD15_CONFIG | changes).items() if key != "out_channels"}
    model = comfy.cldm.cldm.ControlNet(hint_channels=3, dtype=torch.float32, **config)
    generator = torch.Generator().manual_seed(11)
    model.load_state_dict(
        {key: make_random_weight(key, value.shape, generator) for key, value in model.state_dict().items()}
    )
    cpu = torch.device("cpu")
    control = comfy.controlnet.ControlNet(model.eval().requires_grad_(False), load_device=cpu)
    control.set_cond_hint(torch.rand(1, 3, 64, 64, generator=generator), 0.5)
    return [[text, {**rest, "control": control, "control_apply_to_uncond": False}] for text, rest in positive]


def add_flux_controlnet(positive: list[Any]) -> list[Any]:
    """A prompt with a small random FLUX ControlNet of the XLabs kind."""
    config = {
        key: value for key, value in FLUX_CONFIG.items() if key not in ("image_model", "depth", "depth_single_blocks")
    }
    model = comfy.ldm.flux.controlnet.ControlNetFlux(
        dtype=torch.float32, operations=comfy.ops.disable_weight_init, depth=1, depth_single_blocks=1, **config
    )
    generator = torch.Generator().manual_seed(11)
    model.load_state_dict(
        {key: make_random_weight(key, value.shape, generator) for key, value in model.state_dict().items()}
    )
    control = comfy.controlnet.ControlNet(
        model.eval().requires_grad_(False), load_device=torch.device("cpu"), extra_conds=["y", "guidance"]
    )
    control.set_cond_hint(torch.rand(1, 3, 64, 64, generator=generator), 0.5)
    return [[text, {**rest, "control": control, "control_apply_to_uncond": False}] for text, rest in positive]
