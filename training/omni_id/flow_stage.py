"""Omni-ID's second stage (arXiv 2412.09694, Sec. 3.3, App. A.2): E, trained through a frozen generator V.

    L_2 = |V(x~, t, y, l) - (eps - x_r)|^2,   l = E(X_s),   x~ = (1 - t) x_r + t eps                       (Eq. 6, 7)

y is the text "photo of a person". The equations are for a flow model, as the paper's FLUX. A diffusion model such as
SD1.5 is trained with its own objective instead of Eq. 6, the prediction of eps, and its own noise schedule instead of
Eq. 7; a flow model with Eq. 6 as it stands. V attends to l by decoupled attention, which is trained together with E.
Its value projections start at zero, and a small E should have a lower learning rate than they have: until they
distinguish people, the gradient asks the tokens only for what helps every image, and all people's tokens become alike.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from torch import Generator, Tensor, nn

from ...likeness.methods.ip_adapter import DecoupledAdapter
from ..adapters import decoupled
from ..adapters.face_encoders import OmniIDReader
from ..base_models import clip_pair, latents
from ..data.image_source import ImageSource
from ..task import Batch
from . import encoder, views

TRAINING_PROMPT = "photo of a person"


@dataclass(frozen=True, kw_only=True)
class FlowStageConfig(decoupled.DecoupledConfig):
    """`encoder` is the first stage's file, `encoder_output` the name of the trained encoder's file.

    Each person in a batch has `min_images` to `max_images` input images and `num_targets` target images, out of
    `images_per_person` in the shards; the batch size counts people. `encoder_lr_scale` scales the learning rate of E.
    `gradient_checkpointing` of the trunk saves memory.
    """

    encoder_type: str = "omni"
    encoder_output: str = encoder.ENCODER_FILE.removesuffix(".safetensors")
    images_per_person: int = 8
    min_images: int = 1
    max_images: int = 3
    num_targets: int = 8
    encoder_lr_scale: float = 1.0
    gradient_checkpointing: bool = False

    def __post_init__(self) -> None:
        super().__post_init__()
        views.check_view_counts(self.min_images, self.max_images, self.num_targets, self.images_per_person)
        if self.encoder_type != "omni":
            raise ValueError(f"got encoder_type = {self.encoder_type!r} in [task]; expected omni, the encoder to train")


class FlowStageTask(decoupled.DecoupledTask):
    """Trains encoder and adapter. No condition is dropped: the negative prompt attends to no tokens."""

    def __init__(self, settings: FlowStageConfig, source: ImageSource, seed: int) -> None:
        shards = views.require_view_shards(source, settings.images_per_person)
        super().__init__(settings, shards, seed)
        self.stage_settings, self.spec = settings, replace(self.spec, unconditional="none")
        self.clusters = views.list_complete_clusters(
            shards, settings.cached_samples, settings.max_people, settings.images_per_person
        )
        self.trained = encoder.make_encoder_trainable(self.omni_reader.module)
        trunk: Any = self.trained.trunk
        trunk.set_grad_checkpointing(settings.gradient_checkpointing)

    @torch.no_grad()
    def init_key_values(self, adapter: DecoupledAdapter, unet: nn.Module) -> None:
        super().init_key_values(adapter, unet)
        layers: Any = adapter.layers.values()
        for layer in layers:
            layer.v.weight.zero_()

    def learning_rate_scale(self, name: str) -> float:
        return self.stage_settings.encoder_lr_scale if name.startswith("trained.") else 1.0

    @property
    def omni_reader(self) -> OmniIDReader:
        assert isinstance(self.face_encoder, OmniIDReader)
        return self.face_encoder

    def cache_pool_faces(self, reader_file: Path) -> None:
        """Cache the crops alone: the trained encoder encodes them at every step."""
        if self.settings.cached_samples:
            self.frozen.cached_faces = views.cache_aligned_faces(
                self.source, self.clusters, self.omni_reader.module.spec.image_size
            )

    def make_batch(self, generator: Generator, batch_size: int) -> Batch:
        config, latent_size = self.stage_settings, self.stage_settings.resolution // 8
        few, many = views.sample_few_to_many(
            generator, self.clusters, batch_size, (config.min_images, config.max_images), config.num_targets
        )
        face_indices, target_indices = ([index for row in rows for index in row] for rows in (few, many))
        inputs, rows = self._load_inputs(target_indices, face_indices), len(target_indices)
        crops = inputs.pop("face_features" if "face_features" in inputs else "face_crops")
        num_timesteps = self.frozen.model.model_sampling.num_timesteps
        return {
            **inputs, "face_crops": crops, "drop_face": torch.zeros(rows, dtype=torch.bool),
            "tokens": clip_pair.tokenize_texts(self.tokenizer, [TRAINING_PROMPT] * rows),
            "noise": torch.randn(rows, self.frozen.latent_channels, latent_size, latent_size, generator=generator),
            "timesteps": torch.randint(num_timesteps, (rows,), generator=generator),
        }  # fmt: skip

    def forward(self, batch: Batch) -> dict[str, Tensor]:
        if "latents" not in batch:
            with torch.no_grad():
                batch = {**batch, "latents": latents.encode_latents(self.frozen.autoencoder, batch["images"])}
        return super().forward(batch)

    def get_face_features(self, batch: Batch) -> Tensor:
        if "face_features" in batch:  # a batch of samples: each row is another person
            return super().get_face_features(batch)
        num_targets = self.stage_settings.num_targets
        states = self.omni_reader.read_faces(batch["face_crops"], batch["noise"].device)
        tokens = self.omni_reader.join_photos(states, len(batch["drop_face"]) // num_targets)
        return tokens.repeat_interleave(num_targets, 0)

    def save_model(self, folder: Path, notes: Mapping[str, Any]) -> None:
        super().save_model(folder, notes)
        encoder.save_encoder_file(self.trained, folder, notes, f"{self.stage_settings.encoder_output}.safetensors")
