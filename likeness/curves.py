"""Weight over layers: the fifteen weight types artists know, and free strings such as "3:1.2, 6:0".

A layer is a transformer, counted in the order in which the UNet runs: input blocks, middle, output blocks. SD1.5 has
16 (0-5, 6, 7-15), SDXL 11 (0-3, 4, 5-10). In FLUX it is one of the adapter's own, double blocks before single ones: the
double blocks count as input, the first half of the single ones as middle, the others as output.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any


@dataclass(frozen=True)
class Layer:
    """Where a transformer stands: its number in running order, how many there are, its side, the base family."""

    number: int
    count: int
    side: str  # input, middle or output
    base: str  # SD1.5, SDXL or FLUX.1


@dataclass(frozen=True)
class Share:
    """A layer's part of the strength. `away` pushes from the identity instead: only rows without it see it."""

    weight: float
    away: bool = False


NOTHING = Share(0.0)
STYLE = {"SD1.5": {0, 1, 2, 3, 9, 10, 11, 12, 13, 14, 15}, "SDXL": {6}}
COMPOSITION = {"SD1.5": {4: 0.25, 5: 1.0}, "SDXL": {3: 1.0}}
WEAK = 0.2
FLOOR = 0.05  # the ease curves never fall to zero


def _ease(part: Callable[[float], float]) -> Callable[[Layer], Share]:
    return lambda layer: Share(FLOOR + (1 - FLOOR) * part(layer.number / layer.count))


def _weak(*sides: str) -> Callable[[Layer], Share]:
    return lambda layer: Share(WEAK if layer.side in sides else 1.0)


def _known(layers: Mapping[str, Any], layer: Layer) -> Any:
    """The base model's row of a table. Raises ValueError where nobody has found which of its layers do what."""
    if layer.base not in layers:
        raise ValueError(
            f"got layer_weights by style or composition for {layer.base}; expected them for {' or '.join(layers)}, of "
            "which it is known what each layer does; choose linear, an ease or a weak one, or name layers"
        )
    return layers[layer.base]


def _style(layer: Layer) -> Share:
    return Share(float(layer.number in _known(STYLE, layer)))


def _composition(layer: Layer) -> Share:
    return Share(_known(COMPOSITION, layer).get(layer.number, 0.0))


def _strong_style(layer: Layer) -> Share:
    return Share(float(layer.number not in _known(COMPOSITION, layer)))


def _style_and_composition(layer: Layer) -> Share:
    return Share(max(_style(layer).weight, _composition(layer).weight))


def _style_precise(layer: Layer) -> Share:
    return Share(1.0, away=layer.number in _known(COMPOSITION, layer))


def _composition_precise(layer: Layer) -> Share:
    if layer.number in _known(COMPOSITION, layer):
        return _composition(layer)
    return Share(1.0 if layer.number in _known(STYLE, layer) else 0.1, away=True)


LAYER_WEIGHTS: Mapping[str, Callable[[Layer], Share]] = {
    "linear": lambda layer: Share(1.0),
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


def parse(text: str, count: int) -> dict[int, float]:
    """Read "layer:weight, layer:weight". Layers that are not named get 0. Raises ValueError on anything else."""
    out: dict[int, float] = {}
    for part in filter(None, (piece.strip() for piece in text.replace("\n", ",").split(","))):
        number, colon, weight = part.partition(":")
        try:
            layer, value = int(number), float(weight)
        except ValueError:
            layer, value = -1, 0.0
        if not colon or not 0 <= layer < count or not -100 <= value <= 100 or layer in out:
            raise ValueError(
                f'got {part!r} among the layer weights; expected "layer:weight" with layers 0 to {count - 1}, '
                'each once, as in "3:1.2, 6:0"'
            )
        out[layer] = value
    return out


def share(name: str, text: str, layer: Layer) -> Share:
    """The part of the strength that a layer gets: by `text` where it says something, else by the weight type `name`.

    The two "precise" types keep their push away in the layers that `text` names.
    """
    curve = LAYER_WEIGHTS[name](layer)
    weights = parse(text, layer.count)
    if not weights:
        return curve
    return Share(weights.get(layer.number, 0.0), away=curve.away)
