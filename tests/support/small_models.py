"""Small base models that train in a second: VAE, CLIP pair and UNet on colored discs."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import comfy.sd
from comfyui_likeness.likeness.encoders import token_embedding
from comfyui_likeness.training.base_models import clip_pair, unet, vae
from safetensors import safe_open
from safetensors.torch import load_file

from support.toy_tasks import DISC_WORLD, train_few_steps

SMALL_VAE = vae.VAEConfig(resolution=32, widths=(16, 16, 16), num_res_blocks=1)
SMALL_CLIP = clip_pair.CLIPConfig(
    width=32, layers=2, num_heads=2, vision_width=32, vision_layers=2, vision_num_heads=2, resolution=32, patch=8
)
UNET_SIZES: dict[str, Any] = {
    "resolution": 32, "model_channels": 32, "channel_mult": (1, 1), "transformer_depth": (1, 0), "num_res_blocks": 1,
    "num_heads": 2,
}  # fmt: skip


def train_base_models(folder: Path) -> Path:
    """The folder with a VAE, a CLIP pair and a UNet after two steps each."""
    train_few_steps(lambda: vae.VAETask(SMALL_VAE, DISC_WORLD, 0), folder / "vae", batch_size=2)
    train_few_steps(lambda: clip_pair.CLIPPair(SMALL_CLIP, DISC_WORLD, 0), folder / "clip")
    train_few_steps(lambda: unet.TextToImage(make_unet_config(folder), DISC_WORLD, 0), folder / "unet", batch_size=2)
    return folder


def make_unet_config(folder: Path, **changes: Any) -> unet.UNetConfig:
    """A UNet on the VAE and the text encoder of train_base_models."""
    files = {
        "vae": str(folder / "vae" / "model" / vae.VAE_FILE),
        "text": str(folder / "clip" / "model" / clip_pair.TEXT_FILE),
    }
    return unet.UNetConfig(**{**UNET_SIZES, **files, **changes})


def read_metadata(file: Path) -> dict[str, Any]:
    with safe_open(file, "pt") as opened:
        return json.loads(opened.metadata()["likeness"])


def load_host_clip(file: Path) -> comfy.sd.CLIP:
    """A trained text encoder as ComfyUI's CLIP, from its file alone."""
    options = {"model_config": read_metadata(file)["settings"]["config"]}
    return comfy.sd.load_text_encoder_state_dicts(
        [token_embedding.expand_token_table(load_file(file))], model_options=options
    )
