"""The data types of the pack as frozen dataclasses: features, faces, identities, adapter specs."""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

from torch import Tensor

FACE_CROP_SIZES = {"face112": 112, "face224": 224, "face256": 256, "face336": 336}
CROP_NAMES = ("photo", "black", "head", "ffhq512", *FACE_CROP_SIZES)


@dataclass(frozen=True)
class Feature:
    """An encoder output that an adapter reads: which network, which of its layers, on which crop of the photo.

    `network` is `arcface.<pack>`, `clip.<architecture>`, `siglip.<architecture>` or `omni_id`, where a pack may have
    the name of any folder; `layer` is `raw`, `projected`, `penultimate`, `last`, `levels`, `pooled` or `tokens`; `crop`
    is one of `CROP_NAMES`: the full photo, a black image instead of it, the head with a margin, or an aligned face.
    """

    network: str
    layer: str
    crop: str

    def __str__(self) -> str:
        return f"{self.network}.{self.layer}.{self.crop}"

    def format_encoder_id(self, sha256: str) -> str:
        """The encoder id that is the key of this feature in an identity. `sha256` is that of the encoder's file."""
        return f"{self}-{sha256[:8]}"


_ENCODER_ID = re.compile(
    r"(?P<network>[^/\x00-\x1f\x7f]+)\.(?P<layer>[a-z0-9_]+)\.(?P<crop>[a-z0-9_]+)-(?P<hash8>[0-9a-f]{8})"
)


def parse_encoder_id(text: str) -> tuple[Feature, str]:
    """Split an encoder id into its feature and the first eight hex digits of the hash.

    Raises ValueError if `text` is not an encoder id.
    """
    match = _ENCODER_ID.fullmatch(text)
    if match is None:
        raise ValueError(f"{text!r} is not an encoder id; expected <network>.<layer>.<crop>-<8 hex digits>")
    return Feature(match["network"], match["layer"], match["crop"]), match["hash8"]


def find_encoder_id(embeddings: Mapping[str, Tensor], feature: Feature) -> str | None:
    """The key of `feature` in a mapping from encoder ids, or None."""
    return next((key for key in embeddings if parse_encoder_id(key)[0] == feature), None)


@dataclass(frozen=True, eq=False)
class Face:
    """One detected face, in pixels of the photo (x to the right, y down).

    `box` [4] is x0, y0, x1, y1; `kps` [5, 2] are left eye, right eye, nose, left and right mouth corner as the viewer
    sees them; `score` is the detector's confidence, 0 if no detector was run.
    """

    box: Tensor
    kps: Tensor
    score: float

    @property
    def size(self) -> float:
        """The longer side of the box in pixels."""
        return float((self.box[2:] - self.box[:2]).max())


@dataclass(frozen=True, eq=False)
class Identity:
    """One person: faces and their embeddings. Immutable; row i of every tensor belongs to face i.

    `box` [n, 4] and `kps` [n, 5, 2] are in pixels of the crop; `score` [n] is the detector's; `weight` [n] is relative;
    `crop` is uint8 [n, H, W, 3] RGB, the head with a margin, or None. `embeddings` maps encoder ids to raw (not
    normalized) outputs [n, ...], `zero_embeddings` to the output for an all-zero image [1, ...], `joint_embeddings` to
    the output for all faces encoded jointly [1, T, W]. `sources` describes each photo. `hashes` maps encoder ids to the
    sha256 of the encoder's file.
    """

    name: str
    box: Tensor
    kps: Tensor
    score: Tensor
    weight: Tensor
    crop: Tensor | None = None
    embeddings: Mapping[str, Tensor] = field(default_factory=dict)
    zero_embeddings: Mapping[str, Tensor] = field(default_factory=dict)
    sources: tuple[str, ...] = ()
    hashes: Mapping[str, str] = field(default_factory=dict)
    joint_embeddings: Mapping[str, Tensor] = field(default_factory=dict)

    def __len__(self) -> int:
        return self.box.shape[0]

    def find_embedding(self, feature: Feature) -> str | None:
        """The key of `feature` in `embeddings`, or None."""
        return find_encoder_id(self.embeddings, feature)

    def find_joint_embedding(self, feature: Feature) -> str | None:
        """The key of `feature` in `joint_embeddings`, or None."""
        return find_encoder_id(self.joint_embeddings, feature)


@dataclass(frozen=True, eq=False)
class Person:
    """An identity placed in an image.

    `mask` is the region [B, H, W], 0 to 1, or None for the full image. `prompt` is ComfyUI's conditioning for this
    person alone, or None.
    """

    identity: Identity
    mask: Tensor | None = None
    strength: float = 1.0
    prompt: Any = None


