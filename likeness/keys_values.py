"""The keys and values that adapters make of an identity's tokens, K' = t W'_k and V' = t W'_v, one attention's each.

IP-Adapter (arXiv 2308.06721) and what follows it have plain matrices. XLabs' FLUX IP-Adapter (XLabs-AI/x-flux) has
biases; InstantX's (Shakker-Labs/ComfyUI-IPAdapter-Flux) norms both per head, without weights.
"""

from __future__ import annotations

from typing import Any

from torch import Tensor, nn

HEAD_WIDTH = 128  # of FLUX.1
EPSILON = 1e-5


class KeysValues(nn.Module):
    """W'_k and W'_v of one cross-attention: [., width] -> [., hidden]."""

    BIAS = False

    def __init__(self, width: int, hidden: int, operations: Any) -> None:
        super().__init__()
        self.k = operations.Linear(width, hidden, bias=self.BIAS)
        self.v = operations.Linear(width, hidden, bias=self.BIAS)

    def forward(self, tokens: Tensor) -> tuple[Tensor, Tensor]:
        return self.k(tokens), self.v(tokens)


class BiasedKeysValues(KeysValues):
    """The same with biases (XLabs)."""

    BIAS = True


class NormedKeysValues(KeysValues):
    """The same, keys and values alike divided by their root mean square in each head (InstantX)."""

    def forward(self, tokens: Tensor) -> tuple[Tensor, Tensor]:
        k, v = super().forward(tokens)
        return _normed(k), _normed(v)


def _normed(x: Tensor) -> Tensor:
    heads = x.unflatten(-1, (-1, HEAD_WIDTH))
    return (heads * (heads.square().mean(-1, keepdim=True) + EPSILON).rsqrt()).flatten(-2)
