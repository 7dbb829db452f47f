"""The text stream: rows that run beside the image's with the prompt alone, for self-attention to read."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

# No text stream; one that shares the image's latent inside each model call; or one with a latent of its own, which
# starts from the same noise and runs beside the image's from the first step to the last. If injections ask for
# different kinds, the later one serves all.
NO_TEXT_STREAM, SHARED_TEXT_STREAM, OWN_TEXT_STREAM = TEXT_STREAM_KINDS = ("", "shared", "own")


def append_text_rows(
    extra_args: dict[str, Any],
    callback: Any,
    noise: Tensor,
    latent_image: Tensor | None = None,
    denoise_mask: Tensor | None = None,
    *rest: Any,
    **kwargs: Any,
) -> tuple[tuple[Any, ...], dict[str, Any]]:
    """A sampler's arguments with a text stream's rows behind the image's. Callbacks see the image's only."""
    rows = len(noise)

    def repeat_rows(tensor: Tensor | None) -> Tensor | None:
        return tensor if tensor is None or len(tensor) != rows else torch.cat((tensor, tensor))

    def call_with_image_rows(step: int, x0: Any, x: Any, total: int) -> Any:
        return callback(step, x0 if x0 is None else x0[:rows], x[:rows], total)

    wrapped = None if callback is None else call_with_image_rows
    args = extra_args, wrapped, repeat_rows(noise), repeat_rows(latent_image), repeat_rows(denoise_mask), *rest
    return args, kwargs


def stack_streams(x: Tensor) -> Tensor:
    """The rows of the text stream as further channels of the image's: [2 n, C, ...] -> [n, 2 C, ...].

    So whatever takes some images out of the batch, as context windows do, takes those of both streams.
    """
    return torch.cat(x.chunk(2), 1)


def unstack_streams(x: Tensor) -> Tensor:
    """The inverse of stack_streams."""
    return torch.cat(x.chunk(2, 1))


def add_shared_rows(args: Any, x: Tensor, rows_per_chunk: int, options: Any) -> Any:
    """A model's arguments with the rows of a shared text stream behind each chunk of rows, except in its `options`.

    The model gets x [B, ...] and other tensors of B rows.
    """
    index = torch.arange(len(x), device=x.device).view(-1, 1, rows_per_chunk).repeat(1, 2, 1).flatten()
    return _index_batch_rows(args, len(x), index, options)


def remove_shared_rows(out: Tensor, rows_per_chunk: int) -> Tensor:
    """A model's output without the rows of a shared text stream."""
    return out.unflatten(0, (-1, 2, rows_per_chunk))[:, 0].flatten(0, 1)


def _index_batch_rows(value: Any, num_rows: int, index: Tensor, excluded: Any) -> Any:
    """`tensor[index]` for every tensor of `num_rows` rows in a model's arguments, except inside `excluded`."""
    if value is excluded:
        return value
    if isinstance(value, Tensor):
        return value[index] if value.ndim and len(value) == num_rows else value
    if isinstance(value, (list, tuple)):
        return type(value)(_index_batch_rows(item, num_rows, index, excluded) for item in value)
    if isinstance(value, dict):
        return {key: _index_batch_rows(item, num_rows, index, excluded) for key, item in value.items()}
    return value
