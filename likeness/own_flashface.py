"""FlashFace (arXiv 2403.17008) trained here: what reads the faces, for any base model or with a UNet of its own.

File: safetensors, under the host's names. `reference.<name>`, the whole UNet that reads the faces; `added.<path>.q`,
`.k`, `.v`, `.o`, the added layers by the path of their transformer block; where the UNet that paints was trained too,
`main.<name>`, with 5 input channels. Metadata under `likeness`: kind, version, base, heads, face_size, notes.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from torch import Tensor

from . import keymaps, own_file
from .flashface import AddedLayers, Parts
from .spec import FlashFaceSpec

KIND = "flashface"
REFERENCE, ADDED, MAIN = PREFIXES = ("reference.", "added.", "main.")


def metadata(spec: FlashFaceSpec) -> dict[str, str]:
    """What a file tells of itself, for safetensors."""
    return own_file.metadata(KIND, spec.base, spec.notes, heads=spec.heads, face_size=spec.face_size)


def tensors(reference: Mapping[str, Tensor], added: AddedLayers, main: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """What a file holds, by name: two UNets under the host's names, the one that paints empty if it is any base."""
    layers = {name.replace("/", "."): value for name, value in added.layers.state_dict().items()}
    parts = zip(PREFIXES, (reference, layers, main), strict=True)
    return {f"{prefix}{name}": value for prefix, part in parts for name, value in part.items()}


def read(found: Mapping[str, Tensor], told: Mapping[str, Any], file: str) -> tuple[FlashFaceSpec, Parts]:
    """The spec and the parts of a file's tensors and metadata. Raises ValueError where they are not whole or newer."""
    own_file.check(told, KIND, {"heads": int, "face_size": int}, {"base": (FlashFaceSpec.base,)}, file)
    heads, side = told["heads"], told["face_size"]
    if heads < 1 or side < 8 or side % 8:
        raise ValueError(
            f"got {file}, with {heads} heads and faces of {side} pixels; expected some, and a multiple of 8"
        )
    foreign = [key for key in found if not key.startswith(PREFIXES)]
    reference, added, main = (keymaps.under(found, prefix) for prefix in PREFIXES)
    if foreign or not reference or not added:
        what = f"the tensor {foreign[0]!r}" if foreign else "no reference net or no added layers"
        raise ValueError(f"got {file} with {what}; expected both, and a UNet or none; fetch the file again")
    return FlashFaceSpec(told["base"], heads, side, told["notes"]), Parts(main or None, reference, added, {})
