"""FlashFace's reference attention: added layers, or the UNet's own self-attentions, read the features of faces."""

from __future__ import annotations

from collections.abc import Callable, Hashable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from comfy.model_patcher import ModelPatcher
from torch import Tensor

from ....likeness.attention.feature_cache import ReferenceFeatureCache
from ....likeness.methods import flashface
from ... import types
from ..face_stream import FaceRunState, FaceStreamInjection, get_weights_key, hash_tensor
from ..injection import AttentionTerm, GuidanceBranch, PatchPlace, RunCache
from ..layer_masks import get_query_coverage
from ..model_call import ModelCall
from ..patch import capture_attention_inputs, run_attention_backend
from ..schedule import ALWAYS_ON
from ..slots import get_layer_tensors

ProjectionFunction = Callable[[Tensor], Tensor]


@dataclass(frozen=True, eq=False)
class ReferenceAttention:
    """The attention that reads the references: an added layer, or the UNet's own self-attention."""

    q: ProjectionFunction
    k: ProjectionFunction
    v: ProjectionFunction
    o: ProjectionFunction
    is_added: bool


@dataclass(frozen=True, eq=False)
class ReferenceFaces:
    """One person's faces as latents [n, c, h, w], the order in which they are shown, and the region [B, H, W] or None.

    `strength` scales the strength of the term for this person.
    """

    latents: Tensor
    face_order: tuple[int, ...]
    strength: float
    mask: Tensor | None
    digest: str


@dataclass(frozen=True, eq=False)
class ReferenceSettings:
    """How strongly, when and in which rows the references are applied.

    During the schedule of `guidance`: at `strength_before` in all rows until its launch schedule begins, then at
    `strength`
    in the rows of the branch, or in all rows if its scale is 0. The faces are read again every `refresh_interval`
    steps, with the text `reference_text` [1, T, C], or the negative prompt if that is None.
    """

    strength: float = 1.0
    strength_before: float = 1.0
    guidance: GuidanceBranch = GuidanceBranch("", 0.0, 0.0, ALWAYS_ON, ALWAYS_ON)
    refresh_interval: int = 1
    reference_text: Tensor | None = None

    def compute_strengths(self, call: ModelCall) -> tuple[float, ...]:
        """The strength in each chunk of rows."""
        guidance = self.guidance
        if not call.is_during(guidance.schedule):
            return (0.0,) * len(call.roles)
        if not call.is_during(guidance.launch_schedule):
            return (self.strength_before,) * len(call.roles)
        return tuple(self.strength if not guidance.scale or role == guidance.name else 0.0 for role in call.roles)


@dataclass
class ReferenceRunState(FaceRunState):
    """Progress of a run: its steps so far, and sigma and timestep [1] at which the faces were last read."""

    last_sigma: float | None = None
    num_steps: int = 0
    read_sigma: float | None = None
    read_timestep: Tensor | None = None
    text: Tensor | None = None
    text_digest: str = ""

    def update_read_time(self, sigma: float, timesteps: Tensor, refresh_interval: int) -> None:
        is_new_step = sigma != self.last_sigma
        if self.read_sigma is None or (is_new_step and self.num_steps % refresh_interval == 0):
            self.read_sigma, self.read_timestep = sigma, timesteps[:1]
        self.num_steps += is_new_step
        self.last_sigma = sigma

    def get_text_digest(self, text: Tensor) -> str:
        if self.text is not text:
            self.text, self.text_digest = text, hash_tensor(text)
        return self.text_digest


