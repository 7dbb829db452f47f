"""CLIP's text transformer (arXiv 2103.00020) with optionally expanded attention projections (AdaFace, Sec. 2.2).

Expanded keys, as in AdaFace's code: M keys and values per token, masked like their token; key t * M + m is copy m of
token t. Expanded queries, as in AdaFace's paper: M queries and values per token; copy m of the queries uses copy m of
the values, and the output is the mean over the copies. The expanded projections are [M * D, D], one copy after the
other. Which projections are expanded, and M, are read from the shapes of each layer.
State dict: that of `text_model.` in the transformers layout.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.functional import scaled_dot_product_attention

from ..methods.resampler import TensorShapes

START_TOKEN_ID, END_TOKEN_ID = 49406, 49407  # the end token is also the padding token
CONTEXT_LENGTH = 77
VOCABULARY_SIZE = 49408
# What is expanded besides the values -> the name of that projection, and of the one that is not expanded.
EXPANDED_PROJECTIONS: Mapping[str, tuple[str, str]] = {"keys": ("k_proj", "q_proj"), "queries": ("q_proj", "k_proj")}


class CLIPTextAttention(nn.Module):
    """Self-attention of [B, T, D] with `num_copies` values per token, and as many keys or queries
    (`expanded_projection`, a key of `EXPANDED_PROJECTIONS`)."""

    def __init__(
        self, width: int, num_heads: int, num_copies: int, operations: Any, expanded_projection: str = "keys"
    ) -> None:
        super().__init__()
        self.num_heads, self.num_copies, self.expanded_projection = num_heads, num_copies, expanded_projection
        expanded, plain = EXPANDED_PROJECTIONS[expanded_projection]
        rows = {expanded: num_copies * width, plain: width}
        self.q_proj = operations.Linear(width, rows["q_proj"])
        self.k_proj = operations.Linear(width, rows["k_proj"])
        self.v_proj = operations.Linear(width, num_copies * width)
        self.out_proj = operations.Linear(width, width)

    def forward(self, x: Tensor, mask: Tensor | None) -> Tensor:
        """`mask` [T, T] is an additive attention mask."""
        q, k, v = self.q_proj(x), self.k_proj(x), self.v_proj(x)
        if self.expanded_projection == "queries":
            q, v = (t.unflatten(-1, (self.num_copies, -1)).transpose(1, 2) for t in (q, v))  # [B, M, T, D]
            return self.out_proj(self._attend(q, k[:, None].expand_as(q), v, mask).mean(1))
        k, v = (t.unflatten(-1, (self.num_copies, -1)).flatten(1, 2) for t in (k, v))  # [B, T * M, D]
        return self.out_proj(
            self._attend(q, k, v, None if mask is None else mask.repeat_interleave(self.num_copies, -1))
        )

    def _attend(self, q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None) -> Tensor:
        # [..., heads, T, D / heads]
        q, k, v = (t.unflatten(-1, (self.num_heads, -1)).transpose(-3, -2) for t in (q, k, v))
        return scaled_dot_product_attention(q, k, v, mask).transpose(-3, -2).flatten(-2)


class QuickGELU(nn.Module):
    def forward(self, x: Tensor) -> Tensor:
        return x * (1.702 * x).sigmoid()


class CLIPTextLayer(nn.Module):
    """A pre-norm transformer layer: [B, T, D] -> [B, T, D]."""

    def __init__(
        self,
        width: int,
        mlp_width: int,
        num_heads: int,
        num_copies: int,
        operations: Any,
        expanded_projection: str = "keys",
    ) -> None:
        super().__init__()
        self.layer_norm1, self.layer_norm2 = operations.LayerNorm(width), operations.LayerNorm(width)
        self.self_attn = CLIPTextAttention(width, num_heads, num_copies, operations, expanded_projection)
        self.mlp = nn.ModuleDict(
            {"fc1": operations.Linear(width, mlp_width), "fc2": operations.Linear(mlp_width, width)}
        )
        self.activation = QuickGELU()

    def forward(self, x: Tensor, mask: Tensor) -> Tensor:
        x = x + self.self_attn(self.layer_norm1(x), mask)
        return x + self.mlp["fc2"](self.activation(self.mlp["fc1"](self.layer_norm2(x))))


class CLIPTextModel(nn.Module):
    """CLIP's text model: token ids -> token embeddings -> last hidden states. Causal, without a padding mask."""

    layers: list[CLIPTextLayer]
    sizes: dict[str, int]

    def __init__(self, shapes: TensorShapes, num_heads: int, operations: Any) -> None:
        """`shapes` are those of the state dict. Raises KeyError if one is missing, ValueError if one does not match."""
        super().__init__()
        vocabulary, width = shapes["embeddings.token_embedding.weight"]
        positions, _ = shapes["embeddings.position_embedding.weight"]
        self.embeddings = nn.ModuleDict(
            {
                "token_embedding": operations.Embedding(vocabulary, width),
                "position_embedding": operations.Embedding(positions, width),
            }
        )
        self.layers = _build_layers(shapes, width, num_heads, operations)
        self.encoder = nn.ModuleDict({"layers": nn.ModuleList(self.layers)})
        self.final_layer_norm = operations.LayerNorm(width)
        self.sizes = {"layers": len(self.layers), "width": width, "words": vocabulary, "positions": positions}

    def embed_tokens(self, token_ids: Sequence[int] | Tensor, device: torch.device) -> Tensor:
        """Token embeddings [1, T, D] in float32, without position embeddings."""
        return self.embeddings["token_embedding"](torch.as_tensor(token_ids, device=device)).float()[None]

    def embed_positions(self, count: int, device: torch.device) -> Tensor:
        """Position embeddings [1, T, D] in float32."""
        return self.embeddings["position_embedding"](torch.arange(count, device=device)).float()[None]

    def forward(self, token_embeddings: Tensor, layer_mix: Tensor | None = None) -> Tensor:
        """Token embeddings [B, T, D] -> last hidden states [B, T, D].

        `layer_mix` [n, 1 or D] are the weights of the hidden states of the last n layers, the last row for the last
        layer. Each column is normalized to a sum of 1; the weighted sum goes through the final LayerNorm.
        """
        count = token_embeddings.shape[1]
        x = token_embeddings + self.embed_positions(count, token_embeddings.device)
        mask = torch.full((count, count), -torch.inf, device=x.device, dtype=x.dtype).triu(1)
        states: list[Tensor] = []
        for layer in self.layers:
            x = layer(x, mask)
            states = [*states, x][-(1 if layer_mix is None else len(layer_mix)) :]
        if layer_mix is not None:
            weights = (layer_mix / layer_mix.sum(0)).to(x)
            x = sum((weight * state for weight, state in zip(weights, states, strict=True)), torch.zeros_like(x))
        return self.final_layer_norm(x)


