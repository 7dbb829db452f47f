"""Decoupled attention to Omni-ID tokens (arXiv 2412.09694) for FLUX.1 and SD1.5: adapters in the native format.

    Z = Attention(Q, K, V) + strength * Attention(Q, K', V'),   K' = t W'_k,  V' = t W'_v,  t the tokens [256, 1280]

Each layer has one linear without bias for keys and one for values. In FLUX, Q are the queries of the image tokens after
their norm and before the rotary embedding; the term is added before the output projection. The paper only says which
attention, not where in a block with joint attention.

File: safetensors, `layers.double_blocks.<i>.k.weight`, `.v.weight`, `layers.single_blocks.<i>. ...` [hidden, width] for
FLUX, of any subset of the blocks; `layers.<n>. ...`, n = 1, 3, 5, ... as IP-Adapter counts, for SD1.5. Optionally
`projector.proj` (Linear) and `projector.norm` (LayerNorm) from the tokens' width to the layers' input. Metadata under
`likeness`: kind, version, base, tokens, unconditional, notes.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Literal

from torch import Tensor

from ..methods.omni_id import OMNI_ID_FEATURE
from ..spec import AdapterSpec
from . import checkpoint_detection, native_metadata

KIND = "omni_id_adapter"


@dataclass(frozen=True)
class OmniAdapterMetadata(native_metadata.NativeMetadata):
    kind = KIND
    base: Literal["FLUX.1", "SD1.5"]
    tokens: int
    unconditional: Literal["none", "zero"]


def make_omni_adapter_metadata(spec: AdapterSpec, notes: Mapping[str, Any]) -> dict[str, str]:
    """The metadata of an adapter's safetensors file."""
    return native_metadata.encode_metadata(OmniAdapterMetadata, spec, notes=notes)


def read_omni_adapter_spec(tensors: Mapping[str, Tensor], metadata: Mapping[str, Any], file: str) -> AdapterSpec:
    """The spec of a file's tensors and metadata. Raises ValueError where they are incomplete or of a newer version."""
    stored = native_metadata.decode_metadata(OmniAdapterMetadata, metadata, file)
    shapes = checkpoint_detection.get_tensor_shapes(tensors)
    if stored.base == checkpoint_detection.FLUX_BASE:
        names, layers, width = checkpoint_detection.read_flux_layers(shapes, file)
    else:
        names, (layers, width) = (), checkpoint_detection.read_unet_layers(shapes, file)
    return AdapterSpec(
        kind=KIND,
        base=stored.base,
        tokens=stored.tokens,
        width=width,
        layers=layers,
        needs=(OMNI_ID_FEATURE,),
        unconditional=stored.unconditional,
        matches_text_width=False,
        layer_names=names,
    )
