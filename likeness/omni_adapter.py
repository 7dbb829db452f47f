"""Decoupled attention to Omni-ID's tokens (arXiv 2412.09694), in FLUX.1 and SD1.5: files of the pack's own.

    Z = Attention(Q, K, V) + strength * Attention(Q, K', V'),   K' = t W'_k,  V' = t W'_v,  t the tokens [256, 1280]

One linear without bias each for keys and values of a layer. In FLUX, Q are the queries of the picture's tokens after
their norm and ahead of the rotary embedding, and the term is added ahead of the output projection: the paper says which
attention, not where in a block that is joint.

File: safetensors, `layers.double_blocks.<i>.k.weight`, `.v.weight`, `layers.single_blocks.<i>. ...` [hidden, width] for
FLUX, of whichever blocks there are; `layers.<n>. ...`, n = 1, 3, 5, ... as IP-Adapter counts, for SD1.5. Optionally
`projector.proj` (Linear) and `projector.norm` (LayerNorm) from the tokens' width to the layers' input. Metadata under
`likeness`: kind, version, base, tokens, unconditional, notes.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from torch import Tensor

from . import detect, own_file
from .omni_id import FEATURE as TOKENS
from .spec import AdapterSpec

KIND = "omni_id_adapter"
BASES = (detect.FLUX, "SD1.5")
UNCONDITIONAL = ("none", "zero")


def metadata(spec: AdapterSpec, notes: Mapping[str, Any]) -> dict[str, str]:
    """What a file tells of itself, for safetensors."""
    return own_file.metadata(KIND, spec.base, notes, tokens=spec.tokens, unconditional=spec.unconditional)


def read_spec(tensors: Mapping[str, Tensor], told: Mapping[str, Any], file: str) -> AdapterSpec:
    """The spec of a file's tensors and metadata. Raises ValueError where they are not whole or of a newer version."""
    choices = {"base": BASES, "unconditional": UNCONDITIONAL}
    own_file.check(told, KIND, {"tokens": int, "unconditional": str}, choices, file)
    shapes = detect.shapes_of(tensors)
    if told["base"] == detect.FLUX:
        names, layers, width = detect.flux_layers_of(shapes, file)
    else:
        names, (layers, width) = (), detect.layers_of(shapes, file)
    return AdapterSpec(
        kind=KIND,
        base=told["base"],
        tokens=told["tokens"],
        width=width,
        layers=layers,
        needs=(TOKENS,),
        unconditional=told["unconditional"],
        as_text=False,
        names=names,
    )
