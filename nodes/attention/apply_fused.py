"""Apply Identity (Fused KV): the keys and values of faces and of the text, in one softmax."""

from __future__ import annotations

from collections.abc import Hashable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

import comfy.utils
import torch
from comfy.model_patcher import ModelPatcher
from comfy_api.latest import io, ui
from torch import Tensor

from ...likeness.attention import regions
from ...likeness.attention.feature_cache import ReferenceFeatureCache
from ...likeness.attention.grouped_attention import KeyValueBlock
from ...likeness.methods import fused_kv
from ...likeness.spec import FusedKVSpec, Identity, People
from .. import types
from .face_stream import FaceStreamInjection, encode_images_with_vae, get_weights_key, hash_tensor
from .injection import KeyValueBlocks, KeyValueExtension, PatchPlace, RunCache
from .layer_masks import get_visible_queries
from .model_call import ModelCall
from .patch import attach_injection, capture_attention_inputs
from .schedule import Schedule, make_schedule_inputs
from .unet_layers import list_unet_layers

FACE_NOISE_SEED = 0  # of the noise on the faces; the sampling seed must not change the person


@dataclass(frozen=True, eq=False)
class FaceLatents:
    """One person's faces as latents [n, c, h, w], the weight of each face's keys, and the region [B, H, W] or None."""

    latents: Tensor
    key_weights: Sequence[float]
    mask: Tensor | None
    digest: str


@dataclass(frozen=True, eq=False)
class FusedKVExtension(KeyValueExtension, FaceStreamInjection[FaceLatents]):
    """People bound to a fused KV adapter. Rows of the negative prompt see none of them."""

    adapter: types.LoadedFusedKV
    model: ModelPatcher
    module_paths: Mapping[PatchPlace, str]
    people: Sequence[FaceLatents]
    outside: str
    schedule: Schedule
    run_cache: RunCache = field(default_factory=RunCache)

    @property
    def needs_sigma(self) -> bool:
        return self.matches_noise or not self.schedule.is_full

    @property
    def matches_noise(self) -> bool:
        """Whether the faces get the noise level of the image, instead of none."""
        return self.adapter.spec.stream_noise == "match"

    @property
    def patchers(self) -> list[ModelPatcher]:
        return [self.adapter.patcher]

    @property
    def places(self) -> list[PatchPlace]:
        return list(self.module_paths)

    @property
    def feature_cache(self) -> ReferenceFeatureCache:
        return self.adapter.feature_cache

    def prepare_states(self, call: ModelCall) -> Mapping[PatchPlace, Any]:
        if not any(call.is_conditional):
            return {}
        blocks = self.project_people(call)
        return {
            place: [blocks[place] if conditional else None for conditional in call.is_conditional]
            for place in self.module_paths
        }

    def extend_blocks(self, state: Any, blocks: KeyValueBlocks, options: dict[str, Any]) -> KeyValueBlocks:
        visible = get_visible_queries(self.run_cache, [person.mask for person in self.people], self.outside, options)
        faces = (replace(block, visible_queries=queries) for block, queries in zip(state, visible, strict=True))
        return (*blocks, *faces)

    def make_cache_key(self, call: ModelCall) -> tuple[Hashable, ...]:
        return get_weights_key(self.model), call.sigma if self.matches_noise else None, call.dtype

    def read_faces(self, person: FaceLatents, call: ModelCall) -> dict[PatchPlace, Tensor]:
        """The pass of the image's own UNet over a person's faces, with the empty prompt."""
        model = self.model.model
        x, noise, conditioning = self.run_cache.get_or_compute(
            ("face_pass", person.digest, call.dtype), lambda: self._make_pass_inputs(person, call)
        )
        timesteps = torch.zeros_like(call.timesteps[:1]).expand(len(x))
        if self.matches_noise:
            timesteps, sigma = self.get_noise_levels(call, len(x))
            sampling = model.model_sampling
            x = sampling.calculate_input(sigma, sampling.noise_scaling(sigma, noise, x))
        return capture_attention_inputs(
            model.diffusion_model, x.to(call.dtype), timesteps, places=self.places, **conditioning
        )

    def get_noise_levels(self, call: ModelCall, num_faces: int) -> tuple[Tensor, Tensor]:
        """Timestep and sigma of each face."""
        sigma = torch.full((num_faces,), call.sigma or 0.0, device=call.device)
        return call.timesteps[:1].expand(num_faces), sigma

    def sample_face_noise(self, latents: Tensor) -> Tensor:
        """The noise of a person's faces, the same in every run."""
        return torch.randn(latents.shape, generator=torch.Generator().manual_seed(FACE_NOISE_SEED))

    def _make_pass_inputs(self, person: FaceLatents, call: ModelCall) -> tuple[Tensor, Tensor, dict[str, Tensor]]:
        """What does not change during a run: latents, noise and conditioning."""
        module, n = self.adapter.patcher.model, len(person.latents)
        conditioning = {"context": module.text.to(call.device, call.dtype).expand(n, -1, -1)}
        if module.pooled is not None:
            conditioning["y"] = self._make_adm_embedding(module.pooled, call).expand(n, -1)
        return person.latents.to(call.device), self.sample_face_noise(person.latents).to(call.device), conditioning

    def _make_adm_embedding(self, pooled: Tensor, call: ModelCall) -> Tensor:
        """SDXL's pooled text and size conditioning for a face image, [1, 2816]."""
        size = self.adapter.spec.face_size
        embedding: Any = self.model.model.encode_adm(
            pooled_output=pooled.float().cpu(), width=size, height=size, device=call.device
        )
        return embedding.to(call.device, call.dtype)

    def project_faces(
        self, place: PatchPlace, attention_input: Tensor, person: FaceLatents, call: ModelCall
    ) -> KeyValueBlock:
        """K_f and V_f of a person's faces (Eq. 2)."""
        module: fused_kv.FusedKVAdapter = self.adapter.patcher.model
        k, v = (self.join_faces(part) for part in module.get_layer(self.module_paths[place])(attention_input))
        bias = fused_kv.compute_key_bias(person.key_weights, attention_input.shape[1])
        return KeyValueBlock(k, v, None if bias is None else bias.to(call.device))

    def join_faces(self, tokens: Tensor) -> Tensor:
        """The tokens of n faces [n, T, C] as one sequence [1, n * T, C], which every row sees."""
        return tokens.flatten(0, 1)[None]


