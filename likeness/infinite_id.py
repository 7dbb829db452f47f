"""Infinite-ID (arXiv 2403.11781): an identity stream and a text stream, fused by mixed attention and AdaIN-mean.

    c_id = [M_clip(E_clip(FA(x))); M_face(E_face(FA(x)))]                              (identity embedding)
    self-attention:  Attn(Q, [K_id; K_t], [V_id; V_t])                                 (mixed attention)
    cross-attention: Attn(Q, K'_id, V'_id) + Attn(Q, K'_t, V'_t),   K'_id, V'_id of c_id, K'_t, V'_t of the text
    AdaIN-m(x, y) = x - mean(x) + mean(y), over tokens, on K_id and V_id in both places

The picture is the identity stream; its rows give Q, K_id and V_id. K_t and V_t come from the text stream's, in the same
layer and step. Where the paper is silent: the negative prompt's rows attend to the tokens of no face (`unconditional`
zero, or none: to no tokens), and mix with the text stream's rows of the negative prompt.

File: safetensors, `projector.clip.0` (LayerNorm), `projector.clip.1` (Linear), `projector.face.proj.0`, `.proj.2`,
`.norm` (an MLP to tokens), `layers.<n>.k.weight`, `.v.weight` [hidden, width], n = 1, 3, 5, ... as IP-Adapter counts.
Metadata under `likeness`: kind, version, base, unconditional, notes; needs (features by name) and clip_tokens where the
encoders are not the paper's.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from . import detect, own_file
from .blocks import Block
from .decoupled import Tokens
from .spec import AdapterSpec, Feature

KIND = "infinite_id"
CLIP_TOKENS = 257
NEEDS = (detect.FACE, Feature(detect.HIDDEN_NETWORK, "last", "face224"))
NAMES = (
    "projector.clip.0.weight", "projector.clip.1.weight", "projector.face.proj.2.weight", "projector.face.norm.weight",
)  # fmt: skip
UNCONDITIONAL = ("zero", "none")
PAPER: Mapping[str, Any] = {"needs": [str(feature) for feature in NEEDS], "clip_tokens": CLIP_TOKENS}
FLAT = 1e-5  # a smaller deviation is none

Style = Callable[[Tensor, Tensor], Tensor]  # x [B, N, C] brought to the manner of y [B, M, C]


def adain_mean(x: Tensor, y: Tensor) -> Tensor:
    return x - x.mean(1, keepdim=True) + y.mean(1, keepdim=True)


def adain(x: Tensor, y: Tensor) -> Tensor:
    """The same with the deviation, which the paper finds to cost likeness."""
    ratio = y.std(1, correction=0, keepdim=True) / x.std(1, correction=0, keepdim=True).clamp(min=FLAT)
    return (x - x.mean(1, keepdim=True)) * ratio + y.mean(1, keepdim=True)


STYLES: Mapping[str, Style] = {"none": lambda x, y: x, "AdaIN-mean": adain_mean, "AdaIN": adain}


def _mixed(identity: Block, text: Block, style: Style, weight: float) -> tuple[Block, ...]:
    """K = [K_id; K_t]; a key of the text stream counts `weight` times."""
    k, v = style(identity.k, text.k), style(identity.v, text.v)
    return Block(k, v), _weighed(text, weight)


def _mutual(identity: Block, text: Block, style: Style, weight: float) -> tuple[Block, ...]:
    """K_t in place of K_id (the paper's ablation); below weight 1 the rest of the attention stays with K_id."""
    if weight >= 1:
        return (text,)
    k, v = style(identity.k, text.k), style(identity.v, text.v)
    return _weighed(Block(k, v), 1 - weight), _weighed(text, weight)


def _weighed(block: Block, weight: float) -> Block:
    if weight == 1:
        return block
    return Block(block.k, block.v, block.k.new_full((1, 1, block.k.shape[1]), math.log(weight)))


# What the self-attention of the identity stream reads: its own keys and the text stream's, a style, a weight above 0.
ATTENTIONS: Mapping[str, Callable[[Block, Block, Style, float], tuple[Block, ...]] | None] = {
    "mixed": _mixed, "mutual": _mutual, "off": None,
}  # fmt: skip
MIXINGS = ("stacked", "interpolated")


def combine(several: Sequence[tuple[Tokens, float]], mixing: str) -> Tokens:
    """One c_id of several people's: side by side with weights, or their weighted mean."""
    weights = torch.cat([one.weight * share for one, share in several])
    cond, uncond = (torch.cat([getattr(one, part) for one, _ in several]) for part in ("cond", "uncond"))
    if mixing == "stacked":
        return Tokens(cond, uncond, weights)
    share = (weights / weights.sum()).to(cond)[:, None, None]
    return Tokens((share * cond).sum(0, keepdim=True), uncond[:1], torch.ones(1))


def metadata(spec: AdapterSpec, clip_tokens: int, notes: Mapping[str, Any]) -> dict[str, str]:
    """What a file tells of itself, for safetensors; `clip_tokens` are the states that the CLIP encoder gives."""
    needs = [str(feature) for feature in spec.needs]
    return own_file.metadata(
        KIND, spec.base, notes, unconditional=spec.unconditional, needs=needs, clip_tokens=clip_tokens
    )


def read_spec(tensors: Mapping[str, Tensor], told: Mapping[str, Any], file: str) -> AdapterSpec:
    """The spec of a file's tensors and metadata. Raises ValueError where they are not whole or of a newer version."""
    told = {**PAPER, **told}
    fields = {"unconditional": str, "needs": list, "clip_tokens": int}
    own_file.check(told, KIND, fields, {"unconditional": UNCONDITIONAL}, file)
    shapes = detect.shapes_of(tensors)
    missing = [name for name in NAMES if name not in shapes]
    if missing:
        raise ValueError(f"got {file} without {missing[0]}; expected both mappers of Infinite-ID; fetch the file again")
    layers, width = detect.layers_of(shapes, file)
    rows, wide = shapes[NAMES[2]][0], shapes[NAMES[3]][0]
    return AdapterSpec(
        kind=KIND,
        base=detect.BASES[len(layers)],
        tokens=told["clip_tokens"] + rows // wide,
        width=width,
        layers=layers,
        needs=own_file.features(told["needs"], file),
        unconditional=told["unconditional"],
    )
