"""Token embeddings in a prompt: ComfyUI's own conditioning of a text that holds the identity's token embeddings."""

from __future__ import annotations

import copy
import secrets
import tempfile
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from itertools import pairwise
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save
from torch import Tensor

from ..likeness.methods import prompt_placeholders

EMBEDDING_PREFIX = "embedding:"  # ComfyUI's syntax

TokenEmbeddings = Mapping[str, Tensor]  # text encoder -> [n, D]
TokenizedPrompt = dict[str, list[list[tuple[Any, ...]]]]


def get_text_transformer(clip: Any, name: str) -> Any:
    """The transformer of one text encoder of a CLIP."""
    return getattr(clip.cond_stage_model, f"clip_{name}").transformer


def encode_prompt(
    clip: Any,
    prompt_parts: prompt_placeholders.PromptParts,
    identity_embeddings: Mapping[int, TokenEmbeddings],
    layer_mix: Sequence[float],
) -> list[Any]:
    """ComfyUI's conditioning of a prompt, with the token embeddings of each person at the person's places.

    The token embeddings are inserted as textual inversion embeddings. `layer_mix` are the weights of the last layers'
    hidden states, the last layer last; if empty, ComfyUI and its clip skip decide. Raises ValueError if `layer_mix` is
    used with several text encoders.
    """
    clip, prefix = clip.clone(), f"likeness_{secrets.token_hex(8)}_"
    with tempfile.TemporaryDirectory() as folder:
        for number, embeddings in identity_embeddings.items():
            data = save({f"clip_{encoder}": rows for encoder, rows in embeddings.items()})
            Path(folder, f"{prefix}{number}.safetensors").write_bytes(data)
        clip.tokenizer = copy_tokenizer(clip.tokenizer, folder)
        text = prompt_placeholders.join_prompt(prompt_parts, lambda number: f" {EMBEDDING_PREFIX}{prefix}{number} ")
        lengths = [len(rows) for embeddings in identity_embeddings.values() for rows in embeddings.values()]
        tokens = tokenize_unsplit(clip, text, max(lengths, default=0))
    if not layer_mix:
        return clip.encode_from_tokens_scheduled(tokens)
    if len(tokens) > 1:
        raise ValueError(
            f"got layer_mix for a CLIP with several text encoders ({', '.join(sorted(tokens))}); expected that of "
            "SD1.5; set layer_mix to off"
        )
    clip.clip_layer(None)
    with mix_hidden_states(clip, next(iter(tokens)), layer_mix):
        return clip.encode_from_tokens_scheduled(tokens)


def get_encoder_tokenizers(tokenizer: Any) -> dict[str, Any]:
    """The tokenizers of each text encoder that know embeddings, by attribute name."""
    return {name: part for name, part in vars(tokenizer).items() if hasattr(part, "embedding_directory")}


def copy_tokenizer(tokenizer: Any, folder: str) -> Any:
    """A copy of ComfyUI's tokenizer that finds embeddings in one more folder."""
    copied = copy.copy(tokenizer)
    for name, part in get_encoder_tokenizers(tokenizer).items():
        part, folders = copy.copy(part), part.embedding_directory or []
        part.embedding_directory = [folder, *([folders] if isinstance(folders, str) else folders)]
        setattr(copied, name, part)
    return copied


def tokenize_unsplit(clip: Any, text: str, max_embedding_length: int) -> TokenizedPrompt:
    """ComfyUI's tokens of a text, without splitting embeddings of up to `max_embedding_length` rows over two chunks.

    ComfyUI moves only words shorter than `max_word_length` into the next chunk as a whole. The limit is raised only if
    an embedding would be split, so that all other prompts are tokenized as usual. `clip.tokenizer` must be a copy.
    """
    chunks_of_encoders = clip.tokenize(text, return_word_ids=True).values()
    if any(map(_splits_embedding, chunks_of_encoders)):
        for part in get_encoder_tokenizers(clip.tokenizer).values():
            part.max_word_length = max(part.max_word_length, max_embedding_length + 1)
    return clip.tokenize(text)


def _splits_embedding(chunks: Sequence[Sequence[tuple[Any, ...]]]) -> bool:
    """Whether rows of one embedding lie in two chunks."""
    word_ids = [{word_id for token, _, word_id in chunk if isinstance(token, Tensor)} for chunk in chunks]
    return any(first & second for first, second in pairwise(word_ids))


@contextmanager
def mix_hidden_states(clip: Any, encoder: str, layer_mix: Sequence[float]) -> Iterator[None]:
    """Within the context, the text encoder averages the hidden states of its last layers, before the final norm."""
    *layers, last_layer = get_text_transformer(clip, encoder).text_model.encoder.layers[-len(layer_mix) :]
    states: list[Tensor] = []

    def store(_module: Any, _args: Any, output: Tensor) -> None:
        states.append(output.clone())  # the next layer adds to it in place

    def mix(_module: Any, _args: Any, output: Tensor) -> Tensor:
        all_states = [*states, output]
        states.clear()
        weighted = (weight / sum(layer_mix) * state for weight, state in zip(layer_mix, all_states, strict=True))
        return sum(weighted, torch.zeros_like(output))

    hooks = [*(layer.register_forward_hook(store) for layer in layers), last_layer.register_forward_hook(mix)]
    try:
        yield
    finally:
        for hook in hooks:
            hook.remove()
