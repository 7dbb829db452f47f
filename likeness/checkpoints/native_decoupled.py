"""Decoupled attention (arXiv 2308.06721) in the native format: the published layout, and which encoder it reads.

File: safetensors, `image_proj.` and the projector's tensors as in the published files of its kind,
`ip_adapter.<n>.to_k_ip.weight`, `.to_v_ip.weight` [hidden, width], n = 1, 3, 5, ... Metadata under `likeness`: kind,
version, base, adapter (a key of ip_adapter.ADAPTER_KINDS), needs (features by name), notes.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Literal, get_args

from torch import Tensor

from ..spec import AdapterSpec, Feature
from . import checkpoint_detection, key_maps, native_metadata

KIND = "decoupled"
NativeAdapterKind = Literal["portrait", "plus", "plus_face", "image"]  # whose files hold only a projector and layers


@dataclass(frozen=True)
class NativeDecoupledMetadata(native_metadata.NativeMetadata):
    kind = KIND
    base: Literal["SD1.5", "SDXL"]
    adapter: NativeAdapterKind
    needs: tuple[Feature, ...]


# Kind -> the signature that its tensors match.
NATIVE_SIGNATURES: Mapping[str, checkpoint_detection.CheckpointSignature] = {
    kind: signature
    for signature in checkpoint_detection.CHECKPOINT_SIGNATURES
    for kind in (signature.kind, *checkpoint_detection.list_variants(signature.kind))
    if kind in get_args(NativeAdapterKind)
}
# Back to the published names from those that key_maps.IP_ADAPTER gives.
PUBLISHED_KEY_RULES: key_maps.KeyRules = (
    (r"projector\.(.+)", r"image_proj.\1"),
    (r"layers\.(\d+)\.([kv])\.weight", r"ip_adapter.\1.to_\2_ip.weight"),
)


def make_native_decoupled_metadata(spec: AdapterSpec, notes: Mapping[str, Any]) -> dict[str, str]:
    """The metadata of an adapter's safetensors file."""
    return native_metadata.encode_metadata(NativeDecoupledMetadata, spec, adapter=spec.kind, notes=notes)


def read_native_decoupled_spec(tensors: Mapping[str, Tensor], metadata: Mapping[str, Any], file: str) -> AdapterSpec:
    """The spec of a file's renamed tensors and metadata. Raises ValueError where they are incomplete or newer."""
    stored = native_metadata.decode_metadata(NativeDecoupledMetadata, metadata, file)
    shapes, signature = checkpoint_detection.get_tensor_shapes(tensors), NATIVE_SIGNATURES[stored.adapter]
    missing = [name for name in signature.required_tensors if name not in shapes]
    if missing:
        raise ValueError(f"got {file} without {missing[0]}; expected a whole projector; fetch the file again")
    layers, width = checkpoint_detection.read_unet_layers(shapes, file)
    try:
        tokens = signature.count_tokens(shapes)
    except (IndexError, ZeroDivisionError) as error:
        raise ValueError(
            f"got {file}, whose projector is misshapen; expected that of {stored.adapter}; fetch the file again"
        ) from error
    return AdapterSpec(stored.adapter, stored.base, tokens, width, layers, stored.needs)
