"""Where adapters sit in FLUX.1 and models of its blocks: double blocks, then single blocks, in running order."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

from comfy.ldm.flux.model import Flux
from comfy.model_patcher import ModelPatcher
from torch import nn

from ...likeness import curves, omni_adapter
from ...likeness.spec import AdapterSpec
from .dit import EVERYTHING, PICTURE, QUERIED, STREAM
from .injection import Place

Block = tuple[str, int]

# Where the terms of each kind of adapter go. Published ones have a layer for each block of these sides, or for the
# first of EVERY so many; of the pack's own, a file may hold any.
PLACES: Mapping[str, Mapping[str, str]] = {
    "xlabs": {"double": QUERIED},
    "instantx": {"double": PICTURE, "single": EVERYTHING},
    "pulid_flux": {"double": STREAM, "single": STREAM},
    omni_adapter.KIND: {"double": PICTURE, "single": PICTURE},
}
EVERY: Mapping[str, Mapping[str, int]] = {"pulid_flux": {"double": 2, "single": 4}}
SOME = {omni_adapter.KIND}


@dataclass(frozen=True)
class FluxSite:
    """One layer of an adapter in FLUX.

    `name` is the adapter's for it; `place` where its term goes; `number` and `count` are of the adapter's layers in
    running order; `side` says which third of the model it stands in; `hidden` is the width of the model.
    """

    name: str
    place: Place
    number: int
    count: int
    side: str
    hidden: int

    def layer(self, base: str) -> curves.Layer:
        return curves.Layer(self.number, self.count, self.side, base)


def blocks(model: nn.Module) -> list[Block]:
    """The blocks of a FLUX model in running order. Raises ValueError for any other model."""
    if not isinstance(model, Flux):
        raise ValueError(
            f"got a {type(model).__name__} model; expected FLUX.1, which this adapter was made for; load it with "
            "Load Diffusion Model"
        )
    sides = (("double", model.double_blocks), ("single", model.single_blocks))
    return [(side, i) for side, found in sides for i in range(len(found))]


def _side(block: Block, singles: int) -> str:
    """Double blocks are the model's input, the first half of its single blocks its middle, the others its output."""
    kind, index = block
    return "input" if kind == "double" else "middle" if index < singles // 2 else "output"


def _block(name: str, running: list[Block]) -> Block | None:
    """The block of a layer "double_blocks.3", or "7", counted through all; None where there is no such block."""
    side, _, index = name.rpartition(".")
    if side:
        block = side.removesuffix("_blocks"), int(index)
        return block if block in running else None
    return running[int(index)] if int(index) < len(running) else None


def fitting(spec: AdapterSpec, model: ModelPatcher) -> list[FluxSite]:
    """The adapter's layers in the model, in running order. Raises ValueError where the model has no place for them."""
    flux = model.model.diffusion_model
    places, every = PLACES[spec.kind], EVERY.get(spec.kind, {})
    running = [(side, i) for side, i in blocks(flux) if i % every.get(side, 1) == 0]
    singles = len(flux.single_blocks)
    found = {name: _block(name, running) for name in spec.names}
    wanted = {block for block in running if block[0] in places}
    known = {block for block in found.values() if block in wanted}
    fits = len(known) == len(found) and (known == wanted or spec.kind in SOME)
    if not fits or set(spec.layers) != {flux.hidden_size}:
        raise ValueError(
            f"got an adapter for FLUX.1 with {len(spec.names)} layers of width {max(spec.layers)}; expected one for "
            f"this model, which has {len(flux.double_blocks)} double and {singles} single blocks of width "
            f"{flux.hidden_size}; load an adapter for this base model, or FLUX.1"
        )
    order = sorted(((block, name) for name, block in found.items() if block), key=lambda one: running.index(one[0]))
    return [
        FluxSite(
            name=name,
            place=Place(places[block[0]], block),
            number=i,
            count=len(order),
            side=_side(block, singles),
            hidden=flux.hidden_size,
        )
        for i, (block, name) in enumerate(order)
    ]
