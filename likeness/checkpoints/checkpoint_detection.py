"""Detects published adapter files by the names and shapes of their tensors, and builds them."""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from ..methods import pulid
from ..methods.ip_adapter import ADAPTER_KINDS, DecoupledAdapter
from ..methods.resampler import TensorShapes
from ..spec import AdapterSpec, Feature
from . import key_maps

BASES_BY_LAYER_COUNT = {16: "SD1.5", 70: "SDXL"}  # by the number of cross-attentions
BASES_BY_TEXT_WIDTH = {128: "Portrait World"}  # the demo's base model, which has SD1.5's layers
FLUX_BASE = "FLUX.1"
KEY_MATRICES = ("k.weight", "k.weight")
# Kinds for FLUX -> the matrix of a layer whose rows are the model's width, and the one that reads the tokens.
FLUX_LAYER_MATRICES = {"xlabs": KEY_MATRICES, "instantx": KEY_MATRICES, "pulid_flux": ("to_out.weight", "to_kv.weight")}

ARCFACE_BUFFALO_L = Feature("arcface.buffalo_l", "raw", "face112")
ARCFACE_ANTELOPEV2 = Feature("arcface.antelopev2", "raw", "face112")
CLIP_NETWORKS_BY_WIDTH = {1024: "clip.vit-h-14", 1280: "clip.vit-bigg-14"}  # by the width of the projected embedding
PENULTIMATE_NETWORK = "clip.vit-h-14"
CLIP_L_PHOTO, CLIP_L_BLACK = (Feature("clip.vit-l-14", "projected", crop) for crop in ("photo", "black"))
SIGLIP_POOLED = Feature("siglip.so400m-14-384", "pooled", "photo")
EVA_CLIP_FEATURES = tuple(Feature("clip.eva02-l-14-336", layer, "ffhq512") for layer in ("projected", "levels"))


def _penultimate_features(crop: str) -> tuple[Feature, ...]:
    return (Feature(PENULTIMATE_NETWORK, "penultimate", crop),)


@dataclass(frozen=True)
class CheckpointSignature:
    """A kind of file: its required tensors, a condition on their shapes, and how many tokens it makes of one face."""

    kind: str
    required_tensors: tuple[str, ...]
    count_tokens: Callable[[TensorShapes], int]
    shapes_match: Callable[[TensorShapes], bool] = lambda shapes: True

    def matches(self, shapes: TensorShapes) -> bool:
        return all(name in shapes for name in self.required_tensors) and self.shapes_match(shapes)


def _mlp_tokens(shapes: TensorShapes) -> int:
    return shapes["projector.proj.2.weight"][0] // shapes["projector.norm.weight"][0]


def _latent_tokens(shapes: TensorShapes) -> int:
    return shapes["projector.latents"][1]


def _image_tokens(shapes: TensorShapes) -> int:
    return shapes["projector.proj.weight"][0] // shapes["projector.norm.weight"][0]


def _id_tokens(shapes: TensorShapes) -> int:
    return shapes["projector.body.6.weight"][0] // shapes["projector.mapping_0.6.weight"][0] + pulid.NUM_VIT_LEVELS


def _reads_width(width: int) -> Callable[[TensorShapes], bool]:
    return lambda shapes: shapes["projector.proj_in.weight"][1] == width


_MLP = ("projector.proj.0.weight", "projector.proj.2.weight", "projector.norm.weight")
_MLP_PLUS = (*_MLP, "projector.perceiver_resampler.proj_in.weight")
_FULL_FACE = ("projector.proj.0.weight", "projector.proj.2.weight", "projector.proj.3.weight")
_RESAMPLER = ("projector.latents", "projector.proj_in.weight", "projector.proj_out.weight")
_IMAGE = ("projector.proj.weight", "projector.norm.weight")
_ID_ENCODER = ("projector.body.6.weight", "projector.mapping_0.6.weight", "projector.mapping_patch_0.0.weight")
_ID_FORMER = ("projector.latents", "projector.proj_out", "projector.id_embedding_mapping.6.weight")

