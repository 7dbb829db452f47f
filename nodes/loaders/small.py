"""Small models of the pack's own in the host's objects: UNet, text encoder, VAE, vision tower. Training makes them."""

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
from comfy.model_base import BaseModel, ModelType
from comfy.sd1_clip import SD1ClipModel, SD1Tokenizer, SDClipModel
from comfy.taesd.taesd import TAESD
from safetensors import SafetensorError, safe_open
from torch import Tensor, nn

from ...likeness import keymaps, vocabulary

PREFIX = "model.diffusion_model."  # of a UNet's tensors, as in checkpoints
# What a UNet says: the noise, or the velocity (Salimans & Ho 2202.00512, App. D)
PREDICTIONS: Mapping[str, ModelType] = {"noise": ModelType.EPS, "velocity": ModelType.V_PREDICTION}


@contextmanager
def reading(file: Path, what: str) -> Iterator[None]:
    """Whatever is wrong with a file is one ValueError, which names it."""
    try:
        yield
    except (OSError, KeyError, TypeError, ValueError, RuntimeError, SafetensorError) as error:
        why = (str(error) or type(error).__name__).splitlines()[0]
        raise ValueError(f"got {file} ({why}); expected {what}; fetch or train it again") from error


def read(file: Path) -> tuple[dict[str, Any], dict[str, Tensor]]:
    """The settings that a file was trained with, and its tensors."""
    with safe_open(file, "pt") as opened:
        told = json.loads((opened.metadata() or {})["likeness"])
        return told["settings"], {key: opened.get_tensor(key) for key in opened.keys()}


def base_model(described: Mapping[str, Any], prediction: str = "noise") -> BaseModel:
    """A MODEL's inside, as the host has it, without weights; `prediction` is a key of PREDICTIONS."""
    described = copy.deepcopy(dict(described))  # the host's modules consume the lists
    supported = comfy.supported_models.SD15(described)
    supported.unet_config |= {"num_heads": described["num_heads"]}
    supported.set_inference_dtype(torch.float32, None)
    return BaseModel(supported, PREDICTIONS[prediction], torch.get_default_device())


def load_unet(file: Path) -> BaseModel:
    """A trained UNet in the host's own model. Raises ValueError where the file is not one."""
    with reading(file, "a UNet"):
        settings, tensors = read(file)
        # The host's checkpointing knows no weights without a gradient, as those of a frozen model are.
        described = {**settings["config"], "use_checkpoint": False}
        model = base_model(described, settings.get("prediction", "noise"))
        weights = {key: value.float() for key, value in keymaps.under(tensors, PREFIX).items()}
        model.diffusion_model.load_state_dict(weights)
    return model


def text_encoder(config: Mapping[str, Any], known: Sequence[int]) -> Any:
    """The host's text encoder of that size: lists of tokens to states [n, 77, width] and projected texts [n, width]."""
    options = {"clip_l_model_config": dict(config), "custom_operations": comfy.ops.disable_weight_init}
    text: Any = SDClipModel(device=str(torch.get_default_device()), dtype=torch.float32, model_options=options)
    text.transformer.set_input_embeddings(vocabulary.Vocabulary(known, config["hidden_size"]))
    return text


def load_text(file: Path) -> Any:
    """A trained text encoder as a plain module. Raises ValueError where the file is not one."""
    with reading(file, "a text encoder"):
        settings, tensors = read(file)
        text = text_encoder(settings["config"], tensors.pop(vocabulary.KNOWN).tolist())
        text.transformer.load_state_dict({key: value.float() for key, value in tensors.items()})
    return text.eval().requires_grad_(False)


def load_clip(file: Path) -> comfy.sd.CLIP:
    """The same as the host's CLIP, with its tokenizer. Raises ValueError where the file is not one."""
    with reading(file, "a text encoder"):
        settings, tensors = read(file)
        tensors = vocabulary.whole(tensors)
        target = SimpleNamespace(params={}, clip=SD1ClipModel, tokenizer=SD1Tokenizer)
        options = {"clip_l_model_config": settings["config"]}
        made: Any = comfy.sd.CLIP(target, state_dict=[tensors], model_options=options)
        whole(made.cond_stage_model.clip_l.transformer, tensors)
    return made


def load_vae(file: Path) -> TAESD:
    """A trained VAE as a plain module. Raises ValueError where the file is not one."""
    vae = TAESD()
    with reading(file, "a VAE"):
        vae.load_state_dict({key: value.float() for key, value in read(file)[1].items()})
    return vae.eval().requires_grad_(False)


def load_vision(file: Path) -> ClipVisionModel:
    """A trained vision tower as the host's CLIP_VISION. Raises ValueError where the file is not one."""
    with reading(file, "a vision tower"):
        settings, tensors = read(file)
        vision = ClipVisionModel(settings["config"])
        vision.load_sd(tensors)
        whole(vision.model, tensors)
    return vision


def whole(module: nn.Module, tensors: Mapping[str, Tensor]) -> None:
    """Raise KeyError where a module's tensors are others than these: the host loads what it finds, and goes on."""
    for key in sorted(module.state_dict().keys() ^ tensors.keys()):
        raise KeyError(key)
