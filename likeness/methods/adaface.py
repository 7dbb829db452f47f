"""AdaFace (NeurIPS 2024 submission): a face as sixteen token embeddings of any prompt.

Arc2Face's text encoder makes 16 tokens of an ArcFace unit embedding (its states 4 to 19). The prompt inverter, a text
encoder with expanded attention, maps them to 16 token embeddings, which are used in a prompt like those of textual
inversion. The paper expands queries and values; its code and its files expand keys and values; files in the native
format may have either (clip_text).

File: safetensors, `prompt2token_proj.text_model.*`, and optionally `hidden_state_layer_weights` [3, 1 or D],
`pad_embeddings` [77, D], `static_img_suffix_embs` [1, S, D]. Metadata under `likeness`: kind, version, base, towers
(the text encoders that the embeddings are for, with their widths), heads, notes.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from ..checkpoints import checkpoint_detection, key_maps, native_metadata
from ..encoders import token_embedding
from ..encoders.clip_text import CONTEXT_LENGTH, END_TOKEN_ID, VOCABULARY_SIZE, CLIPTextModel, pad_token_ids
from ..spec import AdaFaceSpec, Feature, Identity
from . import arc2face
from .arc2face import FACE_TOKEN_INDEX, average_face_vectors

KIND = "adaface"
INVERTER_PROMPT_IDS = (1125, 539, 320)  # photo of a
COMMA_TOKEN_ID = 267
NUM_FACE_VECTORS = 16
TEXT_MODEL_PREFIX = "prompt2token_proj.text_model."
EXTRA_TENSORS = ("hidden_state_layer_weights", "pad_embeddings", "static_img_suffix_embs")
CLIP_L_SIZES = {"layers": 12, "width": 768, "words": VOCABULARY_SIZE, "positions": CONTEXT_LENGTH}  # of SD1.5's files

Perturbation = Callable[[Tensor], Tensor]


class PromptInverter(nn.Module):
    """Maps Arc2Face's tokens to token embeddings."""

    text: CLIPTextModel
    hidden_state_layer_weights: Tensor | None
    pad_embeddings: Tensor | None
    static_img_suffix_embs: Tensor | None

    def __init__(self, text: CLIPTextModel, extras: Mapping[str, Tensor]) -> None:
        super().__init__()
        self.text = text
        for name in EXTRA_TENSORS:
            self.register_buffer(name, extras.get(name))

    def forward(self, token_ids: list[int], face_tokens: Tensor) -> Tensor:
        """All states [B, 77, D] of a prompt with face tokens [B, N, D] from the fourth token on."""
        embeddings = self.text.embed_tokens(token_ids, face_tokens.device).repeat(len(face_tokens), 1, 1)
        embeddings[:, FACE_TOKEN_INDEX : FACE_TOKEN_INDEX + face_tokens.shape[1]] = face_tokens
        layer_weights = self.hidden_state_layer_weights
        return self.text(embeddings, None if layer_weights is None else layer_weights.to(face_tokens))

    def invert_tokens(self, face_tokens: Tensor, id_scale: float = 1.0) -> Tensor:
        """Token embeddings [B, N, D] of Arc2Face's tokens [B, N, D], scaled from padding (0) to unchanged (1)."""
        count = face_tokens.shape[1]
        token_ids = pad_token_ids((*INVERTER_PROMPT_IDS, *[COMMA_TOKEN_ID] * count))
        vectors = self.forward(token_ids, face_tokens)[:, FACE_TOKEN_INDEX : FACE_TOKEN_INDEX + count]
        if id_scale == 1:
            return vectors
        return apply_id_scale(vectors, self.get_padding_embeddings(face_tokens.device), id_scale)

    def get_padding_embeddings(self, device: torch.device) -> Tensor:
        """The embeddings of padding [77, D] with their positions: stored in the file, or else from its tables."""
        if self.pad_embeddings is not None:
            return self.pad_embeddings.to(device).float()
        return (self.text.embed_tokens([END_TOKEN_ID], device) + self.text.embed_positions(CONTEXT_LENGTH, device))[0]


def apply_id_scale(vectors: Tensor, padding: Tensor, id_scale: float) -> Tensor:
    """The authors' ID scale: interpolates from padding [77, D] to vectors [B, N, D]; above 1 extrapolates."""
    return id_scale * vectors + (1 - id_scale) * padding[FACE_TOKEN_INDEX : FACE_TOKEN_INDEX + vectors.shape[1]]


def perturb_vectors(x: Tensor, noise_level: float, noise: Tensor) -> Tensor:
    """x [..., D] plus noise of `noise_level` times its standard deviation, at its original norm."""
    perturbed = x + noise_level * x.std(-1, keepdim=True).mean() * noise
    return perturbed * (x.norm(dim=-1, keepdim=True) / (perturbed.norm(dim=-1, keepdim=True) + 1e-8))


def _encode_face_tokens(model: CLIPTextModel, face_vectors: Tensor) -> Tensor:
    """Arc2Face's tokens of face vectors [n, 512]: [n, 16, D]."""
    return arc2face.encode_face_prompt(model, face_vectors)[:, FACE_TOKEN_INDEX : FACE_TOKEN_INDEX + NUM_FACE_VECTORS]


def _tokens_of_mean_face(model: CLIPTextModel, rows: Tensor, weight: Tensor, perturb: Perturbation) -> Tensor:
    return _encode_face_tokens(model, perturb(average_face_vectors(rows, weight)))


