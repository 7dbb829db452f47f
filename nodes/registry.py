"""Collects the pack's nodes for ComfyUI."""

from __future__ import annotations

from comfy_api.latest import ComfyExtension, io

from . import attention_map, encode, evaluate, host_contract, identity, measure, people, prompt, schedule
from .attention import apply_decoupled, apply_fused, apply_mixed
from .attention.flashface import apply_reference
from .loaders import (
    adaface_loader,
    adapter_loader,
    demo_loader,
    face_analyzer,
    files,
    flashface_loader,
    fused_kv_loader,
    image_encoder,
    omni_id_loader,
)

STAGE_MODULES = (
    demo_loader, face_analyzer, image_encoder, omni_id_loader, adapter_loader, flashface_loader, fused_kv_loader,
    adaface_loader, encode, identity, measure, evaluate, people, attention_map, apply_decoupled, apply_reference,
    apply_fused, apply_mixed, prompt, schedule,
)  # fmt: skip
NODES: list[type[io.ComfyNode]] = [node for stage in STAGE_MODULES for node in stage.NODES]


class LikenessExtension(ComfyExtension):
    async def on_load(self) -> None:
        host_contract.warn_about_mismatches()
        files.register_model_folders()

    async def get_node_list(self) -> list[type[io.ComfyNode]]:
        return NODES
