"""Load Image Encoder: the vision tower of an OpenCLIP, EVA-CLIP or SigLIP checkpoint."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import comfy.model_management
import torch
from comfy.clip_model import clip_preprocess
from comfy.model_patcher import ModelPatcher
from comfy_api.latest import io
from torch import Tensor

from ...likeness.checkpoints import file_kinds, key_maps
from .. import types
from . import files, model_management
from .vision_towers import LayerOutputs, VisionTower, build_vision_tower

VISION_PREFIXES = ("visual.", "module.visual.", "vision_model.")  # the last is SigLIP in transformers' layout
ACTIVATION_OPTIONS = ("auto", "gelu", "quick_gelu")


@dataclass(frozen=True, eq=False)
class OpenClipEncoder:
    """The vision tower of an OpenCLIP, EVA-CLIP or SigLIP checkpoint, in a ModelPatcher."""

    tower: VisionTower
    sha256: str
    patcher: ModelPatcher

    @property
    def architecture(self) -> str:
        return self.tower.architecture

    @property
    def family(self) -> str:
        return self.tower.family

    def encode(self, images: Tensor) -> LayerOutputs:
        images = images[..., :3].to(self.patcher.load_device)
        return self._run_tower(clip_preprocess(images, size=self.tower.image_size, **self.tower.preprocess_options))

    def encode_zero_image(self) -> LayerOutputs:
        if not self.tower.reads_zero_image:
            return {}
        size = self.tower.image_size
        return self._run_tower(torch.zeros(1, 3, size, size, device=self.patcher.load_device))

    def _run_tower(self, pixels: Tensor) -> LayerOutputs:
        comfy.model_management.load_model_gpu(self.patcher)
        network: Any = self.patcher.model
        outputs = self.tower.run_layers(network, pixels.to(next(network.parameters()).dtype))
        device = comfy.model_management.intermediate_device()
        return {name: value.float().to(device) for name, value in outputs.items()}


def load_image_encoder(file: str, activation: str = "auto") -> OpenClipEncoder:
    """Load a vision tower. The architecture is detected from the weights.

    Raises ValueError if the file is damaged or of another layout.
    """
    path = files.find_model_file(file, "clip_vision")
    tensors = files.load_weights(path, file_kinds.IMAGE_ENCODER)
    candidates = (key_maps.select_prefix(tensors, prefix) for prefix in VISION_PREFIXES)
    weights = next((weights for weights in candidates if weights), {})
    tower = build_vision_tower(weights, path.name, activation)
    try:
        key_maps.load_module_weights(tower.module, tower.weights)
    except ValueError as error:
        raise ValueError(f"got {file}: {error}") from error
    return OpenClipEncoder(tower, files.hash_file(path), model_management.make_encoder_patcher(tower.module))


class LoadImageEncoder(io.ComfyNode):
    @classmethod
    def define_schema(cls) -> io.Schema:
        return io.Schema(
            node_id="LikenessLoadImageEncoder",
            display_name="Load Image Encoder (OpenCLIP)",
            category="likeness/loaders",
            description="Loads the vision tower of an OpenCLIP or EVA-CLIP checkpoint (visual.* weights), or SigLIP "
            "with its pooling head, which Load CLIP Vision may not support. The architecture is detected from the "
            "weights.",
            search_aliases=["clip vision", "open_clip", "eva clip", "siglip", "pulid"],
            inputs=[
                io.Combo.Input(
                    "file",
                    options=files.list_weight_files("clip_vision"),
                    tooltip="OpenCLIP, EVA-CLIP or SigLIP file in models/clip_vision (.safetensors, .bin or .pt).",
                ),
                io.Combo.Input(
                    "activation",
                    options=list(ACTIVATION_OPTIONS),
                    default="auto",
                    optional=True,
                    advanced=True,
                    tooltip="The GELU that the network was trained with, which the file does not state. auto: "
                    "quick_gelu for ViT-L/14-336 and for files named after OpenAI, DFN or MetaCLIP, otherwise gelu.",
                ),
            ],
            outputs=[types.ImageEncoderSocket.Output(display_name="image_encoder")],
        )

    @classmethod
    def fingerprint_inputs(cls, file: str, activation: str = "auto") -> tuple[int, int]:
        return files.get_file_signature(files.find_model_file(file, "clip_vision"))

    @classmethod
    def execute(cls, file: str, activation: str = "auto") -> io.NodeOutput:
        return io.NodeOutput(load_image_encoder(file, activation))


NODES = [LoadImageEncoder]
