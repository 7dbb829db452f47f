"""The nouns of the pack, as frozen data: features, faces, identities, adapters. No behaviour beyond reading them."""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

from torch import Tensor

FACE_SIZES = {"face112": 112, "face224": 224, "face256": 256, "face336": 336}
CROPS = ("photo", "black", "head", "ffhq512", *FACE_SIZES)


@dataclass(frozen=True)
class Feature:
    """What an adapter asks of an encoder: which network, which of its layers, on which crop of the photo.

    `network` is `arcface.<pack>`, `clip.<architecture>`, `siglip.<architecture>` or `omni_id`; `layer` is `raw`,
    `projected`, `penultimate`, `last`, `levels`, `pooled` or `tokens`; `crop` is one of `CROPS`: the whole photo, a
    black picture in its place, the head with a margin, or an aligned face.
    """

    network: str
    layer: str
    crop: str

    def __str__(self) -> str:
        return f"{self.network}.{self.layer}.{self.crop}"

    def id(self, sha256: str) -> str:
        """The encoder id under which an identity keeps this feature, given the hash of the encoder's file."""
        return f"{self}-{sha256[:8]}"


_ENCODER_ID = re.compile(
    r"(?P<network>[a-z0-9_.-]+)\.(?P<layer>[a-z0-9_]+)\.(?P<crop>[a-z0-9_]+)-(?P<hash8>[0-9a-f]{8})"
)


def parse_encoder_id(text: str) -> tuple[Feature, str]:
    """Split an encoder id into its feature and its eight hash digits. Raises ValueError on any other text."""
    match = _ENCODER_ID.fullmatch(text)
    if match is None:
        raise ValueError(f"{text!r} is not an encoder id; expected <network>.<layer>.<crop>-<8 hex digits>")
    return Feature(match["network"], match["layer"], match["crop"]), match["hash8"]


def find(held: Mapping[str, Tensor], feature: Feature) -> str | None:
    """The encoder id under which a mapping holds `feature`, or None."""
    return next((key for key in held if parse_encoder_id(key)[0] == feature), None)


