"""Rows of tokens with people in them, as Prompt with Identity writes them, and text models as the pack's files hold
them."""

from __future__ import annotations

import copy
from collections.abc import Mapping, Sequence
from itertools import cycle
from typing import Any

import comfy.ops
import torch
from comfy.sd1_clip import SDTokenizer
from torch import Tensor

from ...likeness import adaface, keymaps, prompts, vocabulary
from ...likeness.clip_text import END, LENGTH, TextModel, padded
from ..base import clip

PLACE = -1  # in a row of tokens, for one vector of a person
OPERATIONS = comfy.ops.disable_weight_init
ENCODER = "text_model."


def row(tokenizer: SDTokenizer, text: prompts.Parts, said: Sequence[int]) -> list[int]:
    """The tokens of a prompt, `said` at every person's place; what is too long is cut."""
    ids: list[int] = []
    for part in text:
        ids += said if isinstance(part, int) else _ids(tokenizer, part)
    return padded(ids[: LENGTH - 2])


def class_words(tokenizer: SDTokenizer, word: str) -> list[int]:
    """A class word in a person's stead, with commas behind it: all other words are where they are with the person."""
    ids = _ids(tokenizer, word)
    return [*ids, *[adaface.COMMA] * (adaface.VECTORS - len(ids))]


def _ids(tokenizer: SDTokenizer, text: str) -> list[int]:
    tokens = clip.tokenize(tokenizer, [text])[0]
    return tokens[1 : tokens.index(END)]


def encode(text: Any, rows: Sequence[Sequence[int]], vectors: Tensor) -> Tensor:
    """What the UNet reads of rows of tokens, [n, 77, width], with person i's vectors [n, K, width] in row i."""
    filled = []
    for tokens, own in zip(rows, vectors, strict=True):
        said = cycle(own)
        filled.append([next(said) if token == PLACE else token for token in tokens])
    return text(filled)[0]


def text_model(text: Any, tensors: Mapping[str, Tensor] | None = None) -> TextModel:
    """The host's text encoder as the pack's, to be trained; with other weights, those of a file, where they are given.

    The table of words stays as it is: those that no prompt here says would only decay.
    """
    transformer = text.transformer
    own = keymaps.under(transformer.state_dict(), ENCODER)
    table = "embeddings.token_embedding.weight"
    given = own if tensors is None else {**tensors, table: own[table]}
    heads = transformer.text_model.encoder.layers[0].self_attn.heads
    weights = {f"{ENCODER}{key}": value.float().clone() for key, value in given.items()}
    model = adaface.text_model(weights, ENCODER, heads, OPERATIONS).requires_grad_(True)
    words = copy.deepcopy(transformer.get_input_embeddings()).requires_grad_(False)
    model.embeddings["token_embedding"] = words
    model.size["words"] = len(words.known)  # its table has one row more, for all others
    return model


def tensors_of(model: TextModel, prefix: str) -> dict[str, Tensor]:
    """A trained text model as its file has it: with the table of all words, or of those that there are."""
    table: Any = model.embeddings["token_embedding"]
    tensors = {f"{prefix}{key}": value.half().contiguous() for key, value in model.state_dict().items()}
    tensors[prefix.removesuffix(ENCODER) + vocabulary.KNOWN] = torch.tensor(table.known)
    return vocabulary.whole(tensors) if len(table.known) == vocabulary.TOKENS else tensors


def base_of(model: TextModel) -> str:
    """The family of base models that a text encoder of this size is of."""
    return "demo" if adaface.not_clip_l(model) else "SD1.5"
