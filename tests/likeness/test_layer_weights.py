"""Layer weights, against those of IPAdapter Plus's weight types."""

from __future__ import annotations

import pytest
from comfyui_likeness.likeness.attention.layer_weights import (
    WEIGHT_TYPES,
    LayerPosition,
    compute_layer_weight,
    parse_layer_weights,
)

BLOCK_TYPES = {
    "SD1.5": ["input"] * 6 + ["middle"] + ["output"] * 9,
    "SDXL": ["input"] * 4 + ["middle"] + ["output"] * 6,
}

# (base, weight type) -> weights by layer, and the weight of the other layers
KNOWN: dict[tuple[str, str], tuple[dict[int, float], float]] = {
    ("SDXL", "style transfer"): ({6: 1.0}, 0.0),
    ("SDXL", "composition"): ({3: 1.0}, 0.0),
    ("SDXL", "style and composition"): ({3: 1.0, 6: 1.0}, 0.0),
    ("SDXL", "strong style transfer"): ({3: 0.0}, 1.0),
    ("SDXL", "composition precise"): ({3: 1.0, 6: 1.0}, 0.1),
    ("SDXL", "style transfer precise"): ({}, 1.0),
    ("SD1.5", "style transfer"): ({4: 0, 5: 0, 6: 0, 7: 0, 8: 0}, 1.0),
    ("SD1.5", "composition"): ({4: 0.25, 5: 1.0}, 0.0),
    ("SD1.5", "strong style transfer"): ({4: 0.0, 5: 0.0}, 1.0),
    ("SD1.5", "style and composition"): ({4: 0.25, 6: 0, 7: 0, 8: 0}, 1.0),
    ("SD1.5", "composition precise"): ({4: 0.25, 6: 0.1, 7: 0.1, 8: 0.1}, 1.0),
    ("SD1.5", "weak middle"): ({6: 0.2}, 1.0),
    ("SD1.5", "strong middle"): ({6: 1.0}, 0.2),
    ("SDXL", "weak input"): ({0: 0.2, 1: 0.2, 2: 0.2, 3: 0.2}, 1.0),
    ("SDXL", "weak output"): ({0: 1.0, 1: 1.0, 2: 1.0, 3: 1.0, 4: 1.0}, 0.2),
    ("SDXL", "linear"): ({}, 1.0),
}


def layers(base: str) -> list[LayerPosition]:
    return [
        LayerPosition(i, len(BLOCK_TYPES[base]), block_type, base) for i, block_type in enumerate(BLOCK_TYPES[base])
    ]


@pytest.mark.parametrize(("base", "name"), KNOWN)
def test_known_weights(base: str, name: str) -> None:
    by_layer, rest = KNOWN[base, name]
    assert [compute_layer_weight(name, "", layer).weight for layer in layers(base)] == [
        by_layer.get(layer.index, rest) for layer in layers(base)
    ]


@pytest.mark.parametrize(
    ("name", "formula"),
    [
        ("ease in", lambda t, n: 0.05 + 0.95 * (1 - t / n)),
        ("ease out", lambda t, n: 0.05 + 0.95 * t / n),
        ("ease in-out", lambda t, n: 0.05 + 0.95 * (1 - abs(t - n / 2) / (n / 2))),
        ("reverse in-out", lambda t, n: 0.05 + 0.95 * abs(t - n / 2) / (n / 2)),
    ],
)
def test_ease(name: str, formula: object) -> None:
    for base in BLOCK_TYPES:
        for layer in layers(base):
            assert compute_layer_weight(name, "", layer).weight == pytest.approx(formula(layer.index, layer.num_layers))  # pyright: ignore[reportCallIssue]


def test_precise_types_apply_to_the_negative_prompt_in_other_layers() -> None:
    assert [
        layer.index for layer in layers("SDXL") if compute_layer_weight("style transfer precise", "", layer).uncond_only
    ] == [3]
    assert [
        layer.index
        for layer in layers("SD1.5")
        if not compute_layer_weight("composition precise", "", layer).uncond_only
    ] == [4, 5]
    assert not any(
        compute_layer_weight(name, "", layer).uncond_only
        for name in WEIGHT_TYPES
        if "precise" not in name
        for layer in layers("SDXL")
    )


def test_there_are_fifteen_weight_types() -> None:
    assert len(WEIGHT_TYPES) == 15


def test_weights_from_a_string() -> None:
    assert parse_layer_weights(" 3:1.2, 6:0,\n 7 : -0.5 ", 16) == {3: 1.2, 6: 0.0, 7: -0.5}
    weights = [compute_layer_weight("ease in", "3:1.2, 6:0", layer).weight for layer in layers("SDXL")]
    assert weights == [0, 0, 0, 1.2, 0, 0, 0, 0, 0, 0, 0]
    assert compute_layer_weight("style transfer precise", "3:0.5", layers("SDXL")[3]).uncond_only


@pytest.mark.parametrize("text", ["3", "3:x", "a:1", "11:1", "-1:1", "3:1,3:2", "3:nan", "3:inf", "3:1e9", "3:1;4:2"])
def test_invalid_strings_are_rejected(text: str) -> None:
    with pytest.raises(ValueError, match="layer weights"):
        parse_layer_weights(text, 11)