def match_fused_kv_layers(spec: FusedKVSpec, model: ModelPatcher) -> dict[PatchPlace, str]:
    """The model's cross-attentions and their module paths. Raises ValueError if the adapter is for another model."""
    layers = list_unet_layers(model.model.diffusion_model)
    if {layer.module_path: layer.hidden_size for layer in layers} != dict(spec.layers):
        adapter_width, model_width = max(spec.layers.values()), max((layer.hidden_size for layer in layers), default=0)
        raise ValueError(
            f"got a fused KV adapter for {spec.base} ({len(spec.layers)} cross-attentions up to {adapter_width} wide); "
            f"expected one for this model, which has {len(layers)} up to {model_width} wide; load an adapter for this "
            f"base model, or the {spec.base} model that it was trained on"
        )
    channels, latent_channels = model.model.diffusion_model.in_channels, model.model.latent_format.latent_channels
    if channels != latent_channels:
        raise ValueError(
            f"got a model with {channels} input channels, whose UNet cannot read the latent of a face; expected "
            f"{latent_channels}; use an ordinary checkpoint; for inpainting, set a noise mask on the latent"
        )
    return {PatchPlace("attn2", layer.block, layer.depth, layer.is_multi_block): layer.module_path for layer in layers}


def resize_face_crops(crops: Tensor, size: int) -> Tensor:
    """Face crops, uint8 [n, H, W, 3], as the VAE reads them: [n, size, size, 3] in 0..1."""
    images = comfy.utils.common_upscale(crops.movedim(-1, 1).float() / 255, size, size, "bicubic", "center")
    return images.movedim(1, -1).clamp(0, 1)


def encode_face_latents(
    model: ModelPatcher, vae: Any, people: People, strength: float, face_size: int
) -> list[tuple[FaceLatents, Tensor]]:
    """Each person's face latents and face images [n, size, size, 3]. People of strength 0 are left out."""
    encoded = []
    for person in people:
        if strength * person.strength:
            crops, weight = fused_kv.get_face_crops(person.identity)
            images = resize_face_crops(crops, face_size)
            key_weights = [strength * person.strength * face_weight for face_weight in weight.tolist()]
            latents = encode_images_with_vae(model, vae, images)
            encoded.append((FaceLatents(latents, key_weights, person.mask, hash_tensor(latents)), images))
    return encoded


class ApplyFused(io.ComfyNode):
    @classmethod
    def define_schema(cls) -> io.Schema:
        return io.Schema(
            node_id="LikenessApplyFused",
            display_name="Apply Identity (Fused KV)",
            category="likeness/apply",
            description="Every cross-attention reads the faces in addition to the prompt, in one softmax. Supports "
            "several people: each in a mask, or mixed. Needs identities with face crops. Strength 0 or an empty "
            "schedule returns the model unchanged.",
            search_aliases=["fusion", "several people", "regional identity", "morph"],
            inputs=[
                io.Model.Input("model", tooltip="An SD1.5 or SDXL model. LoRAs and other patches are kept."),
                types.AdapterSocket.Input("adapter", tooltip="From Zero-Shot Fused KV or Load Identity Adapter."),
                types.make_identity_input("Needs face crops. People without masks are mixed."),
                io.Vae.Input("vae", tooltip="The VAE of the model's checkpoint. It encodes the faces once."),
                io.Float.Input(
                    "strength", default=1.0, min=0.0, max=5.0, step=0.05,
                    tooltip="Weight of the face's keys relative to the text's, 0 to 5: 0 is off, 1 as trained.",
                ),
                *make_schedule_inputs(),
                io.Combo.Input(
                    "outside", options=list(regions.OUTSIDE_MODES), default="all",
                    tooltip="Who may appear outside all masks: all people (as published), or none.",
                ),
                io.Int.Input(
                    "face_size", default=0, min=0, max=2048, step=64, optional=True, advanced=True,
                    tooltip="Size of the face images in pixels, 64 to 2048. 0: as the adapter was trained, usually "
                    "512. Half the size takes a quarter of the time and memory.",
                ),
            ],
            outputs=[io.Model.Output(display_name="model")],
        )  # fmt: skip

    @classmethod
    def execute(
        cls,
        model: ModelPatcher,
        adapter: types.LoadedFusedKV,
        identity: Identity | People,
        vae: Any,
        strength: float,
        start_percent: float,
        end_percent: float,
        outside: str,
        face_size: int = 0,
    ) -> io.NodeOutput:
        adapter = types.check_adapter_method("fused", adapter)
        paths = match_fused_kv_layers(adapter.spec, model)
        people = encode_face_latents(
            model, vae, regions.convert_to_people(identity), strength, face_size or adapter.spec.face_size
        )
        if not people or start_percent >= end_percent:
            return io.NodeOutput(model)
        schedule = Schedule(start_percent, end_percent)
        extension = FusedKVExtension(adapter, model, paths, [faces for faces, _ in people], outside, schedule)
        preview = ui.PreviewImage(torch.cat([images for _, images in people]), cls=cls)
        return io.NodeOutput(attach_injection(model, extension), ui=preview)


NODES = [ApplyFused]
