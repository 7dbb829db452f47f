"""Vision towers of checkpoints, detected by their tensors: OpenCLIP (open_clip), EVA-CLIP (timm), SigLIP (ComfyUI)."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from functools import partial
from typing import Any

import comfy.ops
import torch
from comfy.clip_model import CLIPVision
from torch import Tensor, nn

from ...likeness.checkpoints import key_maps
from ...likeness.encoders import clip_vision

SIGLIP_LAYER_NORM_EPS = 1e-6

LayerOutputs = dict[str, Tensor]
TowerWeights = Mapping[str, Tensor]


@dataclass(frozen=True, eq=False)
class VisionTower:
    """The network of a checkpoint, on the meta device, and its weights.

    `run_layers` runs it on normalized pixels [n, 3, size, size]. `reads_zero_image`: adapters use its features of the
    zero image where there is no face. `family` is as in encoder ids. `preprocess_options` go to ComfyUI's
    clip_preprocess, in addition to the size.
    """

    architecture: str
    image_size: int
    module: nn.Module
    weights: TowerWeights
    run_layers: Callable[[Any, Tensor], LayerOutputs]
    reads_zero_image: bool = True
    family: str = "clip"
    preprocess_options: Mapping[str, Any] = field(default_factory=dict)


@dataclass(frozen=True)
class TowerSizes:
    """The sizes of a vision transformer. `num_positions` includes the class token."""

    width: int
    num_layers: int
    patch_size: int
    num_positions: int
    mlp_width: int
    output_width: int
    num_heads: int

    @property
    def image_size(self) -> int:
        """Side of the input image in pixels."""
        return round((self.num_positions - 1) ** 0.5) * self.patch_size

    @property
    def mlp_ratio(self) -> float:
        return (self.mlp_width + 0.5) / self.width  # the library computes int(width * ratio)

    def name_architecture(self, prefix: str = "vit") -> str:
        return clip_vision.name_architecture(self.width, self.num_layers, self.patch_size, self.image_size, prefix)


def _count_blocks(weights: TowerWeights, prefix: str) -> int:
    return len({key[len(prefix) :].split(".")[0] for key in weights if key.startswith(prefix)})


def build_open_clip_transformer(sizes: TowerSizes, quick_gelu: bool) -> nn.Module:
    """OpenCLIP's vision transformer without weights. Raises ImportError."""
    from open_clip.transformer import QuickGELU, VisionTransformer

    return VisionTransformer(
        sizes.image_size, sizes.patch_size, sizes.width, sizes.num_layers, sizes.num_heads, sizes.mlp_ratio,
        output_dim=sizes.output_width, act_layer=QuickGELU if quick_gelu else nn.GELU,
    )  # fmt: skip


def build_open_clip_tower(weights: TowerWeights, file: str, activation: str, num_heads: int) -> VisionTower:
    """OpenCLIP's vision transformer. Raises KeyError, ImportError."""
    width, _, patch, _ = weights["conv1.weight"].shape
    sizes = TowerSizes(
        width,
        _count_blocks(weights, "transformer.resblocks."),
        patch,
        weights["positional_embedding"].shape[0],
        weights["transformer.resblocks.0.mlp.c_fc.weight"].shape[0],
        weights["proj"].shape[1],
        num_heads or clip_vision.get_published_head_count(width, file),
    )
    quick_gelu = activation == "quick_gelu"
    if activation == "auto":
        quick_gelu = clip_vision.uses_quick_gelu(sizes.name_architecture(), file)
    with torch.device("meta"):
        module = build_open_clip_transformer(sizes, quick_gelu)
    return VisionTower(sizes.name_architecture(), sizes.image_size, module, weights, _run_open_clip)


def _run_open_clip(tower: Any, pixels: Tensor) -> LayerOutputs:
    output = tower.forward_intermediates(pixels, indices=2, output_fmt="NLC", output_extra_tokens=True)
    patches, class_tokens = output["image_intermediates"], output["image_intermediates_prefix"]
    penultimate, last = (torch.cat(pair, dim=1) for pair in zip(class_tokens, patches, strict=True))
    return {"projected": output["image_features"], "penultimate": penultimate, "last": last}


def build_eva_clip_tower(weights: TowerWeights, file: str, activation: str, num_heads: int) -> VisionTower:
    """EVA-CLIP's tower with rotary embeddings, in its authors' or OpenCLIP's layout. Raises KeyError, ImportError."""
    from timm.models.eva import Eva

    # timm computes the rotary angles; checkpoints store them, some in every block.
    weights = key_maps.rename_keys({key: w for key, w in weights.items() if "rope." not in key}, key_maps.EVA_CLIP)
    width, _, patch, _ = weights["patch_embed.proj.weight"].shape
    sizes = TowerSizes(
        width,
        _count_blocks(weights, "blocks."),
        patch,
        weights["pos_embed"].shape[1],
        weights["blocks.0.mlp.fc1_g.weight"].shape[0],
        weights["head.weight"].shape[0],
        num_heads or clip_vision.get_published_head_count(width, file),
    )
    if sizes.num_layers <= max(clip_vision.EVA_LEVEL_BLOCKS):
        raise ValueError(
            f"got {file}, an EVA-CLIP with {sizes.num_layers} blocks; expected EVA02-CLIP-L-14-336, which has 24"
        )
    build = partial(
        Eva, sizes.image_size, patch, num_classes=sizes.output_width, global_pool="token", embed_dim=width,
        num_heads=sizes.num_heads,
        qkv_fused=False, mlp_ratio=sizes.mlp_ratio, swiglu_mlp=True, scale_mlp=True, scale_attn_inner=True,
        use_rot_pos_emb=True, ref_feat_shape=clip_vision.EVA_ROPE_GRID,
    )  # fmt: skip
    with torch.device("meta"):
        module = build(depth=sizes.num_layers)
    module.rope = build(depth=0).rope  # not in the file, so it must not stay on the meta device
    return VisionTower(
        sizes.name_architecture("eva02"), sizes.image_size, module, weights, _run_eva_clip, reads_zero_image=False
    )