# Specific before broad: the first match decides.
CHECKPOINT_SIGNATURES: tuple[CheckpointSignature, ...] = (
    CheckpointSignature("kolors_faceid_plus", _MLP_PLUS, _mlp_tokens, lambda s: s["projector.norm.weight"][0] == 4096),
    CheckpointSignature("faceid_plus", _MLP_PLUS, _mlp_tokens),
    CheckpointSignature("full_face", _FULL_FACE, lambda s: 257),
    CheckpointSignature("instantx", (*_MLP, "layers.0.k.weight"), _mlp_tokens),
    CheckpointSignature(
        "xlabs", (*_IMAGE, "layers.double_blocks.0.k.weight", "layers.double_blocks.0.k.bias"), _image_tokens
    ),
    CheckpointSignature("faceid", (*_MLP, "lora.0.q.down"), _mlp_tokens),
    CheckpointSignature("portrait", _MLP, _mlp_tokens),
    CheckpointSignature("pulid", _ID_ENCODER, _id_tokens),
    CheckpointSignature("pulid_flux", (*_ID_FORMER, "layers.0.to_kv.weight"), _latent_tokens),
    CheckpointSignature("pulid_v1_1", (*_ID_FORMER, "layers.1.k.weight"), _latent_tokens),
    CheckpointSignature("instantid", _RESAMPLER, _latent_tokens, _reads_width(512)),
    CheckpointSignature("kolors_plus", _RESAMPLER, _latent_tokens, _reads_width(1024)),
    CheckpointSignature("plus", _RESAMPLER, _latent_tokens, _reads_width(1280)),
    CheckpointSignature("image", _IMAGE, _image_tokens),
)

# Variants with exactly the same tensors, each with a pattern of file names that hints at it.
AMBIGUOUS_VARIANTS: dict[str, tuple[tuple[str, str], ...]] = {
    "faceid_plus": (("faceid_plus_v2", r"plus.?v2|sdxl"),),
    "plus": (("plus_face", r"plus.?face"),),
    "instantid": (("portrait_unnorm", r"unnorm|portrait"),),
}

UNSUPPORTED_KINDS = {
    "kolors_plus": "Kolors, a base model that ComfyUI itself does not load",
    "kolors_faceid_plus": "Kolors, a base model that ComfyUI itself does not load",
}

REQUIRED_FEATURES: dict[str, Callable[[TensorShapes], tuple[Feature, ...]]] = {
    "image": lambda s: (
        Feature(CLIP_NETWORKS_BY_WIDTH.get(s["projector.proj.weight"][1], "clip.unknown"), "projected", "photo"),
    ),
    "plus": lambda s: _penultimate_features("photo"),
    "plus_face": lambda s: _penultimate_features("head"),
    "full_face": lambda s: _penultimate_features("head"),
    "faceid": lambda s: (ARCFACE_BUFFALO_L,),
    "faceid_plus": lambda s: (ARCFACE_BUFFALO_L, *_penultimate_features("face224")),
    "faceid_plus_v2": lambda s: (ARCFACE_BUFFALO_L, *_penultimate_features("face224")),
    "portrait": lambda s: (ARCFACE_BUFFALO_L,),
    "portrait_unnorm": lambda s: (ARCFACE_BUFFALO_L,),
    "instantid": lambda s: (ARCFACE_ANTELOPEV2,),
    "instantx": lambda s: (SIGLIP_POOLED,),
    "xlabs": lambda s: (CLIP_L_PHOTO,),
    "pulid": lambda s: (ARCFACE_ANTELOPEV2, *EVA_CLIP_FEATURES),
    "pulid_v1_1": lambda s: (ARCFACE_ANTELOPEV2, *EVA_CLIP_FEATURES),
    "pulid_flux": lambda s: (ARCFACE_ANTELOPEV2, *EVA_CLIP_FEATURES),
}


def get_base_name(base: str, text_width: int) -> str:
    """The display name of a base model, by its family and the width of its text embeddings."""
    return BASES_BY_TEXT_WIDTH.get(text_width, base)


def list_variants(kind: str) -> tuple[str, ...]:
    """The other kinds with the same tensors as this one."""
    return tuple(variant for variant, _ in AMBIGUOUS_VARIANTS.get(kind, ()))


def get_tensor_shapes(tensors: Mapping[str, Tensor]) -> dict[str, tuple[int, ...]]:
    return {key: tuple(value.shape) for key, value in tensors.items()}


def detect_adapter_kind(
    shapes: TensorShapes, file_name: str = "", variant: str = "auto"
) -> tuple[CheckpointSignature, str, bool]:
    """The signature that matches, the kind, and whether the kind was guessed from the file name.

    `variant` is `auto` or a kind. Raises ValueError where the tensors fit no kind, or not the one chosen.
    """
    file_name = file_name or "a file"
    signature = next((signature for signature in CHECKPOINT_SIGNATURES if signature.matches(shapes)), None)
    if signature is None:
        titles = ", ".join(kind.title for kind in ADAPTER_KINDS.values())
        raise ValueError(f"got {file_name}, whose tensors fit no adapter this pack knows; expected one of {titles}")
    kind = signature.kind
    if kind in UNSUPPORTED_KINDS:
        raise ValueError(f"got {file_name}, an adapter for {UNSUPPORTED_KINDS[kind]}; expected one for SD1.5 or SDXL")
    possible = (kind, *list_variants(kind))
    if variant == "auto":
        hints = AMBIGUOUS_VARIANTS.get(kind, ())
        guess = next((name for name, hint in hints if re.search(hint, file_name, re.IGNORECASE)), kind)
        return signature, guess, len(possible) > 1
    if variant not in possible:
        raise ValueError(
            f"got variant {variant} for {file_name}; expected {' or '.join(possible)}, which its tensors can be; "
            "choose one of them or auto"
        )
    return signature, variant, False


