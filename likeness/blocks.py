"""One attention over several blocks of keys, each query over those blocks alone that it may see, without a mask.

Queries that see the same blocks form a group, and a group's attention is an ordinary one over the blocks joined. So any
attention backend can run it, and nothing of the size queries x keys is ever laid out for it.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from .regions import for_rows

Attend = Callable[[Tensor, Tensor, Tensor, Tensor | None], Tensor]  # q, k, v [B, N, C], bias [1, 1, T] -> [B, N, C]


@dataclass(frozen=True, eq=False)
class Block:
    """Some keys and values [1 or rows, T, C], and who sees them: bool [B, N] on the CPU, or None for every query.

    `bias` [1, 1, T] is added to their logits; None is 0.
    """

    k: Tensor
    v: Tensor
    bias: Tensor | None = None
    seen: Tensor | None = None


@dataclass(frozen=True, eq=False)
class Group:
    """The queries (None: all) of some rows (None: all) that see exactly these blocks, by number."""

    rows: slice
    queries: Tensor | None
    blocks: tuple[int, ...]


def group(seen: Sequence[Tensor | None], rows: int, device: torch.device) -> list[Group]:
    """Part the queries of so many rows by the blocks that they see. Depends on the regions alone: once per run."""
    masks = [None if mask is None else for_rows(mask, rows) for mask in seen]
    several = max((len(mask) for mask in masks if mask is not None), default=1) > 1
    places = [slice(r, r + 1) for r in range(rows)] if several else [slice(0, rows)]
    out: list[Group] = []
    for at in places:
        own = [None if mask is None else mask[min(at.start, len(mask) - 1)] for mask in masks]
        first = next((mask for mask in own if mask is not None), None)
        if first is None:
            out.append(Group(at, None, tuple(range(len(own)))))
            continue
        table = torch.stack([torch.ones_like(first) if mask is None else mask for mask in own])
        patterns, which = table.unique(dim=1, return_inverse=True)
        for p, pattern in enumerate(patterns.unbind(1)):
            blocks = tuple(pattern.nonzero().flatten().tolist())
            whole = patterns.shape[1] == 1
            out.append(Group(at, None if whole else (which == p).nonzero().flatten().to(device), blocks))
    return out


def attend_blocks(q: Tensor, blocks: Sequence[Block], groups: Sequence[Group], attend: Attend) -> Tensor:
    """Softmax attention of q [rows, N, C] over the blocks that each query sees: [rows, N, C]."""
    if len(groups) == 1 and groups[0].queries is None:
        return attend(q, *_joined([blocks[i] for i in groups[0].blocks], slice(0, len(q)), len(q)))
    out = torch.empty_like(q)
    for some in groups:
        joined = _joined([blocks[i] for i in some.blocks], some.rows, len(q))
        if some.queries is None:
            out[some.rows] = attend(q[some.rows], *joined)
        else:
            out[some.rows, some.queries] = attend(q[some.rows, some.queries], *joined)
    return out


def _joined(blocks: Sequence[Block], at: slice, rows: int) -> tuple[Tensor, Tensor, Tensor | None]:
    """Keys, values and bias of some blocks in a row, for these rows (Eq. 3 and 6 of Fusion)."""
    k, v = (
        torch.cat([part.expand(rows, -1, -1)[at] for part in parts], 1)
        for parts in zip(*((b.k, b.v) for b in blocks), strict=True)
    )
    if all(block.bias is None for block in blocks):
        return k, v, None
    none = [k.new_zeros(1, 1, block.k.shape[1]) if block.bias is None else block.bias.to(k.dtype) for block in blocks]
    return k, v, torch.cat(none, 2)