@dataclass(frozen=True, eq=False)
class ReferenceTerm(AttentionTerm, FaceStreamInjection[ReferenceFaces]):
    """Faces bound to a reference net, for the attentions of `model` that read them."""

    model: ModelPatcher
    reference_net: types.LoadedReferenceNet
    attentions: Mapping[PatchPlace, ReferenceAttention]
    people: Sequence[ReferenceFaces]
    settings: ReferenceSettings
    run_cache: RunCache = field(default_factory=RunCache)

    schedule = ALWAYS_ON  # the schedules of the settings apply

    @property
    def is_separate_net(self) -> bool:
        """Whether the reference net is another UNet than the model's."""
        return not self.reference_net.patcher.is_clone(self.model)

    @property
    def patchers(self) -> list[ModelPatcher]:
        return [self.reference_net.patcher] if self.is_separate_net else []  # ComfyUI loads a model only once

    @property
    def needs_sigma(self) -> bool:
        return True

    @property
    def places(self) -> list[PatchPlace]:
        return list(self.attentions)

    @property
    def feature_cache(self) -> ReferenceFeatureCache:
        return self.reference_net.feature_cache

    @property
    def run_state(self) -> ReferenceRunState:
        return self.run_cache.get_state(ReferenceRunState)

    def prepare_states(self, call: ModelCall) -> Mapping[PatchPlace, Any]:
        chunks = [
            (slice(i * call.rows_per_chunk, (i + 1) * call.rows_per_chunk), strength)
            for i, strength in enumerate(self.settings.compute_strengths(call))
            if strength
        ]
        if not chunks:
            return {}
        self.run_state.update_read_time(call.sigma or 0.0, call.timesteps, self.settings.refresh_interval)
        pairs = self.project_people(call)
        return {place: (attention, chunks, pairs[place], call) for place, attention in self.attentions.items()}

    def get_reference_text(self, call: ModelCall) -> Tensor:
        """The text [1, T, C] that the reference net reads. Raises ValueError if there is none."""
        text = call.negative_text if self.settings.reference_text is None else self.settings.reference_text
        if text is None:
            raise ValueError(
                "got a guider without a negative prompt, which the reference net reads; expected one; use KSampler or "
                "CFGGuider, or connect reference_text"
            )
        return text

    def get_text_digest(self, call: ModelCall) -> str:
        return self.run_state.get_text_digest(self.get_reference_text(call))

    def get_face_timesteps(self, call: ModelCall, num_faces: int) -> Tensor:
        """The timestep at which each face is read, [n]."""
        timestep = self.run_state.read_timestep
        assert timestep is not None  # set by prepare_states
        return timestep.expand(num_faces)

    def make_cache_key(self, call: ModelCall) -> tuple[Hashable, ...]:
        weights = get_weights_key(self.reference_net.patcher if self.is_separate_net else self.model)
        return weights, self.run_state.read_sigma, self.get_text_digest(call), call.dtype

    def read_faces(self, person: ReferenceFaces, call: ModelCall) -> dict[PatchPlace, Tensor]:
        """The pass of the reference net over a person's faces, without noise, at the image's timestep."""
        model = self.reference_net.patcher.model
        dtype = (model.manual_cast_dtype or model.get_dtype()) if self.is_separate_net else call.dtype
        x = person.latents.to(call.device, dtype)
        context = self.get_reference_text(call)[:1].to(call.device, dtype).expand(len(x), -1, -1)
        timesteps = self.get_face_timesteps(call, len(x))
        inputs = capture_attention_inputs(model.diffusion_model, x, timesteps, context, self.places)
        return {place: tensor.to(call.dtype) for place, tensor in inputs.items()}

    def project_faces(
        self, place: PatchPlace, attention_input: Tensor, person: ReferenceFaces, call: ModelCall
    ) -> flashface.KeyValuePair:
        """Keys and values [1, T, C] of a person's faces, in the order in which they are shown."""
        attention = self.attentions[place]
        k, v = (self.join_faces(part(attention_input), person, call) for part in (attention.k, attention.v))
        return k, v

    def join_faces(self, tokens: Tensor, person: ReferenceFaces, call: ModelCall) -> Tensor:
        """The tokens of n faces [n, L, C] as one sequence [1, len(face_order) * L, C], which every row sees."""
        return torch.cat([tokens[i] for i in person.face_order])[None]

    def compute_term(self, state: Any, q: Tensor, options: dict[str, Any]) -> Tensor:
        attention, chunks, pairs, call = state
        layer = get_layer_tensors(options)
        self_attention = (
            layer.added_layer_output
            if attention.is_added
            else flashface.SelfAttentionOutput(attention.q(q), attention.k(q), attention.v(q), layer.projected_output)
        )
        attend, out = make_attention_function(options), torch.zeros_like(self_attention.output)
        for person, pair in zip(self.people, pairs, strict=True):
            coverage = get_query_coverage(self.run_cache, person.mask, call, options)
            for rows, strength in chunks:
                row_coverage = coverage[rows] if isinstance(coverage, Tensor) and len(coverage) > 1 else coverage
                difference = flashface.compute_reference_difference(self_attention, rows, pair, attend, attention.o)
                out[rows] += strength * person.strength * row_coverage * difference
        return out


def make_attention_function(options: dict[str, Any]) -> flashface.AttentionFunction:
    return lambda q, k, v: run_attention_backend(q, k, v, options)
