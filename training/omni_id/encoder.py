"""The encoder E, likeness/omni_id.py's own, with its gradient: made anew, read from a file, written to one."""

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

from ...likeness import keymaps, omni_id
from ...likeness.omni_id import OmniID
from ...likeness.spec import OmniIDSpec
from ...nodes.loaders import towers
from ..task import start

FILE = "omni_id.safetensors"
VISUAL = "visual."  # under which OpenCLIP's checkpoints have the trunk
VISION = "vision_model."  # and transformers', whose q, k and v are three there
TRUNK = "trunk."


@dataclass(frozen=True, kw_only=True)
class Sizes:
    """`image_size` and `patch` in pixels; `features` and `layers` are the trunk's, which begins as the vision tower
    `trunk` if one is named, OpenCLIP's or in the transformers' layout; `projection` is CLIP's, which nothing reads.
    `tokens` are `width` wide, and `inner` inside their MLPs.
    """

    image_size: int = 112
    patch: int = 14
    features: int = 128
    layers: int = 4
    projection: int = 128
    activation: str = "gelu"
    trunk: str = ""
    tokens: int = 64
    width: int = 128
    heads: int = 4
    inner: int = 256
    cross_blocks: int = 2
    self_blocks: int = 2

    @property
    def spec(self) -> OmniIDSpec:
        return OmniIDSpec(
            image_size=self.image_size, patch=self.patch, features=self.features, activation=self.activation,
            tokens=self.tokens, width=self.width, heads=self.heads, inner=self.inner,
            cross_blocks=self.cross_blocks, self_blocks=self.self_blocks,
        )  # fmt: skip


def attention(q: Tensor, k: Tensor, v: Tensor, heads: int, bias: Tensor | None) -> Tensor:
    """torch's own, which is fast in both directions (omni_id.Attention)."""
    return attention_pytorch(q, k, v, heads, mask=bias)


def fresh(sizes: Sizes, seed: int) -> OmniID:
    """An encoder of first weights; its trunk may begin as CLIP's. Raises ValueError where that has other sizes."""
    spec, inner = sizes.spec, 4 * sizes.features
    tower = towers.Sizes(spec.features, sizes.layers, spec.patch, spec.side**2 + 1, inner, sizes.projection)
    module = OmniID(spec, towers.transformer(tower, spec.activation == "quick_gelu"), nn, attention)
    start(module, seed)
    if sizes.trunk:
        module.trunk.load_state_dict(_trunk(Path(sizes.trunk), module))
    return trainable(module)


def _trunk(file: Path, module: OmniID) -> dict[str, Tensor]:
    try:
        found = _named(load_file(file))
        told = omni_id.fitted({omni_id.POSITIONS: found["positional_embedding"]}, module.spec)
        found = {key: value.float() for key, value in (found | keymaps.under(told, TRUNK)).items()}
    except (OSError, KeyError, SafetensorError) as error:
        raise ValueError(f"got {file} ({str(error).splitlines()[0]}); expected a CLIP vision tower") from error
    own = {key: value.shape for key, value in module.trunk.state_dict().items()}
    if own != {key: value.shape for key, value in found.items()}:
        raise ValueError(
            f"got {file}, another network than [task] says; expected one of its features, layers and patch"
        )
    return found


def _named(tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """A vision tower's tensors by OpenCLIP's names."""
    if not any(key.startswith(VISION) for key in tensors):
        return keymaps.under(tensors, VISUAL)
    found = keymaps.rename(tensors, keymaps.CLIP_VISION)
    found["proj"] = found["proj"].mT
    for key in [key for key in found if ".attn.q_" in key]:
        parts = [found.pop(key.replace(".attn.q_", f".attn.{part}_")) for part in "qkv"]
        found[key.replace(".attn.q_", ".attn.in_proj_")] = torch.cat(parts)
    return found


def trainable(module: OmniID) -> OmniID:
    """All that the tokens come of has a gradient; what makes CLIP's own embedding of the trunk's states has none."""
    trunk: Any = module.requires_grad_(True).trunk
    trunk.proj.requires_grad_(False)
    trunk.ln_post.requires_grad_(module.spec.states == "normed")
    return module


def load(file: Path) -> OmniID:
    """The encoder of a file of the pack's own, frozen. Raises ValueError where the file is not one."""
    try:
        with safe_open(file, "pt") as opened:
            told: Mapping[str, Any] = json.loads((opened.metadata() or {})["likeness"])
        tensors = {key: value.float() for key, value in load_file(file).items()}
    except (OSError, KeyError, SafetensorError) as error:
        raise ValueError(
            f"got {file} ({str(error).splitlines()[0]}); expected an Omni-ID encoder; train omni_masked first"
        ) from error
    spec = omni_id.read_spec(tensors, told, file.name)
    tensors = omni_id.fitted(tensors, spec)
    tower = towers.tower_of(keymaps.under(tensors, TRUNK), file.name, spec.activation)
    return omni_id.build(spec, tensors, tower.module, nn, attention).eval().requires_grad_(False)


def save(module: OmniID, folder: Path, notes: Mapping[str, Any], name: str = FILE) -> None:
    """Write what Load Omni-ID Encoder reads, under that name."""
    tensors = {key: value.half().contiguous() for key, value in module.state_dict().items()}
    save_file(tensors, folder / name, omni_id.metadata(replace(module.spec, notes=dict(notes))))


def states(module: OmniID, faces: Tensor) -> Tensor:
    """f: what the trunk sees of faces [n, S, S, 3 or 4], uint8, one by one: [n, S', features]."""
    return module.states(omni_id.normed(faces[..., :3].to(module.queries) / 255))


def tokens(module: OmniID, seen: Tensor, people: int) -> Tensor:
    """E: the tokens [people, L, C] of states [people * n, S', features], n photos of each."""
    return module.read(seen.unflatten(0, (people, -1)).flatten(1, 2))
