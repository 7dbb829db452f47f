"""Adapters of the pack's own whose file becomes keys and values of an identity's tokens: Infinite-ID, Omni-ID's."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import comfy.ops
from torch import Tensor

from ...likeness import detect, infinite_id, omni_adapter
from ...likeness.spec import AdapterSpec
from .. import types
from . import care


@dataclass(frozen=True)
class Kind:
    """What reads a file's spec, what the method is called, what its tokens are of, and the node that applies it."""

    read_spec: Callable[[Mapping[str, Tensor], Mapping[str, Any], str], AdapterSpec]
    title: str
    per: str
    node: str


KINDS: Mapping[str, Kind] = {
    infinite_id.KIND: Kind(infinite_id.read_spec, "Infinite-ID", "face", "Apply Identity (Mixed)"),
    omni_adapter.KIND: Kind(omni_adapter.read_spec, "Omni-ID", "identity", "Apply Identity (Decoupled)"),
}
NEGATIVE = {"zero": "the tokens of no face", "none": "no tokens"}  # what the negative prompt sees, by the spec's word


def load(tensors: Mapping[str, Tensor], told: Mapping[str, Any], file: str) -> tuple[types.LoadedAdapter, str]:
    """An adapter of a file's tensors and metadata, and a report. Raises ValueError (see the kind's read_spec)."""
    kind = KINDS[told["kind"]]
    spec = kind.read_spec(tensors, told, file)
    patcher = care.patcher_of(detect.build(spec, tensors, comfy.ops.manual_cast))
    notes = "; ".join(f"{key}: {value}" for key, value in told["notes"].items()) or "nothing said"
    lines = [
        f"{file}: {kind.title} for {spec.base}, {spec.tokens} tokens per {kind.per}, {len(spec.layers)} layers",
        f"The negative prompt sees {NEGATIVE[spec.unconditional]}. Training: {notes}.",
        f"Needs {' and '.join(str(feature) for feature in spec.needs)}, and {kind.node}.",
    ]
    return types.LoadedAdapter(spec, patcher, {}, file), "\n".join(lines)
