"""The layers of adapters in FLUX.1 and models with the same blocks: double blocks, then single blocks."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

from comfy.ldm.flux.model import Flux
from comfy.model_patcher import ModelPatcher
from torch import nn

from ...likeness.attention import layer_weights
from ...likeness.checkpoints import native_omni_adapter
from ...likeness.spec import AdapterSpec
from .flux_terms import FLUX_BLOCK_QUERIES, FLUX_BLOCK_STREAM, FLUX_IMAGE_ATTENTION, FLUX_JOINT_ATTENTION
from .injection import PatchPlace

FluxBlockKey = tuple[str, int]

# Adapter kind -> block kind -> place of the terms. Published adapters have a layer for every block of these kinds, or
# for one in every BLOCK_INTERVALS. Adapters in the native format may leave blocks out.
PLACES_BY_KIND: Mapping[str, Mapping[str, str]] = {
    "xlabs": {"double": FLUX_BLOCK_QUERIES},
    "instantx": {"double": FLUX_IMAGE_ATTENTION, "single": FLUX_JOINT_ATTENTION},
    "pulid_flux": {"double": FLUX_BLOCK_STREAM, "single": FLUX_BLOCK_STREAM},
    native_omni_adapter.KIND: {"double": FLUX_IMAGE_ATTENTION, "single": FLUX_IMAGE_ATTENTION},
}
BLOCK_INTERVALS: Mapping[str, Mapping[str, int]] = {"pulid_flux": {"double": 2, "single": 4}}
PARTIAL_ADAPTER_KINDS = {native_omni_adapter.KIND}


@dataclass(frozen=True)
class FluxLayer:
    """One layer of an adapter in FLUX.

    `name` is its name in the adapter. `index` and `num_layers` count the adapter's layers in the order in which they
    run; `block_type` is the part of the model: input, middle or output.
    """

    name: str
    place: PatchPlace
    index: int
    num_layers: int
    block_type: str
    hidden_size: int

    def get_layer_position(self, base: str) -> layer_weights.LayerPosition:
        return layer_weights.LayerPosition(self.index, self.num_layers, self.block_type, base)


def list_flux_blocks(model: nn.Module) -> list[FluxBlockKey]:
    """The blocks of a FLUX model in the order in which they run. Raises ValueError for other models."""
    if not isinstance(model, Flux):
        raise ValueError(
            f"got a {type(model).__name__} model; expected FLUX.1, for which this adapter was made; load it with "
            "Load Diffusion Model"
        )
    kinds = (("double", model.double_blocks), ("single", model.single_blocks))
    return [(kind, i) for kind, blocks in kinds for i in range(len(blocks))]


def _get_block_type(block: FluxBlockKey, num_single_blocks: int) -> str:
    """Double blocks count as input, the first half of the single blocks as middle, the other half as output."""
    kind, index = block
    return "input" if kind == "double" else "middle" if index < num_single_blocks // 2 else "output"


def _find_block(name: str, blocks: list[FluxBlockKey]) -> FluxBlockKey | None:
    """The block of the layer "double_blocks.3", or of the layer "7", an index into `blocks`. None if there is none."""
    kind, _, index = name.rpartition(".")
    if kind:
        block = kind.removesuffix("_blocks"), int(index)
        return block if block in blocks else None
    return blocks[int(index)] if int(index) < len(blocks) else None


def match_flux_layers(spec: AdapterSpec, model: ModelPatcher) -> list[FluxLayer]:
    """The adapter's layers in the order in which they run. Raises ValueError if it is for another model."""
    flux = model.model.diffusion_model
    places, intervals = PLACES_BY_KIND[spec.kind], BLOCK_INTERVALS.get(spec.kind, {})
    blocks = [(kind, i) for kind, i in list_flux_blocks(flux) if i % intervals.get(kind, 1) == 0]
    num_single_blocks = len(flux.single_blocks)
    blocks_by_name = {name: _find_block(name, blocks) for name in spec.layer_names}
    supported = {block for block in blocks if block[0] in places}
    matched = {block for block in blocks_by_name.values() if block in supported}
    fits = len(matched) == len(blocks_by_name) and (matched == supported or spec.kind in PARTIAL_ADAPTER_KINDS)
    if not fits or set(spec.layers) != {flux.hidden_size}:
        raise ValueError(
            f"got an adapter for FLUX.1 with {len(spec.layer_names)} layers of width {max(spec.layers)}; expected one "
            f"for this model, which has {len(flux.double_blocks)} double and {num_single_blocks} single blocks of "
            f"width {flux.hidden_size}; load an adapter for this base model, or FLUX.1"
        )
    layers = [(block, name) for name, block in blocks_by_name.items() if block]
    layers.sort(key=lambda layer: blocks.index(layer[0]))
    return [
        FluxLayer(
            name=name,
            place=PatchPlace(places[block[0]], block),
            index=i,
            num_layers=len(layers),
            block_type=_get_block_type(block, num_single_blocks),
            hidden_size=flux.hidden_size,
        )
        for i, (block, name) in enumerate(layers)
    ]
