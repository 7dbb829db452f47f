"""Regions in a layer: who may appear at which of its queries, and what an artist should be told about a mask."""

from __future__ import annotations

import logging
from collections.abc import Sequence
from typing import Any

from torch import Tensor
from torch.nn.functional import pad

from ...likeness import regions
from .dit import CELLS
from .injection import HERE, WHOLE, Bank, Call


def grid(options: dict[str, Any]) -> tuple[int, int]:
    """The height and width of a layer. Raises ValueError where the model sees a part of the picture alone."""
    whole, here = options.get(WHOLE), options[HERE]
    if whole is not None and here != whole:
        raise ValueError(
            f"got a prompt for an area of {here[1]}x{here[0]} of a latent of {whole[1]}x{whole[0]}, and people with "
            "masks; expected prompts for the whole picture; give the prompt a mask instead of an area"
        )
    height, width = options[CELLS] if CELLS in options else options["activations_shape"][-2:]
    return height, width


def warn(masks: Sequence[Tensor | None], options: dict[str, Any], cells: bool) -> None:
    """Say which masks are of another shape than the picture, and which are too small for a layer's cells."""
    height, width = grid(options)
    tall, wide = options[HERE]
    for number, mask in enumerate(masks, 1):
        if mask is None:
            continue
        ratio = (mask.shape[2] * tall) / (mask.shape[1] * wide)
        if max(ratio, 1 / ratio) > regions.ASPECT:
            logging.warning(
                "Likeness: the mask of person %d is %dx%d and is stretched over a picture of another shape (%dx%d)",
                number, mask.shape[2], mask.shape[1], 8 * wide, 8 * tall,
            )  # fmt: skip
        if cells and regions.vanishes(mask, height, width):
            logging.warning(
                "Likeness: the mask of person %d covers half of no cell where layers are %dx%d; the cells it covers "
                "most count there; enlarge it for a surer place", number, width, height,
            )  # fmt: skip


def visible(bank: Bank, masks: Sequence[Tensor | None], outside: str, options: dict[str, Any]) -> Sequence[Any]:
    """Which queries of a layer may see each person's keys (regions.visible); None: all of them. Once per run."""
    if all(mask is None for mask in masks):
        return [None] * len(masks)

    def look() -> list[Tensor]:
        warn(masks, options, cells=True)
        return regions.visible(masks, *grid(options), outside)

    return bank.get(("visible", grid(options)), look)


def cover(bank: Bank, mask: Tensor | None, call: Call, options: dict[str, Any], queries: int = 0) -> Tensor | float:
    """The factor [1 or rows of all chunks, N, 1] by which a person's term counts at each query. Once per run.

    Of more `queries` than the picture has, the first are the text's, which lie in no region.
    """
    if mask is None:
        return 1.0

    def look() -> Tensor:
        warn([mask], options, cells=False)
        share = regions.for_rows(regions.cover(mask, *grid(options)), call.rows)
        share = share.repeat(len(call.roles), 1) if len(share) > 1 else share
        share = pad(share, (max(queries - share.shape[1], 0), 0))
        return share[..., None].to(call.device, call.dtype)

    return bank.get(("cover", id(mask), grid(options), queries, call), look)
