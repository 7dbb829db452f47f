"""Token rows with placeholders for a person, as in Prompt with Identity, and text models in the native format."""

from __future__ import annotations

import copy
from collections.abc import Mapping, Sequence
from itertools import cycle
from typing import Any

import comfy.ops
import torch
from comfy.sd1_clip import SDTokenizer
from torch import Tensor

from ...likeness.checkpoints import key_maps
from ...likeness.encoders import token_embedding
from ...likeness.encoders.clip_text import CONTEXT_LENGTH, END_TOKEN_ID, CLIPTextModel, pad_token_ids
from ...likeness.methods import adaface, prompt_placeholders
from ..base_models import clip_pair

PERSON_TOKEN = -1  # in a token row, the placeholder for one vector of the person
OPERATIONS = comfy.ops.disable_weight_init
HOST_TEXT_PREFIX = "text_model."


def make_token_row(
    tokenizer: SDTokenizer, prompt_parts: prompt_placeholders.PromptParts, person_ids: Sequence[int]
) -> list[int]:
    """The token ids of a prompt, with `person_ids` at each placeholder, truncated to the context length."""
    ids: list[int] = []
    for part in prompt_parts:
        ids += person_ids if isinstance(part, int) else _tokenize_text(tokenizer, part)
    return pad_token_ids(ids[: CONTEXT_LENGTH - 2])


def tokenize_class_word(tokenizer: SDTokenizer, word: str) -> list[int]:
    """The token ids of a class word, padded with commas to NUM_FACE_VECTORS, so that all other tokens stay in place."""
    ids = _tokenize_text(tokenizer, word)
    return [*ids, *[adaface.COMMA_TOKEN_ID] * (adaface.NUM_FACE_VECTORS - len(ids))]


def _tokenize_text(tokenizer: SDTokenizer, text: str) -> list[int]:
    tokens = clip_pair.tokenize_texts(tokenizer, [text])[0]
    return tokens[1 : tokens.index(END_TOKEN_ID)]


def encode_token_rows(text_encoder: Any, token_rows: Sequence[Sequence[int]], vectors: Tensor) -> Tensor:
    """Text conditioning [n, 77, width] of token rows, with the vectors [n, K, width] of person i in row i."""
    rows = []
    for tokens, person_vectors in zip(token_rows, vectors, strict=True):
        next_vector = cycle(person_vectors)
        rows.append([next(next_vector) if token == PERSON_TOKEN else token for token in tokens])
    return text_encoder(rows)[0]


def build_trainable_text_model(text_encoder: Any, tensors: Mapping[str, Tensor] | None = None) -> CLIPTextModel:
    """A trainable CLIPTextModel with the weights of ComfyUI's text encoder, or with `tensors` instead.

    The token embeddings are the text encoder's and stay frozen: tokens that occur in no prompt would only decay.
    """
    transformer = text_encoder.transformer
    base_tensors = key_maps.select_prefix(transformer.state_dict(), HOST_TEXT_PREFIX)
    table_name = "embeddings.token_embedding.weight"
    tensors = base_tensors if tensors is None else {**tensors, table_name: base_tensors[table_name]}
    num_heads = transformer.text_model.encoder.layers[0].self_attn.heads
    weights = {f"{HOST_TEXT_PREFIX}{key}": value.float().clone() for key, value in tensors.items()}
    model = adaface.build_text_model(weights, HOST_TEXT_PREFIX, num_heads, OPERATIONS).requires_grad_(True)
    table = copy.deepcopy(transformer.get_input_embeddings()).requires_grad_(False)
    model.embeddings["token_embedding"] = table
    model.sizes["words"] = len(table.known_tokens)  # the table has one more row, for all unknown tokens
    return model


def collect_text_tensors(model: CLIPTextModel, prefix: str) -> dict[str, Tensor]:
    """A trained text model's tensors for its file, with the full token table if all tokens are known."""
    table: Any = model.embeddings["token_embedding"]
    tensors = {f"{prefix}{key}": value.half().contiguous() for key, value in model.state_dict().items()}
    tensors[prefix.removesuffix(HOST_TEXT_PREFIX) + token_embedding.KNOWN_TOKENS_NAME] = torch.tensor(
        table.known_tokens
    )
    if len(table.known_tokens) == token_embedding.VOCABULARY_SIZE:
        return token_embedding.expand_token_table(tensors)
    return tensors


def detect_base_family(model: CLIPTextModel) -> str:
    """The base model family of a text encoder, by its sizes."""
    return "demo" if adaface.find_clip_l_mismatches(model) else "SD1.5"
