"""Apply Identity (Mixed): Infinite-ID's mixed attention between the image and a stream of the text alone."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

import torch
from comfy.model_patcher import ModelPatcher
from comfy_api.latest import io
from torch import Tensor

from ...likeness.attention import regions
from ...likeness.attention.grouped_attention import KeyValueBlock
from ...likeness.methods import infinite_id, ip_adapter
from ...likeness.spec import Identity, People, Person
from .. import types
from .identity_attention import ConditionalPair, IdentityAttentionTerm
from .injection import KeyValueBlocks, KeyValueExtension, PatchPlace, RunCache
from .model_call import ModelCall
from .patch import attach_injection, run_attention_backend
from .schedule import Schedule, make_schedule_inputs
from .slots import get_layer_tensors
from .text_stream import OWN_TEXT_STREAM, SHARED_TEXT_STREAM
from .unet_layers import UNetLayer, match_unet_layers

TEXT_STREAM_CHOICES = (OWN_TEXT_STREAM, SHARED_TEXT_STREAM)


@dataclass(frozen=True, eq=False)
class MixedSelfExtension(KeyValueExtension):
    """Self-attention that reads the keys of the text stream in addition to the image's."""

    attention_places: Sequence[PatchPlace]
    attention_mode: str
    style: str
    weight: float
    schedule: Schedule
    run_cache: RunCache = field(default_factory=RunCache)

    @property
    def needs_sigma(self) -> bool:
        return not self.schedule.is_full

    @property
    def patchers(self) -> list[ModelPatcher]:
        return []

    @property
    def places(self) -> list[PatchPlace]:
        return list(self.attention_places)

    def prepare_states(self, call: ModelCall) -> Mapping[PatchPlace, Any]:
        """For the image's chunk of each prompt, its text stream's among all chunks: the next one."""
        num_chunks = len(call.roles)
        text_chunks = [None if call.is_text_stream(role) else (c + 1, num_chunks) for c, role in enumerate(call.roles)]
        return dict.fromkeys(self.attention_places, text_chunks)

    def extend_blocks(self, state: Any, blocks: KeyValueBlocks, options: dict[str, Any]) -> KeyValueBlocks:
        (image_block, *others), (text_chunk, num_chunks) = blocks, state
        k, v = (part.chunk(num_chunks)[text_chunk] for part in get_layer_tensors(options).keys_values)
        text_block, normalize = KeyValueBlock(k, v), infinite_id.STYLE_NORMALIZATIONS[self.style]
        mix = infinite_id.SELF_ATTENTION_MODES[self.attention_mode]
        assert mix is not None  # "off" attaches no extension
        return (*mix(image_block, text_block, normalize, self.weight), *others)


@dataclass(frozen=True, eq=False)
class MixedCrossTerm(IdentityAttentionTerm):
    """Cross-attention to c_id in addition to the text's, for one person or for several who are mixed into one term."""

    adapter: types.LoadedAdapter
    people: Sequence[Person]
    layers: Sequence[UNetLayer]
    strength: float
    style: str
    mixing: str
    schedule: Schedule
    run_cache: RunCache = field(default_factory=RunCache)

    @property
    def places(self) -> list[PatchPlace]:
        return [layer.place for layer in self.layers]

    def make_identity_tokens(self, device: torch.device) -> ip_adapter.IdentityTokens:
        module, spec = self.adapter.patcher.model, self.adapter.spec
        weighted_tokens = [
            (ip_adapter.project_identity(module, spec, person.identity, device), person.strength)
            for person in self.people
        ]
        return infinite_id.combine_identity_tokens(weighted_tokens, self.mixing)

    def project_layers(
        self, tokens: ip_adapter.IdentityTokens
    ) -> Iterator[tuple[PatchPlace, tuple[ConditionalPair, ConditionalPair]]]:
        module: ip_adapter.DecoupledAdapter = self.adapter.patcher.model
        for layer in self.layers:
            cond, uncond = (module.project_tokens(layer.name, t) for t in (tokens.cond, tokens.uncond))
            yield layer.place, ((cond[0], uncond[0]), (cond[1], uncond[1]))

    def prepare_states(self, call: ModelCall) -> Mapping[PatchPlace, Any]:
        # Zero values for rows without the identity would not do, as style normalization changes them.
        row_scale = self._get_conditional_rows(call) if self.adapter.spec.unconditional == "none" else None
        return {place: (state, row_scale) for place, state in super().prepare_states(call).items()}

    def _get_conditional_rows(self, call: ModelCall) -> Tensor:
        """1 for rows with the identity, 0 for the others, [rows, 1, 1]."""

        def make_rows() -> Tensor:
            rows = [float(carries) for carries in call.is_conditional for _ in range(call.rows_per_chunk)]
            return Tensor(rows)[:, None, None].to(call.device, call.dtype)

        key = ("conditional_rows", call.is_conditional, call.rows_per_chunk, call.dtype, call.device)
        return self.run_cache.get_or_compute(key, make_rows)

    def compute_term(self, state: Any, q: Tensor, options: dict[str, Any]) -> Tensor:
        normalize = infinite_id.STYLE_NORMALIZATIONS[self.style]
        text_k, text_v = get_layer_tensors(options).keys_values
        layer, row_scale = state
        k, v = normalize(layer.k, text_k), normalize(layer.v, text_v)
        term = self.strength * run_attention_backend(q, k, v, options, layer.bias)
        term = term if row_scale is None else term * row_scale
        return self.apply_region(term, self.people[0].mask, q, options)