def _run_eva_clip(tower: Any, pixels: Tensor) -> LayerOutputs:
    blocks = len(tower.blocks)
    level_indices = [i - 1 for i in clip_vision.EVA_LEVEL_BLOCKS]  # a block's input is the previous block's output
    indices = sorted({*level_indices, blocks - 2, blocks - 1})
    output, states = tower.forward_intermediates(pixels, indices=indices, output_fmt="NLC", return_prefix_tokens=True)
    outputs = {
        i: torch.cat((class_token, patches), dim=1) for i, (patches, class_token) in zip(indices, states, strict=True)
    }
    return {
        "projected": tower.forward_head(output),
        "penultimate": outputs[blocks - 2],
        "last": outputs[blocks - 1],
        "levels": torch.stack([outputs[i] for i in level_indices], dim=1),
    }


def build_siglip_pooling_head(width: int, num_heads: int, mlp_width: int) -> nn.Module:
    """transformers' attention pooling head of SigLIP (arXiv 2303.15343), which InstantX reads: [n, T, W] to [n, W]."""
    from transformers.models.siglip.configuration_siglip import SiglipVisionConfig
    from transformers.models.siglip.modeling_siglip import SiglipMultiheadAttentionPoolingHead

    return SiglipMultiheadAttentionPoolingHead(
        SiglipVisionConfig(hidden_size=width, num_attention_heads=num_heads, intermediate_size=mlp_width)
    )


class SigLIPTower(CLIPVision):
    """ComfyUI's SigLIP tower with the pooling head that it leaves out."""

    def __init__(self, config: Mapping[str, Any], operations: Any) -> None:
        super().__init__(config, torch.float32, "meta", operations)
        self.head = build_siglip_pooling_head(
            config["hidden_size"], config["num_attention_heads"], config["intermediate_size"]
        )
        for module in self.modules():
            if isinstance(module, nn.LayerNorm):
                module.eps = SIGLIP_LAYER_NORM_EPS  # the host uses CLIP's


def build_siglip_tower(weights: TowerWeights, file: str, activation: str, num_heads: int) -> VisionTower:
    """SigLIP's tower in transformers' layout. Raises KeyError."""
    weights = {key: weight for key, weight in weights.items() if key != "embeddings.position_ids"}
    width, channels, patch_size, _ = weights["embeddings.patch_embedding.weight"].shape
    num_positions = weights["embeddings.position_embedding.weight"].shape[0]
    num_layers = _count_blocks(weights, "encoder.layers.")
    image_size = clip_vision.SIGLIP_IMAGE_SIZES.get((num_positions, patch_size))
    image_size = image_size or round(num_positions**0.5) * patch_size
    config = {
        "num_channels": channels, "hidden_act": "gelu_pytorch_tanh", "hidden_size": width, "image_size": image_size,
        "intermediate_size": weights["encoder.layers.0.mlp.fc1.weight"].shape[0], "patch_size": patch_size,
        "model_type": "siglip_vision_model", "num_hidden_layers": num_layers,
        "num_attention_heads": num_heads or clip_vision.get_published_head_count(width, file),
    }  # fmt: skip
    with torch.device("meta"):
        module = SigLIPTower(config, comfy.ops.disable_weight_init)
    name = clip_vision.name_architecture(width, num_layers, patch_size, image_size, "so")
    preprocess_options = {"mean": [0.5] * 3, "std": [0.5] * 3, "crop": False}  # stretched to a square, as published
    return VisionTower(
        name,
        image_size,
        module,
        weights,
        _run_siglip,
        reads_zero_image=False,
        family="siglip",
        preprocess_options=preprocess_options,
    )


def _run_siglip(tower: Any, pixels: Tensor) -> LayerOutputs:
    return {"pooled": tower.head(tower(pixels)[0])}


# A tensor of the layout -> the function that builds its tower from weights, file name, activation and number of heads.
TOWER_BUILDERS: Mapping[str, Callable[[TowerWeights, str, str, int], VisionTower]] = {
    "patch_embed.proj.weight": build_eva_clip_tower,
    "trunk.patch_embed.proj.weight": build_eva_clip_tower,
    "conv1.weight": build_open_clip_tower,
    "head.probe": build_siglip_tower,
}
EXPECTED_CHECKPOINT = (
    "an OpenCLIP checkpoint with visual.* weights of a vision transformer; load files in the transformers layout with "
    "ComfyUI's own Load CLIP Vision"
)


def build_vision_tower(
    weights: TowerWeights, file: str, activation: str, expected: str = EXPECTED_CHECKPOINT, num_heads: int = 0
) -> VisionTower:
    """Build the tower of a checkpoint's `visual.*` weights, with as many heads as published towers of its width if
    `num_heads` is 0. Raises ValueError with `expected` in its text."""
    build = next((build for key, build in TOWER_BUILDERS.items() if key in weights), build_open_clip_tower)
    try:
        return build(weights, file, activation, num_heads)
    except ImportError as error:
        raise ValueError(
            f"could not import open_clip ({error}); expected open_clip_torch in ComfyUI's Python; "
            "run pip install -r requirements.txt in this pack's folder with ComfyUI's Python"
        ) from error
    except (KeyError, IndexError) as error:
        raise ValueError(f"got {file}, which misses {error}; expected {expected}") from error
