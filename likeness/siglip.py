"""SigLIP's attention-pooling head (arXiv 2303.15343), named as in the transformers library: what InstantX reads."""

from __future__ import annotations

import torch
from torch import Tensor, nn
from torch.nn.functional import gelu

EPSILON = 1e-6  # of every LayerNorm in SigLIP


class _Inner(nn.Module):
    def __init__(self, width: int, inner: int) -> None:
        super().__init__()
        self.fc1 = nn.Linear(width, inner)
        self.fc2 = nn.Linear(inner, width)

    def forward(self, x: Tensor) -> Tensor:
        return self.fc2(gelu(self.fc1(x), approximate="tanh"))


class PoolingHead(nn.Module):
    """The tower's last states behind its norm [n, T, W] -> one vector each [n, W]: a learned query attends to them."""

    def __init__(self, width: int, heads: int, inner: int) -> None:
        super().__init__()
        self.probe = nn.Parameter(torch.empty(1, 1, width))
        self.attention = nn.MultiheadAttention(width, heads, batch_first=True)
        self.layernorm = nn.LayerNorm(width, eps=EPSILON)
        self.mlp = _Inner(width, inner)

    def forward(self, states: Tensor) -> Tensor:
        query = self.probe.expand(len(states), -1, -1)
        pooled, _ = self.attention(query, states, states, need_weights=False)
        return (pooled + self.mlp(self.layernorm(pooled)))[:, 0]
