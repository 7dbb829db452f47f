"""Attention over several blocks of keys, of which each query sees only some, without an attention mask.

Queries that see the same blocks form a group, and each group's attention is an ordinary one over the concatenated
blocks. Any attention backend can run it, and it needs no mask of queries x keys.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

BiasedAttentionFunction = Callable[
    [Tensor, Tensor, Tensor, Tensor | None], Tensor
]  # q, k, v [B, N, C], bias [1, 1, T] -> [B, N, C]


@dataclass(frozen=True, eq=False)
class KeyValueBlock:
    """Keys and values [1 or rows, T, C]. `visible_queries` is bool [B, N] on the CPU, or None for every query.

    `bias` [1, 1, T] is added to the logits; None is 0.
    """

    k: Tensor
    v: Tensor
    bias: Tensor | None = None
    visible_queries: Tensor | None = None


@dataclass(frozen=True, eq=False)
class QueryGroup:
    """The queries (None: all) of some rows that see exactly these blocks, by index."""

    rows: slice
    queries: Tensor | None
    blocks: tuple[int, ...]


class QueryGrouping:
    """The groups of queries for blocks of these `visible_queries`. They depend on the regions only: once per run."""

    def __init__(self, visible_queries: Sequence[Tensor | None], device: torch.device) -> None:
        self._masks, self._device = list(visible_queries), device
        self._groups_by_mask_rows: dict[tuple[int, ...], list[tuple[Tensor | None, tuple[int, ...]]]] = {}

    def group_rows(self, images: Sequence[int]) -> list[QueryGroup]:
        """The groups of rows that are these images of the batch. Masks repeat if the batch has more images."""
        images_differ = any(mask is not None and len(mask) > 1 for mask in self._masks)
        slices = [slice(row, row + 1) for row in range(len(images))] if images_differ else [slice(0, len(images))]
        return [
            QueryGroup(rows, queries, blocks)
            for rows in slices
            for queries, blocks in self._group_image(images[rows.start])
        ]

    def _group_image(self, image: int) -> list[tuple[Tensor | None, tuple[int, ...]]]:
        mask_rows = tuple(0 if mask is None else image % len(mask) for mask in self._masks)
        if mask_rows not in self._groups_by_mask_rows:
            self._groups_by_mask_rows[mask_rows] = self._make_groups(mask_rows)
        return self._groups_by_mask_rows[mask_rows]

    def _make_groups(self, mask_rows: Sequence[int]) -> list[tuple[Tensor | None, tuple[int, ...]]]:
        masks = [None if mask is None else mask[row] for mask, row in zip(self._masks, mask_rows, strict=True)]
        first = next((mask for mask in masks if mask is not None), None)
        if first is None:
            return [(None, tuple(range(len(masks))))]
        table = torch.stack([torch.ones_like(first) if mask is None else mask for mask in masks])
        patterns, pattern_of_query = table.unique(dim=1, return_inverse=True)
        groups: list[tuple[Tensor | None, tuple[int, ...]]] = []
        for p, pattern in enumerate(patterns.unbind(1)):
            is_only = patterns.shape[1] == 1
            queries = None if is_only else (pattern_of_query == p).nonzero().flatten().to(self._device)
            groups.append((queries, tuple(pattern.nonzero().flatten().tolist())))
        return groups


def attend_blocks(
    q: Tensor, blocks: Sequence[KeyValueBlock], groups: Sequence[QueryGroup], attend: BiasedAttentionFunction
) -> Tensor:
    """Softmax attention of q [rows, N, C] over the blocks that each query sees: [rows, N, C]."""
    if len(groups) == 1 and groups[0].queries is None:
        return attend(q, *_join_blocks([blocks[i] for i in groups[0].blocks], slice(0, len(q)), len(q)))
    out = torch.empty_like(q)
    for group in groups:
        joined = _join_blocks([blocks[i] for i in group.blocks], group.rows, len(q))
        if group.queries is None:
            out[group.rows] = attend(q[group.rows], *joined)
        else:
            out[group.rows, group.queries] = attend(q[group.rows, group.queries], *joined)
    return out


def _join_blocks(blocks: Sequence[KeyValueBlock], rows: slice, num_rows: int) -> tuple[Tensor, Tensor, Tensor | None]:
    """Concatenate keys, values and biases of blocks, for some of the rows (fused KV, Eq. 3 and 6)."""
    k, v = (
        torch.cat([part.expand(num_rows, -1, -1)[rows] for part in parts], 1)
        for parts in zip(*((b.k, b.v) for b in blocks), strict=True)
    )
    if all(block.bias is None for block in blocks):
        return k, v, None
    biases = [k.new_zeros(1, 1, block.k.shape[1]) if block.bias is None else block.bias.to(k.dtype) for block in blocks]
    return k, v, torch.cat(biases, 2)
