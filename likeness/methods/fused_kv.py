"""Fused KV ("Fusion is all you need", ICLR 2025 submission): keys and values of the face beside those of the text.

    K_f = Linear_kf(h_f),  V_f = Linear_vf(h_f)                                 (Eq. 2)
    K' = [K_c; K_f1; ...; K_fn],  V' = [V_c; V_f1; ...; V_fn]                   (Eq. 3, 6)
    h = softmax(M + a Q K'^T) V'                                                (Eq. 4, 5)

h_f is the normed input of the same cross-attention when the same UNet processes the face. M masks the keys that a query
may not see (Eq. 7, regions.compute_visible_queries), and adds the logarithms of weights: a key of weight w counts as w
keys.

File: safetensors, `<transformer block>.attn2.to_k_f.weight` and `.to_v_f.weight` [C, C], with ComfyUI's names of the
blocks, as input_blocks.1.1.transformer_blocks.0; `text.hidden` [T, width], the empty prompt with which the face is
processed, and for SDXL `text.pooled` [1280]. Metadata under `likeness`: kind, version, base, stream_noise, face_size,
notes.
"""

from __future__ import annotations

import math
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal, get_args

import torch
from torch import Tensor, nn

from ..checkpoints import key_maps, native_metadata
from ..identity.merge import get_weighted_crops
from ..spec import FusedKVSpec, Identity

KIND = "fused_kv"
StreamNoise = Literal["match", "clean"]
STREAM_NOISES = get_args(StreamNoise)
DEFAULT_FACE_SIZE = 512
PINV_RTOL = 1e-2  # drops directions that a matrix nearly maps to zero; their inverse would blow up
PROJECTION_NAME = re.compile(r"(.+)\.attn2\.to_([kv])_f\.weight")
TEXT_TENSORS = ("text.hidden", "text.pooled")
FACE_PROJECTIONS = ("to_k_f", "to_v_f")


class FusedKVLayer(nn.Module):
    """Linear_kf and Linear_vf of one cross-attention (Eq. 2): [..., C] -> [..., C] each."""

    def __init__(self, channels: int, operations: Any) -> None:
        super().__init__()
        self.to_k_f, self.to_v_f = (operations.Linear(channels, channels, bias=False) for _ in "kv")

    def forward(self, hidden: Tensor) -> tuple[Tensor, Tensor]:
        return self.to_k_f(hidden), self.to_v_f(hidden)


class FusedKVAdapter(nn.Module):
    """The layers by the path of their transformer block, and the text with which faces are processed."""

    def __init__(self, spec: FusedKVSpec, text: Tensor, pooled: Tensor | None, operations: Any) -> None:
        super().__init__()
        self.spec = spec
        self.layers = nn.ModuleDict(
            {_module_name(path): FusedKVLayer(channels, operations) for path, channels in spec.layers.items()}
        )
        self.register_buffer("text", text)
        self.register_buffer("pooled", pooled)

    def get_layer(self, path: str) -> FusedKVLayer:
        return self.layers[_module_name(path)]  # pyright: ignore[reportReturnType]


def _module_name(path: str) -> str:
    return path.replace(".", "/")  # module names may not contain dots


def get_face_crops(identity: Identity) -> tuple[Tensor, Tensor]:
    """The face crops of an identity, uint8 [n, H, W, 3], and their weights [n], without those of weight 0.

    Raises ValueError where none is left, or where the identity holds no crops.
    """
    crops, kept = get_weighted_crops(identity)
    weight = identity.weight[kept].float()
    return crops[kept], weight / weight.mean() if weight.unique().numel() > 1 else torch.ones(len(kept))


def compute_key_bias(weights: Sequence[float], tokens_per_weight: int) -> Tensor | None:
    """The logarithms of weights in M (Eq. 5): [1, 1, n * tokens_per_weight], or None where all weights are 1."""
    if all(weight == 1 for weight in weights):
        return None
    return torch.tensor([math.log(weight) for weight in weights]).repeat_interleave(tokens_per_weight)[None, None]


