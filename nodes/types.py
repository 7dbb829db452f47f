"""All custom socket types of the pack, and the objects that pass through those that several stages share."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Protocol

from comfy.model_patcher import ModelPatcher
from comfy_api.latest import io
from torch import Tensor

from ..likeness.attention.feature_cache import ReferenceFeatureCache
from ..likeness.methods.arc2face import FACE_FEATURES
from ..likeness.spec import AdaFaceSpec, AdapterSpec, Face, Feature, FlashFaceSpec, FusedKVSpec, OmniIDSpec

IdentitySocket = io.Custom("LIKENESS_IDENTITY")
PeopleSocket = io.Custom("LIKENESS_PEOPLE")
AdapterSocket = io.Custom("LIKENESS_ADAPTER")
FaceAnalyzerSocket = io.Custom("LIKENESS_FACE_ANALYZER")
ImageEncoderSocket = io.Custom("LIKENESS_IMAGE_ENCODER")
ReferenceNetSocket = io.Custom("LIKENESS_REFERENCE_NET")
PrompterSocket = io.Custom("LIKENESS_PROMPTER")
OmniIDSocket = io.Custom("LIKENESS_OMNI_ID")


def make_identity_input(tooltip: str) -> io.MultiType.Input:
    """The input of every Apply node: one identity, or people."""
    return io.MultiType.Input(
        "identity", [IdentitySocket, PeopleSocket],
        tooltip=f"An identity (Encode, Load, Merge or Mix), or people with regions (Person). {tooltip}".strip(),
    )  # fmt: skip


@dataclass(frozen=True, eq=False)
class LoadedAdapter:
    """Passes through LIKENESS_ADAPTER: the adapter's spec, its weights in a ModelPatcher, and its LoRA, if any.

    `lora` maps `<number>.<q|k|v|out>.<down|up>` to matrices, with the file's own numbers, which are even for
    self-attentions.
    """

    spec: AdapterSpec
    patcher: ModelPatcher
    lora: Mapping[str, Tensor]
    file: str


@dataclass(frozen=True, eq=False)
class LoadedFusedKV:
    """Passes through LIKENESS_ADAPTER for a fused KV adapter (fused_kv.FusedKVAdapter).

    `feature_cache` holds the UNet's features of the faces for as long as this object lives.
    """

    spec: FusedKVSpec
    patcher: ModelPatcher
    feature_cache: ReferenceFeatureCache
    file: str


INFINITE_ID_KIND = "infinite_id"

# Method -> whether an adapter belongs to it, the adapter's name in errors, how to get one.
ADAPTER_METHODS: Mapping[str, tuple[Callable[[Any], bool], str, str]] = {
    "decoupled": (
        lambda adapter: isinstance(adapter, LoadedAdapter) and adapter.spec.kind != INFINITE_ID_KIND,
        "an adapter of the IP-Adapter family", "load one from models/ipadapter",
    ),
    "fused": (
        lambda adapter: isinstance(adapter, LoadedFusedKV),
        "a fused KV adapter", "load one from models/likeness, or connect Zero-Shot Fused KV",
    ),
    "mixed": (
        lambda adapter: isinstance(adapter, LoadedAdapter) and adapter.spec.kind == INFINITE_ID_KIND,
        "an Infinite-ID adapter", "load one from models/likeness",
    ),
}  # fmt: skip


def check_adapter_method(method: str, adapter: Any) -> Any:
    """Return the adapter. Raises ValueError if it belongs to another method than the node's."""
    belongs_to_method, name, remedy = ADAPTER_METHODS[method]
    if belongs_to_method(adapter):
        return adapter
    raise ValueError(
        f"got {adapter.file}, which is not {name}; {remedy}, or use the Apply Identity node of this adapter's method"
    )


@dataclass(frozen=True, eq=False)
class LoadedReferenceNet:
    """Passes through LIKENESS_REFERENCE_NET: the UNet that reads the faces, in a ModelPatcher.

    `added_layers` are the attention layers that read its features (flashface.AddedLayers), or None if the model's own
    self-attentions read them. `feature_cache` holds its features for as long as this object lives. Faces have the size
    given in the spec.
    """

    patcher: ModelPatcher
    added_layers: ModelPatcher | None
    feature_cache: ReferenceFeatureCache
    file: str
    spec: FlashFaceSpec = FlashFaceSpec()


@dataclass(frozen=True, eq=False)
class LoadedPrompter:
    """Passes through LIKENESS_PROMPTER: Arc2Face's text encoder (clip_text.CLIPTextModel) in a ModelPatcher, and
    AdaFace's prompt inverter (adaface.PromptInverter) with its spec, both None if only Arc2Face was loaded.
    `face_features` are the features that Arc2Face's encoder reads, in order of preference."""

    arc2face: ModelPatcher
    inverter: ModelPatcher | None
    spec: AdaFaceSpec | None
    file: str
    face_features: Sequence[Feature] = FACE_FEATURES


class FaceAnalyzerProtocol(Protocol):
    """Passes through LIKENESS_FACE_ANALYZER. Photos are uint8 RGB [H, W, 3].

    `feature` names the recognizer as encoder ids do; `sha256` is the hash of its file. `detect` runs the detector at
    the given input size in pixels. `embed` returns the raw ArcFace vector [512] of a face.
    """

    @property
    def feature(self) -> Feature: ...

    @property
    def sha256(self) -> str: ...

    def detect(self, photo: Tensor, size: int) -> list[Face]: ...

    def embed(self, photo: Tensor, face: Face) -> Tensor: ...


class ImageEncoderProtocol(Protocol):
    """Passes through LIKENESS_IMAGE_ENCODER. `family`, `architecture` and `sha256` go into encoder ids.

    `encode` takes images [n, H, W, 3] in 0..1 and returns `projected` [n, E], the pooled embedding, `penultimate`
    [n, T, W], the input of the last block, and `last` [n, T, W], its output; both without the post LayerNorm, class
    token first. EVA-CLIP also returns `levels` [n, 5, T, W], which PuLID reads; SigLIP returns only `pooled` [n, W].
    `encode_zero_image` returns the same layers, n = 1, for an image that is zero after normalization (mid-grey). It
    leaves out layers for which adapters use zeros instead when there is no face.
    """

    @property
    def family(self) -> str: ...

    @property
    def architecture(self) -> str: ...

    @property
    def sha256(self) -> str: ...

    def encode(self, images: Tensor) -> dict[str, Tensor]: ...

    def encode_zero_image(self) -> dict[str, Tensor]: ...


class OmniIDEncoderProtocol(Protocol):
    """Passes through LIKENESS_OMNI_ID. `sha256` is the hash of its file.

    Images are aligned faces [n, S, S, 3] in 0..1, where S is the spec's image size: no two equal, each with a weight
    above 0. `encode` encodes them jointly to tokens [1, L, C]; `compute_attention_maps` returns the attention of each
    query to their patches, [L, n, h, w].
    """

    @property
    def spec(self) -> OmniIDSpec: ...

    @property
    def sha256(self) -> str: ...

    def encode(self, images: Tensor, weight: Sequence[float]) -> Tensor: ...

    def compute_attention_maps(self, images: Tensor, weight: Sequence[float]) -> Tensor: ...
