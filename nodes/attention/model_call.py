"""What a model call holds: which prompts its rows belong to, and how long each prompt's text is."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

TEXT_STREAM_ROLE_PREFIX = "text of "  # a text stream's role is this and the name of its prompt


@dataclass(frozen=True)
class ModelCall:
    """One call of the diffusion model, as injections see it.

    The batch is `len(roles)` chunks of `rows_per_chunk` rows. A role is the guider's name of the chunk's prompt
    ("positive"), the name of a guidance branch, or that of a text stream. `timesteps` [B] is the UNet's input; `sigma`
    is set if any injection needs it; `negative_text` [1, T, C] if the guider has a negative prompt. `text_lengths` has
    the number of tokens of each chunk's prompt, or is empty if all are equal.
    """

    roles: tuple[str, ...]
    rows_per_chunk: int
    dtype: torch.dtype
    device: torch.device
    timesteps: Tensor = field(compare=False)
    sigma: float | None = field(compare=False)
    negative_text: Tensor | None = field(compare=False)
    text_lengths: tuple[int, ...] = field(default=(), compare=False)

    @property
    def is_conditional(self) -> tuple[bool, ...]:
        """For each chunk, whether it gets the identity: all but negative prompts and text streams."""
        return tuple("negative" not in role and not self.is_text_stream(role) for role in self.roles)

    @staticmethod
    def is_text_stream(role: str) -> bool:
        """Whether a chunk is a text stream. It follows the image's chunk of the same prompt."""
        return role.startswith(TEXT_STREAM_ROLE_PREFIX)

    def remove_repeated_text(self, chunk: int, tokens: Tensor) -> Tensor:
        """The tokens [rows, T, C] of a chunk's prompt, each once; then those that another pack appended, if any.

        To batch prompts of different lengths, ComfyUI repeats their tokens up to a common length. A softmax over the
        text alone does not change with that, but one over text and faces does.
        """
        if not self.text_lengths:
            return tokens
        own, padded = self.text_lengths[chunk], math.lcm(*self.text_lengths)
        if own == padded or tokens.shape[1] < padded:
            return tokens
        return torch.cat((tokens[:, :own], tokens[:, padded:]), 1) if tokens.shape[1] > padded else tokens[:, :own]


@dataclass(frozen=True, eq=False)
class PromptBatch:
    """What ComfyUI runs together in a step: the names of the prompts that `cond_or_uncond` counts.

    `text_lengths` has the number of tokens of each conditioning, by the position of its prompt and its uuid. (The host
    adds copies of conditionings to other prompts, so that a uuid alone does not do.)
    """

    names: tuple[str, ...]
    text_lengths: Mapping[tuple[int, Any], int]
    negative_text: Tensor | None
    sigma: float | None

    def get_text_lengths(self, positions: Sequence[int], uuids: Sequence[Any]) -> tuple[int, ...]:
        """The number of tokens of each of these conditionings; none if all are equal, or if one is unknown."""
        lengths = tuple(self.text_lengths.get(key, 0) for key in zip(positions, uuids, strict=False))
        return lengths if len(set(lengths)) > 1 and 0 not in lengths else ()


NO_PROMPTS = PromptBatch((), {}, None, None)  # of a call without a guider


def count_text_tokens(conds: Sequence[Sequence[Mapping[str, Any]] | None]) -> dict[tuple[int, Any], int]:
    """The number of tokens of each conditioning of some prompts, by the position of the prompt and its uuid."""
    return {
        (position, cond["uuid"]): text.cond.shape[1]
        for position, prompt in enumerate(conds)
        for cond in prompt or ()
        if (text := cond["model_conds"].get("c_crossattn")) is not None
    }
