"""What a UNet's cross-attentions see while it runs, by hooks on the host's modules."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from functools import partial
from typing import Any

from torch import Tensor, nn

from ...nodes.attention import unet
from .losses import attention_maps


@dataclass
class Layer:
    """One cross-attention: queries and outputs [n, places, C], keys [n, words, C]."""

    heads: int
    kept: dict[str, Tensor] = field(default_factory=dict)

    @property
    def queries(self) -> Tensor:
        return self.kept["to_q"]

    @property
    def outputs(self) -> Tensor:
        return self.kept["out"]

    @property
    def maps(self) -> Tensor:
        return attention_maps(self.kept["to_q"], self.kept["to_k"], self.heads)


@contextmanager
def watching(model: nn.Module) -> Iterator[list[Layer]]:
    """The cross-attentions of a UNet, each filled when it runs while this lasts."""
    layers, hooks = [], []
    for site in unet.sites(model):
        attention: Any = model.get_submodule(f"{site.key}.attn2")
        layers.append(layer := Layer(attention.heads))
        for name, module in (("to_q", attention.to_q), ("to_k", attention.to_k), ("out", attention)):
            hooks.append(module.register_forward_hook(partial(_keep, layer.kept.__setitem__, name)))
    try:
        yield layers
    finally:
        for hook in hooks:
            hook.remove()


def _keep(keep: Callable[[str, Tensor], None], name: str, _module: nn.Module, _given: Any, out: Tensor) -> None:
    keep(name, out)
