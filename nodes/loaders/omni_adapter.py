"""Adapters that read Omni-ID's tokens, from a file of the pack's own."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import comfy.ops
from torch import Tensor

from ...likeness import detect
from ...likeness import omni_adapter as math
from .. import types
from . import care


def load(tensors: Mapping[str, Tensor], told: Mapping[str, Any], file: str) -> tuple[types.LoadedAdapter, str]:
    """An adapter of a file's tensors and metadata, and a report. Raises ValueError (see math.read_spec)."""
    spec = math.read_spec(tensors, told, file)
    patcher = care.patcher_of(detect.build(spec, tensors, comfy.ops.manual_cast))
    notes = "; ".join(f"{key}: {value}" for key, value in told["notes"].items()) or "nothing said"
    lines = [
        f"{file}: Omni-ID for {spec.base}, {spec.tokens} tokens per identity in {len(spec.layers)} layers",
        f"The negative prompt sees the tokens of no face ({spec.unconditional}). Training: {notes}.",
        f"Needs {spec.needs[0]} (Load Omni-ID Encoder), and Apply Identity (Decoupled).",
    ]
    return types.LoadedAdapter(spec, patcher, {}, file), "\n".join(lines)
