"""Keys and values of an identity's tokens in one attention, K' = t W'_k and V' = t W'_v.

IP-Adapter (arXiv 2308.06721) and its successors have plain matrices. XLabs' FLUX IP-Adapter (XLabs-AI/x-flux) has
biases; InstantX's (Shakker-Labs/ComfyUI-IPAdapter-Flux) applies an RMS norm without weights to both, per head.
"""

from __future__ import annotations

from typing import Any

from torch import Tensor, nn

FLUX_HEAD_DIM = 128  # of FLUX.1
RMS_NORM_EPS = 1e-5


class KeyValueProjection(nn.Module):
    """W'_k and W'_v of one cross-attention: [., width] -> [., hidden]."""

    BIAS = False

    def __init__(self, width: int, hidden: int, operations: Any) -> None:
        super().__init__()
        self.k = operations.Linear(width, hidden, bias=self.BIAS)
        self.v = operations.Linear(width, hidden, bias=self.BIAS)

    def forward(self, tokens: Tensor) -> tuple[Tensor, Tensor]:
        return self.k(tokens), self.v(tokens)


class BiasedKeyValueProjection(KeyValueProjection):
    """The same with biases (XLabs)."""

    BIAS = True


class NormalizedKeyValueProjection(KeyValueProjection):
    """The same with an RMS norm on keys and values, per head (InstantX)."""

    def forward(self, tokens: Tensor) -> tuple[Tensor, Tensor]:
        k, v = super().forward(tokens)
        return _rms_normalize_heads(k), _rms_normalize_heads(v)


def _rms_normalize_heads(x: Tensor) -> Tensor:
    heads = x.unflatten(-1, (-1, FLUX_HEAD_DIM))
    return (heads * (heads.square().mean(-1, keepdim=True) + RMS_NORM_EPS).rsqrt()).flatten(-2)
