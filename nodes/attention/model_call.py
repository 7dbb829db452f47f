"""What a model call holds: which prompts its rows belong to, and how long each prompt's text is."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from .schedule import NO_SCHEDULES, ResolvedSchedules, Schedule

TEXT_STREAM_ROLE_PREFIX = "text of "  # a text stream's role is this and the name of its prompt


@dataclass(frozen=True)
class ModelCall:
    """One call of the diffusion model, as injections see it.

    The batch is `len(roles)` chunks of `rows_per_chunk` rows. A role is the guider's name of the chunk's prompt
    ("positive"), the name of a guidance branch, or that of a text stream. `timesteps` [B] is the UNet's input; `sigma`
    is set if any injection needs it; `negative_text` [1, T, C] if the guider has a negative prompt. `text_lengths` has
    the number of tokens of each chunk's prompt, or is empty if all are equal. `schedules` are those of the run.
    """

    roles: tuple[str, ...]
    rows_per_chunk: int
    dtype: torch.dtype
    device: torch.device
    timesteps: Tensor = field(compare=False)
    sigma: float | None = field(compare=False)
    negative_text: Tensor | None = field(compare=False)
    text_lengths: tuple[int, ...] = field(default=(), compare=False)
    schedules: ResolvedSchedules = field(default=NO_SCHEDULES, compare=False)

    def make_image_rows(self) -> Tensor | None:
        """1 for the image's rows and 0 for a text stream's [rows, 1, 1]; None if there is no text stream."""
        if not any(map(self.is_text_stream, self.roles)):
            return None
        rows = torch.ones(len(self.roles), self.rows_per_chunk, 1, 1, dtype=self.dtype, device=self.device)
        for chunk, role in zip(rows, self.roles, strict=True):
            if self.is_text_stream(role):
                chunk.zero_()
        return rows.flatten(0, 1)

    def is_during(self, schedule: Schedule) -> bool:
        """Whether a schedule is on, in a call whose sigma is known."""
        assert self.sigma is not None
        return self.schedules.get_window(schedule).contains(self.sigma)

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
    negative_text: Tensor | None = None
    sigma: float | None = None
    schedules: ResolvedSchedules = NO_SCHEDULES

    def make_model_call(
        self, x: Tensor, timesteps: Tensor, positions: Sequence[int], uuids: Sequence[Any], has_text_stream: bool
    ) -> ModelCall:
        """The call for x [B, C, H, W], whose chunks have prompts at these positions, and these uuids."""
        # Without a guider, ComfyUI's order holds: 0 is the positive prompt.
        roles = [self.names[i] if self.names else ("negative" if i else "positive") for i in positions]
        lengths = [self.text_lengths.get(key, 0) for key in zip(positions, uuids, strict=False)]
        if has_text_stream:
            roles = [role for name in roles for role in (name, f"{TEXT_STREAM_ROLE_PREFIX}{name}")]
            lengths = [length for length in lengths for _ in range(2)]
        is_known = 0 not in lengths and len(set(lengths)) > 1
        return ModelCall(
            roles=tuple(roles),
            rows_per_chunk=len(x) // len(roles),
            dtype=x.dtype,
            device=x.device,
            timesteps=timesteps,
            sigma=self.sigma,
            negative_text=self.negative_text,
            text_lengths=tuple(lengths) if is_known else (),
            schedules=self.schedules,
        )


NO_PROMPTS = PromptBatch((), {})  # of a call without a guider


def count_text_tokens(conds: Sequence[Sequence[Mapping[str, Any]] | None]) -> dict[tuple[int, Any], int]:
    """The number of tokens of each conditioning of some prompts, by the position of the prompt and its uuid."""
    return {
        (position, cond["uuid"]): text.cond.shape[1]
        for position, prompt in enumerate(conds)
        for cond in prompt or ()
        if (text := cond["model_conds"].get("c_crossattn")) is not None
    }


def find_prompt_name(cond: list[Any] | None, prompts_by_name: Mapping[str, list[Any]]) -> str:
    """The guider's name of a prompt, or "". Context windows copy prompts, but their uuids stay the same."""
    same = (name for name, prompt in prompts_by_name.items() if prompt is cond)
    copied = (
        name
        for name, prompt in prompts_by_name.items()
        if cond and prompt and prompt[0].get("uuid") == cond[0].get("uuid")
    )
    return next(same, "") or next(copied, "")
