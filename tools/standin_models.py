"""What the stand-ins consist of: each function gives the tensors of one kind of file, from seeds.

Every attention of the base models is there, 320 channels wide; text and image encoders have their full size, as a host
knows them by it. Adapters keep their names and shapes but for the width of the layers that they attend from.
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

from . import standin_eva, standin_flashface, standin_flux, standin_omni_id

LAYOUTS = Path(__file__).resolve().parents[1] / "tests" / "data" / "golden" / "ip_adapter" / "layouts"
WIDTH = 320
LORA = 0.02

UNET: dict[str, Any] = {
    "image_size": 32, "in_channels": 4, "out_channels": 4, "model_channels": WIDTH, "use_spatial_transformer": True,
    "legacy": False, "dims": 2,
}  # fmt: skip
SD15 = {
    **UNET, "num_res_blocks": [2, 2, 2, 2], "channel_mult": [1, 1, 1, 1], "transformer_depth": [1, 1, 1, 1, 1, 1, 0, 0],
    "transformer_depth_output": [1, 1, 1, 1, 1, 1, 1, 1, 1, 0, 0, 0], "transformer_depth_middle": 1, "context_dim": 768,
    "num_heads": 8,
}  # fmt: skip
SDXL = {
    **UNET, "num_res_blocks": [2, 2, 2], "channel_mult": [1, 1, 1], "transformer_depth": [0, 0, 2, 2, 10, 10],
    "transformer_depth_output": [0, 0, 0, 2, 2, 2, 10, 10, 10], "transformer_depth_middle": 10, "context_dim": 2048,
    "num_heads": -1, "num_head_channels": 64, "use_linear_in_transformer": True, "num_classes": "sequential",
    "adm_in_channels": 2816,
}  # fmt: skip

Shapes = Mapping[str, tuple[int, ...]]


@lru_cache
def _pool() -> Tensor:
    return torch.randn(1 << 22, generator=torch.Generator().manual_seed(0))


def noise(key: str, shape: tuple[int, ...]) -> Tensor:
    """Normal noise that depends on the key: pieces of one pool, as drawing a billion numbers takes a minute."""
    pool, count = _pool(), torch.Size(shape).numel()
    rolled = pool.roll(zlib.crc32(key.encode()) % len(pool))
    return rolled.repeat(-(-count // len(pool)))[:count].view(shape)


def weight(key: str, shape: tuple[int, ...]) -> Tensor:
    """A value under which activations stay near unit size: by fan-in, norms at one, biases at zero."""
    if len(shape) < 2:
        return torch.ones(shape) if key.endswith("weight") else torch.zeros(shape)
    if "embedding" in key or "latents" in key or key == "queries":
        return noise(key, shape) * LORA
    fan_in = torch.Size(shape[1:]).numel()
    return noise(key, shape) * (LORA if "_lora." in key else 0.7 / fan_in**0.5)


def fill(shapes: Shapes, dtype: torch.dtype = torch.float16, prefix: str = "") -> dict[str, Tensor]:
    """A state dict of these shapes."""
    return {prefix + key: weight(key, tuple(shape)).to(dtype) for key, shape in shapes.items()}


def bring_host() -> None:
    """Make the ComfyUI of COMFYUI_PATH importable, on the CPU."""
    host = os.environ["COMFYUI_PATH"]
    if host not in sys.path:
        sys.path.insert(0, host)
    argv, sys.argv = sys.argv, [sys.argv[0], "--cpu"]
    import comfy.options

    comfy.options.enable_args_parsing()
    import comfy.cli_args  # noqa: F401  (reads sys.argv once)

    sys.argv = argv


def shapes_of(make: Callable[[], torch.nn.Module]) -> dict[str, tuple[int, ...]]:
    """The shapes of a module's state dict, without its memory."""
    with torch.device("meta"):
        return {key: tuple(value.shape) for key, value in make().state_dict().items()}


def unet(config: dict[str, Any]) -> dict[str, tuple[int, ...]]:
    import comfy.ops
    from comfy.ldm.modules.diffusionmodules.openaimodel import UNetModel

    operations = comfy.ops.disable_weight_init
    copy = json.loads(json.dumps(config))  # the host's module consumes the lists
    return shapes_of(lambda: UNetModel(dtype=torch.float32, device="meta", operations=operations, **copy))


