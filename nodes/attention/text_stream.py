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
    noise: Tensor,
    latent: Tensor,
    sampler: Any,
    sigmas: Tensor,
    mask: Tensor | None = None,
    callback: Any = None,
    *rest: Any,
    **kwargs: Any,
) -> tuple[tuple[Any, ...], dict[str, Any]]:
    """The arguments of a sampling run with a text stream's rows behind the image's. Callbacks see the image's only."""
    rows = len(noise)

    def repeat_rows(tensor: Tensor | None) -> Tensor | None:
        return tensor if tensor is None or len(tensor) != rows else torch.cat((tensor, tensor))

    def call_with_image_rows(step: int, x0: Any, x: Any, total: int) -> Any:
        return callback(step, x0 if x0 is None else x0[:rows], x[:rows], total)

    if "latent_shapes" in kwargs:
        kwargs = {**kwargs, "latent_shapes": [torch.Size((2 * n, *size)) for n, *size in kwargs["latent_shapes"]]}
    wrapped = None if callback is None else call_with_image_rows
    args = (repeat_rows(noise), repeat_rows(latent), sampler, sigmas, repeat_rows(mask), wrapped, *rest)
    return args, kwargs


def index_batch_rows(value: Any, num_rows: int, index: Tensor, excluded: Any) -> Any:
    """`tensor[index]` for every tensor of `num_rows` rows in a model's arguments, except inside `excluded`."""
    if value is excluded:
        return value
    if isinstance(value, Tensor):
        return value[index] if value.ndim and len(value) == num_rows else value
    if isinstance(value, (list, tuple)):
        return type(value)(index_batch_rows(item, num_rows, index, excluded) for item in value)
    if isinstance(value, dict):
        return {key: index_batch_rows(item, num_rows, index, excluded) for key, item in value.items()}
    return value
