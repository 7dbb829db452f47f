"""The tensors of the stand-ins: each function makes those of one kind of file, from seeds.

Base models have all their attention layers, but only 320 channels. Text and image encoders have their full size, by
which ComfyUI recognizes them. Adapters have their published keys and shapes, except for the width of the UNet's layers.
"""

from __future__ import annotations

import json
import os
import re
import sys
import zlib
from collections.abc import Callable, Mapping
from functools import lru_cache, partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from . import eva_clip, flashface_checkpoint, flux_models, omni_id_encoder

LAYOUT_FOLDER = Path(__file__).with_name("layouts")  # key -> shape of published files, as JSON
MODEL_CHANNELS = 320
LORA_SCALE = 0.02

UNET_CONFIG: dict[str, Any] = {
    "image_size": 32, "in_channels": 4, "out_channels": 4, "model_channels": MODEL_CHANNELS,
    "use_spatial_transformer": True, "legacy": False, "dims": 2,
}  # fmt: skip
SD15_CONFIG = {
    **UNET_CONFIG, "num_res_blocks": [2, 2, 2, 2], "channel_mult": [1, 1, 1, 1],
    "transformer_depth": [1, 1, 1, 1, 1, 1, 0, 0],
    "transformer_depth_output": [1, 1, 1, 1, 1, 1, 1, 1, 1, 0, 0, 0], "transformer_depth_middle": 1, "context_dim": 768,
    "num_heads": 8,
}  # fmt: skip
SDXL_CONFIG = {
    **UNET_CONFIG, "num_res_blocks": [2, 2, 2], "channel_mult": [1, 1, 1], "transformer_depth": [0, 0, 2, 2, 10, 10],
    "transformer_depth_output": [0, 0, 0, 2, 2, 2, 10, 10, 10], "transformer_depth_middle": 10, "context_dim": 2048,
    "num_heads": -1, "num_head_channels": 64, "use_linear_in_transformer": True, "num_classes": "sequential",
    "adm_in_channels": 2816,
}  # fmt: skip

Shapes = Mapping[str, tuple[int, ...]]


@lru_cache
def _noise_pool() -> Tensor:
    return torch.randn(1 << 22, generator=torch.Generator().manual_seed(0))


