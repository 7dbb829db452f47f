"""ComfyUI-Likeness: keeps a person recognizable in generated images. ComfyUI calls `comfy_entrypoint`."""

from __future__ import annotations

from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from comfy_api.latest import ComfyExtension

WEB_DIRECTORY = "./web"


async def comfy_entrypoint() -> ComfyExtension:
    """Give the host the pack's nodes."""
    from .nodes.registry import LikenessExtension

    return LikenessExtension()