def _mean_of_tokens(model: CLIPTextModel, rows: Tensor, weight: Tensor, perturb: Perturbation) -> Tensor:
    return perturb((weight[:, None, None] * _encode_face_tokens(model, rows)).sum(0, keepdim=True))


# How several faces are averaged to tokens [1, 16, D]; the first is the authors'. The mean is perturbed: on every face,
# noise of the same level would be weaker, relative to the mean, the less the faces agree.
AVERAGING_METHODS: Mapping[str, Callable[[CLIPTextModel, Tensor, Tensor, Perturbation], Tensor]] = {
    "faces": _tokens_of_mean_face, "tokens": _mean_of_tokens,
}  # fmt: skip


@dataclass(frozen=True)
class FaceEmbeddingOptions:
    """How a person becomes token embeddings: `averaging` is a key of AVERAGING_METHODS, the noise is added to the mean.

    Up to a `noise_level` of about 0.06 it remains the same person.
    """

    id_scale: float = 1.0
    num_vectors: int = NUM_FACE_VECTORS
    averaging: str = "faces"
    noise_level: float = 0.0
    seed: int = 0


@torch.no_grad()
def make_token_embeddings(
    encoder: CLIPTextModel,
    inverter: PromptInverter,
    identity: Identity,
    options: FaceEmbeddingOptions,
    device: torch.device,
    features: Sequence[Feature] = arc2face.FACE_FEATURES,
) -> Tensor:
    """The token embeddings [num_vectors, D] of a person, float32, from the first of `features` that the identity holds.

    Raises ValueError where the identity holds none.
    """
    rows, weight = arc2face.get_face_vectors(identity, features)

    def perturb(mean: Tensor) -> Tensor:
        if not options.noise_level:
            return mean
        noise = torch.randn(mean.shape, generator=torch.Generator().manual_seed(options.seed))
        return perturb_vectors(mean, options.noise_level, noise.to(mean))

    tokens = AVERAGING_METHODS[options.averaging](encoder, rows.to(device), weight.to(device), perturb)
    return inverter.invert_tokens(tokens, options.id_scale)[0, : options.num_vectors]


@dataclass(frozen=True)
class AdaFaceMetadata(native_metadata.NativeMetadata):
    kind = KIND
    towers: Mapping[str, int]
    heads: int


def make_adaface_metadata(spec: AdaFaceSpec) -> dict[str, str]:
    """The metadata of an inverter's safetensors file."""
    return native_metadata.encode_metadata(AdaFaceMetadata, spec)


def read_adaface_spec(metadata: Mapping[str, Any], file: str) -> AdaFaceSpec:
    """The spec of a file's metadata. Raises ValueError where it is incomplete or of a newer version."""
    stored = native_metadata.decode_metadata(AdaFaceMetadata, metadata, file)
    if not stored.towers or not all(isinstance(width, int) and width > 0 for width in stored.towers.values()):
        raise ValueError(
            f"got {file} with the text encoders {stored.towers}; expected a width for each; fetch the file again"
        )
    return AdaFaceSpec(stored.base, stored.towers, stored.heads, stored.notes)


def build_prompt_inverter(
    tensors: Mapping[str, Tensor], spec: AdaFaceSpec, operations: Any, file: str
) -> PromptInverter:
    """The inverter with its weights, not copied. Raises ValueError naming missing or misshapen tensors."""
    extras = {name: tensors[name] for name in EXTRA_TENSORS if name in tensors}
    text_tensors = {key: value for key, value in tensors.items() if key not in extras}
    text = build_text_model(text_tensors, TEXT_MODEL_PREFIX, spec.heads, operations)
    width = text.sizes["width"]
    wrong = [f"{name} {list(value.shape)}" for name, value in extras.items() if value.shape[-1] not in (1, width)]
    if sum(spec.towers.values()) != width:
        wrong.append(f"vectors of {width} for text encoders of {spec.towers}")
    if spec.base == "SD1.5":
        wrong += find_clip_l_mismatches(text)
    if wrong:
        raise ValueError(f"got {file} with {', '.join(wrong)}; expected the inverter of {spec.base}")
    return PromptInverter(text, extras)


def build_text_model(tensors: Mapping[str, Tensor], prefix: str, num_heads: int, operations: Any) -> CLIPTextModel:
    """A text model of tensors in the transformers layout, possibly with a closed vocabulary.

    Raises ValueError naming missing or misshapen tensors.
    """
    tensors = token_embedding.expand_token_table(tensors)
    weights = key_maps.select_prefix(tensors, prefix)
    weights.pop("embeddings.position_ids", None)  # older files store the numbers 0 to 76
    unknown = [key for key in tensors if not key.startswith(prefix)]
    if unknown:
        raise ValueError(f"the tensor {unknown[0]!r} is not one of a text model; expected only {prefix}*")
    try:
        with torch.device("meta"):
            model = CLIPTextModel(checkpoint_detection.get_tensor_shapes(weights), num_heads, operations)
    except (KeyError, ValueError, ZeroDivisionError) as error:
        raise ValueError(f"the text model's tensors are incomplete or misshapen ({error}); expected CLIP's") from error
    key_maps.load_module_weights(model, weights)
    return model


def find_clip_l_mismatches(model: CLIPTextModel) -> list[str]:
    """How a text model differs from CLIP-L; empty if it does not."""
    return [
        f"{model.sizes[name]} {name} where CLIP-L has {n}" for name, n in CLIP_L_SIZES.items() if model.sizes[name] != n
    ]
