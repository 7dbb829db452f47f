"""The pack's nodes, gathered for the host."""

from __future__ import annotations

from comfy_api.latest import ComfyExtension, io

from . import attention, encode, identity, loaders, measure
from .loaders import files

NODES: list[type[io.ComfyNode]] = [*loaders.NODES, *encode.NODES, *identity.NODES, *measure.NODES, *attention.NODES]


class Likeness(ComfyExtension):
    async def on_load(self) -> None:
        files.register()

    async def get_node_list(self) -> list[type[io.ComfyNode]]:
        return NODES
