"""Adapters of the pack's own whose file becomes keys and values of an identity's tokens."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import comfy.ops
from torch import Tensor

from ...likeness import detect, infinite_id, keymaps, omni_adapter, own_decoupled
from ...likeness.decoupled import KINDS as ADAPTERS
from ...likeness.spec import AdapterSpec
from .. import types
from . import care


@dataclass(frozen=True)
class Kind:
    """What reads a file's spec, what its tokens are of, the node that applies it, and the table of its names."""

    read_spec: Callable[[Mapping[str, Tensor], Mapping[str, Any], str], AdapterSpec]
    per: str
    node: str
    names: keymaps.Rules = ((".+", r"\g<0>"),)  # as they are


DECOUPLED = "Apply Identity (Decoupled)"
KINDS: Mapping[str, Kind] = {
    infinite_id.KIND: Kind(infinite_id.read_spec, "face", "Apply Identity (Mixed)"),
    omni_adapter.KIND: Kind(omni_adapter.read_spec, "identity", DECOUPLED),
    own_decoupled.KIND: Kind(own_decoupled.read_spec, "face", DECOUPLED, keymaps.IP_ADAPTER),
}
NEGATIVE = {"zero": "the tokens of no face", "none": "no tokens"}  # what the negative prompt sees, by the spec's word


def load(tensors: Mapping[str, Tensor], told: Mapping[str, Any], file: str) -> tuple[types.LoadedAdapter, str]:
    """An adapter of a file's tensors and metadata, and a report. Raises ValueError (see the kind's read_spec)."""
    kind = KINDS[told["kind"]]
    tensors = keymaps.rename(tensors, kind.names)
    spec = kind.read_spec(tensors, told, file)
    patcher = care.patcher_of(detect.build(spec, tensors, comfy.ops.manual_cast))
    notes = "; ".join(f"{key}: {value}" for key, value in told["notes"].items()) or "nothing said"
    lines = [
        f"{file}: {ADAPTERS[spec.kind].title} for {detect.base_name(spec.base, spec.width)}, {spec.tokens} tokens per "
        f"{kind.per}, {len(spec.layers)} layers",
        f"The negative prompt sees {NEGATIVE[spec.unconditional]}. Training: {notes}.",
        f"Needs {' and '.join(str(feature) for feature in spec.needs)}, and {kind.node}.",
    ]
    return types.LoadedAdapter(spec, patcher, {}, file), "\n".join(lines)
