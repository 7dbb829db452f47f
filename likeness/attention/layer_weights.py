"""Strength per layer: IPAdapter Plus's fifteen weight types, and strings such as "3:1.2, 6:0".

A layer is a transformer, numbered in running order: input blocks, middle block, output blocks. SD1.5 has 16 (0-5, 6,
7-15), SDXL 11 (0-3, 4, 5-10). In FLUX it is a layer of the adapter, double blocks before single blocks: the double
blocks count as input, the first half of the single blocks as middle, the second half as output.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any


@dataclass(frozen=True)
class LayerPosition:
    """A transformer's place in the UNet. `index` is its number in running order of `num_layers`."""

    index: int
    num_layers: int
    block_type: str  # input, middle or output
    base: str  # SD1.5, SDXL or FLUX.1


@dataclass(frozen=True)
class LayerWeight:
    """The factor of a layer's strength.

    With `uncond_only` only the rows of the negative prompt get the identity, which guides the image away from it.
    """

    weight: float
    uncond_only: bool = False


ZERO_LAYER_WEIGHT = LayerWeight(0.0)
STYLE_LAYERS = {"SD1.5": {0, 1, 2, 3, 9, 10, 11, 12, 13, 14, 15}, "SDXL": {6}}
COMPOSITION_LAYERS = {"SD1.5": {4: 0.25, 5: 1.0}, "SDXL": {3: 1.0}}
WEAK_LAYER_WEIGHT = 0.2
MIN_EASE_WEIGHT = 0.05  # the ease curves never fall to zero


def _ease(curve: Callable[[float], float]) -> Callable[[LayerPosition], LayerWeight]:
    return lambda layer: LayerWeight(MIN_EASE_WEIGHT + (1 - MIN_EASE_WEIGHT) * curve(layer.index / layer.num_layers))


def _weak(*block_types: str) -> Callable[[LayerPosition], LayerWeight]:
    return lambda layer: LayerWeight(WEAK_LAYER_WEIGHT if layer.block_type in block_types else 1.0)


def _get_base_layers(layers: Mapping[str, Any], layer: LayerPosition) -> Any:
    """The base model's entry of a table. Raises ValueError for base models whose layers' roles are not known."""
    if layer.base not in layers:
        raise ValueError(
            f"got layer_weights by style or composition for {layer.base}; expected {' or '.join(layers)}, whose "
            "layers' roles are known; choose linear, an ease or a weak type, or list layers"
        )
    return layers[layer.base]


def _style(layer: LayerPosition) -> LayerWeight:
    return LayerWeight(float(layer.index in _get_base_layers(STYLE_LAYERS, layer)))


def _composition(layer: LayerPosition) -> LayerWeight:
    return LayerWeight(_get_base_layers(COMPOSITION_LAYERS, layer).get(layer.index, 0.0))


def _strong_style(layer: LayerPosition) -> LayerWeight:
    return LayerWeight(float(layer.index not in _get_base_layers(COMPOSITION_LAYERS, layer)))


def _style_and_composition(layer: LayerPosition) -> LayerWeight:
    return LayerWeight(max(_style(layer).weight, _composition(layer).weight))


def _style_precise(layer: LayerPosition) -> LayerWeight:
    return LayerWeight(1.0, uncond_only=layer.index in _get_base_layers(COMPOSITION_LAYERS, layer))


def _composition_precise(layer: LayerPosition) -> LayerWeight:
    if layer.index in _get_base_layers(COMPOSITION_LAYERS, layer):
        return _composition(layer)
    return LayerWeight(1.0 if layer.index in _get_base_layers(STYLE_LAYERS, layer) else 0.1, uncond_only=True)


WEIGHT_TYPES: Mapping[str, Callable[[LayerPosition], LayerWeight]] = {
    "linear": lambda layer: LayerWeight(1.0),
    "ease in": _ease(lambda x: 1 - x),
    "ease out": _ease(lambda x: x),
    "ease in-out": _ease(lambda x: 1 - abs(2 * x - 1)),
    "reverse in-out": _ease(lambda x: abs(2 * x - 1)),
    "weak input": _weak("input"),
    "weak output": _weak("output"),
    "weak middle": _weak("middle"),
    "strong middle": _weak("input", "output"),
    "style transfer": _style,
    "composition": _composition,
    "strong style transfer": _strong_style,
    "style and composition": _style_and_composition,
    "style transfer precise": _style_precise,
    "composition precise": _composition_precise,
}


def parse_layer_weights(text: str, num_layers: int) -> dict[int, float]:
    """Parse "layer:weight, layer:weight". Layers that are not listed get 0. Raises ValueError on anything else."""
    weights: dict[int, float] = {}
    for part in filter(None, (piece.strip() for piece in text.replace("\n", ",").split(","))):
        number, colon, weight = part.partition(":")
        try:
            layer, value = int(number), float(weight)
        except ValueError:
            layer, value = -1, 0.0
        if not colon or not 0 <= layer < num_layers or not -100 <= value <= 100 or layer in weights:
            raise ValueError(
                f'got {part!r} among the layer weights; expected "layer:weight" with layers 0 to {num_layers - 1}, '
                'each once, as in "3:1.2, 6:0"'
            )
        weights[layer] = value
    return weights


def compute_layer_weight(weight_type: str, text: str, layer: LayerPosition) -> LayerWeight:
    """The factor of a layer's strength: from `text` unless it is empty, else from `weight_type`.

    The two "precise" types keep `uncond_only` in the layers that `text` lists.
    """
    curve = WEIGHT_TYPES[weight_type](layer)
    weights = parse_layer_weights(text, layer.num_layers)
    if not weights:
        return curve
    return LayerWeight(weights.get(layer.index, 0.0), uncond_only=curve.uncond_only)
