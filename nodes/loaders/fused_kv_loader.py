"""Fused KV adapters from files in the native format, and Zero-Shot Fused KV: from a model, without training."""

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

from ...likeness.checkpoints import checkpoint_detection
from ...likeness.methods import fused_kv
from ...likeness.spec import FusedKVSpec
from .. import types
from . import model_management
from .native_adapters import format_training_notes

# Name in fused_kv.solve_zero_shot_projections -> name in a transformer block.
ZERO_SHOT_WEIGHTS = {
    "q1": "attn1.to_q.weight", "k1": "attn1.to_k.weight", "v1": "attn1.to_v.weight", "o1": "attn1.to_out.0.weight",
    "q2": "attn2.to_q.weight", "o2": "attn2.to_out.0.weight",
}  # fmt: skip


def make_loaded_fused_kv(spec: FusedKVSpec, tensors: Mapping[str, Tensor], file: str) -> types.LoadedFusedKV:
    """Build an adapter from tensors. Raises ValueError if tensors are missing or misshapen."""
    patcher = model_management.make_model_patcher(fused_kv.build_fused_kv_adapter(spec, tensors, comfy.ops.manual_cast))
    feature_cache = model_management.make_feature_cache(model_management.FEATURE_CACHE_BYTES)
    return types.LoadedFusedKV(spec, patcher, feature_cache, file)


def load_fused_kv(
    tensors: Mapping[str, Tensor], metadata: Mapping[str, Any], file: str
) -> tuple[types.LoadedFusedKV, str]:
    """Build an adapter from a file's tensors and metadata, with a report.

    Raises ValueError (see fused_kv.read_fused_kv_spec).
    """
    spec = fused_kv.read_fused_kv_spec(tensors, metadata, file)
    base = checkpoint_detection.get_base_name(spec.base, tensors["text.hidden"].shape[-1])
    lines = [
        f"{file}: fused KV for {base}, {len(spec.layers)} cross-attentions",
        f"Face size {spec.face_size} pixels, noise: {spec.stream_noise}. "
        f"Training: {format_training_notes(spec.notes)}.",
        "Needs identities with face crops, and Apply Identity (Fused KV).",
    ]
    return make_loaded_fused_kv(spec, tensors, file), "\n".join(lines)


def make_zero_shot_fused_kv(
    model: ModelPatcher, text: list[Any], stream_noise: str
) -> tuple[FusedKVSpec, dict[str, Tensor]]:
    """Spec and tensors of an adapter made from the model's own attentions, without training.

    See fused_kv.solve_zero_shot_projections. LoRAs and hooks of the model are left out. Raises ValueError if the model
    is not SD1.5 or SDXL, or if its weights cannot be read.
    """
    blocks = {
        path: block
        for path, block in model.model.diffusion_model.named_modules()
        if hasattr(block, "attn1") and hasattr(block, "attn2")
    }
    if len(blocks) not in checkpoint_detection.BASES_BY_LAYER_COUNT:
        raise ValueError(
            f"got a model with {len(blocks)} cross-attentions; expected an SD1.5 or SDXL model, with 16 or 70; "
            "connect one of these"
        )
    tensors = {"text.hidden": text[0][0][:1].float().cpu()[0]}
    pooled = text[0][1].get("pooled_output")
    if pooled is not None and model.model.diffusion_model.num_classes is not None:
        tensors["text.pooled"] = pooled[:1].float().cpu()
    layers: dict[str, int] = {}
    progress_bar = comfy.utils.ProgressBar(len(blocks))
    for path, block in blocks.items():
        comfy.model_management.throw_exception_if_processing_interrupted()
        weights = {
            name: model_management.read_unpatched_weight(model, f"diffusion_model.{path}.{weight}")
            for name, weight in ZERO_SHOT_WEIGHTS.items()
        }
        to_k, to_v = fused_kv.solve_zero_shot_projections(weights, block.n_heads)
        tensors |= {f"{path}.attn2.to_k_f.weight": to_k, f"{path}.attn2.to_v_f.weight": to_v}
        layers[path] = len(to_k)
        progress_bar.update(1)
    base = checkpoint_detection.BASES_BY_LAYER_COUNT[len(blocks)]
    spec = FusedKVSpec(base, stream_noise, fused_kv.DEFAULT_FACE_SIZE, layers, {"init": "zero shot"})
    return spec, tensors


class ZeroShotFusedKV(io.ComfyNode):
    @classmethod
    def define_schema(cls) -> io.Schema:
        return io.Schema(
            node_id="LikenessZeroShotFused",
            display_name="Zero-Shot Fused KV",
            category="likeness/loaders",
            description="Makes a fused KV adapter from the attention weights of a model, without training and "
            "without a file. It preserves identity less well than a trained adapter, and can initialize training.",
            search_aliases=["fusion", "training-free"],
            inputs=[
                io.Model.Input("model", tooltip="SD1.5 or SDXL model. Its LoRAs are not used."),
                io.Conditioning.Input(
                    "text", tooltip="An empty prompt from CLIP Text Encode, for the pass over the faces."
                ),
                io.Combo.Input(
                    "stream_noise", options=list(fused_kv.STREAM_NOISES), default="match",
                    tooltip="match: the faces have the noise level of the image and are processed at every step. "
                    "clean: they are processed once, without noise, which is faster.",
                ),
            ],
            outputs=[types.AdapterSocket.Output(display_name="adapter")],
        )  # fmt: skip

    @classmethod
    def execute(cls, model: ModelPatcher, text: list[Any], stream_noise: str) -> io.NodeOutput:
        with torch.no_grad():
            spec, tensors = make_zero_shot_fused_kv(model, text, stream_noise)
        return io.NodeOutput(make_loaded_fused_kv(spec, tensors, "zero shot"))


NODES = [ZeroShotFusedKV]
