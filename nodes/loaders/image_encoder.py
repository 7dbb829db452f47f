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

from ...likeness import clip, keymaps
from .. import types
from . import files

Layers = dict[str, Tensor]


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
        x = tower._embeds(pixels.to(tower.conv1.weight.dtype))
        hidden: list[Tensor] = []
        for block in tower.transformer.resblocks:
            hidden.append(x)
            x = block(x)
        pooled, _ = tower._pool(x)
        device = comfy.model_management.intermediate_device()
        made = {"projected": pooled @ tower.proj, "penultimate": hidden[-1], "last": x}
        return {name: value.float().to(device) for name, value in made.items()}


def load(file: str) -> OpenClipEncoder:
    """The vision tower of an OpenCLIP checkpoint, its architecture read from the weights. Raises ValueError."""
    try:
        from open_clip.transformer import VisionTransformer
    except ImportError as error:
        raise ValueError(
            f"got no open_clip ({error}); expected open_clip_torch beside ComfyUI; "
            "run pip install -r requirements.txt in this pack's folder with ComfyUI's Python"
        ) from error
    path = files.find(file, "clip_vision")
    tensors = files.read(path)
    weights = keymaps.under(tensors, "visual.") or keymaps.under(tensors, "module.visual.")
    try:
        width, _, patch, _ = weights["conv1.weight"].shape
        positions = weights["positional_embedding"].shape[0]
        inner = weights["transformer.resblocks.0.mlp.c_fc.weight"].shape[0]
        layers = len({key.split(".")[2] for key in weights if key.startswith("transformer.resblocks.")})
        embed = weights["proj"].shape[1]
    except (KeyError, ValueError, IndexError) as error:
        raise ValueError(
            f"got {file}, which misses {error}; expected an OpenCLIP checkpoint with visual.* weights of a vision "
            "transformer; files in the transformers layout are for ComfyUI's own Load CLIP Vision"
        ) from error
    size = round((positions - 1) ** 0.5) * patch
    heads = width // clip.HEAD_WIDTHS.get(width, 64)
    with torch.device("meta"):
        tower = VisionTransformer(size, patch, width, layers, heads, inner / width, output_dim=embed)
    try:
        keymaps.load(tower, weights)
    except ValueError as error:
        raise ValueError(f"got {file}: {error}") from error
    tower.eval().requires_grad_(False)
    mm = comfy.model_management
    if mm.should_use_fp16(mm.text_encoder_device()) is False:
        tower.float()  # half precision is slow or missing on this device
    patcher = ModelPatcher(tower, mm.text_encoder_device(), mm.text_encoder_offload_device())
    return OpenClipEncoder(clip.architecture(width, layers, patch, size), files.sha256(path), patcher, size)


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
            ],
            outputs=[types.ImageEncoder.Output(display_name="image_encoder")],
        )

    @classmethod
    def fingerprint_inputs(cls, file: str) -> tuple[int, int]:
        return files.signature(files.find(file, "clip_vision"))

    @classmethod
    def execute(cls, file: str) -> io.NodeOutput:
        return io.NodeOutput(load(file))


NODES = [LoadImageEncoder]
