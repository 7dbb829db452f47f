"""Image encoders of checkpoints, told apart by their tensors: OpenCLIP's; EVA-CLIP's by timm; SigLIP's by the host."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from functools import partial
from typing import Any

import comfy.ops
import torch
from comfy.clip_model import CLIPVision
from torch import Tensor, nn

from ...likeness import clip, keymaps
from ...likeness import siglip as siglip_head
from ...likeness.siglip import PoolingHead

Layers = dict[str, Tensor]
Weights = Mapping[str, Tensor]


@dataclass(frozen=True, eq=False)
class Tower:
    """The network of a checkpoint, on the meta device, and the weights that belong in it.

    `run` takes normalised pixels [n, 3, size, size] through it; `zero` says whether what it makes of the zero picture
    is what adapters read where there is no face; `family` is as in encoder ids; `pixels` what the host's preprocessing
    is told beyond the size.
    """

    architecture: str
    size: int
    module: nn.Module
    weights: Weights
    run: Callable[[Any, Tensor], Layers]
    zero: bool = True
    family: str = "clip"
    pixels: Mapping[str, Any] = field(default_factory=dict)


@dataclass(frozen=True)
class Sizes:
    """What a vision transformer measures. `inner` is the width inside its MLPs, `positions` count the class token."""

    width: int
    layers: int
    patch: int
    positions: int
    inner: int
    out: int

    @property
    def side(self) -> int:
        """Pixels of a picture's side."""
        return round((self.positions - 1) ** 0.5) * self.patch

    @property
    def heads(self) -> int:
        return self.width // clip.HEAD_WIDTHS.get(self.width, 64)

    @property
    def ratio(self) -> float:
        return (self.inner + 0.5) / self.width  # it comes back as int(width * ratio)

    def name(self, kind: str = "vit") -> str:
        return clip.architecture(self.width, self.layers, self.patch, self.side, kind)


def _count(weights: Weights, prefix: str) -> int:
    return len({key[len(prefix) :].split(".")[0] for key in weights if key.startswith(prefix)})


def transformer(sizes: Sizes, quick: bool) -> nn.Module:
    """OpenCLIP's own vision transformer, without weights. Raises ImportError."""
    from open_clip.transformer import QuickGELU, VisionTransformer

    return VisionTransformer(
        sizes.side, sizes.patch, sizes.width, sizes.layers, sizes.heads, sizes.ratio, output_dim=sizes.out,
        act_layer=QuickGELU if quick else nn.GELU,
    )  # fmt: skip


def open_clip(weights: Weights, file: str, activation: str) -> Tower:
    """OpenCLIP's own vision transformer. Raises KeyError, ImportError."""
    width, _, patch, _ = weights["conv1.weight"].shape
    sizes = Sizes(
        width,
        _count(weights, "transformer.resblocks."),
        patch,
        weights["positional_embedding"].shape[0],
        weights["transformer.resblocks.0.mlp.c_fc.weight"].shape[0],
        weights["proj"].shape[1],
    )
    quick = clip.is_quick(sizes.name(), file) if activation == "auto" else activation == "quick_gelu"
    with torch.device("meta"):
        module = transformer(sizes, quick)
    return Tower(sizes.name(), sizes.side, module, weights, _run_open_clip)


def _run_open_clip(tower: Any, pixels: Tensor) -> Layers:
    out = tower.forward_intermediates(pixels, indices=2, output_fmt="NLC", output_extra_tokens=True)
    patches, heads = out["image_intermediates"], out["image_intermediates_prefix"]
    penultimate, last = (torch.cat(pair, dim=1) for pair in zip(heads, patches, strict=True))
    return {"projected": out["image_features"], "penultimate": penultimate, "last": last}


def eva_clip(weights: Weights, file: str, activation: str) -> Tower:
    """EVA-CLIP's tower with rotary positions, in its authors' or OpenCLIP's names. Raises KeyError, ImportError."""
    from timm.models.eva import Eva

    # Angles are computed anew; checkpoints keep them, some in every block.
    weights = keymaps.rename({key: w for key, w in weights.items() if "rope." not in key}, keymaps.EVA_CLIP)
    width, _, patch, _ = weights["patch_embed.proj.weight"].shape
    sizes = Sizes(
        width,
        _count(weights, "blocks."),
        patch,
        weights["pos_embed"].shape[1],
        weights["blocks.0.mlp.fc1_g.weight"].shape[0],
        weights["head.weight"].shape[0],
    )
    if sizes.layers <= max(clip.EVA_LEVELS):
        raise ValueError(f"got {file}, an EVA-CLIP of {sizes.layers} blocks; expected EVA02-CLIP-L-14-336, of 24")
    make = partial(
        Eva, sizes.side, patch, num_classes=sizes.out, global_pool="token", embed_dim=width, num_heads=sizes.heads,
        qkv_fused=False, mlp_ratio=sizes.ratio, swiglu_mlp=True, scale_mlp=True, scale_attn_inner=True,
        use_rot_pos_emb=True, ref_feat_shape=clip.EVA_GRID,
    )  # fmt: skip
    with torch.device("meta"):
        module = make(depth=sizes.layers)
    module.rope = make(depth=0).rope  # no weight of the file, so not to be left on meta
    return Tower(sizes.name("eva02"), sizes.side, module, weights, _run_eva_clip, zero=False)


