"""Records queries, keys and outputs of a UNet's cross-attentions, with forward hooks on the host's modules."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from functools import partial
from typing import Any

from torch import Tensor, nn

from ...nodes.attention import unet_layers
from .losses import compute_attention_maps


@dataclass
class CrossAttentionRecord:
    """One cross-attention: queries and outputs [n, positions, C], keys [n, tokens, C]."""

    num_heads: int
    recorded: dict[str, Tensor] = field(default_factory=dict)

    @property
    def queries(self) -> Tensor:
        return self.recorded["to_q"]

    @property
    def outputs(self) -> Tensor:
        return self.recorded["out"]

    @property
    def attention_maps(self) -> Tensor:
        return compute_attention_maps(self.recorded["to_q"], self.recorded["to_k"], self.num_heads)


@contextmanager
def record_cross_attentions(model: nn.Module) -> Iterator[list[CrossAttentionRecord]]:
    """The cross-attentions of a UNet in order, recorded at each forward pass within the context."""
    records, hooks = [], []
    for layer in unet_layers.list_unet_layers(model):
        attention: Any = model.get_submodule(f"{layer.module_path}.attn2")
        records.append(record := CrossAttentionRecord(attention.heads))
        for name, module in (("to_q", attention.to_q), ("to_k", attention.to_k), ("out", attention)):
            hooks.append(module.register_forward_hook(partial(_record_output, record.recorded.__setitem__, name)))
    try:
        yield records
    finally:
        for hook in hooks:
            hook.remove()


def _record_output(
    store: Callable[[str, Tensor], None], name: str, _module: nn.Module, _inputs: Any, out: Tensor
) -> None:
    store(name, out)
