"""FlashFace (arXiv 2403.17008) in the native format: for any base model, or with a main UNet of its own.

File: safetensors, under ComfyUI's names. `reference.<name>`, the complete reference UNet; `added.<path>.q`, `.k`, `.v`,
`.o`, the added layers by the path of their transformer block; `main.<name>`, with an input channel more than latents
have, where the main UNet was trained too. Metadata under `likeness`: kind, version, base, heads, face_size, notes.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Literal

from torch import Tensor

from ..methods.flashface import AddedLayers, FlashFaceWeights
from ..spec import FlashFaceSpec
from . import key_maps, native_metadata

KIND = "flashface"
REFERENCE_PREFIX, ADDED_PREFIX, MAIN_PREFIX = TENSOR_PREFIXES = ("reference.", "added.", "main.")


@dataclass(frozen=True)
class FlashFaceMetadata(native_metadata.NativeMetadata):
    kind = KIND
    base: Literal["SD1.5"]
    heads: int
    face_size: int


def make_native_flashface_metadata(spec: FlashFaceSpec) -> dict[str, str]:
    """The metadata of a FlashFace model's safetensors file."""
    return native_metadata.encode_metadata(FlashFaceMetadata, spec)


def collect_native_flashface_tensors(
    reference_unet: Mapping[str, Tensor], added_layers: AddedLayers, main_unet: Mapping[str, Tensor]
) -> dict[str, Tensor]:
    """The tensors of a file: both UNets under ComfyUI's names; the main one is empty if any base model will do."""
    layers = {name.replace("/", "."): value for name, value in added_layers.layers.state_dict().items()}
    parts = zip(TENSOR_PREFIXES, (reference_unet, layers, main_unet), strict=True)
    return {f"{prefix}{name}": value for prefix, part in parts for name, value in part.items()}


def read_native_flashface(
    tensors: Mapping[str, Tensor], metadata: Mapping[str, Any], file: str
) -> tuple[FlashFaceSpec, FlashFaceWeights]:
    """The spec and the weights of a file. Raises ValueError where it is incomplete or of a newer version."""
    stored = native_metadata.decode_metadata(FlashFaceMetadata, metadata, file)
    if stored.heads < 1 or stored.face_size < 8 or stored.face_size % 8:
        raise ValueError(
            f"got {file}, with {stored.heads} heads and faces of {stored.face_size} pixels; expected at least one head "
            "and a multiple of 8 pixels; fetch the file again"
        )
    unknown = [key for key in tensors if not key.startswith(TENSOR_PREFIXES)]
    reference, added, main = (key_maps.select_prefix(tensors, prefix) for prefix in TENSOR_PREFIXES)
    if unknown or not reference or not added:
        found = f"the tensor {unknown[0]!r}" if unknown else "no reference net or no added layers"
        raise ValueError(
            f"got {file} with {found}; expected both, and at most a main UNet besides; fetch the file again"
        )
    spec = FlashFaceSpec(stored.base, stored.heads, stored.face_size, stored.notes)
    return spec, FlashFaceWeights(main or None, reference, added, {})
