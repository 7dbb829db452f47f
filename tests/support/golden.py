"""Golden cases: outputs of the methods' official code. Weights and inputs are rebuilt from names and shapes."""

from __future__ import annotations

import importlib.util
import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file
from torch import Tensor

GOLDEN_FOLDER = Path(__file__).resolve().parents[1] / "data" / "golden"
DEFAULT_TOLERANCE = 2e-5  # relative to 1 + the largest value, as the cases' own notes ask


def _load_deterministic_weights() -> Any:
    spec = importlib.util.spec_from_file_location("deterministic_weights", GOLDEN_FOLDER / "deterministic_weights.py")
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


DETERMINISTIC_WEIGHTS = _load_deterministic_weights()


@dataclass(frozen=True)
class GoldenCase:
    folder: Path
    data: dict[str, Any]

    @property
    def config(self) -> dict[str, Any]:
        return self.data["config"]

    def build_weights(self, index: int = 0) -> dict[str, Tensor]:
        entry = self.data["weights"][index]
        manifest = json.loads((self.folder / entry["manifest"]).read_text())
        tensors = DETERMINISTIC_WEIGHTS.state_dict(manifest, salt=entry["salt"])
        for key, values in entry["probe"].items():
            assert torch.allclose(tensors[key].flatten()[:3], torch.tensor(values), atol=1e-6), f"{key} was not rebuilt"
        return tensors

    def build_input(self, name: str) -> Tensor:
        entry = self.data["inputs"][name]
        if "values" in entry:
            return torch.tensor(entry["values"], dtype=getattr(torch, entry["dtype"]))
        value = DETERMINISTIC_WEIGHTS.tensor(entry["name"], entry["shape"], salt=entry.get("salt", "input:"))
        if entry.get("zeros"):
            value = torch.zeros_like(value)
        if entry.get("l2norm"):
            value = value / value.norm(dim=-1, keepdim=True)
        return value * entry.get("mul", 1.0)

    def load_outputs(self) -> dict[str, Tensor]:
        return load_file(self.folder / self.data["outputs"]["file"])


def read_golden_cases(method: str, kind: str | None = None) -> dict[str, GoldenCase]:
    folder = GOLDEN_FOLDER / method
    listed = json.loads((folder / "cases.json").read_text())["cases"]
    return {c["id"]: GoldenCase(folder, c) for c in listed if kind in (None, c["kind"])}


def assert_close(actual: Tensor, expected: Tensor, tolerance: float = DEFAULT_TOLERANCE) -> None:
    assert actual.shape == expected.shape, f"{tuple(actual.shape)} for {tuple(expected.shape)}"
    error = float((actual.float() - expected).abs().max())
    bound = tolerance * (1 + float(expected.abs().max()))
    assert error <= bound, f"off by {error:.3g}, allowed {bound:.3g}"
