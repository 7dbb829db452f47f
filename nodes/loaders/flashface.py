"""Load FlashFace, and any SD1.5 model as a reference net: two UNets of the host's own kind, under the host's care."""

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

from ...likeness import flashface as math
from ...likeness import keymaps, own_flashface
from ...likeness.bank import MemoryBank
from ...likeness.spec import FlashFaceSpec
from .. import types
from ..attention.added import with_added
from . import care, files

FOLDER = "likeness"
MIB = 1 << 20


Given = Mapping[str, Any]  # what the host knows when it asks for further input channels
Loaded = tuple[ModelPatcher, types.LoadedReferenceNet]
WRONG_BASE = {
    True: ("which brings no UNet that paints", "a base model for it", "connect an SD1.5 model"),
    False: ("which brings its own UNet", "no base model", "disconnect the model"),
}


def _no_position(_model: comfy.model_base.BaseModel, given: Given) -> Tensor:
    """The face may be anywhere: zeros [B, 1, h, w]."""
    return torch.zeros_like(given["noise"][:, :1])


def _inpainting(model: comfy.model_base.BaseModel, given: Given) -> Tensor:
    """The latent without the face, and where the face shall be [B, 4 + 1, h, w] (Sec. 3.2)."""
    out = comfy.model_base.BaseModel.concat_cond(model, **given)
    assert out is not None
    return torch.cat((out[:, :4] * (1 - out[:, 4:]), out[:, 4:]), 1)


# What a UNet reads beside the noisy latent, by the number of its input channels.
CHANNELS: dict[int, Callable[[comfy.model_base.BaseModel, Given], Tensor]] = {5: _no_position, 9: _inpainting}


@dataclass(frozen=True, eq=False)
class InputChannels:
    """Stands in for the host's `concat_cond`, which knows no face position."""

    model: comfy.model_base.BaseModel
    make: Callable[[comfy.model_base.BaseModel, Given], Tensor]

    def __call__(self, **given: Any) -> Tensor:
        return self.make(self.model, given)


def host_model(tensors: Mapping[str, Tensor], heads: int = FlashFaceSpec.heads) -> ModelPatcher:
    """A MODEL of the host with these weights, under the host's names; their dtype stays."""
    config = comfy.supported_models.SD15(comfy.model_detection.detect_unet_config(dict(tensors), "") or {})
    config.unet_config["num_heads"] = heads  # which no shape tells
    device, dtype = comfy.model_management.get_torch_device(), next(iter(tensors.values())).dtype
    cast = comfy.model_management.unet_manual_cast(dtype, device, config.supported_inference_dtypes)
    config.set_inference_dtype(dtype, cast)
    try:
        model = comfy.model_base.BaseModel(config, device=torch.device("meta"))  # its weights come whole
    except Exception as error:  # the host builds what it detects, and fails anyhow where that is no UNet
        raise ValueError(
            f"got {len(tensors)} tensors that make no UNet ({type(error).__name__}); expected those of SD1.5's, whole; "
            "download the file again"
        ) from error
    keymaps.load(model.diffusion_model, tensors)
    for module in model.diffusion_model.modules():
        if isinstance(module, nn.GroupNorm):
            module.eps = math.EPS
    model.diffusion_model.eval().requires_grad_(False)
    return ModelPatcher(model, device, comfy.model_management.unet_offload_device())


def host_dtype(tensors: Mapping[str, Tensor]) -> torch.dtype:
    """The dtype in which the host would keep a UNet that comes in this one."""
    return comfy.model_management.unet_dtype(
        model_params=sum(value.numel() for value in tensors.values()),
        supported_dtypes=list(comfy.supported_models.SD15.supported_inference_dtypes),
        weight_dtype=comfy.utils.weight_dtype(dict(tensors)),
    )


def build(
    tensors: Mapping[str, Tensor],
    file: str,
    bank: MemoryBank,
    base: ModelPatcher | None = None,
    told: Mapping[str, Any] | None = None,
) -> Loaded:
    """MODEL and REFERENCE_NET of a checkpoint's tensors, and of the metadata of the pack's own files.

    Raises ValueError on any other file (see `math.parts`, `own_flashface.read`).
    """
    dtype = host_dtype(tensors)
    tensors = {key: value.to(dtype) for key, value in tensors.items()}
    spec, found = (FlashFaceSpec(), math.parts(tensors)) if told is None else own_flashface.read(tensors, told, file)
    if (found.main is None) != (base is not None):
        got, wants, do = WRONG_BASE[base is None]
        raise ValueError(f"got {file}, {got}; expected {wants}; {do}")
    added = care.patcher_of(math.AddedLayers(found.added, comfy.ops.manual_cast))
    net = types.LoadedReferenceNet(host_model(found.reference, spec.heads), added, bank, file, spec)
    model = with_lora(base, found.lora) if base is not None else main_model(found, spec)
    return with_added(model, added), net


