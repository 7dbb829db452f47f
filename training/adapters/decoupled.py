"""Decoupled attention by IP-Adapter's objective (Ye et al. 2308.06721, Eq. 8): a projector, and keys and values.

The base model is frozen. Conditions are dropped at random: the text, the face, or both (Sec. 3.2.3).
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import comfy.ops
import torch
from comfy.model_patcher import ModelPatcher
from torch import Generator, Tensor, nn

from ...likeness import keymaps, omni_adapter, own_decoupled
from ...likeness.decoupled import DecoupledAdapter, FaceProjection, OmniProjection
from ...likeness.resampler import Resampler
from ...likeness.spec import AdapterSpec, Identity
from ...nodes.attention import decoupled, unet
from ...nodes.attention.injection import ALWAYS
from ...nodes.types import LoadedAdapter
from ..base.source import Source
from ..task import Batch, start
from . import stack
from .readers import ArcFace, Encoder, Omni, Vision

BASE = "SD1.5"
OPERATIONS = comfy.ops.disable_weight_init


@dataclass(frozen=True, kw_only=True)
class Settings(stack.Settings):
    """It `reads` "arcface", the vectors of the recogniser in the file `encoder`, of the face `pack`; "image", the
    states of the vision tower in that file; or "omni", an Omni-ID encoder's tokens of 1 to `photos` of a person.

    `no_face` is the part without the face, `neither` that without text and face. `tokens` stand for a face, where no
    encoder makes them. `inner` is the width inside the projector, `depth` and `heads` are the resampler's.
    """

    reads: str
    encoder: str
    pack: str = "demo"
    photos: int = 1
    tokens: int = 4
    inner: int = 1024
    depth: int = 4
    heads: int = 12
    no_text: float = 0.05
    no_face: float = 0.05
    neither: float = 0.05

    def __post_init__(self) -> None:
        if self.reads not in READS:
            raise ValueError(f"got reads = {self.reads!r} in [task]; expected {' or '.join(READS)}")
        if self.photos < 1 or (self.photos > 1 and READS[self.reads].joined is None):
            raise ValueError(
                f"got photos = {self.photos} with reads = {self.reads!r} in [task]; expected 1, or more that omni reads"
            )


def _mlp(settings: Settings, features: int, width: int) -> nn.Module:
    return FaceProjection(features, settings.inner, settings.tokens, width, OPERATIONS)


def _resampler(settings: Settings, features: int, width: int) -> nn.Module:
    return Resampler(settings.inner, settings.depth, settings.heads, settings.tokens, features, width, OPERATIONS)


def _omni(settings: Settings, features: int, width: int) -> nn.Module:
    return OmniProjection(features, width, OPERATIONS)


Weights = dict[str, Tensor]


def _published(spec: AdapterSpec, weights: Weights, notes: Mapping[str, Any]) -> tuple[Weights, dict[str, str]]:
    return keymaps.rename(weights, own_decoupled.PUBLISHED), own_decoupled.metadata(spec, notes)


def _own(spec: AdapterSpec, weights: Weights, notes: Mapping[str, Any]) -> tuple[Weights, dict[str, str]]:
    return weights, omni_adapter.metadata(spec, notes)


@dataclass(frozen=True)
class Reads:
    """What an adapter reads faces with, the kind of its file, and its projector of features to the text's width.

    `joined` makes one set of tokens of what was read of several photos of each row's person, where the encoder does.
    `file` makes a file's tensors and metadata of the weights.
    """

    encoder: Callable[[Settings], Encoder]
    kind: str
    projector: Callable[[Settings, int, int], nn.Module]
    joined: Callable[[Any, Tensor, int], Tensor] | None = None
    file: Callable[[AdapterSpec, Weights, Mapping[str, Any]], tuple[Weights, dict[str, str]]] = _published


READS: Mapping[str, Reads] = {
    "arcface": Reads(lambda settings: ArcFace(Path(settings.encoder), settings.pack), "portrait", _mlp),
    "image": Reads(lambda settings: Vision(Path(settings.encoder)), "plus_face", _resampler),
    "omni": Reads(lambda settings: Omni(Path(settings.encoder)), omni_adapter.KIND, _omni, Omni.joined, _own),
}


class Decoupled(stack.AdapterTask[Settings]):
    """The adapter begins with the keys and values of the text, as published."""

    def __init__(self, settings: Settings, source: Source, seed: int) -> None:
        super().__init__(settings, source)
        reads = READS[settings.reads]
        self.encoder = reads.encoder(settings)
        self.read_pool(Path(settings.encoder))
        self.zero = self.encoder.zero()
        model: Any = self.frozen.model
        sites = unet.sites(model.diffusion_model)
        needs, layers = (self.encoder.feature,), tuple(site.hidden for site in sites)
        own = reads.joined is not None
        tokens = self.zero.shape[1] if own else settings.tokens
        self.spec = AdapterSpec(reads.kind, BASE, tokens, sites[0].context, layers, needs, as_text=not own)
        made: Any = build(settings, self.spec, self.zero.shape[-1])
        self.adapter, self.held = made, stack.Held(made)
        start(made, seed)
        self.first(made, model.diffusion_model)
        self.begin()

    def first(self, adapter: DecoupledAdapter, net: nn.Module) -> None:
        """Give the adapter the keys and values that it begins with."""
        begin_as_text(adapter, net)

    @property
    def reader(self) -> Encoder:
        return self.encoder

    @property
    def parts(self) -> tuple[float, float, float]:
        return self.settings.no_text, self.settings.no_face, self.settings.neither

    def count(self, chance: Generator) -> int:
        most = self.settings.photos
        return 1 if most == 1 else 1 + int(torch.randint(most, (), generator=chance))

    def faces(self, batch: Batch) -> Tensor:
        joined, missing = READS[self.settings.reads].joined, batch["faceless"]
        read = batch["read"].clone() if joined is None else joined(self.encoder, batch["read"], len(missing))
        read[missing] = self.zero.to(read)
        return read

    def injection(self, model: ModelPatcher, read: Tensor) -> decoupled.Decoupled:
        loaded = LoadedAdapter(self.spec, self.held.on(model.load_device), {}, self.settings.file)
        spread = decoupled.shares(decoupled.fitting(self.spec, model), BASE, "linear", "")
        return decoupled.Decoupled(loaded, self._identity(read), spread, 1.0, "V only", 1.0, True, None, ALWAYS)

    def _identity(self, read: Tensor) -> Identity:
        """The faces of a batch as those of one identity, as which the node unfolds them."""
        count, key = len(read), self.encoder.feature.id(self.encoder.hash)
        return Identity(
            name="batch", box=torch.zeros(count, 4), kps=torch.zeros(count, 5, 2), score=torch.ones(count),
            weight=torch.ones(count), embeddings={key: read}, zeros={key: self.zero.to(read)},
        )  # fmt: skip

    def file(self, notes: Mapping[str, Any]) -> tuple[Weights, dict[str, str]]:
        return READS[self.settings.reads].file(self.spec, self.adapter.state_dict(), notes)


def build(settings: Settings, spec: AdapterSpec, features: int) -> DecoupledAdapter:
    """The adapter without weights; faces are read as `features` numbers, or as rows of so many."""
    return DecoupledAdapter(spec, READS[settings.reads].projector(settings, features, spec.width), OPERATIONS)


@torch.no_grad()
def begin_as_text(adapter: DecoupledAdapter, net: nn.Module) -> None:
    """Give an adapter the keys and values of the text in a UNet."""
    for site in unet.sites(net):
        text: Any = net.get_submodule(f"{site.key}.attn2")
        own: Any = adapter.layer(site.name)
        own.k.weight.copy_(text.to_k.weight)
        own.v.weight.copy_(text.to_v.weight)