def _build_layers(
    shapes: Mapping[str, tuple[int, ...]], width: int, num_heads: int, operations: Any
) -> list[CLIPTextLayer]:
    count = len({key.split(".")[2] for key in shapes if key.startswith("encoder.layers.")})
    layers = []
    for i in range(count):
        name = f"encoder.layers.{i}"
        mlp_width = shapes[f"{name}.mlp.fc1.weight"][0]
        rows = {part: shapes[f"{name}.self_attn.{part}.weight"][0] for part in ("q_proj", "k_proj", "v_proj")}
        kind = "queries" if rows["q_proj"] > width else "keys"
        expanded, plain = EXPANDED_PROJECTIONS[kind]
        if rows["v_proj"] % width or rows[expanded] != rows["v_proj"] or rows[plain] != width:
            raise ValueError(
                f"layer {i} has {kind} and values of different sizes; expected the same multiple of {width}"
            )
        layers.append(CLIPTextLayer(width, mlp_width, num_heads, rows["v_proj"] // width, operations, kind))
    return layers


def pad_token_ids(token_ids: Sequence[int], length: int = CONTEXT_LENGTH) -> list[int]:
    """Add the start token, the end token and padding up to `length`."""
    return [START_TOKEN_ID, *token_ids, *[END_TOKEN_ID] * (length - 1 - len(token_ids))]
