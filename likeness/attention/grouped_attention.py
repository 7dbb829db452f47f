"""Attention over several blocks of keys, of which each query sees only some, without an attention mask.

Queries that see the same blocks form a group, and each group's attention is an ordinary one over the concatenated
blocks. Any attention backend can run it, and it needs no mask of queries x keys.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from .regions import repeat_for_rows

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


def group_queries(visible_queries: Sequence[Tensor | None], num_rows: int, device: torch.device) -> list[QueryGroup]:
    """Group the queries of `num_rows` rows by the blocks that they see. Depends on the regions only: once per run."""
    masks = [None if mask is None else repeat_for_rows(mask, num_rows) for mask in visible_queries]
    rows_differ = max((len(mask) for mask in masks if mask is not None), default=1) > 1
    row_slices = [slice(row, row + 1) for row in range(num_rows)] if rows_differ else [slice(0, num_rows)]
    groups: list[QueryGroup] = []
    for rows in row_slices:
        row_masks = [None if mask is None else mask[min(rows.start, len(mask) - 1)] for mask in masks]
        first = next((mask for mask in row_masks if mask is not None), None)
        if first is None:
            groups.append(QueryGroup(rows, None, tuple(range(len(row_masks)))))
            continue
        table = torch.stack([torch.ones_like(first) if mask is None else mask for mask in row_masks])
        patterns, pattern_of_query = table.unique(dim=1, return_inverse=True)
        for p, pattern in enumerate(patterns.unbind(1)):
            blocks = tuple(pattern.nonzero().flatten().tolist())
            is_only = patterns.shape[1] == 1
            queries = None if is_only else (pattern_of_query == p).nonzero().flatten().to(device)
            groups.append(QueryGroup(rows, queries, blocks))
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
