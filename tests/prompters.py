"""AdaFace for the tests: small text encoders of the host and of the pack, from seeds, in the real layouts."""

from __future__ import annotations

import json
from functools import lru_cache
from typing import Any

import comfy.ops
import comfy.sd
import comfy.sd1_clip
import comfy.sdxl_clip
import torch
from comfyui_likeness.likeness import adaface, arc2face
from comfyui_likeness.likeness.spec import Identity, PrompterSpec
from comfyui_likeness.nodes.loaders import care
from comfyui_likeness.nodes.types import LoadedPrompter
from identities import identity
from torch import Tensor

WIDTH, HEADS = 576, 9  # as narrow as a face's 512 numbers allow


def text_shapes(width: int = WIDTH, layers: int = 3, copies: int = 1) -> dict[str, tuple[int, ...]]:
    """A CLIP text model in the transformers layout."""
    shapes: dict[str, tuple[int, ...]] = {
        "embeddings.token_embedding.weight": (49408, width), "embeddings.position_embedding.weight": (77, width),
    }  # fmt: skip
    linear = {"self_attn.q_proj": (1, 1), "self_attn.k_proj": (copies, 1), "self_attn.v_proj": (copies, 1)}
    linear |= {"self_attn.out_proj": (1, 1), "mlp.fc1": (2, 1), "mlp.fc2": (1, 2)}
    norms = ["final_layer_norm"]
    for i in range(layers):
        block = f"encoder.layers.{i}."
        norms += [f"{block}layer_norm1", f"{block}layer_norm2"]
        for name, (rows, columns) in linear.items():
            shapes |= {f"{block}{name}.weight": (rows * width, columns * width), f"{block}{name}.bias": (rows * width,)}
    return shapes | {f"{name}.{part}": (width,) for name in norms for part in ("weight", "bias")}


def seeded(shapes: dict[str, tuple[int, ...]], seed: int, prefix: str = "") -> dict[str, Tensor]:
    generator = torch.Generator().manual_seed(seed)
    out = {}
    for key, shape in shapes.items():
        value = torch.randn(shape, generator=generator) * (0.05 if len(shape) < 2 else shape[1] ** -0.5)
        out[f"{prefix}{key}"] = value + 1 if "norm" in key and key.endswith("weight") else value
    return out


def inverter_tensors(width: int = WIDTH, layers: int = 3, seed: int = 2) -> dict[str, Tensor]:
    """A converted file's tensors."""
    mix = {"hidden_state_layer_weights": torch.tensor([[0.9163], [0.9483], [2.0762]])}
    return seeded(text_shapes(width, layers, copies=2), seed, adaface.TEXT) | mix


def told(towers: dict[str, int], base: str = "test", heads: int = HEADS) -> dict[str, Any]:
    return json.loads(adaface.metadata(PrompterSpec(base, towers, heads, {"steps": 1}))["likeness"])


@lru_cache
def prompter(towers: tuple[tuple[str, int], ...] = (("l", WIDTH),)) -> LoadedPrompter:
    """Arc2Face's encoder and an inverter for such text encoders, as the loader leaves them."""
    operations = comfy.ops.manual_cast
    encoder = adaface.text_model(seeded(text_shapes(), 1, "text_model."), "text_model.", HEADS, operations)
    spec = adaface.read_spec(told(dict(towers)), "seeds")
    inverter = adaface.build(inverter_tensors(), spec, operations, "seeds")
    return LoadedPrompter(care.patcher_of(encoder), care.patcher_of(inverter), spec, "seeds")


def config(width: int, heads: int, layers: int, inner: int) -> dict[str, int]:
    return {
        "hidden_size": width, "intermediate_size": inner, "num_hidden_layers": layers, "num_attention_heads": heads,
        "projection_dim": width,
    }  # fmt: skip


def clip(width: int = WIDTH, heads: int = HEADS, layers: int = 3, weights: dict[str, Tensor] | None = None) -> Any:
    """The host's CLIP of SD1.5, smaller."""
    return _host(
        comfy.sd1_clip.SD1ClipModel, comfy.sd1_clip.SD1Tokenizer, {"l": (width, heads, layers)},
        {"l": weights or seeded(text_shapes(width, layers), 3, "text_model.")},
    )  # fmt: skip


def clip_xl() -> Any:
    """The host's CLIP of SDXL, smaller: 64 and 512 wide."""
    sizes = {"l": (64, 4, 3), "g": (512, 8, 3)}
    weights = {tower: seeded(text_shapes(size[0]), 4, "text_model.") for tower, size in sizes.items()}
    return _host(comfy.sdxl_clip.SDXLClipModel, comfy.sdxl_clip.SDXLTokenizer, sizes, weights)


class _Target:
    """What the host makes a CLIP of."""

    def __init__(self, clip: Any, tokenizer: Any) -> None:
        self.clip, self.tokenizer, self.params = clip, tokenizer, {}


def _host(model: Any, tokenizer: Any, sizes: dict[str, tuple[int, int, int]], weights: dict[str, Any]) -> Any:
    inner = {tower: len(tensors["text_model.encoder.layers.0.mlp.fc1.bias"]) for tower, tensors in weights.items()}
    options = {f"clip_{tower}_model_config": config(*size, inner[tower]) for tower, size in sizes.items()}
    made = comfy.sd.CLIP(_Target(model, tokenizer), embedding_directory=[], model_options=options)
    for tower, tensors in weights.items():
        part = getattr(made.cond_stage_model, f"clip_{tower}").float()
        missing, unexpected = part.load_sd(tensors)
        assert not unexpected and not [key for key in missing if "projection" not in key and "logit" not in key]
        part.transformer.text_projection.weight.copy_(torch.eye(sizes[tower][0]))
    return made


def person(seed: int = 0, faces: int = 1, name: str = "anna") -> Identity:
    from dataclasses import replace

    return replace(identity((arc2face.FACES[-1],), ((512,),), faces, seed), name=name)
