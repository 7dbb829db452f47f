"""Apply Identity (Fused KV): the face's keys and values beside the text's, in one softmax."""

from __future__ import annotations

from collections.abc import Hashable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

import comfy.utils
import torch
from comfy.model_patcher import ModelPatcher
from comfy_api.latest import io, ui
from torch import Tensor

from ...likeness import fused as math
from ...likeness import regions
from ...likeness.blocks import Block
from ...likeness.spec import FusedSpec, Identity, People
from .. import types
from .injection import Bank, Blocks, Call, Extension, Place, Window, window_inputs
from .patch import attach, inputs
from .regional import visible
from .streams import CHANNELS, digest, latents, remembered, weights
from .unet import sites

NOISE_SEED = 0  # of the noise on the faces: the picture's own seed shall not change the person


@dataclass(frozen=True, eq=False)
class Bound:
    """A person's faces [n, 4, h, w] as latents, what the keys of each weigh, and where the person may appear."""

    latents: Tensor
    weights: Sequence[float]
    mask: Tensor | None
    digest: str


@dataclass
class Held:
    """The keys and values of all people as last computed, and what they depend on."""

    key: Hashable = None
    blocks: Mapping[Place, list[Block]] = field(default_factory=dict)


@dataclass(frozen=True, eq=False)
class Fused(Extension):
    """People bound to a fused KV adapter (injection.Extension). The negative prompt's rows see none of them.

    With `unfold`, face i is seen by row i alone, of as many as there are faces, at its own noise; all weigh 1.
    """

    adapter: types.LoadedFused
    model: ModelPatcher
    paths: Mapping[Place, str]
    people: Sequence[Bound]
    outside: str
    window: Window
    unfold: bool = False
    bank: Bank = field(default_factory=Bank)

    @property
    def stepwise(self) -> bool:
        return self.match or not self.window.whole

    @property
    def match(self) -> bool:
        """Whether the faces are as noisy as the picture."""
        return self.adapter.spec.stream_noise == "match"

    @property
    def patchers(self) -> list[ModelPatcher]:
        return [self.adapter.patcher]

    @property
    def places(self) -> list[Place]:
        return list(self.paths)

    def prepare(self, call: Call) -> Mapping[Place, Any]:
        if not any(call.conditional):
            return {}
        blocks = self._keys_values(call)
        return {place: [blocks[place] if carries else None for carries in call.conditional] for place in self.paths}

    def extend(self, state: Any, blocks: Blocks, options: dict[str, Any]) -> Blocks:
        seen = visible(self.bank, [person.mask for person in self.people], self.outside, options)
        return (*blocks, *(replace(block, seen=who) for block, who in zip(state, seen, strict=True)))

    def _keys_values(self, call: Call) -> Mapping[Place, list[Block]]:
        """K_f and V_f of every person at every place (Eq. 2), once per run, or per step where the noise matches."""
        held: Held = self.bank.get("held", Held)
        key = (weights(self.model), call.sigma if self.match else None, call.dtype, call.device)
        if held.key == key and key[0] is not None:
            return held.blocks
        module: math.FusedAdapter = self.adapter.patcher.model
        blocks: dict[Place, list[Block]] = {place: [] for place in self.paths}
        for person in self.people:
            seen = remembered(
                self.adapter.bank, (*key[:-1], person.digest), call, lambda person=person: self._read(person, call)
            )
            for place, path in self.paths.items():
                hidden = seen[place]
                k, v = module.at(path)(hidden)
                if not self.unfold:
                    k, v = (part.flatten(0, 1)[None] for part in (k, v))
                bias = math.key_bias(person.weights, hidden.shape[1])
                blocks[place].append(Block(k, v, None if bias is None else bias.to(call.device)))
        held.key, held.blocks = key, blocks
        return blocks

    def _read(self, person: Bound, call: Call) -> dict[Place, Tensor]:
        """One pass of the picture's own UNet over a person's faces, with the empty prompt."""
        model = self.model.model
        x, noise, given = self.bank.get(("read", person.digest, call.dtype), lambda: self._given(person, call))
        time = torch.zeros_like(call.timesteps[:1])
        if self.match:
            sampling, sigma = model.model_sampling, torch.full((len(x),), call.sigma or 0.0, device=x.device)
            time = call.timesteps[:1]
            if self.unfold:
                time = call.timesteps[: len(x)]
                sigma = sampling.sigma(time)
            x = sampling.calculate_input(sigma, sampling.noise_scaling(sigma, noise, x))
        return inputs(model.diffusion_model, x.to(call.dtype), time.expand(len(x)), places=self.places, **given)

    def _given(self, person: Bound, call: Call) -> tuple[Tensor, Tensor, dict[str, Tensor]]:
        """What every pass over a person's faces begins with: latents, their noise, and what is said of them."""
        module, n = self.adapter.patcher.model, len(person.latents)
        drawn = person.latents[:1] if self.unfold else person.latents  # each face as if it were alone
        noise = torch.randn(drawn.shape, generator=torch.Generator().manual_seed(NOISE_SEED)).expand(n, -1, -1, -1)
        given = {"context": module.text.to(call.device, call.dtype).expand(n, -1, -1)}
        if module.pooled is not None:
            given["y"] = self._label(module.pooled, call).expand(n, -1)
        return person.latents.to(call.device), noise.to(call.device), given

    def _label(self, pooled: Tensor, call: Call) -> Tensor:
        """What SDXL is told of the face picture besides its prompt [1, 2816]."""
        side = self.adapter.spec.face_size
        made: Any = self.model.model.encode_adm(
            pooled_output=pooled.float().cpu(), width=side, height=side, device=call.device
        )
        return made.to(call.device, call.dtype)


