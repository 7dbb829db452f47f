"""The exponential moving average of a module's weights: what is drawn from, and saved."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator

import torch
from torch import Tensor, nn


class Ema:
    """Averages in float32 of all trained parameters and of floating-point buffers.

    The decay at step n is at most (1 + n) / (10 + n), so that the first weights are soon forgotten.
    """

    def __init__(self, module: nn.Module, decay: float) -> None:
        self.decay = decay
        self.average = {key: value.detach().float().clone() for key, value in averaged(module).items()}

    @torch.no_grad()
    def update(self, module: nn.Module, step: int) -> None:
        decay = min(self.decay, (1 + step) / (10 + step))
        for key, value in averaged(module).items():
            self.average[key].lerp_(value.float(), 1 - decay)

    @contextlib.contextmanager
    def applied(self, module: nn.Module) -> Iterator[None]:
        """Inside, the module has the averages for weights, and evaluates; afterwards it is as it was."""
        training = module.training
        now = averaged(module)
        kept = {key: value.detach().clone() for key, value in now.items()}
        self._write(now, self.average)
        module.eval()
        try:
            yield
        finally:
            self._write(averaged(module), kept)
            module.train(training)

    @staticmethod
    @torch.no_grad()
    def _write(into: dict[str, Tensor], values: dict[str, Tensor]) -> None:
        for key, value in into.items():
            value.copy_(values[key])


def averaged(module: nn.Module) -> dict[str, Tensor]:
    """The tensors themselves that have an average, by name."""
    trained = {key: value for key, value in module.named_parameters() if value.requires_grad}
    return trained | {key: value for key, value in module.named_buffers() if value.is_floating_point()}
