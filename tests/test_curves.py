"""Weight over layers, against the weights that artists know from the field."""

from __future__ import annotations

import pytest
from comfyui_likeness.likeness.curves import LAYER_WEIGHTS, Layer, parse, share

SIDES = {
    "SD1.5": ["input"] * 6 + ["middle"] + ["output"] * 9,
    "SDXL": ["input"] * 4 + ["middle"] + ["output"] * 6,
}

# (base, name) -> layer -> weight; what is not named is `rest`
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


def layers(base: str) -> list[Layer]:
    return [Layer(i, len(SIDES[base]), side, base) for i, side in enumerate(SIDES[base])]


@pytest.mark.parametrize(("base", "name"), KNOWN)
def test_known_weights(base: str, name: str) -> None:
    named, rest = KNOWN[base, name]
    assert [share(name, "", layer).weight for layer in layers(base)] == [
        named.get(layer.number, rest) for layer in layers(base)
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
    for base in SIDES:
        for layer in layers(base):
            assert share(name, "", layer).weight == pytest.approx(formula(layer.number, layer.count))  # pyright: ignore[reportCallIssue]


def test_precise_types_push_away_where_the_other_lives() -> None:
    assert [layer.number for layer in layers("SDXL") if share("style transfer precise", "", layer).away] == [3]
    assert [layer.number for layer in layers("SD1.5") if not share("composition precise", "", layer).away] == [4, 5]
    assert not any(
        share(name, "", layer).away for name in LAYER_WEIGHTS if "precise" not in name for layer in layers("SDXL")
    )


def test_fifteen() -> None:
    assert len(LAYER_WEIGHTS) == 15


def test_free_strings() -> None:
    assert parse(" 3:1.2, 6:0,\n 7 : -0.5 ", 16) == {3: 1.2, 6: 0.0, 7: -0.5}
    weights = [share("ease in", "3:1.2, 6:0", layer).weight for layer in layers("SDXL")]
    assert weights == [0, 0, 0, 1.2, 0, 0, 0, 0, 0, 0, 0]
    assert share("style transfer precise", "3:0.5", layers("SDXL")[3]).away


@pytest.mark.parametrize("text", ["3", "3:x", "a:1", "11:1", "-1:1", "3:1,3:2", "3:nan", "3:inf", "3:1e9", "3:1;4:2"])
def test_bad_strings(text: str) -> None:
    with pytest.raises(ValueError, match="layer weights"):
        parse(text, 11)
