"""Apply Identity (Decoupled), and the face tokens that InstantID's ControlNet reads instead of text."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import comfy.model_management
import comfy.sd
from comfy.model_patcher import ModelPatcher
from comfy_api.latest import io
from torch import Tensor

from ...likeness import curves, pulid, regions
from ...likeness import decoupled as math
from ...likeness.spec import AdapterSpec, Identity, People
from .. import types
from . import flux, unet
from .flux import FluxSite
from .injection import GIVEN, Bank, Call, Place, Term, Window, window_inputs
from .patch import attach, host_attention
from .regional import cover
from .unet import Site

Spot = Site | FluxSite

# Base model -> where an adapter's layers sit in it, in the file's order or in running order.
FITTING: Mapping[str, Callable[[AdapterSpec, ModelPatcher], Sequence[Spot]]] = {
    "SD1.5": unet.fitting, "SDXL": unet.fitting, "FLUX.1": flux.fitting,
}  # fmt: skip
BATCHES = {"one identity": False, "unfold": True}
LORA_PARTS = {"q": "to_q", "k": "to_k", "v": "to_v", "out": "to_out.0"}
LORA_SIDES = {"down": "lora_down.weight", "up": "lora_up.weight"}


@dataclass(frozen=True, eq=False)
class Decoupled(Term):
    """An adapter of the IP-Adapter family bound to an identity (injection.Term).

    `shares` says what each layer gets of the strength; sites without a share are not in it. `mask` is the
    region [B, H, W], or None for everywhere. `mode` says what of its attention is added.
    """

    adapter: types.LoadedAdapter
    identity: Identity
    shares: Mapping[Spot, curves.Share]
    strength: float
    scaling: str
    shortcut: float
    unfold: bool
    mask: Tensor | None
    window: Window
    mode: pulid.Mode = pulid.PLAIN
    bank: Bank = field(default_factory=Bank)

    @property
    def patchers(self) -> list[ModelPatcher]:
        return [self.adapter.patcher]

    @property
    def places(self) -> list[Place]:
        return [site.place for site in self.shares]

    def prepare(self, call: Call) -> Mapping[Place, Any]:
        return self.bank.get(call, lambda: self._lay_out(call))

    def _lay_out(self, call: Call) -> Mapping[Place, Any]:
        projected, bias = self.bank.get((call.dtype, call.device), lambda: self._project(call))
        return {
            place: (
                *(math.rows(cond, uncond, call.conditional, call.rows, self.unfold) for cond, uncond in pair),
                bias,
                call,
            )
            for place, pair in projected.items()
        }

    def _project(self, call: Call) -> tuple[Mapping[Place, Any], Tensor | None]:
        """Keys and values of every site, for rows with and without the identity."""
        module: math.DecoupledAdapter = self.adapter.patcher.model
        made = math.tokens(module, self.adapter.spec, self.identity, call.device, self.shortcut, one_by_one=self.unfold)
        spec, scale = self.adapter.spec, math.SCALINGS[self.scaling]
        out: dict[Place, Any] = {}
        for site, share in self.shares.items():
            weight = self.strength * share.weight
            breadth = site.hidden / math.WIDEST[spec.base]
            both = (made.cond,) if made.uncond is made.cond else (made.cond, made.uncond)
            scaled = [scale(*module.project(site.name, t), weight, breadth) for t in both]
            cond, uncond = scaled[0], scaled[-1]
            if spec.unconditional == "none":
                uncond = tuple(t * 0 for t in uncond)
            if share.away:
                cond, uncond = tuple(t * 0 for t in cond), cond
            out[site.place] = tuple(
                tuple(self.mode.drained(t).to(call.dtype) for t in pair) for pair in zip(cond, uncond, strict=True)
            )
        bias = None if self.unfold else math.key_bias(made, call.device)
        return out, None if bias is None else bias.to(call.dtype)

    def term(self, state: Any, q: Tensor, options: dict[str, Any]) -> Tensor:
        k, v, bias, call = state
        term = host_attention(q, k, v, options, bias)
        if self.mode is not pulid.PLAIN:
            term = self.mode.mix(options[GIVEN], term, q, k, options["n_heads"])
        return term if self.mask is None else term * cover(self.bank, self.mask, call, options, q.shape[-2])


class Behind(Decoupled):
    """The same where an adapter's layer is a whole attention, which reads the stream behind a block (PuLID-FLUX)."""

    def _lay_out(self, call: Call) -> Mapping[Place, Any]:
        module: math.DecoupledAdapter = self.adapter.patcher.model
        layers = {site.place: module.layer(site.name) for site in self.shares}
        return {place: (layers[place], *state) for place, state in super()._lay_out(call).items()}

    def term(self, state: Any, q: Tensor, options: dict[str, Any]) -> Tensor:
        layer, k, v, _, call = state
        term = layer.read(q, k, v)
        return term if self.mask is None else term * cover(self.bank, self.mask, call, options, q.shape[-2])


