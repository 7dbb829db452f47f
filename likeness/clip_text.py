"""CLIP's text transformer (2103.00020), its attention as wide as a file has it (AdaFace, Sec. 2.2).

A layer widened by keys, as AdaFace's code does it, has M keys and values for each token, all of them visible exactly
when the token is: key number t * M + m is copy m of token t. One widened by queries, as AdaFace's paper says, has M
queries and values for each token; copy m of the queries reads copy m of the values, and the output is their mean, so
that keys and outputs are as many as ever. The wide projections are [M * D, D], copy by copy. What is wide, and M, are
read from the shapes, layer by layer.
State dict: that of `text_model.` in the transformers layout.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.functional import scaled_dot_product_attention

from .resampler import Shapes

START, END = 49406, 49407  # the end is the padding too
LENGTH = 77
VOCABULARY = 49408
# What a layer is widened by, beside its values -> that projection, and the one that stays.
WIDENS: Mapping[str, tuple[str, str]] = {"keys": ("k_proj", "q_proj"), "queries": ("q_proj", "k_proj")}


class Attention(nn.Module):
    """Self-attention of [B, T, D], with `copies` values per token and as many of what it `widens`, a key of WIDENS."""

    def __init__(self, width: int, heads: int, copies: int, operations: Any, widens: str = "keys") -> None:
        super().__init__()
        self.heads, self.copies, self.widens = heads, copies, widens
        wide, narrow = WIDENS[widens]
        rows = {wide: copies * width, narrow: width}
        self.q_proj = operations.Linear(width, rows["q_proj"])
        self.k_proj = operations.Linear(width, rows["k_proj"])
        self.v_proj = operations.Linear(width, copies * width)
        self.out_proj = operations.Linear(width, width)

    def forward(self, x: Tensor, mask: Tensor | None) -> Tensor:
        """`mask` [T, T] is added to the logits."""
        q, k, v = self.q_proj(x), self.k_proj(x), self.v_proj(x)
        if self.widens == "queries":
            q, v = (t.unflatten(-1, (self.copies, -1)).transpose(1, 2) for t in (q, v))  # [B, M, T, D]
            return self.out_proj(self._attend(q, k[:, None].expand_as(q), v, mask).mean(1))
        k, v = (t.unflatten(-1, (self.copies, -1)).flatten(1, 2) for t in (k, v))  # [B, T * M, D]
        return self.out_proj(self._attend(q, k, v, None if mask is None else mask.repeat_interleave(self.copies, -1)))

    def _attend(self, q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None) -> Tensor:
        q, k, v = (t.unflatten(-1, (self.heads, -1)).transpose(-3, -2) for t in (q, k, v))  # [..., heads, ., D / heads]
        return scaled_dot_product_attention(q, k, v, mask).transpose(-3, -2).flatten(-2)


class QuickGELU(nn.Module):
    def forward(self, x: Tensor) -> Tensor:
        return x * (1.702 * x).sigmoid()


class Layer(nn.Module):
    """A pre-norm transformer layer: the residual stream [B, T, D] after it."""

    def __init__(self, width: int, inner: int, heads: int, copies: int, operations: Any, widens: str = "keys") -> None:
        super().__init__()
        self.layer_norm1, self.layer_norm2 = operations.LayerNorm(width), operations.LayerNorm(width)
        self.self_attn = Attention(width, heads, copies, operations, widens)
        self.mlp = nn.ModuleDict({"fc1": operations.Linear(width, inner), "fc2": operations.Linear(inner, width)})
        self.activation = QuickGELU()

    def forward(self, x: Tensor, mask: Tensor) -> Tensor:
        x = x + self.self_attn(self.layer_norm1(x), mask)
        return x + self.mlp["fc2"](self.activation(self.mlp["fc1"](self.layer_norm2(x))))


class TextModel(nn.Module):
    """Token ids to word embeddings, word embeddings to the last states; causal, without a padding mask."""

    layers: list[Layer]
    size: dict[str, int]

    def __init__(self, shapes: Shapes, heads: int, operations: Any) -> None:
        """`shapes` are those of its state dict. Raises KeyError or ValueError where one is missing or odd."""
        super().__init__()
        words, width = shapes["embeddings.token_embedding.weight"]
        positions, _ = shapes["embeddings.position_embedding.weight"]
        self.embeddings = nn.ModuleDict(
            {
                "token_embedding": operations.Embedding(words, width),
                "position_embedding": operations.Embedding(positions, width),
            }
        )
        self.layers = _layers(shapes, width, heads, operations)
        self.encoder = nn.ModuleDict({"layers": nn.ModuleList(self.layers)})
        self.final_layer_norm = operations.LayerNorm(width)
        self.size = {"layers": len(self.layers), "width": width, "words": words, "positions": positions}

    def words(self, ids: Sequence[int] | Tensor, device: torch.device) -> Tensor:
        """Word embeddings [1, T, D] in float32, without their positions."""
        return self.embeddings["token_embedding"](torch.as_tensor(ids, device=device)).float()[None]

    def positions(self, count: int, device: torch.device) -> Tensor:
        """Position embeddings [1, T, D] in float32."""
        return self.embeddings["position_embedding"](torch.arange(count, device=device)).float()[None]

    def forward(self, words: Tensor, mix: Tensor | None = None) -> Tensor:
        """The last states [B, T, D] of word embeddings [B, T, D].

        `mix` [n, 1 or D], the last row being the last layer's, weighs the residual streams after the last n layers;
        they are summed ahead of the final LayerNorm, each column of weights made to sum to 1.
        """
        count = words.shape[1]
        x = words + self.positions(count, words.device)
        mask = torch.full((count, count), -torch.inf, device=x.device, dtype=x.dtype).triu(1)
        streams: list[Tensor] = []
        for layer in self.layers:
            x = layer(x, mask)
            streams = [*streams, x][-(1 if mix is None else len(mix)) :]
        if mix is not None:
            share = (mix / mix.sum(0)).to(x)
            x = sum((row * stream for row, stream in zip(share, streams, strict=True)), torch.zeros_like(x))
        return self.final_layer_norm(x)


def _layers(shapes: Mapping[str, tuple[int, ...]], width: int, heads: int, operations: Any) -> list[Layer]:
    count = len({key.split(".")[2] for key in shapes if key.startswith("encoder.layers.")})
    made = []
    for i in range(count):
        name = f"encoder.layers.{i}"
        inner = shapes[f"{name}.mlp.fc1.weight"][0]
        rows = {part: shapes[f"{name}.self_attn.{part}.weight"][0] for part in ("q_proj", "k_proj", "v_proj")}
        widens = "queries" if rows["q_proj"] > width else "keys"
        wide, narrow = WIDENS[widens]
        if rows["v_proj"] % width or rows[wide] != rows["v_proj"] or rows[narrow] != width:
            raise ValueError(f"layer {i} has {widens} and values of unequal or odd width; expected the same multiple")
        made.append(Layer(width, inner, heads, rows["v_proj"] // width, operations, widens))
    return made


def padded(ids: Sequence[int], length: int = LENGTH) -> list[int]:
    """The ids of a prompt's words with start, end and padding, to `length`."""
    return [START, *ids, *[END] * (length - 1 - len(ids))]
