"""Small models trained with this pack as ComfyUI's objects: UNet, text encoder, VAE and vision tower."""

from __future__ import annotations

import copy
import json
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import comfy.ops
import comfy.sd
import comfy.supported_models
import torch
from comfy.clip_vision import ClipVisionModel
from comfy.latent_formats import LatentFormat
from comfy.model_base import BaseModel, ModelType
from comfy.sd1_clip import SD1ClipModel, SD1Tokenizer, SDClipModel
from safetensors import SafetensorError, safe_open
from torch import Tensor, nn

from ...likeness.checkpoints import key_maps
from ...likeness.encoders import token_embedding
from . import native_vae

UNET_PREFIX = "model.diffusion_model."  # of UNet tensors, as in checkpoints
# What a UNet predicts: epsilon or v (Salimans & Ho 2202.00512, App. D).
PREDICTION_TYPES: Mapping[str, ModelType] = {"noise": ModelType.EPS, "velocity": ModelType.V_PREDICTION}


class UnitLatents(LatentFormat):
    """Latents of unit variance (native_vae), which the UNet takes as they are."""

    def __init__(self, channels: int) -> None:
        self.latent_channels = channels


def set_latent_format(config: Any) -> None:
    """Let a config's latents have as many channels as its UNet's output; the input may have more, such as a mask."""
    channels = config.unet_config.get("out_channels", config.latent_format.latent_channels)
    if channels != config.latent_format.latent_channels:
        config.latent_format = UnitLatents(channels)


@contextmanager
def report_file_errors(file: Path, expected: str) -> Iterator[None]:
    """Turn every error while reading a file into a ValueError that names the file."""
    try:
        yield
    except (OSError, KeyError, TypeError, ValueError, RuntimeError, SafetensorError) as error:
        reason = (str(error) or type(error).__name__).splitlines()[0]
        raise ValueError(f"got {file} ({reason}); expected {expected}; fetch or train it again") from error


def read_trained_model(file: Path) -> tuple[dict[str, Any], dict[str, Tensor]]:
    """The training settings in a file's metadata, and its tensors."""
    with safe_open(file, "pt") as opened:
        metadata = json.loads((opened.metadata() or {})["likeness"])
        return metadata["settings"], {key: opened.get_tensor(key) for key in opened.keys()}


def build_base_model(unet_config: Mapping[str, Any], prediction: str = "noise") -> BaseModel:
    """ComfyUI's BaseModel without trained weights; `prediction` is a key of PREDICTION_TYPES."""
    unet_config = copy.deepcopy(dict(unet_config))  # the host's modules pop from its lists
    supported = comfy.supported_models.SD15(unet_config)
    supported.unet_config |= {"num_heads": unet_config["num_heads"]}
    set_latent_format(supported)
    supported.set_inference_dtype(torch.float32, None)
    return BaseModel(supported, PREDICTION_TYPES[prediction], torch.get_default_device())


def load_unet(file: Path) -> BaseModel:
    """A trained UNet as ComfyUI's BaseModel. Raises ValueError if the file is not one."""
    with report_file_errors(file, "a UNet"):
        settings, tensors = read_trained_model(file)
        # The host's gradient checkpointing fails for weights without gradients, such as those of a frozen model.
        unet_config = {**settings["config"], "use_checkpoint": False}
        model = build_base_model(unet_config, settings.get("prediction", "noise"))
        weights = {key: value.float() for key, value in key_maps.select_prefix(tensors, UNET_PREFIX).items()}
        model.diffusion_model.load_state_dict(weights)
    return model


def build_text_encoder(config: Mapping[str, Any], known_tokens: Sequence[int]) -> Any:
    """ComfyUI's text encoder: token lists to hidden states [n, 77, width] and pooled embeddings [n, width].

    Only `known_tokens` have embeddings.
    """
    options = {"clip_l_model_config": dict(config), "custom_operations": comfy.ops.disable_weight_init}
    text_encoder: Any = SDClipModel(device=str(torch.get_default_device()), dtype=torch.float32, model_options=options)
    embedding = token_embedding.ClosedVocabularyEmbedding(known_tokens, config["hidden_size"])
    text_encoder.transformer.set_input_embeddings(embedding)
    return text_encoder


def load_text_encoder(file: Path) -> Any:
    """A trained text encoder as a plain module. Raises ValueError if the file is not one."""
    with report_file_errors(file, "a text encoder"):
        settings, tensors = read_trained_model(file)
        known_tokens = tensors.pop(token_embedding.KNOWN_TOKENS_NAME).tolist()
        text_encoder = build_text_encoder(settings["config"], known_tokens)
        text_encoder.transformer.load_state_dict({key: value.float() for key, value in tensors.items()})
    return text_encoder.eval().requires_grad_(False)


def load_clip(file: Path) -> comfy.sd.CLIP:
    """A trained text encoder as ComfyUI's CLIP, with its tokenizer. Raises ValueError if the file is not one."""
    with report_file_errors(file, "a text encoder"):
        settings, tensors = read_trained_model(file)
        tensors = token_embedding.expand_token_table(tensors)
        target = SimpleNamespace(params={}, clip=SD1ClipModel, tokenizer=SD1Tokenizer)
        options = {"clip_l_model_config": settings["config"]}
        clip: Any = comfy.sd.CLIP(target, state_dict=[tensors], model_options=options)
        check_tensor_names(clip.cond_stage_model.clip_l.transformer, tensors)
    return clip


def load_vae(file: Path) -> nn.Module:
    """A trained VAE as a plain module. Raises ValueError if the file is not one."""
    with report_file_errors(file, "a VAE"):
        settings, tensors = read_trained_model(file)
        vae = native_vae.build_vae(settings)
        vae.load_state_dict({key: value.float() for key, value in tensors.items()}, strict=False)
        check_tensor_names(vae, tensors)
    return vae.eval().requires_grad_(False)


def load_clip_vision(file: Path) -> ClipVisionModel:
    """A trained vision tower as ComfyUI's CLIP_VISION. Raises ValueError if the file is not one."""
    with report_file_errors(file, "a vision tower"):
        settings, tensors = read_trained_model(file)
        vision = ClipVisionModel(settings["config"])
        vision.load_sd(tensors)
        check_tensor_names(vision.model, tensors)
    return vision


def check_tensor_names(module: nn.Module, tensors: Mapping[str, Tensor]) -> None:
    """Raise KeyError if the names differ from the module's: the host only loads those that match."""
    for key in sorted(module.state_dict().keys() ^ tensors.keys()):
        raise KeyError(key)
