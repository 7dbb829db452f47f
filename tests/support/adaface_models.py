"""AdaFace for the tests: small text encoders, ComfyUI's and ours, from seeds, in the published layouts."""

from __future__ import annotations

import json
from functools import lru_cache
from typing import Any

import comfy.ops
import comfy.sd
import comfy.sd1_clip
import comfy.sdxl_clip
import torch
from comfyui_likeness.likeness.methods import adaface, arc2face
from comfyui_likeness.likeness.spec import AdaFaceSpec, Identity
from comfyui_likeness.nodes.loaders import model_management
from comfyui_likeness.nodes.types import LoadedPrompter
from torch import Tensor

from support.identities import make_identity

TEXT_WIDTH, NUM_HEADS = 576, 9  # wider than an ArcFace embedding, which has 512


def make_text_model_shapes(
    width: int = TEXT_WIDTH, layers: int = 3, key_value_copies: int = 1
) -> dict[str, tuple[int, ...]]:
    """The shapes of a CLIP text model in the transformers layout."""
    shapes: dict[str, tuple[int, ...]] = {
        "embeddings.token_embedding.weight": (49408, width), "embeddings.position_embedding.weight": (77, width),
    }  # fmt: skip
    linear = {
        "self_attn.q_proj": (1, 1),
        "self_attn.k_proj": (key_value_copies, 1),
        "self_attn.v_proj": (key_value_copies, 1),
    }
    linear |= {"self_attn.out_proj": (1, 1), "mlp.fc1": (2, 1), "mlp.fc2": (1, 2)}
    norms = ["final_layer_norm"]
    for i in range(layers):
        block = f"encoder.layers.{i}."
        norms += [f"{block}layer_norm1", f"{block}layer_norm2"]
        for name, (rows, columns) in linear.items():
            shapes |= {f"{block}{name}.weight": (rows * width, columns * width), f"{block}{name}.bias": (rows * width,)}
    return shapes | {f"{name}.{part}": (width,) for name in norms for part in ("weight", "bias")}


def make_random_tensors(shapes: dict[str, tuple[int, ...]], seed: int, prefix: str = "") -> dict[str, Tensor]:
    generator = torch.Generator().manual_seed(seed)
    tensors = {}
    for key, shape in shapes.items():
        value = torch.randn(shape, generator=generator) * (0.05 if len(shape) < 2 else shape[1] ** -0.5)
        tensors[f"{prefix}{key}"] = value + 1 if "norm" in key and key.endswith("weight") else value
    return tensors


def make_inverter_tensors(width: int = TEXT_WIDTH, layers: int = 3, seed: int = 2) -> dict[str, Tensor]:
    """The tensors of a converted file."""
    layer_weights = {"hidden_state_layer_weights": torch.tensor([[0.9163], [0.9483], [2.0762]])}
    shapes = make_text_model_shapes(width, layers, key_value_copies=2)
    return make_random_tensors(shapes, seed, adaface.TEXT_MODEL_PREFIX) | layer_weights


def make_inverter_metadata(towers: dict[str, int], base: str = "test", num_heads: int = NUM_HEADS) -> dict[str, Any]:
    return json.loads(adaface.make_adaface_metadata(AdaFaceSpec(base, towers, num_heads, {"steps": 1}))["likeness"])


@lru_cache
def make_prompter(towers: tuple[tuple[str, int], ...] = (("l", TEXT_WIDTH),)) -> LoadedPrompter:
    """Arc2Face's encoder and an inverter for these text encoders, as the loader returns them."""
    operations = comfy.ops.manual_cast
    encoder = adaface.build_text_model(
        make_random_tensors(make_text_model_shapes(), 1, "text_model."), "text_model.", NUM_HEADS, operations
    )
    spec = adaface.read_adaface_spec(make_inverter_metadata(dict(towers)), "seeds")
    inverter = adaface.build_prompt_inverter(make_inverter_tensors(), spec, operations, "seeds")
    return LoadedPrompter(
        model_management.make_model_patcher(encoder), model_management.make_model_patcher(inverter), spec, "seeds"
    )


def make_clip_config(width: int, num_heads: int, layers: int, mlp_width: int) -> dict[str, int]:
    return {
        "hidden_size": width,
        "intermediate_size": mlp_width,
        "num_hidden_layers": layers,
        "num_attention_heads": num_heads,
        "projection_dim": width,
    }


def make_clip(
    width: int = TEXT_WIDTH, num_heads: int = NUM_HEADS, layers: int = 3, weights: dict[str, Tensor] | None = None
) -> Any:
    """A small ComfyUI CLIP of SD1.5."""
    return _make_host_clip(
        comfy.sd1_clip.SD1ClipModel, comfy.sd1_clip.SD1Tokenizer, {"l": (width, num_heads, layers)},
        {"l": weights or make_random_tensors(make_text_model_shapes(width, layers), 3, "text_model.")},
    )  # fmt: skip


def make_sdxl_clip() -> Any:
    """A small ComfyUI CLIP of SDXL: 64 and 512 wide."""
    sizes = {"l": (64, 4, 3), "g": (512, 8, 3)}
    weights = {
        tower: make_random_tensors(make_text_model_shapes(size[0]), 4, "text_model.") for tower, size in sizes.items()
    }
    return _make_host_clip(comfy.sdxl_clip.SDXLClipModel, comfy.sdxl_clip.SDXLTokenizer, sizes, weights)


class _ClipTarget:
    """The target from which ComfyUI builds a CLIP."""

    def __init__(self, clip: Any, tokenizer: Any) -> None:
        self.clip, self.tokenizer, self.params = clip, tokenizer, {}


def _make_host_clip(model: Any, tokenizer: Any, sizes: dict[str, tuple[int, int, int]], weights: dict[str, Any]) -> Any:
    mlp_widths = {tower: len(tensors["text_model.encoder.layers.0.mlp.fc1.bias"]) for tower, tensors in weights.items()}
    options = {
        f"clip_{tower}_model_config": make_clip_config(*size, mlp_widths[tower]) for tower, size in sizes.items()
    }
    clip = comfy.sd.CLIP(_ClipTarget(model, tokenizer), embedding_directory=[], model_options=options)
    for tower, tensors in weights.items():
        part = getattr(clip.cond_stage_model, f"clip_{tower}").float()
        missing, unexpected = part.load_sd(tensors)
        assert not unexpected and not [key for key in missing if "projection" not in key and "logit" not in key]
        part.transformer.text_projection.weight.copy_(torch.eye(sizes[tower][0]))
    return clip


def make_arcface_identity(seed: int = 0, faces: int = 1, name: str = "anna") -> Identity:
    from dataclasses import replace

    return replace(make_identity((arc2face.FACE_FEATURES[-1],), ((512,),), faces, seed), name=name)
