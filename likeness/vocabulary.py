"""Token embeddings of a closed vocabulary: a row for each known token, and one that all others share.

A text encoder that was trained on few words needs no more of the table [49408, width] that the host looks tokens up in.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import torch
from torch import Tensor, nn

TOKENS = 49408  # of CLIP's tokenizer
TABLE = "text_model.embeddings.token_embedding.weight"
KNOWN = "text_model.embeddings.token_embedding.known"


class Vocabulary(nn.Module):
    """In the place of a text encoder's token embedding: `weight` [known + 1, width], its last row for all else."""

    rows: Tensor

    def __init__(self, known: Sequence[int], width: int) -> None:
        super().__init__()
        self.known = tuple(sorted(set(known)))
        self.weight = nn.Parameter(torch.randn(len(self.known) + 1, width) * 0.02)
        self.register_buffer("rows", rows_of(torch.tensor(self.known, device="cpu")), persistent=False)

    def forward(self, tokens: Tensor, out_dtype: torch.dtype | None = None) -> Tensor:
        """Tokens [...] to their embeddings [..., width]; called as the host calls its own."""
        found = nn.functional.embedding(self.rows[tokens], self.weight)
        return found if out_dtype is None else found.to(out_dtype)


def rows_of(known: Tensor) -> Tensor:
    """The row of each token, [TOKENS]: its place among the known ones [n], or n.

    Raises ValueError where these are not different tokens.
    """
    numbers = known.tolist()
    if len(set(numbers)) != len(numbers) or not set(numbers) <= set(range(TOKENS)):
        raise ValueError(f"got {len(numbers)} known tokens; expected different numbers from 0 to {TOKENS - 1}")
    rows = torch.full((TOKENS,), len(numbers), device=known.device)
    rows[known] = torch.arange(len(numbers), device=known.device)
    return rows


def whole(tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """A text encoder's tensors, under any prefix, with the full table in place of the short one; others as they are.

    Raises ValueError where the table has not one row more than there are known tokens.
    """
    at = next((key for key in tensors if key.endswith(KNOWN)), None)
    if at is None:
        return dict(tensors)
    place = at.removesuffix(KNOWN) + TABLE
    known, table = tensors[at], tensors[place]
    if len(table) != len(known) + 1:
        raise ValueError(
            f"got {len(table)} token embeddings for {len(known)} known tokens; expected one more; fetch the file again"
        )
    return {key: value for key, value in tensors.items() if key != at} | {place: table[rows_of(known)]}
