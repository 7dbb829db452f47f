"""What a model call holds: which prompts and images its rows belong to, and how long each prompt's text is."""

from __future__ import annotations

import math
from dataclasses import dataclass
from functools import cached_property

import torch
from torch import Tensor

from .schedule import NO_SCHEDULES, ResolvedSchedules, Schedule

TEXT_STREAM_ROLE_PREFIX = "text of "  # a text stream's role is this and the name of its prompt


@dataclass(frozen=True, eq=False)
class ModelCall:
    """One call of the diffusion model, as injections see it.

    The batch is `len(roles)` chunks of rows, one row for each of `images`, which are numbers in the latent batch: a
    context window holds some of them. A role is the guider's name of the chunk's prompt ("positive"), the name of a
    guidance branch, or that of a text stream. `timesteps` is the UNet's input, for the rows that it gets from ComfyUI;
    `sigma` is set if any injection needs it; `negative_text` [1, T, C] if the guider has a negative prompt.
    `text_lengths` has the number of tokens of each chunk's prompt, or is empty if all are equal. `schedules` are those
    of the run.
    """

    roles: tuple[str, ...]
    images: tuple[int, ...]
    dtype: torch.dtype
    device: torch.device
    timesteps: Tensor
    sigma: float | None = None
    negative_text: Tensor | None = None
    text_lengths: tuple[int, ...] = ()
    schedules: ResolvedSchedules = NO_SCHEDULES

    @property
    def rows_per_chunk(self) -> int:
        return len(self.images)

    @property
    def num_rows(self) -> int:
        return len(self.roles) * self.rows_per_chunk

    @property
    def is_conditional(self) -> tuple[bool, ...]:
        """For each chunk, whether it gets the identity: all but negative prompts and text streams."""
        return tuple("negative" not in role and not self.is_text_stream(role) for role in self.roles)

    @staticmethod
    def is_text_stream(role: str) -> bool:
        """Whether a chunk is a text stream. It follows the image's chunk of the same prompt."""
        return role.startswith(TEXT_STREAM_ROLE_PREFIX)

    @cached_property
    def image_of_row(self) -> Tensor:
        """The image of each row, [rows]."""
        images = torch.tensor(self.images).repeat(len(self.roles))
        return images.to(self.device, non_blocking=True)  # no device sync

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
        return self.schedules.is_during(schedule, self.sigma)

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
