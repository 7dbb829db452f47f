"""Fused KV ("Fusion is all you need", ICLR 2025 submission): keys and values of the face beside those of the text.

    K_f = Linear_kf(h_f),  V_f = Linear_vf(h_f)                                 (Eq. 2)
    K' = [K_c; K_f1; ...; K_fn],  V' = [V_c; V_f1; ...; V_fn]                   (Eq. 3, 6)
    h = softmax(M + a Q K'^T) V'                                                (Eq. 4, 5)

h_f is the normed input of the same cross-attention when the same UNet sees the face. Who may see whose keys (Eq. 7) is
regions.visible; M holds the logarithms of weights besides, so that a key of weight w counts as w keys.

File: safetensors, `<transformer block>.attn2.to_k_f.weight` and `.to_v_f.weight` [C, C], the blocks under the host's
names, as input_blocks.1.1.transformer_blocks.0; `text.hidden` [T, width], the empty prompt that the face is read with,
and for SDXL `text.pooled` [1280]. Metadata under `likeness`: kind, version, base, stream_noise, face_size, notes.
"""

from __future__ import annotations

import math
import re
from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from . import keymaps, own_file
from .identity import pictured
from .spec import FusedSpec, Identity

KIND = "fused_kv"
NOISES = ("match", "clean")
FACE_SIZE = 512
FAINT = 1e-2  # directions that a matrix hardly knows are not blown up to make up for it
NAME = re.compile(r"(.+)\.attn2\.to_([kv])_f\.weight")
TEXTS = ("text.hidden", "text.pooled")
PARTS = ("to_k_f", "to_v_f")


class FusedLayer(nn.Module):
    """Linear_kf and Linear_vf of one cross-attention (Eq. 2): [..., C] -> [..., C] each."""

    def __init__(self, channels: int, operations: Any) -> None:
        super().__init__()
        self.to_k_f, self.to_v_f = (operations.Linear(channels, channels, bias=False) for _ in "kv")

    def forward(self, hidden: Tensor) -> tuple[Tensor, Tensor]:
        return self.to_k_f(hidden), self.to_v_f(hidden)


class FusedAdapter(nn.Module):
    """The layers of a file by the path of their transformer block, and the text that the face is read with."""

    def __init__(self, spec: FusedSpec, text: Tensor, pooled: Tensor | None, operations: Any) -> None:
        super().__init__()
        self.spec = spec
        self.layers = nn.ModuleDict({_name(path): FusedLayer(c, operations) for path, c in spec.layers.items()})
        self.register_buffer("text", text)
        self.register_buffer("pooled", pooled)

    def at(self, path: str) -> FusedLayer:
        return self.layers[_name(path)]  # pyright: ignore[reportReturnType]


def _name(path: str) -> str:
    return path.replace(".", "/")  # a module's name holds no dots


def metadata(spec: FusedSpec) -> dict[str, str]:
    """What a file tells of itself, for safetensors."""
    own = {"stream_noise": spec.stream_noise, "face_size": spec.face_size}
    return own_file.metadata(KIND, spec.base, spec.notes, **own)


def read_spec(tensors: Mapping[str, Tensor], told: Mapping[str, Any], file: str) -> FusedSpec:
    """The spec of a file's tensors and metadata. Raises ValueError where they are not whole or of a newer version."""
    own_file.check(told, KIND, {"stream_noise": str, "face_size": int}, {"stream_noise": NOISES}, file)
    if told["face_size"] < 8 or told["face_size"] % 8:
        raise ValueError(f"got {file}, with faces of {told['face_size']} pixels; expected a multiple of 8")
    foreign = [key for key in tensors if key not in TEXTS and not NAME.fullmatch(key)]
    found = {
        match[1]: len(tensors[key]) for key in tensors if (match := NAME.fullmatch(key)) and tensors[key].ndim == 2
    }
    if foreign or not found or "text.hidden" not in tensors:
        what = f"the tensor {foreign[0]!r}" if foreign else "no text.hidden or no layers"
        raise ValueError(
            f"got {file} with {what}; expected to_k_f and to_v_f of every cross-attention, and text.hidden; "
            "fetch the file again"
        )
    return FusedSpec(told["base"], told["stream_noise"], told["face_size"], found, told["notes"])


def build(spec: FusedSpec, tensors: Mapping[str, Tensor], operations: Any) -> FusedAdapter:
    """The adapter with all of its tensors, uncopied. Raises ValueError naming what is missing or misshapen."""
    with torch.device("meta"):
        module = FusedAdapter(spec, tensors["text.hidden"], tensors.get("text.pooled"), operations)
    weights = {key: tensor for key, tensor in tensors.items() if key not in TEXTS}
    named = {key: NAME.fullmatch(key) for key in weights}
    keymaps.load(module.layers, {f"{_name(m[1])}.to_{m[2]}_f.weight": weights[key] for key, m in named.items() if m})
    return module


def tensors(adapter: FusedAdapter) -> dict[str, Tensor]:
    """What the file of an adapter holds, by name."""
    texts: Mapping[str, Any] = {"text.hidden": adapter.text, "text.pooled": adapter.pooled}
    layers: Mapping[str, Any] = {path: adapter.at(path) for path in adapter.spec.layers}
    parts = {f"{path}.attn2.{part}": getattr(layer, part) for path, layer in layers.items() for part in PARTS}
    weights = {f"{name}.weight": part.weight for name, part in parts.items()}
    return weights | {name: text for name, text in texts.items() if text is not None}


def faces(identity: Identity) -> tuple[Tensor, Tensor]:
    """The pictures of an identity's faces, uint8 [n, H, W, 3], and their weights [n], those of weight 0 left out.

    Raises ValueError where none is left, or where the identity holds no pictures.
    """
    crops, kept = pictured(identity)
    weight = identity.weight[kept].float()
    return crops[kept], weight / weight.mean() if weight.unique().numel() > 1 else torch.ones(len(kept))


def key_bias(weights: Sequence[float], tokens: int) -> Tensor | None:
    """What keys of these weights, so many tokens each, add to their logits [1, 1, n * tokens]: None where all are 1."""
    if all(weight == 1 for weight in weights):
        return None
    return torch.tensor([math.log(weight) for weight in weights]).repeat_interleave(tokens)[None, None]


def zero_shot(own: Mapping[str, Tensor], heads: int) -> tuple[Tensor, Tensor]:
    """to_k_f and to_v_f [C, C] without training, from a transformer block's own self-attention.

    `own` holds `q1, k1, v1, o1` of the self-attention and `q2, o2` of the cross-attention, [C, C]. Head by head, the
    nearest matrices (least squares) by which the cross-attention's queries score the face's tokens as those of the
    self-attention would, and its output projection writes what the self-attention's would.
    """
    q1, k1, v1, q2 = (own[name].float().unflatten(0, (heads, -1)) for name in ("q1", "k1", "v1", "q2"))  # [H, d, C]
    o1, o2 = (own[name].float().unflatten(1, (heads, -1)).movedim(1, 0) for name in ("o1", "o2"))  # [H, C, d]
    to_k = torch.linalg.pinv(q2.mT, rtol=FAINT) @ (q1.mT @ k1)
    to_v = torch.linalg.pinv(o2, rtol=FAINT) @ (o1 @ v1)
    return to_k.flatten(0, 1).to(own["k1"].dtype), to_v.flatten(0, 1).to(own["v1"].dtype)
