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

GOLDEN = Path(__file__).parent / "data" / "golden"
TOLERANCE = 2e-5  # relative to 1 + the largest value, as the cases' own notes ask


def _deterministic_weights() -> Any:
    spec = importlib.util.spec_from_file_location("deterministic_weights", GOLDEN / "deterministic_weights.py")
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


WEIGHTS = _deterministic_weights()


@dataclass(frozen=True)
class Case:
    folder: Path
    data: dict[str, Any]

    @property
    def config(self) -> dict[str, Any]:
        return self.data["config"]

    def weights(self, which: int = 0) -> dict[str, Tensor]:
        entry = self.data["weights"][which]
        manifest = json.loads((self.folder / entry["manifest"]).read_text())
        tensors = WEIGHTS.state_dict(manifest, salt=entry["salt"])
        for key, values in entry["probe"].items():
            assert torch.allclose(tensors[key].flatten()[:3], torch.tensor(values), atol=1e-6), f"{key} was not rebuilt"
        return tensors

    def input(self, name: str) -> Tensor:
        entry = self.data["inputs"][name]
        if "values" in entry:
            return torch.tensor(entry["values"], dtype=getattr(torch, entry["dtype"]))
        value = WEIGHTS.tensor(entry["name"], entry["shape"], salt=entry.get("salt", "input:"))
        if entry.get("zeros"):
            value = torch.zeros_like(value)
        if entry.get("l2norm"):
            value = value / value.norm(dim=-1, keepdim=True)
        return value * entry.get("mul", 1.0)

    def outputs(self) -> dict[str, Tensor]:
        return load_file(self.folder / self.data["outputs"]["file"])


def cases(method: str, kind: str | None = None) -> dict[str, Case]:
    folder = GOLDEN / method
    listed = json.loads((folder / "cases.json").read_text())["cases"]
    return {c["id"]: Case(folder, c) for c in listed if kind in (None, c["kind"])}


def assert_close(got: Tensor, stored: Tensor, tolerance: float = TOLERANCE) -> None:
    assert got.shape == stored.shape, f"{tuple(got.shape)} for {tuple(stored.shape)}"
    error = float((got.float() - stored).abs().max())
    bound = tolerance * (1 + float(stored.abs().max()))
    assert error <= bound, f"off by {error:.3g}, allowed {bound:.3g}"