TERMS: Mapping[str, type[Decoupled]] = {"pulid_flux": Behind}  # by the adapter's kind; of all others, Decoupled


def fitting(spec: AdapterSpec, model: ModelPatcher) -> Sequence[Spot]:
    """The adapter's layers in the model. Raises ValueError where it was made for another base model."""
    return FITTING[spec.base](spec, model)


def shares(found: Sequence[Spot], base: str, layer_weights: str, custom: str) -> dict[Spot, curves.Share]:
    """What each site gets of the strength, those left out that get nothing."""
    out = {site: curves.share(layer_weights, custom, site.layer(base)) for site in found}
    return {site: share for site, share in out.items() if share.weight}


def with_lora(
    model: ModelPatcher, adapter: types.LoadedAdapter, found: Sequence[Spot], strength: float
) -> ModelPatcher:
    """The model with the adapter's own LoRA, through the host's LoRA code."""
    if not adapter.lora or not strength:
        return model
    lora: dict[str, Tensor] = {}
    for key, matrix in adapter.lora.items():
        number, part, side = key.split(".")
        site = found[int(number) // 2]
        assert isinstance(site, Site)  # as FLUX's adapters bring no LoRA
        attention = "attn2" if int(number) % 2 else "attn1"
        lora[f"diffusion_model.{site.key}.{attention}.{LORA_PARTS[part]}.{LORA_SIDES[side]}"] = matrix
    patched, _ = comfy.sd.load_lora_for_models(model, None, lora, strength, 0.0)
    assert patched is not None  # as a model was given
    return patched


class ApplyDecoupled(io.ComfyNode):
    @classmethod
    def define_schema(cls) -> io.Schema:
        return io.Schema(
            node_id="LikenessApplyDecoupled",
            display_name="Apply Identity (Decoupled)",
            category="likeness/apply",
            description="Puts an identity into a model by a second cross-attention beside the text's: IP-Adapter, "
            "FaceID, Portrait, InstantID, PuLID. Strength 0 or an empty schedule gives the model as it was.",
            search_aliases=["ipadapter", "faceid", "instantid", "pulid", "apply"],
            inputs=[
                io.Model.Input("model", tooltip="SD1.5, SDXL or FLUX.1, with any LoRAs and patches it already has."),
                types.Adapter.Input("adapter", tooltip="From Load Identity Adapter; made for this base model."),
                types.who_input(""),
                io.Float.Input(
                    "strength", default=0.8, min=-1.0, max=5.0, step=0.05,
                    tooltip="How much of the identity's attention is added, -1 to 5: 0 none, 1 as trained. "
                    "0.5 to 0.8 leaves room for the prompt.",
                ),
                *window_inputs(),
                io.Combo.Input(
                    "layer_weights", options=list(curves.LAYER_WEIGHTS), default="linear",
                    tooltip="How the strength is spread over the layers of the model.",
                ),
                io.Combo.Input(
                    "scaling", options=list(math.SCALINGS), default="V only",
                    tooltip="Where the strength enters: on the values (as published), or on keys and values; "
                    "with C penalty, narrow layers get less.",
                ),
                io.String.Input(
                    "custom_layers", default="", optional=True, advanced=True,
                    tooltip='Weight by layer, "3:1.2, 6:0": layers 0 to 15 (SD1.5), 0 to 10 (SDXL) or those of the '
                    "adapter (FLUX) in running order, weights -100 to 100; the others get 0. Empty: layer_weights.",
                ),
                io.Float.Input(
                    "v2_weight", default=1.0, min=-1.0, max=5.0, step=0.05, optional=True, advanced=True,
                    tooltip="FaceID-PlusV2 only: share of the CLIP features, -1 to 5; 1 as published.",
                ),
                io.Float.Input(
                    "lora_strength", default=1.0, min=0.0, max=2.0, step=0.05, optional=True, advanced=True,
                    tooltip="FaceID files with a LoRA inside: its strength, 0 to 2; 1 as published. "
                    "It acts on all steps and on both prompts.",
                ),
                io.Combo.Input(
                    "batch", options=list(BATCHES), default="one identity", optional=True, advanced=True,
                    tooltip="one identity: all faces in every picture. unfold: face 1 in picture 1 of the batch, "
                    "face 2 in picture 2, the last in all further ones.",
                ),
                io.Combo.Input(
                    "pulid_mode", options=[pulid.AUTO, *pulid.MODES], default=pulid.AUTO, optional=True, advanced=True,
                    tooltip="PuLID on SDXL only: what of the identity is added. auto: fidelity for v1, v1.1 for v1.1, "
                    "as published; style keeps more of the prompt; plain adds all, as IP-Adapter does.",
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
        start_percent: float,
        end_percent: float,
        layer_weights: str,
        scaling: str,
        custom_layers: str = "",
        v2_weight: float = 1.0,
        lora_strength: float = 1.0,
        batch: str = "one identity",
        pulid_mode: str = pulid.AUTO,
    ) -> io.NodeOutput:
        adapter = types.adapter_for("decoupled", adapter)
        found = fitting(adapter.spec, model)
        people = [person for person in regions.everyone(identity) if strength * person.strength]
        for person in people:
            math.features(adapter.spec, person.identity)  # what is missing is said here, not in the sampler
        spread = shares(found, adapter.spec.base, layer_weights, custom_layers)
        if not people or not spread or start_percent >= end_percent:
            return io.NodeOutput(model)
        window = Window.of(model, start_percent, end_percent)
        model = with_lora(model, adapter, found, lora_strength)
        mode, unfold = pulid.mode_of(adapter.spec.kind, pulid_mode), BATCHES[batch]
        term = TERMS.get(adapter.spec.kind, Decoupled)
        for who in people:
            own = strength * who.strength
            model = attach(
                model, term(adapter, who.identity, spread, own, scaling, v2_weight, unfold, who.mask, window, mode)
            )
        return io.NodeOutput(model)


class FaceTokens(io.ComfyNode):
    @classmethod
    def define_schema(cls) -> io.Schema:
        return io.Schema(
            node_id="LikenessFaceTokens",
            display_name="Face Tokens for ControlNet",
            category="likeness/apply",
            description="InstantID's ControlNet reads the face instead of the text. Put this between the prompts and "
            "Apply ControlNet: the ControlNets of these prompts get the face tokens, the model keeps the text.",
            search_aliases=["instantid", "controlnet"],
            inputs=[
                io.Conditioning.Input("positive", tooltip="Prompt whose ControlNet gets the identity's tokens."),
                io.Conditioning.Input(
                    "negative", tooltip="Prompt whose ControlNet gets the tokens of no face, as published."
                ),
                types.Adapter.Input("adapter", tooltip="InstantID's adapter from Load Identity Adapter."),
                types.Identity.Input("identity", tooltip="The identity whose tokens the ControlNet reads."),
            ],
            outputs=[
                io.Conditioning.Output(display_name="positive"),
                io.Conditioning.Output(display_name="negative"),
            ],
        )

    @classmethod
    def execute(
        cls, positive: list[Any], negative: list[Any], adapter: types.LoadedAdapter, identity: Identity
    ) -> io.NodeOutput:
        adapter = types.adapter_for("decoupled", adapter)
        comfy.model_management.load_model_gpu(adapter.patcher)
        made = math.tokens(adapter.patcher.model, adapter.spec, identity, adapter.patcher.load_device)
        device = comfy.model_management.intermediate_device()
        pairs = ((positive, made.cond), (negative, made.uncond))
        return io.NodeOutput(
            *(_for_controlnet(prompt, tokens.flatten(0, 1)[None].to(device)) for prompt, tokens in pairs)
        )


def _for_controlnet(prompt: list[Any], tokens: Tensor) -> list[Any]:
    return [[text, {**rest, "cross_attn_controlnet": tokens}] for text, rest in prompt]


NODES = [ApplyDecoupled, FaceTokens]
