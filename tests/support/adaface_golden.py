"""AdaFace's golden cases, with weights and inputs rebuilt from their names."""

from __future__ import annotations

import json
from typing import Any

import torch
from torch import Tensor
from torch.nn.functional import normalize

from support.golden import DETERMINISTIC_WEIGHTS, GOLDEN_FOLDER

FOLDER = GOLDEN_FOLDER / "adaface"
CASES: dict[str, dict[str, Any]] = {
    case["name"]: case for case in json.loads((FOLDER / "cases.json").read_text())["cases"]
}


def build_weights(case: dict[str, Any], role: str) -> dict[str, Tensor]:
    entry = case["weights"][role]
    tensors = DETERMINISTIC_WEIGHTS.state_dict(json.loads((FOLDER / entry["manifest"]).read_text()), salt=entry["salt"])
    return tensors | {key: torch.tensor(value) for key, value in entry.get("overrides", {}).items()}


def build_input(case: dict[str, Any], name: str) -> Tensor:
    entry = case["inputs"][name]
    value = DETERMINISTIC_WEIGHTS.tensor(entry["tensor_name"], entry["shape"], salt=entry["salt"])
    value = normalize(value, dim=-1) if entry.get("post") == "l2_normalize_last_dim" else value
    return value * entry.get("scale", 1.0)