@dataclass(frozen=True, eq=False)
class Face:
    """One detected face, in pixels of the photo (x to the right, y down).

    `box` [4] is x0, y0, x1, y1; `kps` [5, 2] are left eye, right eye, nose, left and right mouth corner as the viewer
    sees them; `score` is the detector's, 0 where no detector has looked.
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
    """All that is known of one person. Immutable; row i of every tensor belongs to face i.

    `box` [n, 4] and `kps` [n, 5, 2] are pixels of the crop; `score` [n]; `weight` [n], relative; `crop` uint8
    [n, H, W, 3] RGB, the head with a margin, or None; `embeddings` maps encoder ids to raw [n, ...]; `zeros` maps them
    to what the network gives for the zero picture, [1, ...]; `joint` maps encoder ids to what an encoder made of all
    faces together, [1, T, W]; `sources` says what each photo was; `hashes` maps encoder ids to the sha256 of the
    encoder's file.
    """

    name: str
    box: Tensor
    kps: Tensor
    score: Tensor
    weight: Tensor
    crop: Tensor | None = None
    embeddings: Mapping[str, Tensor] = field(default_factory=dict)
    zeros: Mapping[str, Tensor] = field(default_factory=dict)
    sources: tuple[str, ...] = ()
    hashes: Mapping[str, str] = field(default_factory=dict)
    joint: Mapping[str, Tensor] = field(default_factory=dict)

    def __len__(self) -> int:
        return self.box.shape[0]

    def find(self, feature: Feature) -> str | None:
        """The encoder id under which `embeddings` hold `feature`, or None."""
        return find(self.embeddings, feature)

    def find_joint(self, feature: Feature) -> str | None:
        """The encoder id under which `joint` holds `feature`, or None."""
        return find(self.joint, feature)


@dataclass(frozen=True, eq=False)
class Person:
    """An identity in a picture: where (a region [B, H, W], 0 to 1, or None for everywhere), how strongly, and what is
    said of this person alone (the host's conditioning), if anything."""

    identity: Identity
    mask: Tensor | None = None
    strength: float = 1.0
    prompt: Any = None


People = tuple[Person, ...]


@dataclass(frozen=True)
class FusedSpec:
    """What a fused KV adapter is (likeness.fused).

    `base` is the family of base models; `stream_noise` the noise of the face latents: `match`, that of the picture's
    step, or `clean`, none; `face_size` the side of the face pictures in pixels; `layers` maps the path of each
    transformer block to the width of its hidden states; `notes` say how it was trained.
    """

    base: str
    stream_noise: str
    face_size: int
    layers: Mapping[str, int]
    notes: Mapping[str, Any] = field(default_factory=dict)


@dataclass(frozen=True)
class FlashFaceSpec:
    """What a FlashFace file is (likeness.own_flashface); as its authors published it, if nothing is said.

    `base` is the family of base models; `heads` are those of its UNets' attentions; `face_size` is the side of a
    reference in pixels; `notes` say how it was trained.
    """

    base: str = "SD1.5"
    heads: int = 8
    face_size: int = 224
    notes: Mapping[str, Any] = field(default_factory=dict)


@dataclass(frozen=True)
class OmniIDSpec:
    """What an Omni-ID encoder is (likeness.omni_id). The defaults are the paper's, or ours where it is silent.

    `image_size` is the side of the face pictures and `patch` that of the trunk's patches, in pixels; `features` is the
    width of the trunk's states, of which `states` are read (omni_id.STATES), the class token's too or not; `activation`
    is the trunk's. Of the blocks, `cross_blocks` attend to the photos and `self_blocks` to the tokens, `tokens` of
    them, `width` wide, with `heads` and an MLP of `inner`. `notes` say how it was trained.
    """

    image_size: int = 224
    patch: int = 14
    features: int = 1280
    states: str = "last"
    class_token: bool = True
    activation: str = "gelu"
    tokens: int = 256
    width: int = 1280
    heads: int = 20
    inner: int = 5120
    cross_blocks: int = 2
    self_blocks: int = 2
    notes: Mapping[str, Any] = field(default_factory=dict)

    @property
    def side(self) -> int:
        """Patches along the side of a picture."""
        return self.image_size // self.patch

    @property
    def states_per_photo(self) -> int:
        return self.side**2 + self.class_token


@dataclass(frozen=True)
class AdapterSpec:
    """What an adapter file is. `kind` names its row of `detect.SIGNATURES`.

    `base` is the family of base models; `tokens` the tokens it makes of one face; `width` the width of its keys'
    and values' input; `layers` the hidden width of each cross-attention in the file's order (down, up, middle);
    `needs` the features its projector reads, in order; `lora_rank` is 0 where the file holds no LoRA; `unconditional`
    says what the negative prompt's rows attend to: `zero`, the tokens of no face, or `none`; `as_text` whether tokens
    are as wide as a UNet's text; `names` are those of FLUX's layers in the file: "double_blocks.0", "single_blocks.3",
    or "7", counted through all blocks.
    """

    kind: str
    base: str
    tokens: int
    width: int
    layers: tuple[int, ...]
    needs: tuple[Feature, ...]
    lora_rank: int = 0
    unconditional: str = "zero"
    as_text: bool = True
    names: tuple[str, ...] = ()


@dataclass(frozen=True)
class Arc2FaceSpec:
    """What a text encoder of Arc2Face's kind is (likeness.arc2face).

    `base` is the family of base models; `heads` are those of its attention; `faces` are the features that it reads, in
    the order of preference; `notes` say how it was trained.
    """

    base: str
    heads: int
    faces: tuple[Feature, ...]
    notes: Mapping[str, Any] = field(default_factory=dict)


@dataclass(frozen=True)
class PrompterSpec:
    """What an AdaFace file is (likeness.adaface).

    `base` is the family of base models; `towers` maps each of its text encoders, "l", to the width of its words, in the
    order in which a vector holds them; `heads` are those of the inverter's attention; `notes` say how it was trained.
    """

    base: str
    towers: Mapping[str, int]
    heads: int
    notes: Mapping[str, Any] = field(default_factory=dict)
