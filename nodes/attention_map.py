"""Omni-ID Attention Map: shows where in the photos the learned queries of an Omni-ID encoder look."""

from __future__ import annotations

import torch
from comfy_api.latest import io
from torch import Tensor

from ..likeness.faces import drawing
from ..likeness.methods.omni_id import align_stored_faces, compute_selectivity
from ..likeness.spec import Identity
from . import types

CONTACT_SHEET = -1
MAX_SHEET_COLUMNS = 16  # photos in a row of the contact sheet


def draw_contact_sheet(images: Tensor, attention_maps: Tensor, count: int) -> Tensor:
    """Draw the `count` most selective queries, one numbered row each, [1, H, W, 3].

    `images` are [n, S, S, 3], `attention_maps` [queries, n, h, w].
    """
    queries = compute_selectivity(attention_maps).argsort(descending=True, stable=True)[:count].tolist()
    rows: list[Tensor] = []
    for query in queries:
        first, *others = drawing.overlay_heatmap(images[:MAX_SHEET_COLUMNS], attention_maps[query, :MAX_SHEET_COLUMNS])
        rows.append(torch.cat([drawing.draw_label(first, str(query)), *others], dim=1))
    return torch.cat(rows)[None]


class OmniIDAttentionMap(io.ComfyNode):
    @classmethod
    def define_schema(cls) -> io.Schema:
        return io.Schema(
            node_id="LikenessAttentionMap",
            display_name="Omni-ID Attention Map",
            category="likeness/face",
            description="Shows where the queries of an Omni-ID encoder look in the photos of an identity: one query in "
            "every photo, or a contact sheet of the most selective queries.",
            search_aliases=["attention visualization", "heatmap", "omni id"],
            inputs=[
                types.OmniIDSocket.Input(
                    "omni_id", tooltip="From Load Omni-ID Encoder: the encoder that made the identity's tokens."
                ),
                types.IdentitySocket.Input("identity", tooltip="The identity to look at. It needs its face crops."),
                io.Int.Input(
                    "query", default=CONTACT_SHEET, min=CONTACT_SHEET, max=255,
                    tooltip="Which of the 256 queries to show, 0 to 255: one image per photo. -1: a contact sheet of "
                    "the queries that attend to the smallest areas, one row each.",
                ),
                io.Int.Input(
                    "count", default=8, min=1, max=64, optional=True,
                    tooltip="Rows of the contact sheet, 1 to 64. Each row shows the first 16 photos.",
                ),
            ],
            outputs=[io.Image.Output(display_name="image")],
        )  # fmt: skip

    @classmethod
    def execute(
        cls, omni_id: types.OmniIDEncoderProtocol, identity: Identity, query: int, count: int = 8
    ) -> io.NodeOutput:
        num_queries = omni_id.spec.tokens
        if not CONTACT_SHEET <= query < num_queries:
            raise ValueError(
                f"got query {query} for an encoder with {num_queries} queries; expected 0 to {num_queries - 1}, "
                "or -1 for the contact sheet"
            )
        images, weight = align_stored_faces([identity], omni_id.spec.image_size)
        attention_maps = omni_id.compute_attention_maps(images, weight)
        if query == CONTACT_SHEET:
            return io.NodeOutput(draw_contact_sheet(images, attention_maps, count))
        return io.NodeOutput(drawing.overlay_heatmap(images, attention_maps[query]))


NODES = [OmniIDAttentionMap]
