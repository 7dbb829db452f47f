"""Apply Identity (Mixed): Infinite-ID's mixed attention between the picture and a stream of the text alone."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

from comfy.model_patcher import ModelPatcher
from comfy_api.latest import io
from torch import Tensor

from ...likeness import decoupled, regions
from ...likeness import infinite_id as math
from ...likeness.blocks import Block
from ...likeness.spec import Identity, People, Person
from .. import types
from .injection import KEYS, Bank, Blocks, Call, Extension, Place, Term, Window, window_inputs
from .patch import attach, host_attention
from .regional import cover
from .streams import OWN, SHARED
from .unet import Site, fitting

TEXT_STREAMS = (OWN, SHARED)


@dataclass(frozen=True, eq=False)
class MixedSelf(Extension):
    """Self-attention that reads the text stream's keys beside the picture's (injection.Extension)."""

    at: Sequence[Place]
    attention: str
    style: str
    weight: float
    window: Window
    bank: Bank = field(default_factory=Bank)

    @property
    def stepwise(self) -> bool:
        return not self.window.whole

    @property
    def patchers(self) -> list[ModelPatcher]:
        return []

    @property
    def places(self) -> list[Place]:
        return list(self.at)

    def prepare(self, call: Call) -> Mapping[Place, Any]:
        """For the picture's chunk of each prompt, the rows of the text stream's behind it."""
        n = call.rows
        texts = [None if call.is_text(role) else slice((c + 1) * n, (c + 2) * n) for c, role in enumerate(call.roles)]
        return dict.fromkeys(self.at, texts)

    def extend(self, state: Any, blocks: Blocks, options: dict[str, Any]) -> Blocks:
        (own, *rest), (k, v) = blocks, options[KEYS]
        mix = math.ATTENTIONS[self.attention]
        assert mix is not None  # or it would not have been attached
        return (*mix(own, Block(k[state], v[state]), math.STYLES[self.style], self.weight), *rest)


@dataclass(frozen=True, eq=False)
class MixedCross(Term):
    """Cross-attention to c_id beside the text's (injection.Term), of people who are one term: mixed, or one alone.

    `unfold` shows each row of a batch one face of theirs, the first to the first.
    """

    adapter: types.LoadedAdapter
    people: Sequence[Person]
    sites: Sequence[Site]
    strength: float
    style: str
    mixing: str
    window: Window
    unfold: bool = False
    bank: Bank = field(default_factory=Bank)

    @property
    def patchers(self) -> list[ModelPatcher]:
        return [self.adapter.patcher]

    @property
    def places(self) -> list[Place]:
        return [site.place for site in self.sites]

    def prepare(self, call: Call) -> Mapping[Place, Any]:
        return self.bank.get(call, lambda: self._lay_out(call))

    def _lay_out(self, call: Call) -> Mapping[Place, Any]:
        projected, bias = self.bank.get((call.dtype, call.device), lambda: self._project(call))
        counts = None
        if self.adapter.spec.unconditional == "none":
            shown = [float(carries) for carries in call.conditional for _ in range(call.rows)]
            counts = Tensor(shown)[:, None, None].to(call.device, call.dtype)
        return {
            place: (
                *(decoupled.rows(cond, uncond, call.conditional, call.rows, self.unfold) for cond, uncond in pair),
                bias, counts, call,
            )
            for place, pair in projected.items()
        }  # fmt: skip

    def _project(self, call: Call) -> tuple[Mapping[Place, Any], Tensor | None]:
        """K'_id and V'_id of every site, for rows with and without the identity: once per run."""
        module: decoupled.DecoupledAdapter = self.adapter.patcher.model
        spec = self.adapter.spec
        several = [(decoupled.tokens(module, spec, p.identity, call.device), p.strength) for p in self.people]
        made = math.combine(several, self.mixing)
        out: dict[Place, Any] = {}
        for site in self.sites:
            pairs = zip(*(module.project(site.number, tokens) for tokens in (made.cond, made.uncond)), strict=True)
            out[site.place] = tuple((c.to(call.dtype), u.to(call.dtype)) for c, u in pairs)
        bias = None if self.unfold else decoupled.key_bias(made, call.device)
        return out, None if bias is None else bias.to(call.dtype)

    def term(self, state: Any, q: Tensor, options: dict[str, Any]) -> Tensor:
        k, v, bias, counts, call = state
        style, (text_k, text_v) = math.STYLES[self.style], options[KEYS]
        term = self.strength * host_attention(q, style(k, text_k), style(v, text_v), options, bias)
        term = term if counts is None else term * counts
        mask = self.people[0].mask
        return term if mask is None else term * cover(self.bank, mask, call, options)


def beside(sites: Sequence[Site]) -> list[Place]:
    """The self-attentions of transformer blocks."""
    return [replace(site.place, name="attn1") for site in sites]


def terms_of(people: People) -> list[tuple[list[Person], float]]:
    """People as terms, each with its strength: those without a mask mixed as one, those with one by themselves."""
    shown = [person for person in people if person.strength]
    everywhere = [person for person in shown if person.mask is None]
    alone: list[tuple[list[Person], float]] = [([p], p.strength) for p in shown if p.mask is not None]
    if not everywhere:
        return alone
    most = max(person.strength for person in everywhere)
    return [(everywhere, most), *alone]


class ApplyMixed(io.ComfyNode):
    @classmethod
    def define_schema(cls) -> io.Schema:
        return io.Schema(
            node_id="LikenessApplyMixed",
            display_name="Apply Identity (Mixed)",
            category="likeness/apply",
            description="Infinite-ID: the identity in a second cross-attention, and self-attention shared with a "
            "stream that is painted by the prompt alone, so that its words and style survive. Strength 0 or an empty "
            "schedule gives the model as it was.",
            search_aliases=["infinite-id", "mixed attention", "style"],
            inputs=[
                io.Model.Input("model", tooltip="SDXL or SD1.5 model, with any LoRAs and patches it already has."),
                types.Adapter.Input("adapter", tooltip="An Infinite-ID file, from Load Identity Adapter."),
                types.who_input("Encoded with buffalo_l and CLIP ViT-H."),
                io.Float.Input(
                    "strength", default=1.0, min=0.0, max=5.0, step=0.05,
                    tooltip="How much the identity's cross-attention counts, 0 to 5: 0 takes the whole method out, 1 "
                    "is as trained.",
                ),
                io.Combo.Input(
                    "style", options=list(math.STYLES), default="none",
                    tooltip="none: photos. AdaIN-mean: the identity's features get the mean of the prompt's, for "
                    "anime, line art, paintings. AdaIN: the deviation too, which costs likeness.",
                ),
                io.Combo.Input(
                    "attention", options=list(math.ATTENTIONS), default="mixed",
                    tooltip="What self-attention reads. mixed: the picture and the text stream. mutual: the text "
                    "stream alone. off: the picture alone, without a text stream.",
                ),
                io.Combo.Input(
                    "text_stream", options=list(TEXT_STREAMS), default=OWN,
                    tooltip="own: a picture of its own from the same noise, painted by the prompt alone. shared: the "
                    "picture's latent, seen without the identity.",
                ),
                *window_inputs(),
                io.Float.Input(
                    "self_attention", default=1.0, min=0.0, max=5.0, step=0.05, optional=True, advanced=True,
                    tooltip="How much the text stream counts in self-attention, 0 to 5; 0 is off, mutual whole at 1.",
                ),
                io.Combo.Input(
                    "mixing", options=list(math.MIXINGS), default="stacked", optional=True, advanced=True,
                    tooltip="People without masks become one. stacked: their tokens side by side. interpolated: the "
                    "mean of their tokens, by strength.",
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
        adapter = types.adapter_for("mixed", adapter)
        found = fitting(adapter.spec, model)
        terms = terms_of(regions.everyone(identity))
        for person in (person for people, _ in terms for person in people):
            decoupled.features(adapter.spec, person.identity)  # what is missing is said here, not in the sampler
        if not strength or not terms or start_percent >= end_percent:
            return io.NodeOutput(model)
        window = Window.of(model, start_percent, end_percent)
        for people, share in terms:
            model = attach(model, MixedCross(adapter, people, found, strength * share, style, mixing, window))
        if math.ATTENTIONS[attention] is not None and self_attention:
            model = attach(
                model, MixedSelf(beside(found), attention, style, self_attention, window), stream=text_stream
            )
        return io.NodeOutput(model)


NODES = [ApplyMixed]
