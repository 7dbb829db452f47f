"""Infinite-ID (arXiv 2403.11781): identity-enhanced training of face mapper, CLIP mapper and image cross-attention.

Text cross-attention is deactivated, so that the model is conditioned on the identity alone (Sec. 3.2). It is active
again at inference, together with mixed attention and a text stream, which take no part in training.
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

from ...likeness.checkpoints import checkpoint_detection
from ...likeness.methods import infinite_id
from ...likeness.methods.ip_adapter import DecoupledAdapter
from ...likeness.methods.projectors import FaceIDProjection, InfiniteIDProjection
from ...likeness.spec import AdapterSpec, Identity, Person
from ...nodes.attention import apply_mixed, unet_layers
from ...nodes.attention.patch import attach_injection
from ...nodes.attention.schedule import ALWAYS_ON
from ...nodes.attention.slots import get_layer_tensors
from ...nodes.attention.text_stream import OWN_TEXT_STREAM
from ...nodes.types import LoadedAdapter
from ..base_models import face_recognizer
from ..data.image_source import ImageSource
from ..task import Batch, init_weights
from . import adapter_task
from .decoupled import copy_text_key_values
from .face_encoders import ArcFaceReader, CLIPVisionReader, FaceAndImageReader

OPERATIONS = comfy.ops.disable_weight_init


@dataclass(frozen=True, kw_only=True)
class InfiniteIDConfig(adapter_task.PeopleTaskConfig):
    """`recognizer` is the file that computes the embeddings of the face `pack`, `vision` that of a CLIP vision tower;
    both encode aligned faces.

    Without `identity_enhanced` (the paper's ablation), text cross-attention stays active. `caption_dropout`,
    `face_dropout` and `face_and_caption_dropout` are the probabilities of dropping the caption alone, the face alone,
    and both. The face mapper makes `num_tokens` tokens of the embedding, with a hidden width of `projector_width`.
    `unconditional` is that of AdapterSpec.
    """

    recognizer: str
    vision: str
    pack: str = "demo"
    identity_enhanced: bool = True
    num_tokens: int = 4
    projector_width: int = 1024
    caption_dropout: float = 0.05
    face_dropout: float = 0.05
    face_and_caption_dropout: float = 0.05
    unconditional: str = "zero"

    def __post_init__(self) -> None:
        if self.unconditional not in infinite_id.UNCONDITIONAL_MODES:
            raise ValueError(
                f"got unconditional = {self.unconditional!r} in [task]; "
                f"expected {' or '.join(infinite_id.UNCONDITIONAL_MODES)}"
            )


class BatchCrossTerm(apply_mixed.MixedCrossTerm):
    """Row i of a batch sees face i alone."""

    @property
    def has_face_per_row(self) -> bool:
        return True


class IdentityOnlyTerm(BatchCrossTerm):
    """Cross-attention to the identity instead of the text."""

    def compute_term(self, state: Any, q: Tensor, options: dict[str, Any]) -> Tensor:
        return super().compute_term(state, q, options) - get_layer_tensors(options).attention_output


CROSS_ATTENTION_TERMS: Mapping[bool, type[BatchCrossTerm]] = {
    True: IdentityOnlyTerm,
    False: BatchCrossTerm,
}  # by InfiniteIDConfig.identity_enhanced


class InfiniteIDTask(adapter_task.AdapterTask[InfiniteIDConfig]):
    """The image cross-attention is initialized with the key and value projections of the text."""

    def __init__(self, settings: InfiniteIDConfig, source: ImageSource, seed: int) -> None:
        super().__init__(settings, source)
        vision = CLIPVisionReader(Path(settings.vision), "last", "face224")
        self.face_and_image_reader = FaceAndImageReader(ArcFaceReader(Path(settings.recognizer), settings.pack), vision)
        self.cache_pool_faces(Path(settings.vision))
        unet: Any = self.frozen.model.diffusion_model
        self.unet_layers = unet_layers.list_unet_layers(unet)
        self.num_clip_states = vision.make_uncond_features().shape[1]
        self.spec = AdapterSpec(
            kind=infinite_id.KIND,
            base=checkpoint_detection.BASES_BY_LAYER_COUNT[len(self.unet_layers)],
            tokens=self.num_clip_states + settings.num_tokens,
            width=self.unet_layers[0].context_dim,
            layers=tuple(layer.hidden_size for layer in self.unet_layers),
            needs=(self.face_and_image_reader.face_reader.feature, vision.feature),
            unconditional=settings.unconditional,
        )
        self.adapter: Any = build_infinite_id_adapter(settings, self.spec, vision.width)
        self.adapter_patchers = adapter_task.DevicePatchers(self.adapter)
        init_weights(self.adapter, seed)
        copy_text_key_values(self.adapter, unet)
        self.load_initial_weights()

    @property
    def reader(self) -> FaceAndImageReader:
        return self.face_and_image_reader

    @property
    def dropout_rates(self) -> tuple[float, float, float]:
        config = self.settings
        if not config.identity_enhanced:
            return config.caption_dropout, config.face_dropout, config.face_and_caption_dropout
        face_rate = config.face_dropout + config.face_and_caption_dropout
        return 1 - face_rate, 0.0, face_rate

    def get_face_features(self, batch: Batch) -> Tensor:
        return batch["face_features"].masked_fill(batch["drop_face"][:, None], 0.0)

    def make_injection(self, model: ModelPatcher, face_features: Tensor) -> BatchCrossTerm:
        return self._make_cross_term(CROSS_ATTENTION_TERMS[self.settings.identity_enhanced], model, face_features)

    def apply_adapter(self, model: ModelPatcher, face_features: Tensor) -> ModelPatcher:
        """With mixed attention and a text stream with its own latent, the defaults of Apply Identity (Mixed)."""
        patched = attach_injection(model, self._make_cross_term(BatchCrossTerm, model, face_features))
        self_extension = apply_mixed.MixedSelfExtension(
            apply_mixed.list_self_attention_places(self.unet_layers), "mixed", "none", 1.0, ALWAYS_ON
        )
        return attach_injection(patched, self_extension, text_stream=OWN_TEXT_STREAM)

    def _make_cross_term(
        self, term_class: type[BatchCrossTerm], model: ModelPatcher, face_features: Tensor
    ) -> BatchCrossTerm:
        loaded = LoadedAdapter(self.spec, self.adapter_patchers.get_patcher(model.load_device), {}, self.settings.file)
        features = self.face_and_image_reader.split_features(face_features)
        return make_infinite_id_term(term_class, loaded, features, unet_layers.match_unet_layers(self.spec, model))

    def make_file_contents(self, notes: Mapping[str, Any]) -> tuple[dict[str, Tensor], dict[str, str]]:
        return self.adapter.state_dict(), infinite_id.make_infinite_id_metadata(self.spec, self.num_clip_states, notes)


def build_infinite_id_adapter(settings: InfiniteIDConfig, spec: AdapterSpec, states_width: int) -> DecoupledAdapter:
    """The adapter with uninitialized weights, for CLIP hidden states of width `states_width`."""
    face_mapper = FaceIDProjection(
        face_recognizer.EMBEDDING_SIZE, settings.projector_width, settings.num_tokens, spec.width, OPERATIONS
    )
    return DecoupledAdapter(spec, InfiniteIDProjection(states_width, spec.width, face_mapper, OPERATIONS), OPERATIONS)


def make_infinite_id_term(
    term_class: type[BatchCrossTerm],
    loaded: LoadedAdapter,
    features: Mapping[str, Tensor],
    layers: Sequence[unet_layers.UNetLayer],
) -> BatchCrossTerm:
    """The adapter bound to face features [n, ...] by encoder id, face i for row i."""
    ones = torch.ones(len(next(iter(features.values()))))
    box, kps = torch.zeros(len(ones), 4), torch.zeros(len(ones), 5, 2)
    person = Person(Identity("batch", box, kps, ones, ones, embeddings=features))
    return term_class(loaded, [person], layers, 1.0, "none", "stacked", ALWAYS_ON)