def clip_text(config: str, prefix: str, dtype: torch.dtype) -> dict[str, Tensor]:
    """A text encoder in the transformers layout, its configuration read from the host."""
    import comfy.clip_model
    import comfy.ops
    import comfy.sd1_clip

    settings = json.loads((Path(comfy.sd1_clip.__file__).parent / config).read_text())
    operations = comfy.ops.disable_weight_init
    shapes = shapes_of(lambda: comfy.clip_model.CLIPTextModel(settings, torch.float32, "meta", operations))
    return fill({key: shape for key, shape in shapes.items() if key.startswith("text_model.")}, dtype, prefix)


def open_clip_text(prefix: str, dtype: torch.dtype, width: int = 1280, layers: int = 32) -> dict[str, Tensor]:
    """SDXL's second text encoder, ViT-bigG's, in the OpenCLIP layout of published checkpoints."""
    shapes: dict[str, tuple[int, ...]] = {
        "positional_embedding": (77, width), "text_projection": (width, width),
        "token_embedding.weight": (49408, width), "ln_final.weight": (width,), "ln_final.bias": (width,),
        "logit_scale": (),
    }  # fmt: skip
    for i in range(layers):
        block = f"transformer.resblocks.{i}."
        shapes |= {f"{block}{norm}.{part}": (width,) for norm in ("ln_1", "ln_2") for part in ("weight", "bias")}
        shapes |= {f"{block}attn.in_proj_weight": (3 * width, width), f"{block}attn.in_proj_bias": (3 * width,)}
        for name, rows, columns in (("attn.out_proj", 1, 1), ("mlp.c_fc", 4, 1), ("mlp.c_proj", 1, 4)):
            shapes |= {f"{block}{name}.weight": (rows * width, columns * width), f"{block}{name}.bias": (rows * width,)}
    return fill(shapes, dtype, prefix)


def taesd(scale: float, shift: float = 0.0, channels: int = 4, prefix: str = "first_stage_model.") -> dict[str, Tensor]:
    """A small VAE that the host knows: TAESD."""
    from comfy.taesd.taesd import Decoder, Encoder

    out = {f"{prefix}vae_scale": torch.tensor(scale), f"{prefix}vae_shift": torch.tensor(shift)}
    for name, module in (("taesd_encoder", Encoder), ("taesd_decoder", Decoder)):
        out |= fill(shapes_of(partial(module, channels)), torch.float32, f"{prefix}{name}.")
    last = max((key for key in out if key.endswith(".bias") and "taesd_decoder" in key), key=_number)
    out[last] = out[last] + 0.5  # around grey, or most of the noise would be cut off at black
    return out


def _number(key: str) -> int:
    """The place of a layer in a sequence: its first number."""
    return next(int(part) for part in key.split(".") if part.isdigit())


def checkpoint_sd15() -> dict[str, Tensor]:
    text = clip_text("sd1_clip_config.json", "cond_stage_model.transformer.", torch.float16)
    return fill(unet(SD15), prefix="model.diffusion_model.") | text | taesd(0.18215)


def checkpoint_sdxl() -> dict[str, Tensor]:
    small = clip_text("sd1_clip_config.json", "conditioner.embedders.0.transformer.", torch.float8_e4m3fn)
    large = open_clip_text("conditioner.embedders.1.model.", torch.float8_e4m3fn)
    return fill(unet(SDXL), prefix="model.diffusion_model.") | small | large | taesd(0.13025)


def controlnet(base: dict[str, Any]) -> dict[str, Tensor]:
    """A ControlNet that fits a stand-in, in the layout of the method's authors."""
    import comfy.ops
    from comfy.cldm.cldm import ControlNet

    config = {key: value for key, value in base.items() if key not in ("out_channels", "transformer_depth_output")}
    config = json.loads(json.dumps(config))
    operations = comfy.ops.disable_weight_init
    shapes = shapes_of(
        lambda: ControlNet(hint_channels=3, dtype=torch.float32, device="meta", operations=operations, **config)
    )
    return fill(shapes, prefix="control_model.")


def flux() -> dict[str, Tensor]:
    """A short FLUX.1 dev, which reads CLIP-L's text: the real one's second encoder is too large to stand in for."""
    from comfy.ldm.flux.model import Flux

    return _flux(Flux)


def controlnet_flux() -> dict[str, Tensor]:
    """A ControlNet for the FLUX stand-in, in XLabs' layout."""
    from comfy.ldm.flux.controlnet import ControlNetFlux

    return _flux(ControlNetFlux)


