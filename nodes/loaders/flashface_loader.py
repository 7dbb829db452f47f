"""Load FlashFace and Model as Reference Net: the main UNet and the reference UNet, as ordinary SD1.5 models."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import comfy.model_base
import comfy.model_detection
import comfy.model_management
import comfy.ops
import comfy.sd
import comfy.supported_models
import comfy.utils
import torch
from comfy.model_patcher import ModelPatcher
from comfy_api.latest import io
from torch import Tensor, nn

from ...likeness.attention.feature_cache import ReferenceFeatureCache
from ...likeness.checkpoints import file_kinds, key_maps, native_flashface
from ...likeness.methods import flashface
from ...likeness.spec import FlashFaceSpec
from .. import types
from ..attention.flashface.added_layers import attach_added_layers
from . import files, model_management, native_models

FLASHFACE_FOLDER = "likeness"
BYTES_PER_MIB = 1 << 20

ConcatKwargs = Mapping[str, Any]  # the arguments of the host's concat_cond
LoadedFlashFace = tuple[ModelPatcher, types.LoadedReferenceNet]
# Base model missing -> got, expected, what to do.
BASE_MODEL_ERRORS = {
    True: ("which has no main UNet", "a base model", "connect an SD1.5 model"),
    False: ("which has its own main UNet", "no base model", "disconnect the model"),
}


def _make_empty_position(_model: comfy.model_base.BaseModel, kwargs: ConcatKwargs) -> Tensor:
    """A face position of zeros [B, 1, h, w]: the face may be anywhere."""
    return torch.zeros_like(kwargs["noise"][:, :1])


def _make_inpainting_channels(model: comfy.model_base.BaseModel, kwargs: ConcatKwargs) -> Tensor:
    """The latent without the face region, and the face position [B, c + 1, h, w] (Sec. 3.2)."""
    channels = comfy.model_base.BaseModel.concat_cond(model, **kwargs)
    assert channels is not None
    latent, mask = channels[:, :-1], channels[:, -1:]
    return torch.cat((latent * (1 - mask), mask), 1)


# Number of latents that the UNet reads -> its inputs besides the noisy latent, of which one is the face position.
EXTRA_CHANNELS: Mapping[int, Callable[[comfy.model_base.BaseModel, ConcatKwargs], Tensor]] = {
    1: _make_empty_position,
    2: _make_inpainting_channels,
}


@dataclass(frozen=True, eq=False)
class FlashFaceConcatCond:
    """Replaces the host's `concat_cond`, which does not know the face position."""

    model: comfy.model_base.BaseModel
    make_channels: Callable[[comfy.model_base.BaseModel, ConcatKwargs], Tensor]

    def __call__(self, **kwargs: Any) -> Tensor:
        return self.make_channels(self.model, kwargs)


def build_sd15_model(tensors: Mapping[str, Tensor], num_heads: int = FlashFaceSpec.heads) -> ModelPatcher:
    """A MODEL with these weights, named as ComfyUI names them, in their dtype."""
    config = comfy.supported_models.SD15(comfy.model_detection.detect_unet_config(dict(tensors), "") or {})
    config.unet_config["num_heads"] = num_heads  # cannot be detected from shapes
    native_models.set_latent_format(config)
    device, dtype = comfy.model_management.get_torch_device(), next(iter(tensors.values())).dtype
    cast = comfy.model_management.unet_manual_cast(dtype, device, config.supported_inference_dtypes)
    config.set_inference_dtype(dtype, cast)
    try:
        model = comfy.model_base.BaseModel(config, device=torch.device("meta"))  # all weights are assigned below
    except Exception as error:  # the host fails in many ways if the tensors are not a UNet's
        raise ValueError(
            f"got {len(tensors)} tensors that do not make a UNet ({type(error).__name__}); expected a complete SD1.5 "
            "UNet; download the file again"
        ) from error
    key_maps.load_module_weights(model.diffusion_model, tensors)
    for module in model.diffusion_model.modules():
        if isinstance(module, nn.GroupNorm):
            module.eps = flashface.GROUP_NORM_EPS
    model.diffusion_model.eval().requires_grad_(False)
    return ModelPatcher(model, device, comfy.model_management.unet_offload_device())


def choose_unet_dtype(tensors: Mapping[str, Tensor]) -> torch.dtype:
    """The dtype in which ComfyUI would load a UNet with these weights."""
    return comfy.model_management.unet_dtype(
        model_params=sum(value.numel() for value in tensors.values()),
        supported_dtypes=list(comfy.supported_models.SD15.supported_inference_dtypes),
        weight_dtype=comfy.utils.weight_dtype(dict(tensors)),
    )


def build_flashface(
    tensors: Mapping[str, Tensor],
    file: str,
    feature_cache: ReferenceFeatureCache,
    base: ModelPatcher | None = None,
    metadata: Mapping[str, Any] | None = None,
) -> LoadedFlashFace:
    """MODEL and REFERENCE_NET of a published checkpoint, or with `metadata` of a file in the native format.

    Raises ValueError for any other file (see flashface.split_flashface_checkpoint and
    native_flashface.read_native_flashface).
    """
    dtype = choose_unet_dtype(tensors)
    tensors = {key: value.to(dtype) for key, value in tensors.items()}
    if metadata is None:
        spec, weights = FlashFaceSpec(), flashface.split_flashface_checkpoint(tensors)
    else:
        spec, weights = native_flashface.read_native_flashface(tensors, metadata, file)
    if (weights.main_unet is None) != (base is not None):
        got, expected, remedy = BASE_MODEL_ERRORS[base is None]
        raise ValueError(f"got {file}, {got}; expected {expected}; {remedy}")
    added = model_management.make_model_patcher(flashface.AddedLayers(weights.added_layers, comfy.ops.manual_cast))
    reference_unet = build_sd15_model(weights.reference_unet, spec.heads)
    reference_net = types.LoadedReferenceNet(reference_unet, added, feature_cache, file, spec)
    model = apply_flashface_lora(base, weights.lora) if base is not None else build_main_model(weights, spec)
    return attach_added_layers(model, added), reference_net