def list_self_attention_places(layers: Sequence[UNetLayer]) -> list[PatchPlace]:
    """The self-attentions of these transformer blocks."""
    return [replace(layer.place, name="attn1") for layer in layers]


def group_people_by_term(people: People) -> list[tuple[list[Person], float]]:
    """The people of each term, and its strength. People without a mask share a term, the others get one each."""
    people = tuple(person for person in people if person.strength)
    unmasked = [person for person in people if person.mask is None]
    terms: list[tuple[list[Person], float]] = [([p], p.strength) for p in people if p.mask is not None]
    return [(unmasked, max(person.strength for person in unmasked)), *terms] if unmasked else terms


class ApplyMixed(io.ComfyNode):
    @classmethod
    def define_schema(cls) -> io.Schema:
        return io.Schema(
            node_id="LikenessApplyMixed",
            display_name="Apply Identity (Mixed)",
            category="likeness/apply",
            description="Infinite-ID: a second cross-attention reads the identity, and self-attention also reads a "
            "stream that is denoised with the prompt alone, which preserves the prompt's meaning and style. Strength 0 "
            "or an empty schedule returns the model unchanged.",
            search_aliases=["infinite-id", "mixed attention", "style"],
            inputs=[
                io.Model.Input("model", tooltip="An SDXL or SD1.5 model. LoRAs and other patches are kept."),
                types.AdapterSocket.Input("adapter", tooltip="An Infinite-ID file, from Load Identity Adapter."),
                types.make_identity_input("Encoded with buffalo_l and CLIP ViT-H."),
                io.Float.Input(
                    "strength", default=1.0, min=0.0, max=5.0, step=0.05,
                    tooltip="Scale of the identity's cross-attention, 0 to 5: 0 turns the method off, 1 is as trained.",
                ),
                io.Combo.Input(
                    "style", options=list(infinite_id.STYLE_NORMALIZATIONS), default="none",
                    tooltip="none: for photos. AdaIN-mean: the identity's features get the mean of the prompt's, for "
                    "anime, line art and paintings. AdaIN: also their standard deviation, which costs likeness.",
                ),
                io.Combo.Input(
                    "attention", options=list(infinite_id.SELF_ATTENTION_MODES), default="mixed",
                    tooltip="What self-attention reads. mixed: the image and the text stream. mutual: the text stream "
                    "only. off: the image only; there is no text stream.",
                ),
                io.Combo.Input(
                    "text_stream", options=list(TEXT_STREAM_CHOICES), default=OWN_TEXT_STREAM,
                    tooltip="own: the text stream has its own latent, which starts from the same noise and is denoised "
                    "with the prompt alone. shared: it uses the latent of the image, without the identity.",
                ),
                *make_schedule_inputs(),
                io.Float.Input(
                    "self_attention", default=1.0, min=0.0, max=5.0, step=0.05, optional=True, advanced=True,
                    tooltip="Weight of the text stream in self-attention, 0 to 5. 0 is off; mutual is complete at 1.",
                ),
                io.Combo.Input(
                    "mixing", options=list(infinite_id.MIXING_MODES), default="stacked", optional=True, advanced=True,
                    tooltip="How people without masks are mixed. stacked: their tokens are concatenated. interpolated: "
                    "the mean of their tokens, weighted by strength.",
                ),
            ],
            outputs=[io.Model.Output(display_name="model")],
        )  # fmt: skip

    @classmethod
    def execute(
        cls,
        model: ModelPatcher,
        adapter: types.LoadedAdapter,
        identity: Identity | People,
        strength: float,
        style: str,
        attention: str,
        text_stream: str,
        start_percent: float,
        end_percent: float,
        self_attention: float = 1.0,
        mixing: str = "stacked",
    ) -> io.NodeOutput:
        adapter = types.check_adapter_method("mixed", adapter)
        layers = match_unet_layers(adapter.spec, model)
        terms = group_people_by_term(regions.convert_to_people(identity))
        for person in (person for people, _ in terms for person in people):
            ip_adapter.gather_projector_inputs(adapter.spec, person.identity)  # raise before sampling, not during it
        if not strength or not terms or start_percent >= end_percent:
            return io.NodeOutput(model)
        schedule = Schedule(start_percent, end_percent)
        for people, share in terms:
            term = MixedCrossTerm(adapter, people, layers, strength * share, style, mixing, schedule)
            model = attach_injection(model, term)
        if infinite_id.SELF_ATTENTION_MODES[attention] is not None and self_attention:
            places = list_self_attention_places(layers)
            extension = MixedSelfExtension(places, attention, style, self_attention, schedule)
            model = attach_injection(model, extension, text_stream=text_stream)
        return io.NodeOutput(model)


NODES = [ApplyMixed]
