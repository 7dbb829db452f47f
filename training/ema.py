"""Exponential moving average of a module's weights, used for samples and saved files."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator

import torch
from torch import Tensor, nn


class EMA:
    """Averages of all trained parameters and floating-point buffers, in float32.

    The decay at step n is at most (1 + n) / (10 + n), so that the initial weights are soon forgotten.
    """

    def __init__(self, module: nn.Module, decay: float) -> None:
        self.decay = decay
        self.average = {key: value.detach().float().clone() for key, value in list_averaged_tensors(module).items()}

    @torch.no_grad()
    def update(self, module: nn.Module, step: int) -> None:
        decay = min(self.decay, (1 + step) / (10 + step))
        for key, value in list_averaged_tensors(module).items():
            self.average[key].lerp_(value.float(), 1 - decay)

    @contextlib.contextmanager
    def average_parameters(self, module: nn.Module) -> Iterator[None]:
        """Inside the context the module has the averaged weights and is in evaluation mode."""
        was_training = module.training
        current = list_averaged_tensors(module)
        backup = {key: value.detach().clone() for key, value in current.items()}
        self._copy_into(current, self.average)
        module.eval()
        try:
            yield
        finally:
            self._copy_into(list_averaged_tensors(module), backup)
            module.train(was_training)

    @staticmethod
    @torch.no_grad()
    def _copy_into(targets: dict[str, Tensor], values: dict[str, Tensor]) -> None:
        for key, value in targets.items():
            value.copy_(values[key])


def list_averaged_tensors(module: nn.Module) -> dict[str, Tensor]:
    """The module's tensors that are averaged, by name; no copies."""
    trained = {key: value for key, value in module.named_parameters() if value.requires_grad}
    return trained | {key: value for key, value in module.named_buffers() if value.is_floating_point()}
