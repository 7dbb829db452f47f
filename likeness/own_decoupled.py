"""Decoupled attention (arXiv 2308.06721) trained here: the published layout, beside it which encoder it reads.

File: safetensors, `image_proj.` and the projector's tensors as the kind's published files have them,
`ip_adapter.<n>.to_k_ip.weight`, `.to_v_ip.weight` [hidden, width], n = 1, 3, 5, ... Metadata under `likeness`: kind,
version, base, adapter (a kind of decoupled.KINDS), needs (features by name), notes.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from torch import Tensor

from . import detect, keymaps, own_file
from .spec import AdapterSpec

KIND = "decoupled"
BASES = tuple(detect.BASES.values())
# Kinds whose files hold nothing but a projector and the layers: kind -> the signature that its tensors fit.
ROWS: Mapping[str, detect.Signature] = {
    kind: row
    for row in detect.SIGNATURES
    for kind in (row.kind, *(twin for twin, _ in detect.TWINS.get(row.kind, ())))
    if row.kind in ("image", "plus", "portrait")
}
# The published names of what keymaps.IP_ADAPTER renames.
PUBLISHED: keymaps.Rules = (
    (r"projector\.(.+)", r"image_proj.\1"),
    (r"layers\.(\d+)\.([kv])\.weight", r"ip_adapter.\1.to_\2_ip.weight"),
)


def metadata(spec: AdapterSpec, notes: Mapping[str, Any]) -> dict[str, str]:
    """What a file tells of itself, for safetensors."""
    return own_file.metadata(KIND, spec.base, notes, adapter=spec.kind, needs=[str(feature) for feature in spec.needs])


def read_spec(tensors: Mapping[str, Tensor], told: Mapping[str, Any], file: str) -> AdapterSpec:
    """The spec of a file's renamed tensors and metadata. Raises ValueError where they are not whole or newer."""
    choices = {"base": BASES, "adapter": tuple(ROWS)}
    own_file.check(told, KIND, {"adapter": str, "needs": list}, choices, file)
    shapes, row = detect.shapes_of(tensors), ROWS[told["adapter"]]
    missing = [name for name in row.names if name not in shapes]
    if missing:
        raise ValueError(f"got {file} without {missing[0]}; expected a whole projector; fetch the file again")
    layers, width = detect.layers_of(shapes, file)
    try:
        tokens = row.tokens(shapes)
    except (IndexError, ZeroDivisionError) as error:
        raise ValueError(
            f"got {file}, whose projector is misshapen; expected that of {told['adapter']}; fetch the file again"
        ) from error
    return AdapterSpec(
        kind=told["adapter"],
        base=told["base"],
        tokens=tokens,
        width=width,
        layers=layers,
        needs=own_file.features(told["needs"], file),
    )
