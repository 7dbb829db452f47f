"""Load Image Encoder: the vision tower of an OpenCLIP checkpoint, through open_clip_torch."""

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
from . import care, files, towers

Layers = dict[str, Tensor]
ACTIVATIONS = ("auto", "gelu", "quick_gelu")
EXPECTED = (
    "an OpenCLIP checkpoint with visual.* weights of a vision transformer; files in the transformers layout are for "
    "ComfyUI's own Load CLIP Vision"
)


@dataclass(frozen=True, eq=False)
class OpenClipEncoder:
    """The vision tower of an OpenCLIP checkpoint, under the host's care."""

    architecture: str
    sha256: str
    patcher: ModelPatcher
    size: int

    def encode(self, pictures: Tensor) -> Layers:
        return self._run(clip_preprocess(pictures[..., :3].to(self.patcher.load_device), size=self.size))

    def zero(self) -> Layers:
        return self._run(torch.zeros(1, 3, self.size, self.size, device=self.patcher.load_device))

    def _run(self, pixels: Tensor) -> Layers:
        comfy.model_management.load_model_gpu(self.patcher)
        tower: Any = self.patcher.model
        out = tower.forward_intermediates(
            pixels.to(tower.conv1.weight.dtype), indices=2, output_fmt="NLC", output_extra_tokens=True
        )
        patches, heads = out["image_intermediates"], out["image_intermediates_prefix"]
        penultimate, last = (torch.cat(pair, dim=1) for pair in zip(heads, patches, strict=True))
        device = comfy.model_management.intermediate_device()
        made = {"projected": out["image_features"], "penultimate": penultimate, "last": last}
        return {name: value.float().to(device) for name, value in made.items()}


def load(file: str, activation: str = "auto") -> OpenClipEncoder:
    """The vision tower of an OpenCLIP checkpoint, its architecture read from the weights. Raises ValueError."""
    path = files.find(file, "clip_vision")
    tensors = files.read(path)
    weights = keymaps.under(tensors, "visual.") or keymaps.under(tensors, "module.visual.")
    tower = towers.build(weights, file, EXPECTED, activation)
    try:
        keymaps.load(tower.module, weights)
    except ValueError as error:
        raise ValueError(f"got {file}: {error}") from error
    return OpenClipEncoder(tower.name, files.sha256(path), care.encoder_of(tower.module), tower.size)


class LoadImageEncoder(io.ComfyNode):
    @classmethod
    def define_schema(cls) -> io.Schema:
        return io.Schema(
            node_id="LikenessLoadImageEncoder",
            display_name="Load Image Encoder (OpenCLIP)",
            category="likeness/loaders",
            description="Loads the image half of an OpenCLIP checkpoint (visual.* weights), which ComfyUI's own "
            "Load CLIP Vision may not know. The architecture is read from the weights.",
            search_aliases=["clip vision", "open_clip"],
            inputs=[
                io.Combo.Input(
                    "file",
                    options=files.names("clip_vision"),
                    tooltip="OpenCLIP checkpoint in models/clip_vision (.safetensors, .bin or .pt).",
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
