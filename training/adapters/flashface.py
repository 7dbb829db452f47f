"""FlashFace (arXiv 2403.17008): the Face ReferenceNet and the added attention layers, on clusters of N + 1 images.

The reference UNet is initialized from the base model, the added layers from the self-attentions of their blocks, as in
the authors' code. With `train_unet` the base UNet is trained too, as published, with an additional input channel for
the face position. Otherwise it stays frozen and the file works with any base model; the added layers' output
projections then start at zero, as a frozen UNet could not compensate for a second copy of its self-attentions.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import comfy.ops
import torch
from comfy.model_base import BaseModel, ModelType
from comfy.model_patcher import ModelPatcher
from torch import Generator, Tensor, nn
from torch.nn.functional import pad

from ...likeness.attention.feature_cache import ReferenceFeatureCache
from ...likeness.checkpoints import native_flashface
from ...likeness.faces import reference_faces
from ...likeness.methods import flashface
from ...likeness.spec import FlashFaceSpec
from ...nodes.attention.flashface import apply_reference, reference_term
from ...nodes.attention.flashface.added_layers import attach_added_layers
from ...nodes.attention.injection import ATTN1_OUTPUT, PatchPlace
from ...nodes.attention.model_call import ModelCall
from ...nodes.attention.patch import capture_attention_inputs
from ...nodes.attention.unet_layers import UNetLayer, list_unet_layers
from ...nodes.loaders.flashface_loader import add_face_position_channels, build_sd15_model
from ...nodes.types import LoadedReferenceNet
from ..base_models import clip_pair
from ..data.clusters import crop_and_resize
from ..data.image_source import ImageSource
from ..task import Batch
from . import adapter_task
from .face_encoders import ReferenceFaceReader

FACE_CACHE_BYTES = 0  # no two steps use the same faces
INPUT_CONV_WEIGHT = "input_blocks.0.0.weight"  # its input: the latent, and the face position if there is one
# UNet parts with added layers (Table 4); the middle block always has one.
ADDED_LAYER_PLACEMENTS: Mapping[str, tuple[str, ...]] = {
    "encoder": ("input", "middle"), "decoder": ("middle", "output"), "both": ("input", "middle", "output"),
}  # fmt: skip
ATTENTION_PROJECTIONS = {"q": "to_q", "k": "to_k", "v": "to_v", "o": "to_out.0"}


@dataclass(frozen=True, kw_only=True)
class FlashFaceConfig(adapter_task.PeopleTaskConfig):
    """`placement` is a key of ADDED_LAYER_PLACEMENTS. Each row sees 1 to `max_references` faces of `face_size` pixels.

    `face_dropout`, `position_dropout` and `caption_dropout` are independent probabilities of dropping the faces, the
    face position and the caption. See the module's docstring for `train_unet`.
    """

    placement: str = "decoder"
    face_size: int = reference_faces.REFERENCE_SIZE
    max_references: int = flashface.DEFAULT_NUM_REFERENCES
    face_dropout: float = 0.1
    position_dropout: float = 0.1
    train_unet: bool = False

    def __post_init__(self) -> None:
        if self.placement not in ADDED_LAYER_PLACEMENTS:
            raise ValueError(
                f"got placement = {self.placement!r} in [task]; expected one of {', '.join(ADDED_LAYER_PLACEMENTS)}"
            )


class BatchReferenceTerm(reference_term.ReferenceTerm):
    """Each row of a batch sees its own faces at its own timestep: the next of the latents, as many for every row."""

    def get_text_digest(self, call: ModelCall) -> str:
        return ""  # nothing is cached, and hashing would wait for the device

    def get_face_timesteps(self, call: ModelCall, num_faces: int) -> Tensor:
        return call.timesteps[: call.rows_per_chunk].repeat_interleave(num_faces // call.rows_per_chunk)

    def join_faces(self, tokens: Tensor, person: reference_term.ReferenceFaces, call: ModelCall) -> Tensor:
        return tokens.unflatten(0, (call.rows_per_chunk, -1)).flatten(1, 2)


class FlashFaceTask(adapter_task.AdapterTask[FlashFaceConfig]):
    """Trains reference UNet and added layers, with `train_unet` also the base UNet. Initialization uses no seed."""

    def __init__(self, settings: FlashFaceConfig, source: ImageSource, _seed: int) -> None:
        super().__init__(settings, source)
        self.face_reader = ReferenceFaceReader(Path(settings.vae), self.frozen.autoencoder, settings.face_size)
        self.cache_pool_faces(Path(settings.vae))
        self.empty_prompt_embedding = self.frozen.encode_tokens(
            clip_pair.tokenize_texts(self.tokenizer, [""]), torch.get_default_device()
        ).detach()
        base = self.frozen.model
        if settings.train_unet and base.model_type != ModelType.EPS:
            raise ValueError(
                f"got train_unet in [task] with {settings.unet}, which is not epsilon-prediction; expected an "
                "epsilon-prediction UNet, as FlashFace files hold no other; set train_unet = false"
            )
        self.spec = FlashFaceSpec(heads=base.model_config.unet_config["num_heads"], face_size=settings.face_size)
        self.net, self.added = build_flashface_modules(base, settings, self.spec.heads)
        self.main = build_trainable_unet(base, self.spec.heads) if settings.train_unet else None
        self.reference_patchers = adapter_task.DevicePatchers(self.net)
        self.added_layer_patchers = adapter_task.DevicePatchers(self.added)
        self.unet_patchers = self.frozen.unet_patchers if self.main is None else adapter_task.DevicePatchers(self.main)
        self.load_initial_weights()

    @property
    def reader(self) -> ReferenceFaceReader:
        return self.face_reader

    @property
    def dropout_rates(self) -> tuple[float, float, float]:
        caption, face = self.settings.caption_dropout, self.settings.face_dropout
        return caption * (1 - face), face * (1 - caption), caption * face

    def choose_face_count(self, generator: Generator) -> int:
        return 1 + int(torch.randint(self.settings.max_references, (1,), generator=generator))

    def make_batch(self, generator: Generator, batch_size: int) -> Batch:
        batch = super().make_batch(generator, batch_size)
        if self.main is None:
            return batch
        size = self.settings.resolution
        targets = [self.source.load_original_image(index) for index in batch["target_indices"]]
        boxes = [crop_and_resize(target, size).box / size for target in targets]
        positions = torch.stack([reference_faces.make_face_position_mask(box.tolist(), size, size) for box in boxes])
        keep_position = torch.rand(batch_size, generator=generator) >= self.settings.position_dropout
        return {**batch, "face_position": (positions * keep_position[:, None, None])[:, None]}

    def get_base_patcher(self, device: torch.device) -> ModelPatcher:
        model = self.unet_patchers.get_patcher(device)
        return attach_added_layers(
            model if self.main is None else add_face_position_channels(model),
            self.added_layer_patchers.get_patcher(device),
        )

    def make_model_kwargs(self, batch: Batch) -> dict[str, Tensor]:
        return super().make_model_kwargs(batch) | ({} if self.main is None else {"c_concat": batch["face_position"]})

    def make_batch_injection(self, model: ModelPatcher, batch: Batch) -> BatchReferenceTerm:
        visible = ~batch["drop_face"][:, None, None]
        return self.make_injection(model, batch["face_features"], visible.float())

    def make_injection(
        self, model: ModelPatcher, face_features: Tensor, visible: Tensor | None = None
    ) -> BatchReferenceTerm:
        """Bind n face latents of [rows * n, c, h, w] to each row; rows with `visible` [rows, 1, 1] of 0 see none."""
        device = model.load_device
        reference_net = LoadedReferenceNet(
            self.reference_patchers.get_patcher(device),
            self.added_layer_patchers.get_patcher(device),
            ReferenceFeatureCache(FACE_CACHE_BYTES),
            self.settings.file,
            self.spec,
        )
        return make_reference_term(model, reference_net, face_features, visible, self.empty_prompt_embedding.to(device))

    def make_file_contents(self, notes: Mapping[str, Any]) -> tuple[dict[str, Tensor], dict[str, str]]:
        main_tensors = {} if self.main is None else self.main.diffusion_model.state_dict()
        tensors = native_flashface.collect_native_flashface_tensors(
            self.net.diffusion_model.state_dict(), self.added, main_tensors
        )
        return tensors, native_flashface.make_native_flashface_metadata(replace(self.spec, notes=notes))


def make_reference_term(
    model: ModelPatcher, reference_net: LoadedReferenceNet, face_latents: Tensor, visible: Tensor | None, text: Tensor
) -> BatchReferenceTerm:
    """Bind face latents [rows * n, c, h, w] to the rows; the reference UNet encodes them with `text` [1, T, C]."""
    latents = model.model.process_latent_in(face_latents.float())
    attentions = apply_reference.find_reference_attentions(model, reference_net)
    faces = reference_term.ReferenceFaces(latents, (), 1.0, visible, "")
    settings = reference_term.ReferenceSettings(reference_text=text)
    return BatchReferenceTerm(model, reference_net, attentions, [faces], settings)


def build_flashface_modules(
    base: BaseModel, settings: FlashFaceConfig, num_heads: int
) -> tuple[BaseModel, flashface.AddedLayers]:
    """The initialized reference UNet and added layers."""
    unet: Any = base.diffusion_model
    blocks = ADDED_LAYER_PLACEMENTS[settings.placement]
    layers = [layer for layer in list_unet_layers(unet) if layer.block[0] in blocks]
    net = build_unet_copy(clone_unet_weights(base), num_heads)
    freeze_unused_parameters(net.diffusion_model, layers)
    tensors = {
        f"{layer.module_path}.{part}.{key}": value.detach().clone()
        for layer in layers
        for part, name in ATTENTION_PROJECTIONS.items()
        for key, value in unet.get_submodule(f"{layer.module_path}.attn1.{name}").state_dict().items()
    }
    added = flashface.AddedLayers(tensors, comfy.ops.disable_weight_init).requires_grad_(True)
    if not settings.train_unet:
        with torch.no_grad():
            for name, value in added.named_parameters():
                value.mul_(".o." not in name)
    return net, added


def build_trainable_unet(base: BaseModel, num_heads: int) -> BaseModel:
    """A trainable base UNet with an input channel for the face position, whose weights start at zero."""
    weights = clone_unet_weights(base)
    weights[INPUT_CONV_WEIGHT] = pad(weights[INPUT_CONV_WEIGHT], (0, 0, 0, 0, 0, 1))
    return build_unet_copy(weights, num_heads)


def clone_unet_weights(model: BaseModel) -> dict[str, Tensor]:
    return {key: value.detach().clone() for key, value in model.diffusion_model.state_dict().items()}


def build_unet_copy(tensors: Mapping[str, Tensor], num_heads: int) -> BaseModel:
    """A trainable UNet with these weights, built as the FlashFace loader builds it."""
    model: Any = build_sd15_model(tensors, num_heads).model
    return model.requires_grad_(True)


def freeze_unused_parameters(unet: nn.Module, layers: Sequence[UNetLayer]) -> None:
    """Freeze all parameters that the inputs of these layers do not depend on: those after the last layer."""
    places = [PatchPlace(ATTN1_OUTPUT, layer.block, layer.depth, layer.is_multi_block) for layer in layers]
    weight: Any = unet.get_parameter(INPUT_CONV_WEIGHT)
    latent, timestep = torch.zeros(1, weight.shape[1], 16, 16).to(weight), torch.zeros(1).to(weight)
    context = torch.zeros(1, 1, layers[0].context_dim).to(weight)
    inputs = capture_attention_inputs(unet, latent, timestep, context, places)
    parameters = list(unet.parameters())
    gradients = torch.autograd.grad([x.sum() for x in inputs.values()], parameters, allow_unused=True)
    for value, gradient in zip(parameters, gradients, strict=True):
        value.requires_grad_(gradient is not None)
