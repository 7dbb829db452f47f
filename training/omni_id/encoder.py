"""The Omni-ID encoder E of likeness/methods/omni_id.py for training: initialize, load and save it."""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from comfy.ldm.modules.attention import attention_pytorch
from safetensors import SafetensorError, safe_open
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from ...likeness.checkpoints import key_maps
from ...likeness.encoders import clip_vision
from ...likeness.methods import omni_id
from ...likeness.methods.omni_id import OmniIDModel
from ...likeness.spec import OmniIDSpec
from ...nodes.loaders import vision_towers
from ..task import init_weights

ENCODER_FILE = "omni_id.safetensors"
OPEN_CLIP_PREFIX = "visual."  # of the vision tower in OpenCLIP checkpoints
TRANSFORMERS_PREFIX = "vision_model."  # and in the transformers layout, with separate q, k and v
TRUNK_PREFIX = "trunk."


@dataclass(frozen=True, kw_only=True)
class OmniIDEncoderConfig:
    """`image_size` and `patch_size` are in pixels. The trunk has `trunk_layers` layers of `trunk_width` with
    `trunk_heads` heads (0: as published CLIP towers of this width). It starts from the vision tower in the file
    `init_trunk_from`, in OpenCLIP's or the transformers layout, unless that is empty. `projection_width` is the width
    of CLIP's image embedding, which is unused. The encoder makes `num_tokens` tokens of `width`, with MLPs of
    `mlp_width`.
    """

    image_size: int = 112
    patch_size: int = 14
    trunk_width: int = 128
    trunk_layers: int = 4
    projection_width: int = 128
    activation: str = "gelu"
    init_trunk_from: str = ""
    num_tokens: int = 64
    width: int = 128
    num_heads: int = 4
    mlp_width: int = 256
    cross_blocks: int = 2
    self_blocks: int = 2
    trunk_heads: int = 0

    @property
    def spec(self) -> OmniIDSpec:
        return OmniIDSpec(
            image_size=self.image_size, patch_size=self.patch_size, trunk_width=self.trunk_width,
            activation=self.activation, tokens=self.num_tokens, width=self.width, heads=self.num_heads,
            mlp_width=self.mlp_width, cross_blocks=self.cross_blocks, self_blocks=self.self_blocks,
            trunk_heads=self.trunk_heads,
        )  # fmt: skip


def run_pytorch_attention(q: Tensor, k: Tensor, v: Tensor, num_heads: int, bias: Tensor | None) -> Tensor:
    """PyTorch attention, as omni_id.MultiHeadAttentionFunction: fast forward and backward."""
    return attention_pytorch(q, k, v, num_heads, mask=bias)


def build_trainable_encoder(config: OmniIDEncoderConfig, seed: int) -> OmniIDModel:
    """An initialized encoder. Raises ValueError if the vision tower for its trunk has other sizes."""
    spec = config.spec
    sizes = vision_towers.TowerSizes(
        spec.trunk_width,
        config.trunk_layers,
        spec.patch_size,
        spec.patches_per_side**2 + 1,
        4 * config.trunk_width,
        config.projection_width,
        spec.trunk_heads or clip_vision.get_published_head_count(spec.trunk_width, "a trunk"),
    )
    trunk = vision_towers.build_open_clip_transformer(sizes, spec.activation == "quick_gelu")
    module = OmniIDModel(spec, trunk, nn, run_pytorch_attention)
    init_weights(module, seed)
    if config.init_trunk_from:
        module.trunk.load_state_dict(_load_trunk_weights(Path(config.init_trunk_from), module))
    return make_encoder_trainable(module)