def solve_zero_shot_projections(block_weights: Mapping[str, Tensor], num_heads: int) -> tuple[Tensor, Tensor]:
    """to_k_f and to_v_f [C, C] without training, from a transformer block's self-attention.

    `block_weights` are `q1`, `k1`, `v1`, `o1` of the self-attention and `q2`, `o2` of the cross-attention, [C, C]. Head
    by head, to_k_f is the least-squares solution with which the cross-attention's queries score the face tokens as the
    self-attention's would; with to_v_f its output projection gives what the self-attention's would.
    """
    q1, k1, v1, q2 = (
        block_weights[name].float().unflatten(0, (num_heads, -1)) for name in ("q1", "k1", "v1", "q2")
    )  # [H, d, C]
    o1, o2 = (
        block_weights[name].float().unflatten(1, (num_heads, -1)).movedim(1, 0) for name in ("o1", "o2")
    )  # [H, C, d]
    to_k = torch.linalg.pinv(q2.mT, rtol=PINV_RTOL) @ (q1.mT @ k1)
    to_v = torch.linalg.pinv(o2, rtol=PINV_RTOL) @ (o1 @ v1)
    return to_k.flatten(0, 1).to(block_weights["k1"].dtype), to_v.flatten(0, 1).to(block_weights["v1"].dtype)


@dataclass(frozen=True)
class FusedKVMetadata(native_metadata.NativeMetadata):
    kind = KIND
    stream_noise: StreamNoise
    face_size: int


def make_fused_kv_metadata(spec: FusedKVSpec) -> dict[str, str]:
    """The metadata of an adapter's safetensors file."""
    return native_metadata.encode_metadata(FusedKVMetadata, spec)


def read_fused_kv_spec(tensors: Mapping[str, Tensor], metadata: Mapping[str, Any], file: str) -> FusedKVSpec:
    """The spec of a file's tensors and metadata. Raises ValueError where they are incomplete or of a newer version."""
    stored = native_metadata.decode_metadata(FusedKVMetadata, metadata, file)
    if stored.face_size < 8 or stored.face_size % 8:
        raise ValueError(
            f"got {file}, with faces of {stored.face_size} pixels; expected a multiple of 8; fetch the file again"
        )
    unknown = [key for key in tensors if key not in TEXT_TENSORS and not PROJECTION_NAME.fullmatch(key)]
    layers = {
        match[1]: len(tensors[key])
        for key in tensors
        if (match := PROJECTION_NAME.fullmatch(key)) and tensors[key].ndim == 2
    }
    if unknown or not layers or "text.hidden" not in tensors:
        found = f"the tensor {unknown[0]!r}" if unknown else "no text.hidden or no layers"
        raise ValueError(
            f"got {file} with {found}; expected to_k_f and to_v_f of every cross-attention, and text.hidden; "
            "fetch the file again"
        )
    return FusedKVSpec(stored.base, stored.stream_noise, stored.face_size, layers, stored.notes)


def build_fused_kv_adapter(spec: FusedKVSpec, tensors: Mapping[str, Tensor], operations: Any) -> FusedKVAdapter:
    """The adapter with its weights, not copied. Raises ValueError naming missing or misshapen tensors."""
    with torch.device("meta"):
        module = FusedKVAdapter(spec, tensors["text.hidden"], tensors.get("text.pooled"), operations)
    matches = {key: PROJECTION_NAME.fullmatch(key) for key in tensors}
    weights = {f"{_module_name(m[1])}.to_{m[2]}_f.weight": tensors[key] for key, m in matches.items() if m}
    key_maps.load_module_weights(module.layers, weights)
    return module


def collect_fused_kv_tensors(adapter: FusedKVAdapter) -> dict[str, Tensor]:
    """The tensors of an adapter's file by name."""
    texts: Mapping[str, Any] = {"text.hidden": adapter.text, "text.pooled": adapter.pooled}
    layers: Mapping[str, Any] = {path: adapter.get_layer(path) for path in adapter.spec.layers}
    projections = {
        f"{path}.attn2.{name}": getattr(layer, name) for path, layer in layers.items() for name in FACE_PROJECTIONS
    }
    weights = {f"{name}.weight": projection.weight for name, projection in projections.items()}
    return weights | {name: text for name, text in texts.items() if text is not None}