def make_noise(key: str, shape: tuple[int, ...]) -> Tensor:
    """Normal noise that depends on the key, from one pool: drawing a billion numbers would take a minute."""
    pool, count = _noise_pool(), torch.Size(shape).numel()
    rolled = pool.roll(zlib.crc32(key.encode()) % len(pool))
    return rolled.repeat(-(-count // len(pool)))[:count].view(shape)


def make_weight(key: str, shape: tuple[int, ...]) -> Tensor:
    """A random weight that keeps activations near unit variance: scaled by fan-in, norms at one, biases at zero."""
    if len(shape) < 2:
        return torch.ones(shape) if key.endswith("weight") else torch.zeros(shape)
    if "embedding" in key or "latents" in key or key == "queries":
        return make_noise(key, shape) * LORA_SCALE
    fan_in = torch.Size(shape[1:]).numel()
    return make_noise(key, shape) * (LORA_SCALE if "_lora." in key else 0.7 / fan_in**0.5)


def fill_shapes(shapes: Shapes, dtype: torch.dtype = torch.float16, prefix: str = "") -> dict[str, Tensor]:
    """A random state dict with these shapes."""
    return {prefix + key: make_weight(key, tuple(shape)).to(dtype) for key, shape in shapes.items()}


def import_host() -> None:
    """Make the ComfyUI of COMFYUI_PATH importable, in CPU mode."""
    host = os.environ["COMFYUI_PATH"]
    if host not in sys.path:
        sys.path.insert(0, host)
    argv, sys.argv = sys.argv, [sys.argv[0], "--cpu"]
    import comfy.options

    comfy.options.enable_args_parsing()
    import comfy.cli_args  # noqa: F401  (reads sys.argv once)

    sys.argv = argv


def get_module_shapes(make_module: Callable[[], torch.nn.Module]) -> dict[str, tuple[int, ...]]:
    """The shapes of a module's state dict, without allocating it."""
    with torch.device("meta"):
        return {key: tuple(value.shape) for key, value in make_module().state_dict().items()}


def get_unet_shapes(config: dict[str, Any]) -> dict[str, tuple[int, ...]]:
    import comfy.ops
    from comfy.ldm.modules.diffusionmodules.openaimodel import UNetModel

    operations = comfy.ops.disable_weight_init
    config = json.loads(json.dumps(config))  # ComfyUI's module modifies the lists
    return get_module_shapes(lambda: UNetModel(dtype=torch.float32, device="meta", operations=operations, **config))


def make_clip_text(config_file: str, prefix: str, dtype: torch.dtype) -> dict[str, Tensor]:
    """A text encoder in the transformers layout, with a configuration file of ComfyUI."""
    import comfy.clip_model
    import comfy.ops
    import comfy.sd1_clip

    settings = json.loads((Path(comfy.sd1_clip.__file__).parent / config_file).read_text())
    operations = comfy.ops.disable_weight_init
    shapes = get_module_shapes(lambda: comfy.clip_model.CLIPTextModel(settings, torch.float32, "meta", operations))
    return fill_shapes({key: shape for key, shape in shapes.items() if key.startswith("text_model.")}, dtype, prefix)


def make_open_clip_text(prefix: str, dtype: torch.dtype, width: int = 1280, num_layers: int = 32) -> dict[str, Tensor]:
    """SDXL's second text encoder, ViT-bigG, in the OpenCLIP layout of published checkpoints."""
    shapes: dict[str, tuple[int, ...]] = {
        "positional_embedding": (77, width), "text_projection": (width, width),
        "token_embedding.weight": (49408, width), "ln_final.weight": (width,), "ln_final.bias": (width,),
        "logit_scale": (),
    }  # fmt: skip
    for i in range(num_layers):
        block = f"transformer.resblocks.{i}."
        shapes |= {f"{block}{norm}.{part}": (width,) for norm in ("ln_1", "ln_2") for part in ("weight", "bias")}
        shapes |= {f"{block}attn.in_proj_weight": (3 * width, width), f"{block}attn.in_proj_bias": (3 * width,)}
        for name, rows, columns in (("attn.out_proj", 1, 1), ("mlp.c_fc", 4, 1), ("mlp.c_proj", 1, 4)):
            shapes |= {f"{block}{name}.weight": (rows * width, columns * width), f"{block}{name}.bias": (rows * width,)}
    return fill_shapes(shapes, dtype, prefix)


def make_taesd(
    scale: float, shift: float = 0.0, channels: int = 4, prefix: str = "first_stage_model."
) -> dict[str, Tensor]:
    """A small VAE that ComfyUI supports: TAESD."""
    from comfy.taesd.taesd import Decoder, Encoder

    out = {f"{prefix}vae_scale": torch.tensor(scale), f"{prefix}vae_shift": torch.tensor(shift)}
    for name, module in (("taesd_encoder", Encoder), ("taesd_decoder", Decoder)):
        out |= fill_shapes(get_module_shapes(partial(module, channels)), torch.float32, f"{prefix}{name}.")
    last = max((key for key in out if key.endswith(".bias") and "taesd_decoder" in key), key=_layer_index)
    out[last] = out[last] + 0.5  # around gray, otherwise most of the noise would be clipped to black
    return out


def _layer_index(key: str) -> int:
    """The index of a layer in a sequence: the first number in its key."""
    return next(int(part) for part in key.split(".") if part.isdigit())


def make_sd15_checkpoint() -> dict[str, Tensor]:
    text = make_clip_text("sd1_clip_config.json", "cond_stage_model.transformer.", torch.float16)
    return fill_shapes(get_unet_shapes(SD15_CONFIG), prefix="model.diffusion_model.") | text | make_taesd(0.18215)


def make_sdxl_checkpoint() -> dict[str, Tensor]:
    small = make_clip_text("sd1_clip_config.json", "conditioner.embedders.0.transformer.", torch.float8_e4m3fn)
    large = make_open_clip_text("conditioner.embedders.1.model.", torch.float8_e4m3fn)
    return (
        fill_shapes(get_unet_shapes(SDXL_CONFIG), prefix="model.diffusion_model.") | small | large | make_taesd(0.13025)
    )


def make_controlnet(unet_config: dict[str, Any]) -> dict[str, Tensor]:
    """A ControlNet for a stand-in UNet, in the original layout."""
    import comfy.ops
    from comfy.cldm.cldm import ControlNet

    config = {
        key: value for key, value in unet_config.items() if key not in ("out_channels", "transformer_depth_output")
    }
    config = json.loads(json.dumps(config))
    operations = comfy.ops.disable_weight_init
    shapes = get_module_shapes(
        lambda: ControlNet(hint_channels=3, dtype=torch.float32, device="meta", operations=operations, **config)
    )
    return fill_shapes(shapes, prefix="control_model.")


def make_flux() -> dict[str, Tensor]:
    """A small FLUX.1 dev, conditioned on CLIP-L alone: a stand-in for T5-XXL would be too large."""
    from comfy.ldm.flux.model import Flux

    return _make_flux_module(Flux)


def make_flux_controlnet() -> dict[str, Tensor]:
    """A ControlNet for the FLUX stand-in, in the XLabs layout."""
    from comfy.ldm.flux.controlnet import ControlNetFlux

    return _make_flux_module(ControlNetFlux)


def _make_flux_module(module_class: Callable[..., torch.nn.Module]) -> dict[str, Tensor]:
    """A FLUX module with the published keys, in which the weights of query and key norms are called scale."""
    import comfy.ops

    operations = comfy.ops.disable_weight_init
    tensors = fill_shapes(
        get_module_shapes(lambda: module_class(dtype=torch.float32, operations=operations, **flux_models.FLUX_CONFIG))
    )
    return {re.sub(r"(query|key)_norm\.weight", r"\1_norm.scale", key): value for key, value in tensors.items()}


def make_clip_vision(config_file: str = "clip_vision_config_h.json") -> dict[str, Tensor]:
    """An image encoder in the transformers layout, with a configuration file of ComfyUI; SigLIP with pooling head."""
    import comfy.clip_model
    import comfy.ops

    settings = json.loads((Path(comfy.clip_model.__file__).parent / config_file).read_text())
    operations = comfy.ops.disable_weight_init
    shapes = get_module_shapes(
        lambda: comfy.clip_model.CLIPVisionModelProjection(settings, torch.float32, "meta", operations)
    )
    head = flux_models.get_pooling_head_shapes(settings["hidden_size"], settings["intermediate_size"])
    return fill_shapes(shapes | head if "siglip" in config_file else shapes)


def read_layout(name: str) -> dict[str, tuple[int, ...]]:
    """The shapes of a published file, by key."""
    return {key: tuple(shape) for key, shape in json.loads((LAYOUT_FOLDER / f"{name}.json").read_text()).items()}


def make_adapter(layout: str, width: int | None = MODEL_CHANNELS) -> dict[str, Tensor]:
    """A published adapter with dotted keys; its layers have this width, or the published one if None."""
    shapes = read_layout(layout)
    return fill_shapes(
        shapes if width is None else {key: narrow_shape(key, shape, width) for key, shape in shapes.items()}
    )


def narrow_shape(key: str, shape: tuple[int, ...], width: int) -> tuple[int, ...]:
    """The shape with the hidden widths of SD1.5 and SDXL replaced; text and projector widths stay."""
    if not key.startswith(("ip_adapter.", "id_adapter_attn_layers.")):
        return shape
    return tuple(width if size in (320, 640, 1280) else size for size in shape)


def make_eva_clip() -> dict[str, Tensor]:
    return fill_shapes(eva_clip.get_eva_clip_shapes())


def make_flux_adapter(layout: str, text_width: int = flux_models.TEXT_WIDTH) -> dict[str, Tensor]:
    """A published adapter for FLUX that fits the stand-in; `text_width` reduces a huge projector."""
    return fill_shapes(flux_models.fit_adapter_shapes(read_layout(layout), text_width=text_width))


def make_infinite_id(unet_config: dict[str, Any], num_attentions: int) -> dict[str, Tensor]:
    """An Infinite-ID adapter that fits a stand-in UNet, in native format."""
    width, hidden, tokens = unet_config["context_dim"], 1280, 4
    shapes: dict[str, tuple[int, ...]] = {
        "projector.clip.0.weight": (hidden,), "projector.clip.0.bias": (hidden,),
        "projector.clip.1.weight": (width, hidden), "projector.clip.1.bias": (width,),
        "projector.face.proj.0.weight": (1024, 512), "projector.face.proj.0.bias": (1024,),
        "projector.face.proj.2.weight": (tokens * width, 1024), "projector.face.proj.2.bias": (tokens * width,),
        "projector.face.norm.weight": (width,), "projector.face.norm.bias": (width,),
    }  # fmt: skip
    for n in range(num_attentions):
        shapes |= {f"layers.{2 * n + 1}.{part}.weight": (MODEL_CHANNELS, width) for part in "kv"}
    return fill_shapes(shapes)


def make_flashface(input_channels: int, width: int = 32) -> dict[str, Tensor]:
    """A FlashFace file; the published one has `width` 320."""
    shapes = get_unet_shapes({**SD15_CONFIG, "model_channels": width, "channel_mult": [1, 2, 4, 4]})
    return flashface_checkpoint.add_alias_names(
        fill_shapes(flashface_checkpoint.get_flashface_shapes(shapes, input_channels))
    )


def make_omni_id_encoder() -> dict[str, Tensor]:
    return fill_shapes(omni_id_encoder.get_omni_id_encoder_shapes())


def make_adaface() -> dict[str, Tensor]:
    """A converted AdaFace file: CLIP-L's text encoder with twice as many keys and values in its first layers."""
    text = make_clip_text("sd1_clip_config.json", "prompt2token_proj.", torch.float16)
    wide = [key for key in text if key.split(".")[4:5] < ["4"] and (".k_proj." in key or ".v_proj." in key)]
    mix = {"hidden_state_layer_weights": torch.tensor([[0.9163], [0.9483], [2.0762]])}
    return text | {key: torch.cat((text[key], 0.9 * text[key])) for key in wide} | mix
