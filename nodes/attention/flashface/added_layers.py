"""FlashFace's added attention layers over the image tokens, which its UNet needs with and without references."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

from comfy.model_patcher import ModelPatcher
from torch import Tensor

from ....likeness.methods.flashface import AddedLayer, AddedLayers, SelfAttentionOutput
from ..injection import ATTN1_OUTPUT, AttentionTerm, PatchPlace, RunCache
from ..model_call import ModelCall
from ..patch import attach_injection, run_attention_backend
from ..schedule import ALWAYS_ON, Schedule
from ..slots import get_layer_tensors
from ..unet_layers import list_unet_layers


@dataclass(frozen=True, eq=False)
class AddedLayersTerm(AttentionTerm):
    """The added layers. Always on, as the UNet was trained with them."""

    patcher: ModelPatcher
    layers: Mapping[PatchPlace, AddedLayer]
    schedule: Schedule = ALWAYS_ON
    run_cache: RunCache = field(default_factory=RunCache)

    @property
    def is_part_of_model(self) -> bool:
        return True

    @property
    def patchers(self) -> list[ModelPatcher]:
        return [self.patcher]

    @property
    def places(self) -> list[PatchPlace]:
        return list(self.layers)

    def prepare_states(self, call: ModelCall) -> Mapping[PatchPlace, Any]:
        return self.layers

    def compute_term(self, state: Any, q: Tensor, options: dict[str, Any]) -> Tensor:
        layer: AddedLayer = state
        query, k, v = layer.q(q), layer.k(q), layer.v(q)
        output = layer.o(run_attention_backend(query, k, v, options))
        get_layer_tensors(options).added_layer_output = SelfAttentionOutput(query, k, v, output)
        return output


def attach_added_layers(model: ModelPatcher, patcher: ModelPatcher) -> ModelPatcher:
    """The model with the added layers. Raises ValueError if some of them do not fit."""
    module: AddedLayers = patcher.model
    unet_layers = list_unet_layers(model.model.diffusion_model)
    layers = {
        PatchPlace(ATTN1_OUTPUT, layer.block, layer.depth, layer.is_multi_block): added
        for layer in unet_layers
        if (added := module.get_layer(layer.module_path)) is not None and added.q.in_features == layer.hidden_size
    }
    if len(layers) < len(module.layers):
        raise ValueError(
            f"got a model that {len(layers)} of {len(module.layers)} added layers fit; expected an SD1.5 model; "
            "connect one"
        )
    return attach_injection(model, AddedLayersTerm(patcher, layers))