def fitting(spec: FusedSpec, model: ModelPatcher) -> dict[Place, str]:
    """The model's cross-attentions and their paths, if the adapter was made for such a model. Raises ValueError."""
    found = sites(model.model.diffusion_model)
    if {site.key: site.hidden for site in found} != dict(spec.layers):
        own, there = max(spec.layers.values()), max((site.hidden for site in found), default=0)
        raise ValueError(
            f"got a fused KV adapter for {spec.base} ({len(spec.layers)} cross-attentions up to {own} wide); expected "
            f"one for this model, which has {len(found)} up to {there} wide; load an adapter for this base model, or "
            f"the {spec.base} model that it was trained on"
        )
    channels = model.model.diffusion_model.in_channels
    if channels != CHANNELS:
        raise ValueError(
            f"got a model of {channels} input channels, which cannot look at a face alone; expected {CHANNELS}; "
            "use an ordinary checkpoint; for inpainting, put a noise mask on the latent"
        )
    return {Place("attn2", site.block, site.depth, site.deep): site.key for site in found}


def sized(crops: Tensor, side: int) -> Tensor:
    """Face pictures, uint8 [n, H, W, 3], as the VAE reads them: [n, side, side, 3] from 0 to 1."""
    pictures = comfy.utils.common_upscale(crops.movedim(-1, 1).float() / 255, side, side, "bicubic", "center")
    return pictures.movedim(1, -1).clamp(0, 1)


def bound(model: ModelPatcher, vae: Any, people: People, strength: float, side: int) -> list[tuple[Bound, Tensor]]:
    """People as the model reads them, and the pictures of their faces [n, side, side, 3]; those of strength 0 not."""
    out = []
    for person in people:
        if strength * person.strength:
            crops, weight = math.faces(person.identity)
            pictures = sized(crops, side)
            own = [strength * person.strength * one for one in weight.tolist()]
            made = latents(model, vae, pictures)
            out.append((Bound(made, own, person.mask, digest(made)), pictures))
    return out


class ApplyFused(io.ComfyNode):
    @classmethod
    def define_schema(cls) -> io.Schema:
        return io.Schema(
            node_id="LikenessApplyFused",
            display_name="Apply Identity (Fused KV)",
            category="likeness/apply",
            description="Lets every cross-attention read the face beside the prompt, in one softmax; several people "
            "by masks, or mixed. Needs identities with face crops. Strength 0 or an empty schedule gives the model "
            "as it was.",
            search_aliases=["fusion", "several people", "regional identity", "morph"],
            inputs=[
                io.Model.Input("model", tooltip="SD1.5 or SDXL model, with any LoRAs and patches it already has."),
                types.Adapter.Input("adapter", tooltip="From Zero-Shot Fused KV, or a fused KV file."),
                types.who_input("With crops. Several people without masks are mixed."),
                io.Vae.Input("vae", tooltip="The VAE of the model's checkpoint; it encodes the faces once."),
                io.Float.Input(
                    "strength", default=1.0, min=0.0, max=5.0, step=0.05,
                    tooltip="How much a key of the face weighs against one of the text, 0 to 5: 0 none, 1 as trained.",
                ),
                *window_inputs(),
                io.Combo.Input(
                    "outside", options=list(regions.OUTSIDE), default="all",
                    tooltip="Where no mask is: all people may be seen there (as published), or none.",
                ),
                io.Int.Input(
                    "face_size", default=0, min=0, max=2048, step=64, optional=True, advanced=True,
                    tooltip="Side of the face pictures in pixels, 64 to 2048; 0: as the adapter was trained, mostly "
                    "512. Half of it takes a quarter of the time and memory.",
                ),
            ],
            outputs=[io.Model.Output(display_name="model")],
        )  # fmt: skip

    @classmethod
    def execute(
        cls,
        model: ModelPatcher,
        adapter: types.LoadedFused,
        identity: Identity | People,
        vae: Any,
        strength: float,
        start_percent: float,
        end_percent: float,
        outside: str,
        face_size: int = 0,
    ) -> io.NodeOutput:
        adapter = types.adapter_for("fused", adapter)
        paths = fitting(adapter.spec, model)
        people = bound(model, vae, regions.everyone(identity), strength, face_size or adapter.spec.face_size)
        if not people or start_percent >= end_percent:
            return io.NodeOutput(model)
        window = Window.of(model, start_percent, end_percent)
        injection = Fused(adapter, model, paths, [person for person, _ in people], outside, window)
        preview = ui.PreviewImage(torch.cat([pictures for _, pictures in people]), cls=cls)
        return io.NodeOutput(attach(model, injection), ui=preview)


NODES = [ApplyFused]