People = tuple[Person, ...]


@dataclass(frozen=True)
class FusedKVSpec:
    """Spec of a fused KV adapter (likeness/methods/fused_kv.py).

    `base` is the base model family. `stream_noise` is the noise level of the face latents: `match` the current step, or
    `clean`. `face_size` is the side of the face images in pixels. `layers` maps the path of each transformer block to
    its hidden width. `notes` describe the training.
    """

    base: str
    stream_noise: str
    face_size: int
    layers: Mapping[str, int]
    notes: Mapping[str, Any] = field(default_factory=dict)


@dataclass(frozen=True)
class FlashFaceSpec:
    """Spec of a FlashFace file (likeness/checkpoints/native_flashface.py). The defaults are the published model's.

    `base` is the base model family, `heads` the number of attention heads of both UNets, `face_size` the side of a
    reference image in pixels. `notes` describe the training.
    """

    base: str = "SD1.5"
    heads: int = 8
    face_size: int = 224
    notes: Mapping[str, Any] = field(default_factory=dict)


@dataclass(frozen=True)
class OmniIDSpec:
    """Spec of an Omni-ID encoder (likeness/methods/omni_id.py). The defaults are the paper's, or ours where the paper
    does not say.

    Trunk: `image_size` and `patch_size` in pixels, `trunk_width` the width of its hidden states, `trunk_heads` the
    number of its attention heads (0: as published CLIP towers of this width), `states` which hidden states are read (a
    key of `omni_id.TRUNK_STATES`), `class_token` whether the class token is read too, `activation` of its MLPs.
    Decoder: `cross_blocks` attend to the photos and `self_blocks` to the tokens; `tokens` queries of `width`, `heads`
    attention heads, MLPs of `mlp_width`. `notes` describe the training.
    """

    image_size: int = 224
    patch_size: int = 14
    trunk_width: int = 1280
    states: str = "last"
    class_token: bool = True
    activation: str = "gelu"
    tokens: int = 256
    width: int = 1280
    heads: int = 20
    mlp_width: int = 5120
    cross_blocks: int = 2
    self_blocks: int = 2
    trunk_heads: int = 0
    notes: Mapping[str, Any] = field(default_factory=dict)

    @property
    def patches_per_side(self) -> int:
        """Patches along one side of the image."""
        return self.image_size // self.patch_size

    @property
    def states_per_photo(self) -> int:
        return self.patches_per_side**2 + self.class_token


@dataclass(frozen=True)
class AdapterSpec:
    """Spec of an adapter file.

    `kind` is the name of its row in `checkpoint_detection.CHECKPOINT_SIGNATURES`; `base` the base model family;
    `tokens` the number of identity tokens per face; `width` the input width of the key and value projections; `layers`
    the hidden width of each cross-attention in the file's order (down, up, middle); `needs` the features that the
    projector reads, in order; `lora_rank` is 0 if the file has no LoRA; `unconditional` is what the negative rows
    attend to: `zero`, the tokens of zero embeddings, or `none`; `matches_text_width` whether the tokens are as wide as
    a UNet's text embeddings; `layer_names` are FLUX's layers in the file: "double_blocks.0", "single_blocks.3", or "7",
    counted over all blocks.
    """

    kind: str
    base: str
    tokens: int
    width: int
    layers: tuple[int, ...]
    needs: tuple[Feature, ...]
    lora_rank: int = 0
    unconditional: str = "zero"
    matches_text_width: bool = True
    layer_names: tuple[str, ...] = ()


@dataclass(frozen=True)
class Arc2FaceSpec:
    """Spec of a text encoder like Arc2Face's (likeness/methods/arc2face.py).

    `base` is the base model family, `heads` the number of attention heads, `faces` the features that it can read, in
    order of preference. `notes` describe the training.
    """

    base: str
    heads: int
    faces: tuple[Feature, ...]
    notes: Mapping[str, Any] = field(default_factory=dict)


@dataclass(frozen=True)
class AdaFaceSpec:
    """Spec of an AdaFace file (likeness/methods/adaface.py).

    `base` is the base model family. `towers` maps the name of each text encoder, such as "l", to its token embedding
    width, in the order in which the predicted vectors are concatenated. `heads` is the number of attention heads of the
    inverter. `notes` describe the training.
    """

    base: str
    towers: Mapping[str, int]
    heads: int
    notes: Mapping[str, Any] = field(default_factory=dict)
