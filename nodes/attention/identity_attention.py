"""A second cross-attention to identity tokens: what decoupled and mixed attention have in common."""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from comfy.model_patcher import ModelPatcher
from torch import Tensor

from ...likeness.methods import ip_adapter
from .. import types
from .injection import AttentionTerm, PatchPlace
from .layer_masks import get_query_coverage
from .model_call import ModelCall
from .slots import get_call_state

ConditionalPair = tuple[Tensor, Tensor]  # for rows with and without the identity, [n, T, hidden] each


@dataclass(frozen=True, eq=False)
class LayerKeyValues:
    """Keys and values [rows, T, hidden] of a layer for one model call, and the bias of their logits [1, 1, n * T]."""

    k: Tensor
    v: Tensor
    bias: Tensor | None


class IdentityAttentionTerm(AttentionTerm):
    """The keys and values of an identity are projected once per run and laid out once per kind of model call."""

    adapter: types.LoadedAdapter

    @property
    def has_face_per_row(self) -> bool:
        """Whether image i of a batch gets face i alone, instead of all faces."""
        return False

    @property
    def patchers(self) -> list[ModelPatcher]:
        return [self.adapter.patcher]

    @abstractmethod
    def make_identity_tokens(self, device: torch.device) -> ip_adapter.IdentityTokens:
        """Run the projector of the adapter."""

    @abstractmethod
    def project_layers(
        self, tokens: ip_adapter.IdentityTokens
    ) -> Iterator[tuple[PatchPlace, tuple[ConditionalPair, ConditionalPair]]]:
        """For each place, the keys and then the values."""

    def prepare_states(self, call: ModelCall) -> Mapping[PatchPlace, LayerKeyValues]:
        # Windows of equal length share the states, unless each image has a face of its own.
        images = call.images if self.has_face_per_row else (0,) * len(call.images)
        key = ("states", call.is_conditional, images, call.dtype, call.device)
        return self.run_cache.get_or_compute(key, lambda: self._arrange_states(call))

    def _arrange_states(self, call: ModelCall) -> Mapping[PatchPlace, LayerKeyValues]:
        layers, bias = self.run_cache.get_or_compute((call.dtype, call.device), lambda: self._project_identity(call))

        def arrange(pair: ConditionalPair) -> Tensor:
            return ip_adapter.arrange_batch_rows(*pair, call.is_conditional, call.images, self.has_face_per_row)

        return {place: LayerKeyValues(arrange(k), arrange(v), bias) for place, (k, v) in layers.items()}

    def _project_identity(self, call: ModelCall) -> tuple[Mapping[PatchPlace, Any], Tensor | None]:
        tokens = self.make_identity_tokens(call.device)
        layers = {
            place: tuple((cond.to(call.dtype), uncond.to(call.dtype)) for cond, uncond in pairs)
            for place, pairs in self.project_layers(tokens)
        }
        bias = None if self.has_face_per_row else ip_adapter.compute_face_key_bias(tokens, call.device)
        return layers, None if bias is None else bias.to(call.dtype)

    def apply_region(self, term: Tensor, mask: Tensor | None, q: Tensor, options: dict[str, Any]) -> Tensor:
        """The term of the queries q [..., N, C] times the coverage of the region [B, H, W]; None is everywhere."""
        if mask is None:
            return term
        return term * get_query_coverage(self.run_cache, mask, get_call_state(options).call, options, q.shape[-2])
