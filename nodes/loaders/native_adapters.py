"""Adapters in the native format whose weights make keys and values of an identity's tokens."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import comfy.ops
from torch import Tensor

from ...likeness.checkpoints import checkpoint_detection, key_maps, native_decoupled, native_omni_adapter
from ...likeness.methods import infinite_id
from ...likeness.methods.ip_adapter import ADAPTER_KINDS
from ...likeness.methods.omni_id import OMNI_ID_FEATURE
from ...likeness.spec import AdapterSpec
from .. import types
from . import model_management


@dataclass(frozen=True)
class NativeKind:
    """How to read the spec of a file, which node applies the adapter, and the file's key map."""

    read_spec: Callable[[Mapping[str, Tensor], Mapping[str, Any], str], AdapterSpec]
    apply_node: str
    key_rules: key_maps.KeyRules = ((".+", r"\g<0>"),)  # keys stay as they are


DECOUPLED_NODE = "Apply Identity (Decoupled)"
NATIVE_KINDS: Mapping[str, NativeKind] = {
    infinite_id.KIND: NativeKind(infinite_id.read_infinite_id_spec, "Apply Identity (Mixed)"),
    native_omni_adapter.KIND: NativeKind(native_omni_adapter.read_omni_adapter_spec, DECOUPLED_NODE),
    native_decoupled.KIND: NativeKind(native_decoupled.read_native_decoupled_spec, DECOUPLED_NODE, key_maps.IP_ADAPTER),
}
# AdapterSpec.unconditional -> what the negative prompt sees.
NEGATIVE_PROMPT_TOKENS = {"zero": "the tokens of a zero embedding", "none": "no tokens"}


def load_native_adapter(
    tensors: Mapping[str, Tensor], metadata: Mapping[str, Any], file: str
) -> tuple[types.LoadedAdapter, str]:
    """Build an adapter from a file's tensors and metadata, with a report. Raises ValueError (see `read_spec`)."""
    kind = NATIVE_KINDS[metadata["kind"]]
    tensors = key_maps.rename_keys(tensors, kind.key_rules)
    spec = kind.read_spec(tensors, metadata, file)
    module = checkpoint_detection.build_ip_adapter(spec, tensors, comfy.ops.manual_cast)
    lines = [
        f"{file}: {ADAPTER_KINDS[spec.kind].title} for {checkpoint_detection.get_base_name(spec.base, spec.width)}, "
        f"{spec.tokens} tokens per {get_token_unit(spec)}, {len(spec.layers)} layers",
        f"The negative prompt sees {NEGATIVE_PROMPT_TOKENS[spec.unconditional]}. "
        f"Training: {format_training_notes(metadata['notes'])}.",
        f"Needs {' and '.join(str(feature) for feature in spec.needs)}, and {kind.apply_node}.",
    ]
    return types.LoadedAdapter(spec, model_management.make_model_patcher(module), {}, file), "\n".join(lines)


def get_token_unit(spec: AdapterSpec) -> str:
    """What one set of the adapter's tokens stands for."""
    reads_jointly = ADAPTER_KINDS[spec.kind].faces_as_sequence or OMNI_ID_FEATURE in spec.needs
    return "identity" if reads_jointly else "face"


def format_training_notes(notes: Mapping[str, Any]) -> str:
    return "; ".join(f"{key}: {value}" for key, value in notes.items()) or "no notes"
