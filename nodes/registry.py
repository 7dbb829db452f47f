"""The pack's nodes, gathered for the host."""

from __future__ import annotations

from comfy_api.latest import ComfyExtension, io

from . import attention_map, encode, evaluate, identity, measure, people, prompt, schedule
from .attention import decoupled, fused, mixed, reference
from .loaders import adaface, adapter, demo, face_analyzer, files, flashface, image_encoder, omni_id
from .loaders import fused as fused_loader

STAGES = (
    demo, face_analyzer, image_encoder, omni_id, adapter, flashface, fused_loader, adaface, encode, identity, measure,
    evaluate, people, attention_map, decoupled, reference, fused, mixed, prompt, schedule,
)  # fmt: skip
NODES: list[type[io.ComfyNode]] = [node for stage in STAGES for node in stage.NODES]


class Likeness(ComfyExtension):
    async def on_load(self) -> None:
        files.register()

    async def get_node_list(self) -> list[type[io.ComfyNode]]:
        return NODES
