"""Token embeddings of a closed vocabulary: one row per known token, and one row shared by all other tokens.

A text encoder that was trained on few words stores these instead of the full table [49408, width], which is rebuilt for
ComfyUI when the file is loaded.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import torch
from torch import Tensor, nn

VOCABULARY_SIZE = 49408  # of CLIP's tokenizer
TOKEN_TABLE_NAME = "text_model.embeddings.token_embedding.weight"
KNOWN_TOKENS_NAME = "text_model.embeddings.token_embedding.known"


class ClosedVocabularyEmbedding(nn.Module):
    """Replaces a text encoder's token embedding: `weight` [known + 1, width], the last row for all other tokens."""

    rows: Tensor

    def __init__(self, known_tokens: Sequence[int], width: int) -> None:
        super().__init__()
        self.known_tokens = tuple(sorted(set(known_tokens)))
        self.weight = nn.Parameter(torch.randn(len(self.known_tokens) + 1, width) * 0.02)
        self.register_buffer(
            "rows", index_known_tokens(torch.tensor(self.known_tokens, device="cpu")), persistent=False
        )

    def forward(self, tokens: Tensor, out_dtype: torch.dtype | None = None) -> Tensor:
        """Token ids [...] -> embeddings [..., width], with the signature of the host's embedding."""
        embeddings = nn.functional.embedding(self.rows[tokens], self.weight)
        return embeddings if out_dtype is None else embeddings.to(out_dtype)


def index_known_tokens(known_tokens: Tensor) -> Tensor:
    """The row of each token of the vocabulary [VOCABULARY_SIZE]: its index among the known tokens [n], or n.

    Raises ValueError if the known tokens are not unique ids of the vocabulary.
    """
    ids = known_tokens.tolist()
    if len(set(ids)) != len(ids) or not set(ids) <= set(range(VOCABULARY_SIZE)):
        raise ValueError(f"got {len(ids)} known tokens; expected different numbers from 0 to {VOCABULARY_SIZE - 1}")
    rows = torch.full((VOCABULARY_SIZE,), len(ids), device=known_tokens.device)
    rows[known_tokens] = torch.arange(len(ids), device=known_tokens.device)
    return rows


def expand_token_table(tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Replace the short token table of a text encoder, under any prefix, by the full one; keeps all other tensors.

    Raises ValueError unless the table has one row more than there are known tokens.
    """
    known_key = next((key for key in tensors if key.endswith(KNOWN_TOKENS_NAME)), None)
    if known_key is None:
        return dict(tensors)
    table_key = known_key.removesuffix(KNOWN_TOKENS_NAME) + TOKEN_TABLE_NAME
    known, table = tensors[known_key], tensors[table_key]
    if len(table) != len(known) + 1:
        raise ValueError(
            f"got {len(table)} token embeddings for {len(known)} known tokens; expected one more; "
            "download the file again"
        )
    others = {key: value for key, value in tensors.items() if key != known_key}
    return others | {table_key: table[index_known_tokens(known)]}