def main_model(found: math.Parts, spec: FlashFaceSpec) -> ModelPatcher:
    assert found.main is not None
    return with_place(host_model(found.main, spec.heads))


def with_place(model: ModelPatcher) -> ModelPatcher:
    """The same, reading the face's place in its further input channels. Raises ValueError on other channels."""
    channels = model.model.model_config.unet_config["in_channels"]
    if channels not in CHANNELS:
        raise ValueError(f"got a UNet of {channels} input channels; expected {' or '.join(map(str, CHANNELS))}")
    model.model.set_inpaint()
    model.model.concat_keys = ("masked_image", "mask")  # as the paper stacks them; read with 9 channels alone
    model.add_object_patch("concat_cond", InputChannels(model.model, CHANNELS[channels]))
    return model


def with_lora(base: ModelPatcher, lora: Mapping[str, Tensor]) -> ModelPatcher:
    named = {f"diffusion_model.{key}": value for key, value in lora.items()}
    model, _ = comfy.sd.load_lora_for_models(base, None, named, 1.0, 0.0)
    assert model is not None  # as a model was given
    return model


def load(file: str, base: ModelPatcher | None, limit: int) -> Loaded:
    """Read a FlashFace checkpoint; its bank may take `limit` bytes. Raises ValueError (see `files.read`, `build`)."""
    path = files.find(file, FOLDER)
    return build(files.read(path), file, care.bank_of(limit), base, files.told(path))


CACHE = io.Int.Input(
    "cache", default=1024, min=0, max=65536, step=64, optional=True, advanced=True,
    tooltip="Memory in MiB for what the reference net saw of the faces: from the second picture of a person on it does "
    "not run again. 10 MiB per step in half precision; the longest unused goes first; 0 keeps nothing.",
)  # fmt: skip


class LoadFlashFace(io.ComfyNode):
    @classmethod
    def define_schema(cls) -> io.Schema:
        return io.Schema(
            node_id="LikenessLoadFlashFace",
            display_name="Load FlashFace",
            category="likeness/loaders",
            description="Loads a FlashFace checkpoint: the fine-tuned SD1.5 model, and the second UNet that reads the "
            "faces for Apply Identity (Reference). Text encoder and VAE are SD1.5's, from any checkpoint.",
            search_aliases=["flashface", "reference net"],
            inputs=[
                io.Combo.Input(
                    "file", options=files.names(FOLDER),
                    tooltip="Checkpoint from models/likeness: flashface.ckpt, its safetensors, an inpainting or a LoRA "
                    "version, or one of your own training.",
                ),
                io.Model.Input(
                    "model", optional=True,
                    tooltip="For files without a UNet that paints (LoRA versions, own trainings): the SD1.5 model to "
                    "put them into.",
                ),
                CACHE,
            ],
            outputs=[
                io.Model.Output(display_name="model", tooltip="Paints like any SD1.5 model, without a reference too."),
                types.ReferenceNet.Output(display_name="reference_net"),
            ],
        )  # fmt: skip

    @classmethod
    def fingerprint_inputs(
        cls, file: str, model: ModelPatcher | None = None, cache: int = 1024
    ) -> tuple[tuple[int, int], int]:
        return files.signature(files.find(file, FOLDER)), cache

    @classmethod
    def execute(cls, file: str, model: ModelPatcher | None = None, cache: int = 1024) -> io.NodeOutput:
        return io.NodeOutput(*load(file, model, cache * MIB))


class ModelAsReferenceNet(io.ComfyNode):
    @classmethod
    def define_schema(cls) -> io.Schema:
        return io.Schema(
            node_id="LikenessModelAsReferenceNet",
            display_name="Model as Reference Net",
            category="likeness/loaders",
            description="Lets any SD1.5 model read the faces for Apply Identity (Reference), without training "
            "('reference only'): the picture's own self-attentions look at what this model sees.",
            search_aliases=["reference only"],
            inputs=[
                io.Model.Input("model", tooltip="An SD1.5 model; the one that paints, or another."),
                CACHE,
            ],
            outputs=[types.ReferenceNet.Output(display_name="reference_net")],
        )

    @classmethod
    def execute(cls, model: ModelPatcher, cache: int = 1024) -> io.NodeOutput:
        return io.NodeOutput(types.LoadedReferenceNet(model, None, care.bank_of(cache * MIB), "a model"))


NODES = [LoadFlashFace, ModelAsReferenceNet]
