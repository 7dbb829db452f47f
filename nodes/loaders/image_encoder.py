"""Load Image Encoder: the vision tower of an OpenCLIP or EVA-CLIP checkpoint, through open_clip_torch."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import comfy.model_management
import torch
from comfy.clip_model import clip_preprocess
from comfy.model_patcher import ModelPatcher
from comfy_api.latest import io
from torch import Tensor

from ...likeness import keymaps
from .. import types
from . import files
from .towers import Layers, Tower, tower_of

PREFIXES = ("visual.", "module.visual.", "vision_model.")  # the last is SigLIP's in the transformers layout
ACTIVATIONS = ("auto", "gelu", "quick_gelu")


@dataclass(frozen=True, eq=False)
class OpenClipEncoder:
    """The vision tower of an OpenCLIP or EVA-CLIP checkpoint, under the host's care."""

    tower: Tower
    sha256: str
    patcher: ModelPatcher

    @property
    def architecture(self) -> str:
        return self.tower.architecture

    @property
    def family(self) -> str:
        return self.tower.family

    def encode(self, pictures: Tensor) -> Layers:
        pictures = pictures[..., :3].to(self.patcher.load_device)
        return self._run(clip_preprocess(pictures, size=self.tower.size, **self.tower.pixels))

    def zero(self) -> Layers:
        size = self.tower.size
        return self._run(torch.zeros(1, 3, size, size, device=self.patcher.load_device)) if self.tower.zero else {}

    def _run(self, pixels: Tensor) -> Layers:
        comfy.model_management.load_model_gpu(self.patcher)
        network: Any = self.patcher.model
        made = self.tower.run(network, pixels.to(next(network.parameters()).dtype))
        device = comfy.model_management.intermediate_device()
        return {name: value.float().to(device) for name, value in made.items()}


def load(file: str, activation: str = "auto") -> OpenClipEncoder:
    """The vision tower of an OpenCLIP or EVA-CLIP checkpoint, its architecture read from the weights.

    Raises ValueError.
    """
    path = files.find(file, "clip_vision")
    tensors = files.read(path)
    found = (keymaps.under(tensors, prefix) for prefix in PREFIXES)
    weights = next((weights for weights in found if weights), {})
    tower = tower_of(weights, path.name, activation)
    try:
        keymaps.load(tower.module, tower.weights)
    except ValueError as error:
        raise ValueError(f"got {file}: {error}") from error
    module = tower.module.eval().requires_grad_(False)
    mm = comfy.model_management
    if mm.should_use_fp16(mm.text_encoder_device()) is False:
        module.float()  # half precision is slow or missing on this device
    patcher = ModelPatcher(module, mm.text_encoder_device(), mm.text_encoder_offload_device())
    return OpenClipEncoder(tower, files.sha256(path), patcher)


class LoadImageEncoder(io.ComfyNode):
    @classmethod
    def define_schema(cls) -> io.Schema:
        return io.Schema(
            node_id="LikenessLoadImageEncoder",
            display_name="Load Image Encoder (OpenCLIP)",
            category="likeness/loaders",
            description="Loads the image half of an OpenCLIP or EVA-CLIP checkpoint (visual.* weights), which "
            "ComfyUI's own Load CLIP Vision may not know, or SigLIP's with its pooling head. The architecture is read "
            "from the weights.",
            search_aliases=["clip vision", "open_clip", "eva clip", "siglip", "pulid"],
            inputs=[
                io.Combo.Input(
                    "file",
                    options=files.names("clip_vision"),
                    tooltip="OpenCLIP, EVA-CLIP or SigLIP file in models/clip_vision (.safetensors, .bin or .pt).",
                ),
                io.Combo.Input(
                    "activation",
                    options=list(ACTIVATIONS),
                    default="auto",
                    optional=True,
                    advanced=True,
                    tooltip="Which GELU the network was trained with; the weights do not say. auto: quick_gelu for "
                    "ViT-L/14-336 and for files named after OpenAI, DFN or MetaCLIP, else gelu.",
                ),
            ],
            outputs=[types.ImageEncoder.Output(display_name="image_encoder")],
        )

    @classmethod
    def fingerprint_inputs(cls, file: str, activation: str = "auto") -> tuple[int, int]:
        return files.signature(files.find(file, "clip_vision"))

    @classmethod
    def execute(cls, file: str, activation: str = "auto") -> io.NodeOutput:
        return io.NodeOutput(load(file, activation))


NODES = [LoadImageEncoder]
