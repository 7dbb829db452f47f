"""Decoupled cross-attention, trained with IP-Adapter's objective (Ye et al. 2308.06721, Eq. 8).

Trains the projector and the key and value projections; the base model is frozen. The text, the face, or both are
dropped at random (Sec. 3.2.3).
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import comfy.ops
import torch
from comfy.model_patcher import ModelPatcher
from torch import Generator, Tensor, nn

from ...likeness.checkpoints import key_maps, native_decoupled, native_omni_adapter
from ...likeness.methods.ip_adapter import DecoupledAdapter
from ...likeness.methods.projectors import FaceIDProjection, OmniIDProjection
from ...likeness.methods.resampler import Resampler
from ...likeness.spec import AdapterSpec, Identity
from ...nodes.attention import apply_decoupled, unet_layers
from ...nodes.attention.schedule import ALWAYS_ON
from ...nodes.types import LoadedAdapter
from ..data.image_source import ImageSource
from ..task import Batch, init_weights
from . import adapter_task
from .face_encoders import ArcFaceReader, CLIPVisionReader, FaceEncoder, OmniIDReader

BASE_MODEL_FAMILY = "SD1.5"
OPERATIONS = comfy.ops.disable_weight_init


@dataclass(frozen=True, kw_only=True)
class DecoupledConfig(adapter_task.PeopleTaskConfig):
    """`encoder_type` is "arcface": the embedding of the recognizer in the file `encoder`, of the face `pack`; "image":
    the hidden states of the vision tower in that file; or "omni": an Omni-ID encoder's tokens of 1 to `max_photos`
    photos.

    `caption_dropout`, `face_dropout` and `face_and_caption_dropout` are the probabilities of dropping the caption
    alone, the face alone, and both. `num_tokens` is the number of tokens per face, unless the encoder sets it.
    `projector_width` is the projector's hidden width, `depth` and `num_heads` are the resampler's.
    """

    encoder_type: str
    encoder: str
    pack: str = "demo"
    max_photos: int = 1
    num_tokens: int = 4
    projector_width: int = 1024
    depth: int = 4
    num_heads: int = 12
    caption_dropout: float = 0.05
    face_dropout: float = 0.05
    face_and_caption_dropout: float = 0.05

    def __post_init__(self) -> None:
        if self.encoder_type not in ENCODER_TYPES:
            raise ValueError(
                f"got encoder_type = {self.encoder_type!r} in [task]; expected {' or '.join(ENCODER_TYPES)}"
            )
        if self.max_photos < 1 or (self.max_photos > 1 and ENCODER_TYPES[self.encoder_type].join_photos is None):
            raise ValueError(
                f"got max_photos = {self.max_photos} with encoder_type = {self.encoder_type!r} in [task]; "
                "expected 1, or more than 1 with encoder_type = 'omni'"
            )


def _build_mlp(settings: DecoupledConfig, in_features: int, width: int) -> nn.Module:
    return FaceIDProjection(in_features, settings.projector_width, settings.num_tokens, width, OPERATIONS)


def _build_resampler(settings: DecoupledConfig, in_features: int, width: int) -> nn.Module:
    return Resampler(
        settings.projector_width,
        settings.depth,
        settings.num_heads,
        settings.num_tokens,
        in_features,
        width,
        OPERATIONS,
    )


def _build_omni_projection(settings: DecoupledConfig, in_features: int, width: int) -> nn.Module:
    return OmniIDProjection(in_features, width, OPERATIONS)


StateDict = dict[str, Tensor]


def _make_published_file(
    spec: AdapterSpec, state_dict: StateDict, notes: Mapping[str, Any]
) -> tuple[StateDict, dict[str, str]]:
    tensors = key_maps.rename_keys(state_dict, native_decoupled.PUBLISHED_KEY_RULES)
    return tensors, native_decoupled.make_native_decoupled_metadata(spec, notes)


def _make_native_file(
    spec: AdapterSpec, state_dict: StateDict, notes: Mapping[str, Any]
) -> tuple[StateDict, dict[str, str]]:
    return state_dict, native_omni_adapter.make_omni_adapter_metadata(spec, notes)


@dataclass(frozen=True)
class EncoderType:
    """How faces are encoded, the kind of adapter file, and the projector from face features to the text width.

    `join_photos` turns the features of several photos per row into one set of tokens, if the encoder supports that.
    `make_file_contents` makes the file's tensors and metadata from the state dict.
    """

    make_encoder: Callable[[DecoupledConfig], FaceEncoder]
    kind: str
    make_projector: Callable[[DecoupledConfig, int, int], nn.Module]
    join_photos: Callable[[Any, Tensor, int], Tensor] | None = None
    make_file_contents: Callable[[AdapterSpec, StateDict, Mapping[str, Any]], tuple[StateDict, dict[str, str]]] = (
        _make_published_file
    )


ENCODER_TYPES: Mapping[str, EncoderType] = {
    "arcface": EncoderType(
        lambda settings: ArcFaceReader(Path(settings.encoder), settings.pack), "portrait", _build_mlp
    ),
    "image": EncoderType(lambda settings: CLIPVisionReader(Path(settings.encoder)), "plus_face", _build_resampler),
    "omni": EncoderType(
        lambda settings: OmniIDReader(Path(settings.encoder)),
        native_omni_adapter.KIND,
        _build_omni_projection,
        OmniIDReader.join_photos,
        _make_native_file,
    ),
}


class DecoupledTask(adapter_task.AdapterTask[DecoupledConfig]):
    """Key and value projections are initialized from those of the text, as published."""

    def __init__(self, settings: DecoupledConfig, source: ImageSource, seed: int) -> None:
        super().__init__(settings, source)
        encoder_type = ENCODER_TYPES[settings.encoder_type]
        self.face_encoder = encoder_type.make_encoder(settings)
        self.cache_pool_faces(Path(settings.encoder))
        self.uncond_features = self.face_encoder.make_uncond_features()
        model: Any = self.frozen.model
        layers = unet_layers.list_unet_layers(model.diffusion_model)
        makes_tokens = encoder_type.join_photos is not None
        self.spec = AdapterSpec(
            kind=encoder_type.kind,
            base=BASE_MODEL_FAMILY,
            tokens=self.uncond_features.shape[1] if makes_tokens else settings.num_tokens,
            width=layers[0].context_dim,
            layers=tuple(layer.hidden_size for layer in layers),
            needs=(self.face_encoder.feature,),
            matches_text_width=not makes_tokens,
        )
        self.adapter: Any = build_decoupled_adapter(settings, self.spec, self.uncond_features.shape[-1])
        self.adapter_patchers = adapter_task.DevicePatchers(self.adapter)
        init_weights(self.adapter, seed)
        self.init_key_values(self.adapter, model.diffusion_model)
        self.load_initial_weights()

    def init_key_values(self, adapter: DecoupledAdapter, unet: nn.Module) -> None:
        """Initialize the adapter's key and value projections."""
        copy_text_key_values(adapter, unet)

    @property
    def reader(self) -> FaceEncoder:
        return self.face_encoder

    @property
    def dropout_rates(self) -> tuple[float, float, float]:
        return self.settings.caption_dropout, self.settings.face_dropout, self.settings.face_and_caption_dropout

    def choose_face_count(self, generator: Generator) -> int:
        max_photos = self.settings.max_photos
        return 1 if max_photos == 1 else 1 + int(torch.randint(max_photos, (), generator=generator))

    def get_face_features(self, batch: Batch) -> Tensor:
        join_photos, drop_face = ENCODER_TYPES[self.settings.encoder_type].join_photos, batch["drop_face"]
        if join_photos is None:
            features = batch["face_features"].clone()
        else:
            features = join_photos(self.face_encoder, batch["face_features"], len(drop_face))
        features[drop_face] = self.uncond_features.to(features)
        return features

    def make_injection(self, model: ModelPatcher, face_features: Tensor) -> apply_decoupled.DecoupledTerm:
        loaded = LoadedAdapter(self.spec, self.adapter_patchers.get_patcher(model.load_device), {}, self.settings.file)
        layers = apply_decoupled.match_adapter_layers(self.spec, model)
        return apply_decoupled.DecoupledTerm(
            adapter=loaded,
            identity=self._make_batch_identity(face_features),
            weights_by_layer=apply_decoupled.compute_layer_weights(layers, BASE_MODEL_FAMILY, "linear", ""),
            strength=1.0,
            scaling="V only",
            shortcut=1.0,
            unfold=True,
            mask=None,
            schedule=ALWAYS_ON,
        )

    def _make_batch_identity(self, face_features: Tensor) -> Identity:
        """One identity whose face i is that of row i; the term's `unfold` assigns them to the rows."""
        count, key = len(face_features), self.face_encoder.feature.format_encoder_id(self.face_encoder.hash)
        return Identity(
            name="batch", box=torch.zeros(count, 4), kps=torch.zeros(count, 5, 2), score=torch.ones(count),
            weight=torch.ones(count), embeddings={key: face_features},
            zero_embeddings={key: self.uncond_features.to(face_features)},
        )  # fmt: skip

    def make_file_contents(self, notes: Mapping[str, Any]) -> tuple[StateDict, dict[str, str]]:
        return ENCODER_TYPES[self.settings.encoder_type].make_file_contents(self.spec, self.adapter.state_dict(), notes)


def build_decoupled_adapter(settings: DecoupledConfig, spec: AdapterSpec, in_features: int) -> DecoupledAdapter:
    """The adapter with uninitialized weights, for face features [..., in_features]."""
    projector = ENCODER_TYPES[settings.encoder_type].make_projector(settings, in_features, spec.width)
    return DecoupledAdapter(spec, projector, OPERATIONS)


@torch.no_grad()
def copy_text_key_values(adapter: DecoupledAdapter, unet: nn.Module) -> None:
    """Copy the UNet's key and value projections of the text into the adapter."""
    for layer in unet_layers.list_unet_layers(unet):
        text_attention: Any = unet.get_submodule(f"{layer.module_path}.attn2")
        adapter_layer: Any = adapter.get_layer(layer.name)
        adapter_layer.k.weight.copy_(text_attention.to_k.weight)
        adapter_layer.v.weight.copy_(text_attention.to_v.weight)
