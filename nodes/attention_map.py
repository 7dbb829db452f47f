"""Omni-ID Attention Map: where in the photos an Omni-ID encoder's learned queries look."""

from __future__ import annotations

import torch
from comfy_api.latest import io
from torch import Tensor

from ..likeness import draw
from ..likeness import omni_id as math
from ..likeness.spec import Identity
from . import types

MOST = -1
ACROSS = 16  # photos in a row of the contact sheet


def sheet(pictures: Tensor, maps: Tensor, count: int) -> Tensor:
    """The `count` queries that look at the least, a row each with its number, [1, H, W, 3]."""
    rows: list[Tensor] = []
    for query in math.selectivity(maps).argsort(descending=True, stable=True)[:count].tolist():
        first, *others = draw.heated(pictures[:ACROSS], maps[query, :ACROSS])
        rows.append(torch.cat([draw.labelled(first, str(query)), *others], dim=1))
    return torch.cat(rows)[None]


class OmniIDAttentionMap(io.ComfyNode):
    @classmethod
    def define_schema(cls) -> io.Schema:
        return io.Schema(
            node_id="LikenessAttentionMap",
            display_name="Omni-ID Attention Map",
            category="likeness/face",
            description="Shows where in an identity's photos an Omni-ID encoder's queries look: one query in every "
            "photo, or the queries that look at the smallest parts.",
            search_aliases=["attention visualization", "heatmap", "omni id"],
            inputs=[
                types.OmniID.Input("omni_id", tooltip="From Load Omni-ID Encoder; the one that made the tokens."),
                types.Identity.Input("identity", tooltip="Whose photos; needs its face crops."),
                io.Int.Input(
                    "query", default=MOST, min=MOST, max=255,
                    tooltip="Which of the 256 queries, 0 to 255: a picture for each photo. -1: a sheet of those that "
                    "look at the smallest parts, a row each.",
                ),
                io.Int.Input(
                    "count", default=8, min=1, max=64, optional=True,
                    tooltip="Rows of the sheet, 1 to 64; each shows the first 16 photos.",
                ),
            ],
            outputs=[io.Image.Output(display_name="image")],
        )  # fmt: skip

    @classmethod
    def execute(cls, omni_id: types.OmniEncoder, identity: Identity, query: int, count: int = 8) -> io.NodeOutput:
        if not MOST <= query < omni_id.spec.tokens:
            raise ValueError(
                f"got query {query} for an encoder of {omni_id.spec.tokens}; expected 0 to {omni_id.spec.tokens - 1}, "
                "or -1 for the sheet"
            )
        pictures, weight = math.stored([identity], omni_id.spec.image_size)
        maps = omni_id.maps(pictures, weight)
        if query == MOST:
            return io.NodeOutput(sheet(pictures, maps, count))
        return io.NodeOutput(draw.heated(pictures, maps[query]))


NODES = [OmniIDAttentionMap]