def _run_eva_clip(tower: Any, pixels: Tensor) -> Layers:
    blocks = len(tower.blocks)
    before = [i - 1 for i in clip.EVA_LEVELS]  # a block's input is what the one before gives
    wanted = sorted({*before, blocks - 2, blocks - 1})
    out, states = tower.forward_intermediates(pixels, indices=wanted, output_fmt="NLC", return_prefix_tokens=True)
    after = {i: torch.cat((head, patches), dim=1) for i, (patches, head) in zip(wanted, states, strict=True)}
    return {
        "projected": tower.forward_head(out),
        "penultimate": after[blocks - 2],
        "last": after[blocks - 1],
        "levels": torch.stack([after[i] for i in before], dim=1),
    }


class Pooled(CLIPVision):
    """The host's SigLIP tower with the pooling head that it leaves out."""

    def __init__(self, config: Mapping[str, Any], operations: Any) -> None:
        super().__init__(config, torch.float32, "meta", operations)
        self.head = PoolingHead(config["hidden_size"], config["num_attention_heads"], config["intermediate_size"])
        for module in self.modules():
            if isinstance(module, nn.LayerNorm):
                module.eps = siglip_head.EPSILON  # the host leaves it at CLIP's


def siglip(weights: Weights, file: str, activation: str) -> Tower:
    """SigLIP's tower as transformers saves it. Raises KeyError."""
    weights = {key: weight for key, weight in weights.items() if key != "embeddings.position_ids"}
    width, channels, patch, _ = weights["embeddings.patch_embedding.weight"].shape
    positions, layers = weights["embeddings.position_embedding.weight"].shape[0], _count(weights, "encoder.layers.")
    size = clip.SIGLIP_SIZES.get((positions, patch)) or round(positions**0.5) * patch
    config = {
        "num_channels": channels, "hidden_act": "gelu_pytorch_tanh", "hidden_size": width, "image_size": size,
        "intermediate_size": weights["encoder.layers.0.mlp.fc1.weight"].shape[0], "patch_size": patch,
        "model_type": "siglip_vision_model", "num_hidden_layers": layers,
        "num_attention_heads": width // clip.HEAD_WIDTHS.get(width, 64),
    }  # fmt: skip
    with torch.device("meta"):
        module = Pooled(config, comfy.ops.disable_weight_init)
    name = clip.architecture(width, layers, patch, size, "so")
    pixels = {"mean": [0.5] * 3, "std": [0.5] * 3, "crop": False}  # stretched to a square, as published
    return Tower(name, size, module, weights, _run_siglip, zero=False, family="siglip", pixels=pixels)


def _run_siglip(tower: Any, pixels: Tensor) -> Layers:
    states = tower(pixels)[0]
    return {"pooled": tower.head(states)}


# The tensor that tells a layout -> what builds its tower of weights, file name and activation.
LAYOUTS: Mapping[str, Callable[[Weights, str, str], Tower]] = {
    "patch_embed.proj.weight": eva_clip,
    "trunk.patch_embed.proj.weight": eva_clip,
    "conv1.weight": open_clip,
    "head.probe": siglip,
}


EXPECTED = (
    "an OpenCLIP checkpoint with visual.* weights of a vision transformer; files in the transformers layout are for "
    "ComfyUI's own Load CLIP Vision"
)


def tower_of(weights: Weights, file: str, activation: str, expected: str = EXPECTED) -> Tower:
    """The tower of a checkpoint's `visual.*` weights. Raises ValueError, which says what was `expected`."""
    build = next((build for key, build in LAYOUTS.items() if key in weights), open_clip)
    try:
        return build(weights, file, activation)
    except ImportError as error:
        raise ValueError(
            f"got no open_clip ({error}); expected open_clip_torch beside ComfyUI; "
            "run pip install -r requirements.txt in this pack's folder with ComfyUI's Python"
        ) from error
    except (KeyError, IndexError) as error:
        raise ValueError(f"got {file}, which misses {error}; expected {expected}") from error
