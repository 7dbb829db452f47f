"""Which published file is this? Signatures read a state dict's names and shapes, never the file's name."""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from . import keymaps, pulid
from .decoupled import KINDS, DecoupledAdapter
from .resampler import Shapes
from .spec import AdapterSpec, Feature

BASES = {16: "SD1.5", 70: "SDXL"}  # by the number of cross-attentions
TEXTS = {128: "Portrait World"}  # base models of SD1.5's layers by the width of their text: the demo's
FLUX = "FLUX.1"
KEYS = ("k.weight", "k.weight")
# Kinds for FLUX -> of a layer, the matrix that gives the model's width, and the one that reads the tokens.
FLUX_KINDS = {"xlabs": KEYS, "instantx": KEYS, "pulid_flux": ("to_out.weight", "to_kv.weight")}

FACE = Feature("arcface.buffalo_l", "raw", "face112")
FACE_ANTELOPE = Feature("arcface.antelopev2", "raw", "face112")
CLIP = {1024: "clip.vit-h-14", 1280: "clip.vit-bigg-14"}  # by the width of the projected embedding
HIDDEN_NETWORK = "clip.vit-h-14"
CLIP_L, BLACK = (Feature("clip.vit-l-14", "projected", crop) for crop in ("photo", "black"))
SIGLIP = Feature("siglip.so400m-14-384", "pooled", "photo")
EVA = tuple(Feature("clip.eva02-l-14-336", layer, "ffhq512") for layer in ("projected", "levels"))


def _hidden(crop: str) -> tuple[Feature, ...]:
    return (Feature(HIDDEN_NETWORK, "penultimate", crop),)


@dataclass(frozen=True)
class Signature:
    """A kind of file: the names it must have, a condition on their shapes, how many tokens it makes of a face."""

    kind: str
    names: tuple[str, ...]
    tokens: Callable[[Shapes], int]
    where: Callable[[Shapes], bool] = lambda shapes: True


def _rows_per_width(shapes: Shapes) -> int:
    return shapes["projector.proj.2.weight"][0] // shapes["projector.norm.weight"][0]


def _latents(shapes: Shapes) -> int:
    return shapes["projector.latents"][1]


def _image_tokens(shapes: Shapes) -> int:
    return shapes["projector.proj.weight"][0] // shapes["projector.norm.weight"][0]


def _id_tokens(shapes: Shapes) -> int:
    return shapes["projector.body.6.weight"][0] // shapes["projector.mapping_0.6.weight"][0] + pulid.LEVELS


def _reads(width: int) -> Callable[[Shapes], bool]:
    return lambda shapes: shapes["projector.proj_in.weight"][1] == width


_MLP = ("projector.proj.0.weight", "projector.proj.2.weight", "projector.norm.weight")
_MLP_PLUS = (*_MLP, "projector.perceiver_resampler.proj_in.weight")
_FULL = ("projector.proj.0.weight", "projector.proj.2.weight", "projector.proj.3.weight")
_RESAMPLER = ("projector.latents", "projector.proj_in.weight", "projector.proj_out.weight")
_IMAGE = ("projector.proj.weight", "projector.norm.weight")
_ID_ENCODER = ("projector.body.6.weight", "projector.mapping_0.6.weight", "projector.mapping_patch_0.0.weight")
_ID_FORMER = ("projector.latents", "projector.proj_out", "projector.id_embedding_mapping.6.weight")

