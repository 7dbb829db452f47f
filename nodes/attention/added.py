"""FlashFace's added attention layers over the picture's own tokens: what makes its UNet whole, references or not."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

from comfy.model_patcher import ModelPatcher
from torch import Tensor

from ...likeness.flashface import AddedLayer, AddedLayers, Heard
from .injection import ALWAYS, OUTPUT, Bank, Call, Place, Term, Window
from .patch import attach, host_attention
from .unet import sites

HEARD = "likeness_heard"  # in a layer's options: what its added layer made of the picture's tokens


@dataclass(frozen=True, eq=False)
class Added(Term):
    """The added layers (injection.Term). Always on: the UNet was trained with them."""

    patcher: ModelPatcher
    layers: Mapping[Place, AddedLayer]
    window: Window = ALWAYS
    bank: Bank = field(default_factory=Bank)

    @property
    def intrinsic(self) -> bool:
        return True

    @property
    def patchers(self) -> list[ModelPatcher]:
        return [self.patcher]

    @property
    def places(self) -> list[Place]:
        return list(self.layers)

    def prepare(self, call: Call) -> Mapping[Place, Any]:
        return self.layers

    def term(self, state: Any, q: Tensor, options: dict[str, Any]) -> Tensor:
        layer: AddedLayer = state
        query, k, v = layer.q(q), layer.k(q), layer.v(q)
        heard = Heard(query, k, v, layer.o(host_attention(query, k, v, options)))
        options[HEARD] = heard
        return heard.own


def with_added(model: ModelPatcher, patcher: ModelPatcher) -> ModelPatcher:
    """The model with the added layers in it. Raises ValueError where it has no place for one of them."""
    module: AddedLayers = patcher.model
    found = {site: module.at(site.key) for site in sites(model.model.diffusion_model)}
    layers = {
        Place(OUTPUT, site.block, site.depth, site.deep): layer
        for site, layer in found.items()
        if layer is not None and layer.q.in_features == site.hidden
    }
    if len(layers) < len(module.layers):
        raise ValueError(
            f"got {len(module.layers)} added layers, {len(layers)} of which fit this model; expected an SD1.5 model; "
            "connect one"
        )
    return attach(model, Added(patcher, layers))
