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
ACTIVATIONS = ("auto", "gelu", "quick_gelu")


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
    try:
        from open_clip.transformer import QuickGELU, VisionTransformer
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
    name = clip.architecture(width, layers, patch, size)
    quick = clip.is_quick(name, path.name) if activation == "auto" else activation == "quick_gelu"
    ratio = (inner + 0.5) / width  # it comes back as int(width * ratio)
    act_layer = QuickGELU if quick else torch.nn.GELU
    with torch.device("meta"):
        tower = VisionTransformer(size, patch, width, layers, heads, ratio, output_dim=embed, act_layer=act_layer)
    try:
        keymaps.load(tower, weights)
    except ValueError as error:
        raise ValueError(f"got {file}: {error}") from error
    tower.eval().requires_grad_(False)
    mm = comfy.model_management
    if mm.should_use_fp16(mm.text_encoder_device()) is False:
        tower.float()  # half precision is slow or missing on this device
    patcher = ModelPatcher(tower, mm.text_encoder_device(), mm.text_encoder_offload_device())
    return OpenClipEncoder(name, files.sha256(path), patcher, size)


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