def read_unet_layers(shapes: TensorShapes, file: str) -> tuple[tuple[int, ...], int]:
    """The hidden width of every cross-attention of a renamed state dict, and the input width of their keys.

    Raises ValueError unless the file covers all cross-attentions of a base model.
    """
    numbers = sorted({int(key.split(".")[1]) for key in shapes if re.match(r"layers\.\d+\.", key)})
    if len(numbers) not in BASES_BY_LAYER_COUNT or numbers != list(range(1, 2 * len(numbers), 2)):
        raise ValueError(
            f"got {file or 'a file'} with keys and values for {len(numbers)} cross-attentions; "
            "expected 16 (SD1.5) or 70 (SDXL), numbered 1, 3, 5, ...; the file is cut short or for another base model"
        )
    keys = [shapes.get(f"layers.{n}.k.weight", ()) for n in numbers]
    if any(len(shape) != 2 for shape in keys):
        raise ValueError(f"got {file or 'a file'}, whose keys are not all matrices; expected [hidden, width] each")
    return tuple(shape[0] for shape in keys), keys[0][1]


def read_flux_layers(
    shapes: TensorShapes, file: str, matrices: tuple[str, str] = KEY_MATRICES
) -> tuple[tuple[str, ...], tuple[int, ...], int]:
    """The layer names of a renamed state dict for FLUX, their hidden widths, and the input width of their keys.

    `matrices` is a value of FLUX_LAYER_MATRICES. Raises ValueError unless every layer has both, with one input width.
    """
    names_found = {
        match[1]
        for match in (re.match(r"layers\.((?:(?:double|single)_blocks\.)?\d+)\.", key) for key in shapes)
        if match
    }
    names = sorted(names_found, key=lambda name: (name.rpartition(".")[0], int(name.rpartition(".")[2])))
    hidden_shapes, input_shapes = ([shapes.get(f"layers.{name}.{matrix}", ()) for name in names] for matrix in matrices)
    if (
        not names
        or any(len(shape) != 2 for shape in hidden_shapes)
        or any(shape[1:] != input_shapes[0][1:] for shape in input_shapes)
    ):
        raise ValueError(
            f"got {file or 'a file'} with keys and values for {len(names)} blocks of FLUX, which are not all matrices "
            "of the same input width; expected [hidden, width] each; the file is cut short"
        )
    return tuple(names), tuple(shape[0] for shape in hidden_shapes), input_shapes[0][1]


def detect_adapter_spec(
    tensors: Mapping[str, Tensor], file: str = "", variant: str = "auto"
) -> tuple[AdapterSpec, bool]:
    """The spec of a renamed state dict (`key_maps.IP_ADAPTER`), and whether its kind was a guess. Raises ValueError."""
    shapes = get_tensor_shapes(tensors)
    signature, kind, guessed = detect_adapter_kind(shapes, file, variant)
    if kind in FLUX_LAYER_MATRICES:
        base, (names, layers, width) = FLUX_BASE, read_flux_layers(shapes, file, FLUX_LAYER_MATRICES[kind])
    else:
        names, (layers, width) = (), read_unet_layers(shapes, file)
        base = BASES_BY_LAYER_COUNT[len(layers)]
    spec = AdapterSpec(
        kind=kind,
        base=base,
        tokens=signature.count_tokens(shapes),
        width=width,
        layers=layers,
        needs=REQUIRED_FEATURES[kind](shapes),
        lora_rank=shapes.get("lora.0.q.down", (0,))[0],
        layer_names=names,
    )
    return spec, guessed


def build_ip_adapter(spec: AdapterSpec, tensors: Mapping[str, Tensor], operations: Any) -> DecoupledAdapter:
    """The adapter's module with its weights, not copied. Raises ValueError naming missing or misshapen tensors."""
    weights = {key: value for key, value in tensors.items() if not key.startswith("lora.")}
    shapes = get_tensor_shapes(key_maps.select_prefix(weights, "projector."))
    try:
        with torch.device("meta"):  # structure only: the file's tensors become the weights without a copy
            projector = ADAPTER_KINDS[spec.kind].projector(shapes, operations)
            module = DecoupledAdapter(spec, projector, operations)
    except (KeyError, ValueError, IndexError, ZeroDivisionError, RuntimeError) as error:
        raise ValueError(
            f"the projector's tensors are incomplete or misshapen ({error}); "
            f"expected those of {ADAPTER_KINDS[spec.kind].title}"
        ) from error
    key_maps.load_module_weights(module, weights)
    return module