def _load_trunk_weights(file: Path, module: OmniIDModel) -> dict[str, Tensor]:
    try:
        tensors = _rename_to_open_clip(load_file(file))
        positions = omni_id.interpolate_position_embeddings(
            {omni_id.POSITION_EMBEDDING_NAME: tensors["positional_embedding"]}, module.spec
        )
        tensors |= key_maps.select_prefix(positions, TRUNK_PREFIX)
        tensors = {key: value.float() for key, value in tensors.items()}
    except (OSError, KeyError, SafetensorError) as error:
        raise ValueError(f"got {file} ({str(error).splitlines()[0]}); expected a CLIP vision tower") from error
    expected = {key: value.shape for key, value in module.trunk.state_dict().items()}
    if expected != {key: value.shape for key, value in tensors.items()}:
        raise ValueError(
            f"got {file}, whose sizes differ from those in [task]; expected a vision tower with the same "
            "trunk_width, trunk_layers, projection_width and patch_size"
        )
    return tensors


def _rename_to_open_clip(tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """A vision tower's tensors in OpenCLIP's layout."""
    if not any(key.startswith(TRANSFORMERS_PREFIX) for key in tensors):
        return key_maps.select_prefix(tensors, OPEN_CLIP_PREFIX)
    renamed = key_maps.rename_keys(tensors, key_maps.CLIP_VISION)
    renamed["proj"] = renamed["proj"].mT
    for key in [key for key in renamed if ".attn.q_" in key]:
        parts = [renamed.pop(key.replace(".attn.q_", f".attn.{part}_")) for part in "qkv"]
        renamed[key.replace(".attn.q_", ".attn.in_proj_")] = torch.cat(parts)
    return renamed


def make_encoder_trainable(module: OmniIDModel) -> OmniIDModel:
    """Enable gradients for all parameters that the tokens depend on: all but those of CLIP's image embedding."""
    trunk: Any = module.requires_grad_(True).trunk
    trunk.proj.requires_grad_(False)
    trunk.ln_post.requires_grad_(module.spec.states == "normed")
    return module


def load_encoder_file(file: Path) -> OmniIDModel:
    """The frozen encoder of a native file. Raises ValueError on other files."""
    try:
        with safe_open(file, "pt") as opened:
            metadata: Mapping[str, Any] = json.loads((opened.metadata() or {})["likeness"])
        tensors = {key: value.float() for key, value in load_file(file).items()}
    except (OSError, KeyError, SafetensorError) as error:
        raise ValueError(
            f"got {file} ({str(error).splitlines()[0]}); expected an Omni-ID encoder; train omni_masked first"
        ) from error
    spec = omni_id.read_omni_id_spec(tensors, metadata, file.name)
    tensors = omni_id.interpolate_position_embeddings(tensors, spec)
    tower = vision_towers.build_vision_tower(
        key_maps.select_prefix(tensors, TRUNK_PREFIX), file.name, spec.activation, num_heads=spec.trunk_heads
    )
    module = omni_id.build_omni_id_model(spec, tensors, tower.module, nn, run_pytorch_attention)
    return module.eval().requires_grad_(False)


def save_encoder_file(
    module: OmniIDModel, folder: Path, notes: Mapping[str, Any], file_name: str = ENCODER_FILE
) -> None:
    """Write a file for Load Omni-ID Encoder."""
    tensors = {key: value.half().contiguous() for key, value in module.state_dict().items()}
    save_file(tensors, folder / file_name, omni_id.make_omni_id_metadata(replace(module.spec, notes=dict(notes))))


def extract_face_states(module: OmniIDModel, faces: Tensor) -> Tensor:
    """f: the trunk's hidden states [n, S', trunk_width] of faces [n, S, S, 3 or 4], uint8, each encoded by itself."""
    return module.extract_states(omni_id.normalize_images(faces[..., :3].to(module.queries) / 255))


def encode_face_tokens(module: OmniIDModel, trunk_states: Tensor, num_people: int) -> Tensor:
    """E: tokens [num_people, L, C] of trunk states [num_people * n, S', trunk_width], n photos encoded jointly."""
    return module.encode_states(trunk_states.unflatten(0, (num_people, -1)).flatten(1, 2))
