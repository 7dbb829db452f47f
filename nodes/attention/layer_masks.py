"""Regions in a layer: which queries see which person, and warnings about unsuitable masks."""

from __future__ import annotations

import logging
from collections.abc import Sequence
from typing import Any

from torch import Tensor
from torch.nn.functional import pad

from ...likeness.attention import regions
from .flux_terms import TOKEN_GRID_OPTION
from .injection import FULL_LATENT_SIZE_OPTION, LATENT_SIZE_OPTION, RunCache
from .model_call import ModelCall


def get_layer_grid(options: dict[str, Any]) -> tuple[int, int]:
    """Height and width of a layer's queries. Raises ValueError if the model sees only a part of the image."""
    full, size = options.get(FULL_LATENT_SIZE_OPTION), options[LATENT_SIZE_OPTION]
    if full is not None and size != full:
        raise ValueError(
            "give the prompt a mask instead of an area, if it has an area; else remove the node that splits the image "
            "into tiles or windows, or the masks of people (without masks, people and tiles work together); got people "
            f"with masks, and a part of {size[1]}x{size[0]} of a latent of {full[1]}x{full[0]}; expected the full image"
        )
    height, width = options[TOKEN_GRID_OPTION] if TOKEN_GRID_OPTION in options else options["activations_shape"][-2:]
    return height, width


def warn_about_masks(masks: Sequence[Tensor | None], options: dict[str, Any], check_coverage: bool) -> None:
    """Log which masks have another aspect ratio than the image, and which are too small for the latent grid."""
    height, width = get_layer_grid(options)
    latent_height, latent_width = options[LATENT_SIZE_OPTION]
    for number, mask in enumerate(masks, 1):
        if mask is None:
            continue
        ratio = (mask.shape[2] * latent_height) / (mask.shape[1] * latent_width)
        if max(ratio, 1 / ratio) > regions.MAX_ASPECT_RATIO_MISMATCH:
            logging.warning(
                "Likeness: the mask of person %d is %dx%d and is stretched to the aspect ratio of the image (%dx%d)",
                number, mask.shape[2], mask.shape[1], 8 * latent_width, 8 * latent_height,
            )  # fmt: skip
        if check_coverage and regions.is_region_too_small(mask, height, width):
            logging.warning(
                "Likeness: the mask of person %d covers no cell of the %dx%d latent grid by half; the cells that it "
                "covers most are used there; enlarge the mask for a more reliable placement", number, width, height,
            )  # fmt: skip


def get_visible_queries(
    run_cache: RunCache, masks: Sequence[Tensor | None], outside: str, options: dict[str, Any]
) -> Sequence[Any]:
    """The queries of a layer that see each person's keys (compute_visible_queries), cached per run; None is all."""
    if all(mask is None for mask in masks):
        return [None] * len(masks)

    def compute() -> list[Tensor]:
        warn_about_masks(masks, options, check_coverage=True)
        return regions.compute_visible_queries(masks, *get_layer_grid(options), outside)

    return run_cache.get_or_compute(("visible", get_layer_grid(options)), compute)


def get_query_coverage(
    run_cache: RunCache, mask: Tensor | None, call: ModelCall, options: dict[str, Any], num_queries: int = 0
) -> Tensor | float:
    """The factor of a person's term at each query [1 or all rows, N, 1], cached per run.

    If `num_queries` exceeds the queries of the image, the first are text tokens, which no region covers.
    """
    if mask is None:
        return 1.0

    def compute() -> Tensor:
        warn_about_masks([mask], options, check_coverage=False)
        coverage = regions.compute_coverage(mask, *get_layer_grid(options))
        coverage = pad(coverage, (max(num_queries - coverage.shape[1], 0), 0))
        return coverage[..., None].to(call.device, call.dtype)

    key = ("coverage", id(mask), get_layer_grid(options), num_queries, call.device, call.dtype)
    coverage = run_cache.get_or_compute(key, compute)
    return coverage if len(mask) == 1 else coverage[call.image_of_row % len(mask)]