def _flux(kind: Callable[..., torch.nn.Module]) -> dict[str, Tensor]:
    """A module of FLUX's kind under the published names, which call the weights of its norms of queries scales."""
    import comfy.ops

    operations = comfy.ops.disable_weight_init
    tensors = fill(shapes_of(lambda: kind(dtype=torch.float32, operations=operations, **standin_flux.FLUX)))
    return {re.sub(r"(query|key)_norm\.weight", r"\1_norm.scale", key): value for key, value in tensors.items()}


def clip_vision(config: str = "clip_vision_config_h.json") -> dict[str, Tensor]:
    """An image encoder in the transformers layout, its configuration read from the host; SigLIP's with its head."""
    import comfy.clip_model
    import comfy.ops

    settings = json.loads((Path(comfy.clip_model.__file__).parent / config).read_text())
    operations = comfy.ops.disable_weight_init
    shapes = shapes_of(lambda: comfy.clip_model.CLIPVisionModelProjection(settings, torch.float32, "meta", operations))
    head = standin_flux.pooling_head(settings["hidden_size"], settings["intermediate_size"])
    return fill(shapes | head if "siglip" in config else shapes)


def layout_of(name: str) -> dict[str, tuple[int, ...]]:
    """The shapes of a published file."""
    return {key: tuple(shape) for key, shape in json.loads((LAYOUTS / f"{name}.json").read_text()).items()}


def adapter(layout: str, width: int | None = WIDTH) -> dict[str, Tensor]:
    """A published adapter file from seeds, dotted names; its layers `width` wide, or as published where None."""
    shapes = layout_of(layout)
    return fill(shapes if width is None else {key: narrowed(key, shape, width) for key, shape in shapes.items()})


def narrowed(key: str, shape: tuple[int, ...], width: int) -> tuple[int, ...]:
    """A shape with the hidden widths of SD1.5 and SDXL replaced; the text's and the projector's stay."""
    if not key.startswith(("ip_adapter.", "id_adapter_attn_layers.")):
        return shape
    return tuple(width if size in (320, 640, 1280) else size for size in shape)


def eva_clip() -> dict[str, Tensor]:
    return fill(standin_eva.eva_clip())


def for_flux(layout: str, text: int = standin_flux.TEXT) -> dict[str, Tensor]:
    """A published adapter for FLUX that fits the stand-in; `text` narrows the tokens where their projector is huge."""
    return fill(standin_flux.fitted(layout_of(layout), text=text))


def infinite_id(base: dict[str, Any], attentions: int) -> dict[str, Tensor]:
    """An Infinite-ID adapter that fits a stand-in, in the pack's own layout."""
    width, hidden, tokens = base["context_dim"], 1280, 4
    shapes: dict[str, tuple[int, ...]] = {
        "projector.clip.0.weight": (hidden,), "projector.clip.0.bias": (hidden,),
        "projector.clip.1.weight": (width, hidden), "projector.clip.1.bias": (width,),
        "projector.face.proj.0.weight": (1024, 512), "projector.face.proj.0.bias": (1024,),
        "projector.face.proj.2.weight": (tokens * width, 1024), "projector.face.proj.2.bias": (tokens * width,),
        "projector.face.norm.weight": (width,), "projector.face.norm.bias": (width,),
    }  # fmt: skip
    for n in range(attentions):
        shapes |= {f"layers.{2 * n + 1}.{part}.weight": (WIDTH, width) for part in "kv"}
    return fill(shapes)


def flashface(channels: int, width: int = 32) -> dict[str, Tensor]:
    """A FlashFace file; `width` 320 and SD15's own levels are the published size."""
    shapes = unet({**SD15, "model_channels": width, "channel_mult": [1, 2, 4, 4]})
    return standin_flashface.with_aliases(fill(standin_flashface.names(shapes, channels)))


def omni_id() -> dict[str, Tensor]:
    return fill(standin_omni_id.shapes())


def adaface() -> dict[str, Tensor]:
    """AdaFace's converted file: CLIP-L's text encoder, the keys and values of its first layers twice as wide."""
    text = clip_text("sd1_clip_config.json", "prompt2token_proj.", torch.float16)
    wide = [key for key in text if key.split(".")[4:5] < ["4"] and (".k_proj." in key or ".v_proj." in key)]
    mix = {"hidden_state_layer_weights": torch.tensor([[0.9163], [0.9483], [2.0762]])}
    return text | {key: torch.cat((text[key], 0.9 * text[key])) for key in wide} | mix
