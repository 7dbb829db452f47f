"""Every custom socket type of the pack, once, and what travels through those that two stages share."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Protocol

from comfy.model_patcher import ModelPatcher
from comfy_api.latest import io
from torch import Tensor

from ..likeness.arc2face import FACES
from ..likeness.bank import MemoryBank
from ..likeness.spec import AdapterSpec, Face, Feature, FlashFaceSpec, FusedSpec, OmniIDSpec, PrompterSpec

Identity = io.Custom("LIKENESS_IDENTITY")
People = io.Custom("LIKENESS_PEOPLE")
Adapter = io.Custom("LIKENESS_ADAPTER")
FaceAnalyzer = io.Custom("LIKENESS_FACE_ANALYZER")
ImageEncoder = io.Custom("LIKENESS_IMAGE_ENCODER")
ReferenceNet = io.Custom("LIKENESS_REFERENCE_NET")
Prompter = io.Custom("LIKENESS_PROMPTER")
OmniID = io.Custom("LIKENESS_OMNI_ID")


def who_input(tooltip: str) -> io.MultiType.Input:
    """The input by which every apply node takes one identity, or people."""
    return io.MultiType.Input(
        "identity", [Identity, People],
        tooltip=f"An identity (Encode, Load, Merge, Mix), or people with regions (Person). {tooltip}".strip(),
    )  # fmt: skip


@dataclass(frozen=True, eq=False)
class LoadedAdapter:
    """What goes through LIKENESS_ADAPTER: what the file is, its weights under the host's care, its LoRA if any.

    `lora` maps `<number>.<q|k|v|out>.<down|up>` to matrices; the number is the file's own, even for self-attentions.
    """

    spec: AdapterSpec
    patcher: ModelPatcher
    lora: Mapping[str, Tensor]
    file: str


@dataclass(frozen=True, eq=False)
class LoadedFused:
    """What goes through LIKENESS_ADAPTER where it is a fused KV adapter (fused.FusedAdapter).

    `bank` keeps what the UNet saw of the faces, for as long as this object lives.
    """

    spec: FusedSpec
    patcher: ModelPatcher
    bank: MemoryBank
    file: str


INFINITE_ID = "infinite_id"

# Method -> whether an adapter is of it, what it is called, and where one comes from.
METHODS: Mapping[str, tuple[Callable[[Any], bool], str, str]] = {
    "decoupled": (
        lambda given: isinstance(given, LoadedAdapter) and given.spec.kind != INFINITE_ID,
        "adapter of the IP-Adapter family", "load one from models/ipadapter",
    ),
    "fused": (
        lambda given: isinstance(given, LoadedFused),
        "fused KV adapter", "load one from models/likeness, connect Zero-Shot Fused KV",
    ),
    "mixed": (
        lambda given: isinstance(given, LoadedAdapter) and given.spec.kind == INFINITE_ID,
        "Infinite-ID adapter", "load one from models/likeness",
    ),
}  # fmt: skip


def adapter_for(method: str, given: Any) -> Any:
    """What came through the adapter socket. Raises ValueError where it is of another method than the node's."""
    fits, what, how = METHODS[method]
    if fits(given):
        return given
    raise ValueError(
        f"got {given.file}, which is no {what}; expected one; {how}, or use the Apply Identity node of this adapter's "
        "own method"
    )


@dataclass(frozen=True, eq=False)
class LoadedReferenceNet:
    """What goes through LIKENESS_REFERENCE_NET: a UNet that reads the faces, under the host's care.

    `added` holds the attention layers that read what it saw (flashface.AddedLayers); None where the model's own
    self-attentions do. `bank` keeps what it saw, for as long as this object lives; faces have the spec's size.
    """

    patcher: ModelPatcher
    added: ModelPatcher | None
    bank: MemoryBank
    file: str
    spec: FlashFaceSpec = FlashFaceSpec()


@dataclass(frozen=True, eq=False)
class LoadedPrompter:
    """What goes through LIKENESS_PROMPTER, under the host's care: Arc2Face's text encoder (clip_text.TextModel), and
    the inverter (adaface.PromptInverter) with its spec, which are None where Arc2Face was loaded alone. `faces` are the
    features that Arc2Face's encoder reads, in the order of preference."""

    arc2face: ModelPatcher
    inverter: ModelPatcher | None
    spec: PrompterSpec | None
    file: str
    faces: Sequence[Feature] = FACES


class Analyzer(Protocol):
    """What goes through LIKENESS_FACE_ANALYZER. Photos are uint8 RGB [H, W, 3].

    `feature` names the recogniser as in encoder ids, `sha256` is its file's; `detect` sees the photo at a detector
    size in pixels; `embed` gives a face's raw ArcFace vector [512].
    """

    @property
    def feature(self) -> Feature: ...

    @property
    def sha256(self) -> str: ...

    def detect(self, photo: Tensor, size: int) -> list[Face]: ...

    def embed(self, photo: Tensor, face: Face) -> Tensor: ...


class Encoder(Protocol):
    """What goes through LIKENESS_IMAGE_ENCODER. `family`, `architecture` and `sha256` go into encoder ids.

    `encode` takes [n, H, W, 3] in 0..1 and gives `projected` [n, E], the pooled embedding; `penultimate` [n, T, W],
    the last block's input, and `last` [n, T, W], its output; both without the post LayerNorm, class token first.
    EVA-CLIP gives `levels` [n, 5, T, W], too: what PuLID reads; SigLIP gives `pooled` [n, W] alone. `zero` gives the
    same layers, n = 1, for a picture that is zero after normalisation: mid-grey; it leaves out those in whose place no
    face is 0.
    """

    @property
    def family(self) -> str: ...

    @property
    def architecture(self) -> str: ...

    @property
    def sha256(self) -> str: ...

    def encode(self, pictures: Tensor) -> dict[str, Tensor]: ...

    def zero(self) -> dict[str, Tensor]: ...


class OmniEncoder(Protocol):
    """What goes through LIKENESS_OMNI_ID. `sha256` is its file's.

    Pictures are aligned faces [n, S, S, 3] in 0..1, S the spec's image size, no two alike, each with a weight above 0.
    `encode` makes [1, L, C] of all of them; `maps` says how each query attends to their patches, [L, n, h, w].
    """

    @property
    def spec(self) -> OmniIDSpec: ...

    @property
    def sha256(self) -> str: ...

    def encode(self, pictures: Tensor, weight: Sequence[float]) -> Tensor: ...

    def maps(self, pictures: Tensor, weight: Sequence[float]) -> Tensor: ...
