"""Apply Identity (Decoupled), and the face tokens that InstantID's ControlNet reads instead of the text."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import comfy.model_management
import comfy.sd
import torch
from comfy.model_patcher import ModelPatcher
from comfy_api.latest import io
from torch import Tensor

from ...likeness.attention import layer_weights as attention_layer_weights
from ...likeness.attention import regions
from ...likeness.methods import ip_adapter, pulid
from ...likeness.spec import AdapterSpec, Identity, People
from .. import types
from . import flux_layers, unet_layers
from .flux_layers import FluxLayer
from .identity_attention import ConditionalPair, IdentityAttentionTerm
from .injection import PatchPlace, RunCache
from .model_call import ModelCall
from .patch import attach_injection, run_attention_backend
from .schedule import Schedule, make_schedule_inputs
from .slots import get_layer_tensors
from .unet_layers import UNetLayer

AdapterLayer = UNetLayer | FluxLayer

# Base model -> the layers of an adapter in it.
LAYER_MATCHERS: Mapping[str, Callable[[AdapterSpec, ModelPatcher], Sequence[AdapterLayer]]] = {
    "SD1.5": unet_layers.match_unet_layers,
    "SDXL": unet_layers.match_unet_layers,
    "FLUX.1": flux_layers.match_flux_layers,
}
BATCH_MODES = {"one identity": False, "unfold": True}
LORA_PROJECTION_NAMES = {"q": "to_q", "k": "to_k", "v": "to_v", "out": "to_out.0"}
LORA_MATRIX_NAMES = {"down": "lora_down.weight", "up": "lora_up.weight"}


@dataclass(frozen=True, eq=False)
class DecoupledTerm(IdentityAttentionTerm):
    """An adapter of the IP-Adapter family bound to an identity.

    `weights_by_layer` scales the strength per layer; layers of weight 0 are left out. With `unfold`, row i of a batch
    gets face i. `mask` is the region [B, H, W], None for everywhere. `pulid_mode` says which part of the attention is
    added.
    """

    adapter: types.LoadedAdapter
    identity: Identity
    weights_by_layer: Mapping[AdapterLayer, attention_layer_weights.LayerWeight]
    strength: float
    scaling: str
    shortcut: float
    unfold: bool
    mask: Tensor | None
    schedule: Schedule
    pulid_mode: pulid.PuLIDMode = pulid.PLAIN_MODE
    run_cache: RunCache = field(default_factory=RunCache)

    @property
    def has_face_per_row(self) -> bool:
        return self.unfold

    @property
    def places(self) -> list[PatchPlace]:
        return [layer.place for layer in self.weights_by_layer]

    def make_identity_tokens(self, device: torch.device) -> ip_adapter.IdentityTokens:
        return ip_adapter.project_identity(
            self.adapter.patcher.model,
            self.adapter.spec,
            self.identity,
            device,
            self.shortcut,
            separate_faces=self.unfold,
        )

    def project_layers(
        self, tokens: ip_adapter.IdentityTokens
    ) -> Iterator[tuple[PatchPlace, tuple[ConditionalPair, ConditionalPair]]]:
        module: ip_adapter.DecoupledAdapter = self.adapter.patcher.model
        spec, scale = self.adapter.spec, ip_adapter.STRENGTH_SCALINGS[self.scaling]
        inputs = (tokens.cond,) if tokens.uncond is tokens.cond else (tokens.cond, tokens.uncond)
        for layer, layer_weight in self.weights_by_layer.items():
            weight = self.strength * layer_weight.weight
            relative_width = layer.hidden_size / ip_adapter.MAX_LAYER_WIDTHS[spec.base]
            scaled = [scale(*module.project_tokens(layer.name, t), weight, relative_width) for t in inputs]
            cond, uncond = scaled[0], scaled[-1]
            if spec.unconditional == "none":
                uncond = (uncond[0] * 0, uncond[1] * 0)
            if layer_weight.uncond_only:
                cond, uncond = (cond[0] * 0, cond[1] * 0), cond
            pad = self.pulid_mode.append_zero_tokens
            yield layer.place, ((pad(cond[0]), pad(uncond[0])), (pad(cond[1]), pad(uncond[1])))

    def compute_term(self, state: Any, q: Tensor, options: dict[str, Any]) -> Tensor:
        term = run_attention_backend(q, state.k, state.v, options, state.bias)
        if self.pulid_mode is not pulid.PLAIN_MODE:
            output = get_layer_tensors(options).attention_output
            term = self.pulid_mode.orthogonalize(output, term, q, state.k, options["n_heads"])
        return self.apply_region(term, self.mask, q, options)


class PostBlockTerm(DecoupledTerm):
    """For adapters whose layers are attention modules that read the stream behind a block (PuLID-FLUX)."""

    def prepare_states(self, call: ModelCall) -> Mapping[PatchPlace, Any]:
        module: ip_adapter.DecoupledAdapter = self.adapter.patcher.model
        states = super().prepare_states(call)
        return {layer.place: (module.get_layer(layer.name), states[layer.place]) for layer in self.weights_by_layer}

    def compute_term(self, state: Any, q: Tensor, options: dict[str, Any]) -> Tensor:
        layer, key_values = state
        term = layer.attend_identity(q, key_values.k, key_values.v)
        return self.apply_region(term, self.mask, q, options)


TERM_CLASSES: Mapping[str, type[DecoupledTerm]] = {"pulid_flux": PostBlockTerm}  # by kind; DecoupledTerm for the others


def match_adapter_layers(spec: AdapterSpec, model: ModelPatcher) -> Sequence[AdapterLayer]:
    """The layers of the adapter in the model. Raises ValueError if it was made for another base model."""
    return LAYER_MATCHERS[spec.base](spec, model)


def compute_layer_weights(
    layers: Sequence[AdapterLayer], base: str, weight_type: str, custom_layers: str
) -> dict[AdapterLayer, attention_layer_weights.LayerWeight]:
    """The weight of each layer; layers of weight 0 are left out."""
    weights = {
        layer: attention_layer_weights.compute_layer_weight(weight_type, custom_layers, layer.get_layer_position(base))
        for layer in layers
    }
    return {layer: weight for layer, weight in weights.items() if weight.weight}


def apply_adapter_lora(
    model: ModelPatcher, adapter: types.LoadedAdapter, layers: Sequence[AdapterLayer], strength: float
) -> ModelPatcher:
    """The model with the LoRA of the adapter's file, applied by ComfyUI."""
    if not adapter.lora or not strength:
        return model
    lora: dict[str, Tensor] = {}
    for key, matrix in adapter.lora.items():
        number, projection, matrix_name = key.split(".")
        layer = layers[int(number) // 2]
        assert isinstance(layer, UNetLayer)  # FLUX adapters have no LoRA
        path = f"diffusion_model.{layer.module_path}.{'attn2' if int(number) % 2 else 'attn1'}"
        lora[f"{path}.{LORA_PROJECTION_NAMES[projection]}.{LORA_MATRIX_NAMES[matrix_name]}"] = matrix
    patched, _ = comfy.sd.load_lora_for_models(model, None, lora, strength, 0.0)
    assert patched is not None  # it is None only without a model
    return patched


class ApplyDecoupled(io.ComfyNode):
    @classmethod
    def define_schema(cls) -> io.Schema:
        return io.Schema(
            node_id="LikenessApplyDecoupled",
            display_name="Apply Identity (Decoupled)",
            category="likeness/apply",
            description="Adds a second cross-attention that reads the identity: IP-Adapter, FaceID, Portrait, "
            "InstantID, PuLID. Strength 0 or an empty schedule returns the model unchanged.",
            search_aliases=["ipadapter", "faceid", "instantid", "pulid", "apply"],
            inputs=[
                io.Model.Input("model", tooltip="An SD1.5, SDXL or FLUX.1 model. LoRAs and other patches are kept."),
                types.AdapterSocket.Input("adapter", tooltip="From Load Identity Adapter, made for this base model."),
                types.make_identity_input(""),
                io.Float.Input(
                    "strength", default=0.8, min=-1.0, max=5.0, step=0.05,
                    tooltip="Scale of the identity's attention, -1 to 5: 0 is off, 1 as trained. 0.5 to 0.8 leaves "
                    "room for the prompt.",
                ),
                *make_schedule_inputs(),
                io.Combo.Input(
                    "layer_weights", options=list(attention_layer_weights.WEIGHT_TYPES), default="linear",
                    tooltip="How the strength is distributed over the layers of the model.",
                ),
                io.Combo.Input(
                    "scaling", options=list(ip_adapter.STRENGTH_SCALINGS), default="V only",
                    tooltip="What the strength scales: the values (as published), or keys and values. With C penalty, "
                    "layers with fewer channels get less.",
                ),
                io.String.Input(
                    "custom_layers", default="", optional=True, advanced=True,
                    tooltip='Weights by layer, "3:1.2, 6:0", in the order in which the layers run: 0 to 15 (SD1.5), 0 '
                    "to 10 (SDXL), or the adapter's layers (FLUX). Weights are -100 to 100; other layers get 0. Empty: "
                    "use layer_weights.",
                ),
                io.Float.Input(
                    "v2_weight", default=1.0, min=-1.0, max=5.0, step=0.05, optional=True, advanced=True,
                    tooltip="FaceID-PlusV2 only: weight of the CLIP features, -1 to 5; 1 as published.",
                ),
                io.Float.Input(
                    "lora_strength", default=1.0, min=0.0, max=2.0, step=0.05, optional=True, advanced=True,
                    tooltip="Strength of the LoRA in FaceID files, 0 to 2; 1 as published. It applies to all steps and "
                    "to both prompts.",
                ),
                io.Combo.Input(
                    "batch", options=list(BATCH_MODES), default="one identity", optional=True, advanced=True,
                    tooltip="one identity: all faces in every image. unfold: face 1 in image 1 of the batch, face 2 in "
                    "image 2, the last face in all further images.",
                ),
                io.Combo.Input(
                    "pulid_mode", options=[pulid.AUTO_MODE, *pulid.PULID_MODES], default=pulid.AUTO_MODE, optional=True,
                    advanced=True,
                    tooltip="PuLID on SDXL only: which part of the identity's attention is added. auto: fidelity for "
                    "v1, v1.1 for v1.1, as published. style keeps more of the prompt. plain adds all of it, as "
                    "IP-Adapter does.",
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
        pulid_mode: str = pulid.AUTO_MODE,
    ) -> io.NodeOutput:
        adapter = types.check_adapter_method("decoupled", adapter)
        layers = match_adapter_layers(adapter.spec, model)
        people = [person for person in regions.convert_to_people(identity) if strength * person.strength]
        for person in people:
            ip_adapter.gather_projector_inputs(adapter.spec, person.identity)  # raise before sampling, not during it
        weights = compute_layer_weights(layers, adapter.spec.base, layer_weights, custom_layers)
        if not people or not weights or start_percent >= end_percent:
            return io.NodeOutput(model)
        schedule = Schedule(start_percent, end_percent)
        model = apply_adapter_lora(model, adapter, layers, lora_strength)
        mode, unfold = pulid.select_mode(adapter.spec.kind, pulid_mode), BATCH_MODES[batch]
        term_class = TERM_CLASSES.get(adapter.spec.kind, DecoupledTerm)
        for person in people:
            term = term_class(
                adapter, person.identity, weights, strength * person.strength, scaling, v2_weight, unfold,
                person.mask, schedule, mode,
            )  # fmt: skip
            model = attach_injection(model, term)
        return io.NodeOutput(model)


class FaceTokens(io.ComfyNode):
    @classmethod
    def define_schema(cls) -> io.Schema:
        return io.Schema(
            node_id="LikenessFaceTokens",
            display_name="Face Tokens for ControlNet",
            category="likeness/apply",
            description="For InstantID, whose ControlNet reads face tokens instead of the text. Place it between the "
            "prompts and Apply ControlNet: their ControlNets get the face tokens, the model still gets the text.",
            search_aliases=["instantid", "controlnet"],
            inputs=[
                io.Conditioning.Input("positive", tooltip="Prompt whose ControlNet gets the tokens of the identity."),
                io.Conditioning.Input(
                    "negative", tooltip="Prompt whose ControlNet gets the unconditional tokens, as published."
                ),
                types.AdapterSocket.Input("adapter", tooltip="InstantID from Load Identity Adapter."),
                types.IdentitySocket.Input("identity", tooltip="The identity whose tokens the ControlNet reads."),
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
        adapter = types.check_adapter_method("decoupled", adapter)
        comfy.model_management.load_model_gpu(adapter.patcher)
        tokens = ip_adapter.project_identity(adapter.patcher.model, adapter.spec, identity, adapter.patcher.load_device)
        return io.NodeOutput(
            _set_controlnet_tokens(positive, tokens.cond), _set_controlnet_tokens(negative, tokens.uncond)
        )


def _set_controlnet_tokens(prompt: list[Any], tokens: Tensor) -> list[Any]:
    """The prompt with tokens [n, T, width], as one sequence, for its ControlNets."""
    sequence = tokens.flatten(0, 1)[None].to(comfy.model_management.intermediate_device())
    return [[text, {**extras, "cross_attn_controlnet": sequence}] for text, extras in prompt]


NODES = [ApplyDecoupled, FaceTokens]
