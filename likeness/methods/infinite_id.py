"""Infinite-ID (arXiv 2403.11781): an identity stream and a text stream, fused by mixed attention and AdaIN-mean.

    c_id = [M_clip(E_clip(FA(x))); M_face(E_face(FA(x)))]                              (identity embedding)
    self-attention:  Attn(Q, [K_id; K_t], [V_id; V_t])                                 (mixed attention)
    cross-attention: Attn(Q, K'_id, V'_id) + Attn(Q, K'_t, V'_t),   K'_id, V'_id of c_id, K'_t, V'_t of the text
    AdaIN-m(x, y) = x - mean(x) + mean(y), over tokens, on K_id and V_id in both places

The image is the identity stream; its rows give Q, K_id and V_id. K_t and V_t come from the rows of the text stream, in
the same layer and step. Where the paper is silent: rows of the negative prompt attend to the tokens of a zero face
(`unconditional` zero) or to no tokens (none), and mix with the text stream's rows of the negative prompt.

File: safetensors, `projector.clip.0` (LayerNorm), `projector.clip.1` (Linear), `projector.face.proj.0`, `.proj.2`,
`.norm` (an MLP to tokens), `layers.<n>.k.weight`, `.v.weight` [hidden, width], n = 1, 3, 5, ... as IP-Adapter counts.
Metadata under `likeness`: kind, version, base, unconditional, notes; needs (features by name) and clip_tokens if the
encoders are not the paper's.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal, get_args

import torch
from torch import Tensor

from ..attention.grouped_attention import KeyValueBlock
from ..checkpoints import checkpoint_detection, native_metadata
from ..spec import AdapterSpec, Feature
from .ip_adapter import IdentityTokens

KIND = "infinite_id"
NUM_CLIP_TOKENS = 257
PAPER_FEATURES = (
    checkpoint_detection.ARCFACE_BUFFALO_L,
    Feature(checkpoint_detection.PENULTIMATE_NETWORK, "last", "face224"),
)
REQUIRED_TENSORS = (
    "projector.clip.0.weight", "projector.clip.1.weight", "projector.face.proj.2.weight", "projector.face.norm.weight",
)  # fmt: skip
UnconditionalMode = Literal["zero", "none"]
UNCONDITIONAL_MODES = get_args(UnconditionalMode)
PAPER_METADATA: Mapping[str, Any] = {
    "needs": [str(feature) for feature in PAPER_FEATURES],
    "clip_tokens": NUM_CLIP_TOKENS,
}
MIN_STD = 1e-5  # smaller standard deviations are not divided by

StyleNormalization = Callable[[Tensor, Tensor], Tensor]  # x [B, N, C] with the statistics of y [B, M, C]


def apply_adain_mean(x: Tensor, y: Tensor) -> Tensor:
    """AdaIN-m: x with the mean of y, over tokens."""
    return x - x.mean(1, keepdim=True) + y.mean(1, keepdim=True)


def apply_adain(x: Tensor, y: Tensor) -> Tensor:
    """AdaIN: x with mean and standard deviation of y. The paper finds that it costs likeness."""
    ratio = y.std(1, correction=0, keepdim=True) / x.std(1, correction=0, keepdim=True).clamp(min=MIN_STD)
    return (x - x.mean(1, keepdim=True)) * ratio + y.mean(1, keepdim=True)


STYLE_NORMALIZATIONS: Mapping[str, StyleNormalization] = {
    "none": lambda x, y: x,
    "AdaIN-mean": apply_adain_mean,
    "AdaIN": apply_adain,
}


def _mixed_attention(
    identity: KeyValueBlock, text: KeyValueBlock, style: StyleNormalization, weight: float
) -> tuple[KeyValueBlock, ...]:
    """K = [K_id; K_t], where a key of the text stream counts `weight` times."""
    k, v = style(identity.k, text.k), style(identity.v, text.v)
    return KeyValueBlock(k, v), _weight_block(text, weight)


def _mutual_attention(
    identity: KeyValueBlock, text: KeyValueBlock, style: StyleNormalization, weight: float
) -> tuple[KeyValueBlock, ...]:
    """K_t instead of K_id (the paper's ablation). Below weight 1, K_id keeps the rest of the attention."""
    if weight >= 1:
        return (text,)
    k, v = style(identity.k, text.k), style(identity.v, text.v)
    return _weight_block(KeyValueBlock(k, v), 1 - weight), _weight_block(text, weight)


def _weight_block(block: KeyValueBlock, weight: float) -> KeyValueBlock:
    if weight == 1:
        return block
    return KeyValueBlock(block.k, block.v, block.k.new_full((1, 1, block.k.shape[1]), math.log(weight)))


# The blocks that the identity stream's self-attention reads, from its own block and the text stream's, with a style and
# a weight above 0.
SelfAttentionMode = Callable[[KeyValueBlock, KeyValueBlock, StyleNormalization, float], tuple[KeyValueBlock, ...]]
SELF_ATTENTION_MODES: Mapping[str, SelfAttentionMode | None] = {
    "mixed": _mixed_attention,
    "mutual": _mutual_attention,
    "off": None,
}
MIXING_MODES = ("stacked", "interpolated")


def combine_identity_tokens(weighted_tokens: Sequence[tuple[IdentityTokens, float]], mixing: str) -> IdentityTokens:
    """One c_id of several people's: stacked with weights, or their weighted mean."""
    weights = torch.cat([tokens.weight * weight for tokens, weight in weighted_tokens])
    cond, uncond = (torch.cat([getattr(tokens, part) for tokens, _ in weighted_tokens]) for part in ("cond", "uncond"))
    if mixing == "stacked":
        return IdentityTokens(cond, uncond, weights)
    share = (weights / weights.sum()).to(cond)[:, None, None]
    return IdentityTokens((share * cond).sum(0, keepdim=True), uncond[:1], torch.ones(1))


@dataclass(frozen=True)
class InfiniteIDMetadata(native_metadata.NativeMetadata):
    """`clip_tokens` is the number of states that the CLIP encoder gives."""

    kind = KIND
    unconditional: UnconditionalMode
    needs: tuple[Feature, ...]
    clip_tokens: int


def make_infinite_id_metadata(spec: AdapterSpec, clip_tokens: int, notes: Mapping[str, Any]) -> dict[str, str]:
    """The metadata of an adapter's safetensors file."""
    return native_metadata.encode_metadata(InfiniteIDMetadata, spec, clip_tokens=clip_tokens, notes=notes)


def read_infinite_id_spec(tensors: Mapping[str, Tensor], metadata: Mapping[str, Any], file: str) -> AdapterSpec:
    """The spec of a file's tensors and metadata. Raises ValueError where they are incomplete or of a newer version."""
    stored = native_metadata.decode_metadata(InfiniteIDMetadata, {**PAPER_METADATA, **metadata}, file)
    shapes = checkpoint_detection.get_tensor_shapes(tensors)
    missing = [name for name in REQUIRED_TENSORS if name not in shapes]
    if missing:
        raise ValueError(f"got {file} without {missing[0]}; expected both mappers of Infinite-ID; fetch the file again")
    layers, width = checkpoint_detection.read_unet_layers(shapes, file)
    face_tokens = shapes["projector.face.proj.2.weight"][0] // shapes["projector.face.norm.weight"][0]
    return AdapterSpec(
        kind=KIND,
        base=checkpoint_detection.BASES_BY_LAYER_COUNT[len(layers)],
        tokens=stored.clip_tokens + face_tokens,
        width=width,
        layers=layers,
        needs=stored.needs,
        unconditional=stored.unconditional,
    )