def build_main_model(weights: flashface.FlashFaceWeights, spec: FlashFaceSpec) -> ModelPatcher:
    assert weights.main_unet is not None
    return add_face_position_channels(build_sd15_model(weights.main_unet, spec.heads))


def add_face_position_channels(model: ModelPatcher) -> ModelPatcher:
    """Feed the face position to the UNet's extra input channels. Raises ValueError if their number is unknown."""
    channels = model.model.model_config.unet_config["in_channels"]
    latent_channels = model.model.latent_format.latent_channels
    choices = {latents * latent_channels + 1: make_channels for latents, make_channels in EXTRA_CHANNELS.items()}
    if channels not in choices:
        raise ValueError(f"got a UNet of {channels} input channels; expected {' or '.join(map(str, choices))}")
    model.model.set_inpaint()
    model.model.concat_keys = ("masked_image", "mask")  # the paper's order; only read for inpainting
    model.add_object_patch("concat_cond", FlashFaceConcatCond(model.model, choices[channels]))
    return model


def apply_flashface_lora(base: ModelPatcher, lora: Mapping[str, Tensor]) -> ModelPatcher:
    named = {f"diffusion_model.{key}": value for key, value in lora.items()}
    model, _ = comfy.sd.load_lora_for_models(base, None, named, 1.0, 0.0)
    assert model is not None  # because `base` is not None
    return model


def load_flashface(file: str, base: ModelPatcher | None, max_cache_bytes: int) -> LoadedFlashFace:
    """Load a FlashFace file, with a feature cache of `max_cache_bytes`. Raises ValueError (see `build_flashface`)."""
    path = files.find_model_file(file, FLASHFACE_FOLDER)
    return build_flashface(
        files.load_weights(path, file_kinds.FLASHFACE),
        file,
        model_management.make_feature_cache(max_cache_bytes),
        base,
        files.read_native_metadata(path),
    )


CACHE_INPUT = io.Int.Input(
    "cache", default=1024, min=0, max=65536, step=64, optional=True, advanced=True,
    tooltip="Memory in MiB for the cached face features, 0 to 65536. With cached features, the reference net does "
    "not run again for further images of a person. One step takes 10 MiB in half precision. The least recently used "
    "features are removed first. 0 disables the cache.",
)  # fmt: skip


class LoadFlashFace(io.ComfyNode):
    @classmethod
    def define_schema(cls) -> io.Schema:
        return io.Schema(
            node_id="LikenessLoadFlashFace",
            display_name="Load FlashFace",
            category="likeness/loaders",
            description="Loads a FlashFace checkpoint: the fine-tuned SD1.5 model, and the reference UNet that reads "
            "the faces for Apply Identity (Reference). Use the text encoder and the VAE of any SD1.5 checkpoint.",
            search_aliases=["flashface", "reference net"],
            inputs=[
                io.Combo.Input(
                    "file", options=files.list_weight_files(FLASHFACE_FOLDER),
                    tooltip="Checkpoint from models/likeness: flashface.ckpt, a safetensors, inpainting or LoRA "
                    "version of it, or a file that you trained.",
                ),
                io.Model.Input(
                    "model", optional=True,
                    tooltip="The SD1.5 base model. Only for files without a main UNet: LoRA versions and files that "
                    "you trained.",
                ),
                CACHE_INPUT,
            ],
            outputs=[
                io.Model.Output(display_name="model", tooltip="An SD1.5 model. It also works without a reference."),
                types.ReferenceNetSocket.Output(display_name="reference_net"),
            ],
        )  # fmt: skip

    @classmethod
    def fingerprint_inputs(
        cls, file: str, model: ModelPatcher | None = None, cache: int = 1024
    ) -> tuple[tuple[int, int], int]:
        return files.get_file_signature(files.find_model_file(file, FLASHFACE_FOLDER)), cache

    @classmethod
    def execute(cls, file: str, model: ModelPatcher | None = None, cache: int = 1024) -> io.NodeOutput:
        return io.NodeOutput(*load_flashface(file, model, cache * BYTES_PER_MIB))


class ModelAsReferenceNet(io.ComfyNode):
    @classmethod
    def define_schema(cls) -> io.Schema:
        return io.Schema(
            node_id="LikenessModelAsReferenceNet",
            display_name="Model as Reference Net",
            category="likeness/loaders",
            description="Uses any SD1.5 model as the reference net of Apply Identity (Reference), without training "
            "('reference only'): the image's self-attentions also attend to this model's features of the faces.",
            search_aliases=["reference only"],
            inputs=[
                io.Model.Input("model", tooltip="An SD1.5 model: the one that generates the image, or another."),
                CACHE_INPUT,
            ],
            outputs=[types.ReferenceNetSocket.Output(display_name="reference_net")],
        )

    @classmethod
    def execute(cls, model: ModelPatcher, cache: int = 1024) -> io.NodeOutput:
        return io.NodeOutput(
            types.LoadedReferenceNet(model, None, model_management.make_feature_cache(cache * BYTES_PER_MIB), "a model")
        )


NODES = [LoadFlashFace, ModelAsReferenceNet]
