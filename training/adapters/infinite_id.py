"""Infinite-ID (arXiv 2403.11781): identity-enhanced training of face mapper, CLIP mapper and image cross-attention.

The text's cross-attention is off, so that the identity alone says what the picture shows (Sec. 3.2). It returns when
the adapter is used, beside mixed attention with a stream of the text, of which training knows nothing.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import comfy.ops
import torch
from comfy.model_patcher import ModelPatcher
from torch import Tensor

from ...likeness import detect
from ...likeness import infinite_id as math
from ...likeness.decoupled import DecoupledAdapter, FaceProjection, InfiniteProjection
from ...likeness.spec import AdapterSpec, Identity, Person
from ...nodes.attention import mixed, unet
from ...nodes.attention.injection import ALWAYS, GIVEN
from ...nodes.attention.patch import attach
from ...nodes.attention.streams import OWN
from ...nodes.types import LoadedAdapter
from ..base import recogniser
from ..base.source import Source
from ..task import Batch, start
from . import stack
from .decoupled import begin_as_text
from .readers import ArcFace, Both, Vision

OPERATIONS = comfy.ops.disable_weight_init


@dataclass(frozen=True, kw_only=True)
class Settings(stack.Settings):
    """`recogniser` gives the vectors of the face `pack`, `vision` the states of a CLIP tower, both of aligned faces.

    Where training is not `enhanced` (the paper's ablation), the text's cross-attention stays on. `no_text` is the part
    without the caption, `no_face` that without the face, `neither` that without both. `tokens` stand for the vector,
    `inner` is the width inside its mapper. `unconditional` is the spec's.
    """

    recogniser: str
    vision: str
    pack: str = "demo"
    enhanced: bool = True
    tokens: int = 4
    inner: int = 1024
    no_text: float = 0.05
    no_face: float = 0.05
    neither: float = 0.05
    unconditional: str = "zero"

    def __post_init__(self) -> None:
        if self.unconditional not in math.UNCONDITIONAL:
            raise ValueError(
                f"got unconditional = {self.unconditional!r} in [task]; expected {' or '.join(math.UNCONDITIONAL)}"
            )


class Alone(mixed.MixedCross):
    """The identity's cross-attention in the place of the text's."""

    def term(self, state: Any, q: Tensor, options: dict[str, Any]) -> Tensor:
        return super().term(state, q, options) - options[GIVEN]


CROSS: Mapping[bool, type[mixed.MixedCross]] = {True: Alone, False: mixed.MixedCross}  # by Settings.enhanced


class InfiniteID(stack.AdapterTask[Settings]):
    """The image cross-attention begins with the keys and values of the text."""

    def __init__(self, settings: Settings, source: Source, seed: int) -> None:
        super().__init__(settings, source)
        vision = Vision(Path(settings.vision), "last", "face224")
        self.both = Both(ArcFace(Path(settings.recogniser), settings.pack), vision)
        self.read_pool(Path(settings.vision))
        net: Any = self.frozen.model.diffusion_model
        self.sites, self.states = unet.sites(net), vision.zero().shape[1]
        layers, needs = tuple(site.hidden for site in self.sites), (self.both.face.feature, vision.feature)
        self.spec = AdapterSpec(
            math.KIND, detect.BASES[len(layers)], self.states + settings.tokens, self.sites[0].context, layers, needs,
            unconditional=settings.unconditional,
        )  # fmt: skip
        made: Any = build(settings, self.spec, vision.width)
        self.adapter, self.held = made, stack.Held(made)
        start(made, seed)
        begin_as_text(made, net)
        self.begin()

    @property
    def reader(self) -> Both:
        return self.both

    @property
    def parts(self) -> tuple[float, float, float]:
        told = self.settings
        if not told.enhanced:
            return told.no_text, told.no_face, told.neither
        gone = told.no_face + told.neither
        return 1 - gone, 0.0, gone

    def faces(self, batch: Batch) -> Tensor:
        return batch["read"].masked_fill(batch["faceless"][:, None], 0.0)

    def injection(self, model: ModelPatcher, read: Tensor) -> mixed.MixedCross:
        return self._cross(CROSS[self.settings.enhanced], model, read)

    def applied(self, model: ModelPatcher, read: Tensor) -> ModelPatcher:
        """By mixed attention with a text stream of its own, as the node has it unless told."""
        patched = attach(model, self._cross(mixed.MixedCross, model, read))
        itself = mixed.MixedSelf(mixed.beside(self.sites), "mixed", "none", 1.0, ALWAYS)
        return attach(patched, itself, stream=OWN)

    def _cross(self, kind: type[mixed.MixedCross], model: ModelPatcher, read: Tensor) -> mixed.MixedCross:
        loaded = LoadedAdapter(self.spec, self.held.on(model.load_device), {}, self.settings.file)
        return bound(kind, loaded, self.both.features(read), unet.fitting(self.spec, model))

    def file(self, notes: Mapping[str, Any]) -> tuple[dict[str, Tensor], dict[str, str]]:
        return self.adapter.state_dict(), math.metadata(self.spec, self.states, notes)


def build(settings: Settings, spec: AdapterSpec, states: int) -> DecoupledAdapter:
    """The adapter without weights, for CLIP states of this width."""
    face = FaceProjection(recogniser.VECTOR, settings.inner, settings.tokens, spec.width, OPERATIONS)
    return DecoupledAdapter(spec, InfiniteProjection(states, spec.width, face, OPERATIONS), OPERATIONS)


def bound(
    kind: type[mixed.MixedCross], loaded: LoadedAdapter, read: Mapping[str, Tensor], sites: Sequence[unet.Site]
) -> mixed.MixedCross:
    """The adapter bound to faces by what was read of them, by encoder id [n, ...]: face i in row i."""
    ones = torch.ones(len(next(iter(read.values()))))
    box, kps = torch.zeros(len(ones), 4), torch.zeros(len(ones), 5, 2)
    person = Person(Identity("batch", box, kps, ones, ones, embeddings=read))
    return kind(loaded, [person], sites, 1.0, "none", "stacked", ALWAYS, unfold=True)
