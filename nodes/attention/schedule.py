"""When an injection is on: in percents of the sampling, which become sigmas when sampling starts."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any

from comfy_api.latest import io
from torch import Tensor

from ...likeness.methods.flashface import NUM_TRAIN_TIMESTEPS


@dataclass(frozen=True)
class SigmaWindow:
    """When an injection is on: `end_sigma` < sigma <= `start_sigma`, so adjacent windows never overlap."""

    start_sigma: float
    end_sigma: float

    @property
    def is_full(self) -> bool:
        """Whether it contains every sigma."""
        return self.start_sigma == math.inf and self.end_sigma < 0

    def contains(self, sigma: float) -> bool:
        return self.end_sigma < sigma <= self.start_sigma

    def compute_gate(self, sigma: Tensor | None) -> Tensor | bool:
        """On or off. If sigma is on an accelerator: a factor of 0 or 1 there, as reading it would force a sync."""
        if sigma is None or self.is_full:
            return True
        first = sigma.flatten()[0]
        inside = (first > self.end_sigma) & (first <= self.start_sigma)
        return bool(inside) if sigma.device.type == "cpu" else inside


@dataclass(frozen=True)
class Schedule:
    """When an injection is on, as parts of the sampling, 0 to 1.

    Sampling nodes behind an Apply node may change what noise level a part stands for, so the model that is sampled
    decides.
    """

    start_percent: float = 0.0
    end_percent: float = 1.0

    @classmethod
    def from_timestep(cls, timestep: float) -> Schedule:
        """From this timestep on, as models count them: 999 is noise, 0 the image."""
        return cls(start_percent=1 - timestep / (NUM_TRAIN_TIMESTEPS - 1))

    @property
    def is_full(self) -> bool:
        """Whether it is always on."""
        return self.start_percent <= 0 and self.end_percent >= 1

    def resolve(self, model_sampling: Any) -> SigmaWindow:
        start = model_sampling.percent_to_sigma(self.start_percent) if self.start_percent > 0 else math.inf
        end = model_sampling.percent_to_sigma(self.end_percent) if self.end_percent < 1 else -1.0  # sigma may be 0
        return SigmaWindow(float(start), float(end))


ALWAYS_ON = Schedule()


class ResolvedSchedules:
    """The sigma windows of schedules in a sampling run, each resolved once by the `model_sampling` of its model.

    Without a run (None), only schedules that are always on can be resolved; others raise RuntimeError.
    """

    def __init__(self, model_sampling: Any) -> None:
        self._model_sampling = model_sampling
        self._windows: dict[Schedule, SigmaWindow] = {}

    def get_window(self, schedule: Schedule) -> SigmaWindow:
        if schedule not in self._windows:
            if self._model_sampling is None and not schedule.is_full:
                raise RuntimeError(
                    "the model was called without a guider; expected ComfyUI's samplers; use one of them"
                )
            self._windows[schedule] = schedule.resolve(self._model_sampling)
        return self._windows[schedule]

    def is_during(self, schedule: Schedule, sigma: float | None) -> bool:
        """Whether a schedule is on at a sigma, which must be known."""
        assert sigma is not None
        return self.get_window(schedule).contains(sigma)


NO_SCHEDULES = ResolvedSchedules(None)


def make_schedule_inputs() -> list[io.Float.Input]:
    """The start_percent and end_percent inputs of every apply node."""
    return [
        io.Float.Input(
            "start_percent", default=0.0, min=0.0, max=1.0, step=0.001,
            tooltip="Part of the sampling after which the identity is applied, 0 to 1.",
        ),
        io.Float.Input(
            "end_percent", default=1.0, min=0.0, max=1.0, step=0.001,
            tooltip="Part of the sampling after which the identity is no longer applied, 0 to 1.",
        ),
    ]  # fmt: skip