# Specific before broad: the first row that fits decides.
SIGNATURES: tuple[Signature, ...] = (
    Signature("kolors_faceid_plus", _MLP_PLUS, _rows_per_width, lambda s: s["projector.norm.weight"][0] == 4096),
    Signature("faceid_plus", _MLP_PLUS, _rows_per_width),
    Signature("full_face", _FULL, lambda s: 257),
    Signature("instantx", (*_MLP, "layers.0.k.weight"), _rows_per_width),
    Signature("xlabs", (*_IMAGE, "layers.double_blocks.0.k.weight", "layers.double_blocks.0.k.bias"), _image_tokens),
    Signature("faceid", (*_MLP, "lora.0.q.down"), _rows_per_width),
    Signature("portrait", _MLP, _rows_per_width),
    Signature("pulid", _ID_ENCODER, _id_tokens),
    Signature("pulid_flux", (*_ID_FORMER, "layers.0.to_kv.weight"), _latents),
    Signature("pulid_v1_1", (*_ID_FORMER, "layers.1.k.weight"), _latents),
    Signature("instantid", _RESAMPLER, _latents, _reads(512)),
    Signature("kolors_plus", _RESAMPLER, _latents, _reads(1024)),
    Signature("plus", _RESAMPLER, _latents, _reads(1280)),
    Signature("image", _IMAGE, _image_tokens),
)

# Kinds with the very same tensors. Without the user's word, the file's name may hint at which one it is.
TWINS: dict[str, tuple[tuple[str, str], ...]] = {
    "faceid_plus": (("faceid_plus_v2", r"plus.?v2|sdxl"),),
    "plus": (("plus_face", r"plus.?face"),),
    "instantid": (("portrait_unnorm", r"unnorm|portrait"),),
}

UNSUPPORTED = {
    "kolors_plus": "Kolors, a base model that ComfyUI itself does not load",
    "kolors_faceid_plus": "Kolors, a base model that ComfyUI itself does not load",
}

NEEDS: dict[str, Callable[[Shapes], tuple[Feature, ...]]] = {
    "image": lambda s: (Feature(CLIP.get(s["projector.proj.weight"][1], "clip.unknown"), "projected", "photo"),),
    "plus": lambda s: _hidden("photo"),
    "plus_face": lambda s: _hidden("head"),
    "full_face": lambda s: _hidden("head"),
    "faceid": lambda s: (FACE,),
    "faceid_plus": lambda s: (FACE, *_hidden("face224")),
    "faceid_plus_v2": lambda s: (FACE, *_hidden("face224")),
    "portrait": lambda s: (FACE,),
    "portrait_unnorm": lambda s: (FACE,),
    "instantid": lambda s: (FACE_ANTELOPE,),
    "instantx": lambda s: (SIGLIP,),
    "xlabs": lambda s: (CLIP_L,),
    "pulid": lambda s: (FACE_ANTELOPE, *EVA),
    "pulid_v1_1": lambda s: (FACE_ANTELOPE, *EVA),
    "pulid_flux": lambda s: (FACE_ANTELOPE, *EVA),
}


def base_name(base: str, text: int) -> str:
    """What to call a family's base model whose text is so wide."""
    return TEXTS.get(text, base)


def shapes_of(tensors: Mapping[str, Tensor]) -> dict[str, tuple[int, ...]]:
    return {key: tuple(value.shape) for key, value in tensors.items()}


def kind_of(shapes: Shapes, file: str = "", variant: str = "auto") -> tuple[Signature, str, bool]:
    """The signature that fits, the kind it stands for, and whether that was guessed among twins by the file's name.

    `variant` is the user's word: `auto`, or a kind. Raises ValueError where the tensors fit no kind, or not that one.
    """
    file = file or "a file"
    row = next((s for s in SIGNATURES if all(name in shapes for name in s.names) and s.where(shapes)), None)
    if row is None:
        titles = ", ".join(kind.title for kind in KINDS.values())
        raise ValueError(f"got {file}, whose tensors fit no adapter this pack knows; expected one of {titles}")
    if row.kind in UNSUPPORTED:
        raise ValueError(f"got {file}, an adapter for {UNSUPPORTED[row.kind]}; expected one for SD1.5 or SDXL")
    twins = TWINS.get(row.kind, ())
    possible = (row.kind, *(kind for kind, _ in twins))
    if variant == "auto":
        guess = next((kind for kind, hint in twins if re.search(hint, file, re.IGNORECASE)), row.kind)
        return row, guess, bool(twins)
    if variant not in possible:
        raise ValueError(
            f"got variant {variant} for {file}; its tensors can be {' or '.join(possible)}; choose one of them or auto"
        )
    return row, variant, False


