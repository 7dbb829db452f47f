"""Fused KV ("Fusion is all you need", ICLR 2025 submission): trains Linear_kf and Linear_vf only (Sec. 3.2).

Both are initialized as in the zero-shot adapter. Their input, the frozen UNet's features of the face, has no gradient.
Only the caption is dropped: rows without a face would be the plain base model, and train nothing.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import comfy.ops
import torch
from comfy.model_patcher import ModelPatcher
from torch import Tensor

from ...likeness.attention.feature_cache import ReferenceFeatureCache
from ...likeness.methods import fused_kv
from ...nodes.attention import apply_fused
from ...nodes.attention.model_call import ModelCall
from ...nodes.attention.schedule import ALWAYS_ON
from ...nodes.loaders.fused_kv_loader import make_zero_shot_fused_kv
from ...nodes.types import LoadedFusedKV
from ..base_models import clip_pair
from ..data.image_source import ImageSource
from . import adapter_task
from .face_encoders import LatentReader

FACE_CACHE_BYTES = 0  # no two steps use the same faces


@dataclass(frozen=True, kw_only=True)
class FusedKVConfig(adapter_task.PeopleTaskConfig):
    """`stream_noise` is the face's noise: `match`, as in the image, or `clean`, none. `face_size` is in pixels."""

    stream_noise: str = "match"
    face_size: int = fused_kv.DEFAULT_FACE_SIZE

    def __post_init__(self) -> None:
        if self.stream_noise not in fused_kv.STREAM_NOISES:
            raise ValueError(
                f"got stream_noise = {self.stream_noise!r} in [task]; expected {' or '.join(fused_kv.STREAM_NOISES)}"
            )


class BatchFusedKVExtension(apply_fused.FusedKVExtension):
    """Row i of a batch sees face i alone, at the noise level of the row. All keys have the weight 1."""

    def get_noise_levels(self, call: ModelCall, num_faces: int) -> tuple[Tensor, Tensor]:
        timesteps = call.timesteps[:num_faces]
        return timesteps, self.model.model.model_sampling.sigma(timesteps)

    def sample_face_noise(self, latents: Tensor) -> Tensor:
        """The noise of every face is that of a single face at inference."""
        return super().sample_face_noise(latents[:1]).expand(len(latents), -1, -1, -1)

    def join_faces(self, tokens: Tensor) -> Tensor:
        return tokens


class FusedKVTask(adapter_task.AdapterTask[FusedKVConfig]):
    """Trains the key and value projections of the face. Initialization uses no seed."""

    def __init__(self, settings: FusedKVConfig, source: ImageSource, _seed: int) -> None:
        super().__init__(settings, source)
        self.face_reader = LatentReader(Path(settings.vae), self.frozen.autoencoder, settings.face_size)
        self.cache_pool_faces(Path(settings.vae))
        device = torch.get_default_device()
        with torch.no_grad():
            text = self.frozen.encode_tokens(clip_pair.tokenize_texts(self.tokenizer, [""]), device)
            zero_shot_spec, tensors = make_zero_shot_fused_kv(
                self.frozen.unet_patchers.get_patcher(device), [[text, {}]], settings.stream_noise
            )
        self.spec = replace(zero_shot_spec, face_size=settings.face_size, notes={})
        self.adapter = fused_kv.build_fused_kv_adapter(
            self.spec, tensors, comfy.ops.disable_weight_init
        ).requires_grad_(True)
        self.adapter_patchers = adapter_task.DevicePatchers(self.adapter)
        self.load_initial_weights()

    @property
    def reader(self) -> LatentReader:
        return self.face_reader

    def make_injection(self, model: ModelPatcher, face_features: Tensor) -> BatchFusedKVExtension:
        patcher = self.adapter_patchers.get_patcher(model.load_device)
        loaded = LoadedFusedKV(self.spec, patcher, ReferenceFeatureCache(FACE_CACHE_BYTES), self.settings.file)
        latents = model.model.process_latent_in(face_features.float())
        faces = [apply_fused.FaceLatents(latents, [1.0] * len(latents), None, "")]
        return BatchFusedKVExtension(
            loaded, model, apply_fused.match_fused_kv_layers(self.spec, model), faces, "all", ALWAYS_ON
        )

    def make_file_contents(self, notes: Mapping[str, Any]) -> tuple[dict[str, Tensor], dict[str, str]]:
        spec = replace(self.spec, notes=notes)
        return fused_kv.collect_fused_kv_tensors(self.adapter), fused_kv.make_fused_kv_metadata(spec)
