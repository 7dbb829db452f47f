"""Fused KV adapters: from a file of the pack's own, or from a model itself, without training."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import comfy.model_management
import comfy.ops
import comfy.utils
import torch
from comfy.model_patcher import ModelPatcher
from comfy_api.latest import io
from torch import Tensor

from ...likeness import detect
from ...likeness import fused as math
from ...likeness.spec import FusedSpec
from .. import types
from . import care


def build(spec: FusedSpec, tensors: Mapping[str, Tensor], file: str) -> types.LoadedFused:
    """An adapter whose weights the host cares for. Raises ValueError where tensors are missing or misshapen."""
    patcher = care.patcher_of(math.build(spec, tensors, comfy.ops.manual_cast))
    return types.LoadedFused(spec, patcher, care.bank_of(care.DEFAULT), file)


def load(tensors: Mapping[str, Tensor], told: Mapping[str, Any], file: str) -> tuple[types.LoadedFused, str]:
    """An adapter of a file's tensors and metadata, and a report. Raises ValueError (see math.read_spec)."""
    spec = math.read_spec(tensors, told, file)
    base = detect.base_name(spec.base, tensors["text.hidden"].shape[-1])
    notes = "; ".join(f"{key}: {value}" for key, value in spec.notes.items()) or "nothing said"
    lines = [
        f"{file}: fused KV for {base}, {len(spec.layers)} cross-attentions",
        f"Faces of {spec.face_size} pixels, noise: {spec.stream_noise}. Training: {notes}.",
        "Needs identities with face crops, and Apply Identity (Fused KV).",
    ]
    return build(spec, tensors, file), "\n".join(lines)


def zero_shot(model: ModelPatcher, text: list[Any], stream_noise: str) -> tuple[FusedSpec, dict[str, Tensor]]:
    """Spec and tensors of an adapter made of a model's own attentions (math.zero_shot). Raises ValueError."""
    blocks = {
        path: block
        for path, block in model.model.diffusion_model.named_modules()
        if hasattr(block, "attn1") and hasattr(block, "attn2")
    }
    if len(blocks) not in detect.BASES:
        raise ValueError(
            f"got a model with {len(blocks)} cross-attentions; expected an SD1.5 or SDXL model, with 16 or 70; "
            "load one of these"
        )
    tensors = {"text.hidden": text[0][0][:1].float().cpu()[0]}
    pooled = text[0][1].get("pooled_output")
    if pooled is not None and model.model.diffusion_model.num_classes is not None:
        tensors["text.pooled"] = pooled[:1].float().cpu()
    layers: dict[str, int] = {}
    bar = comfy.utils.ProgressBar(len(blocks))
    for path, block in blocks.items():
        comfy.model_management.throw_exception_if_processing_interrupted()
        a, b = block.attn1, block.attn2
        modules = {"q1": a.to_q, "k1": a.to_k, "v1": a.to_v, "o1": a.to_out[0], "q2": b.to_q, "o2": b.to_out[0]}
        own = {name: module.weight.detach().to("cpu", copy=False) for name, module in modules.items()}
        to_k, to_v = math.zero_shot(own, block.n_heads)
        tensors |= {f"{path}.attn2.to_k_f.weight": to_k, f"{path}.attn2.to_v_f.weight": to_v}
        layers[path] = len(to_k)
        bar.update(1)
    notes = {"init": "zero shot"}
    return FusedSpec(detect.BASES[len(blocks)], stream_noise, math.FACE_SIZE, layers, notes), tensors


class ZeroShotFused(io.ComfyNode):
    @classmethod
    def define_schema(cls) -> io.Schema:
        return io.Schema(
            node_id="LikenessZeroShotFused",
            display_name="Zero-Shot Fused KV",
            category="likeness/loaders",
            description="Makes a fused KV adapter of a model's own attentions, without any training or file: less "
            "faithful than a trained one, and a start for training.",
            search_aliases=["fusion", "training-free"],
            inputs=[
                io.Model.Input("model", tooltip="SD1.5 or SDXL model whose own weights are taken, without its LoRAs."),
                io.Conditioning.Input("text", tooltip="The empty prompt, by CLIP Text Encode: faces are read with it."),
                io.Combo.Input(
                    "stream_noise", options=list(math.NOISES), default="match",
                    tooltip="match: the faces are as noisy as the picture, and read at every step. clean: they are "
                    "read once, without noise; from then on they cost nearly nothing.",
                ),
            ],
            outputs=[types.Adapter.Output(display_name="adapter")],
        )  # fmt: skip

    @classmethod
    def execute(cls, model: ModelPatcher, text: list[Any], stream_noise: str) -> io.NodeOutput:
        with torch.no_grad():
            spec, tensors = zero_shot(model, text, stream_noise)
        return io.NodeOutput(build(spec, tensors, "zero shot"))


NODES = [ZeroShotFused]