def layers_of(shapes: Shapes, file: str) -> tuple[tuple[int, ...], int]:
    """The hidden width of every cross-attention of a renamed state dict, and the width that its keys read.

    Raises ValueError unless these are all of a base model's.
    """
    numbers = sorted({int(key.split(".")[1]) for key in shapes if re.match(r"layers\.\d+\.", key)})
    if len(numbers) not in BASES or numbers != list(range(1, 2 * len(numbers), 2)):
        raise ValueError(
            f"got {file or 'a file'} with keys and values for {len(numbers)} cross-attentions; "
            "expected 16 (SD1.5) or 70 (SDXL), numbered 1, 3, 5, ...: the file is cut short or for another base model"
        )
    keys = [shapes.get(f"layers.{n}.k.weight", ()) for n in numbers]
    if any(len(shape) != 2 for shape in keys):
        raise ValueError(f"got {file or 'a file'}, whose keys are not all matrices; expected [hidden, width] each")
    return tuple(shape[0] for shape in keys), keys[0][1]


def flux_layers_of(
    shapes: Shapes, file: str, matrices: tuple[str, str] = KEYS
) -> tuple[tuple[str, ...], tuple[int, ...], int]:
    """The names of the layers of a renamed state dict for FLUX, their hidden widths, and the width their keys read.

    Raises ValueError unless each has its `matrices` (FLUX_KINDS), all of the same input.
    """
    found = {
        match[1]
        for match in (re.match(r"layers\.((?:(?:double|single)_blocks\.)?\d+)\.", key) for key in shapes)
        if match
    }
    names = sorted(found, key=lambda name: (name.rpartition(".")[0], int(name.rpartition(".")[2])))
    gives, reads = ([shapes.get(f"layers.{name}.{matrix}", ()) for name in names] for matrix in matrices)
    if not names or any(len(shape) != 2 for shape in gives) or any(shape[1:] != reads[0][1:] for shape in reads):
        raise ValueError(
            f"got {file or 'a file'} with keys and values for {len(names)} blocks of FLUX, which are not all matrices "
            "with the same input; expected [hidden, width] each: the file is cut short"
        )
    return tuple(names), tuple(shape[0] for shape in gives), reads[0][1]


def read_spec(tensors: Mapping[str, Tensor], file: str = "", variant: str = "auto") -> tuple[AdapterSpec, bool]:
    """Say what a renamed state dict (`keymaps.IP_ADAPTER`) is, and whether that was a guess. Raises ValueError."""
    shapes = shapes_of(tensors)
    row, kind, guessed = kind_of(shapes, file, variant)
    if kind in FLUX_KINDS:
        base, (names, layers, width) = FLUX, flux_layers_of(shapes, file, FLUX_KINDS[kind])
    else:
        names, (layers, width) = (), layers_of(shapes, file)
        base = BASES[len(layers)]
    spec = AdapterSpec(
        kind=kind,
        base=base,
        tokens=row.tokens(shapes),
        width=width,
        layers=layers,
        needs=NEEDS[kind](shapes),
        lora_rank=shapes.get("lora.0.q.down", (0,))[0],
        names=names,
    )
    return spec, guessed


def build(spec: AdapterSpec, tensors: Mapping[str, Tensor], operations: Any) -> DecoupledAdapter:
    """The adapter's module with all of its tensors. Raises ValueError naming what is missing or misshapen."""
    weights = {key: value for key, value in tensors.items() if not key.startswith("lora.")}
    shapes = shapes_of(keymaps.under(weights, "projector."))
    try:
        with torch.device("meta"):  # only structure: the tensors of the file become the weights, uncopied
            projector = KINDS[spec.kind].projector(shapes, operations)
            module = DecoupledAdapter(spec, projector, operations)
    except (KeyError, ValueError, IndexError, ZeroDivisionError, RuntimeError) as error:
        raise ValueError(
            f"the projector's tensors are incomplete or misshapen ({error}); expected those of {KINDS[spec.kind].title}"
        ) from error
    keymaps.load(module, weights)
    return module
