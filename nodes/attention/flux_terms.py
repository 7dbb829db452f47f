"""Terms in FLUX, which has no attention replacement: added behind an attention or behind a block.

A block is ("double", 3) or ("single", 0). Its tokens are those of the text, of the image and of reference images, in
this order; the image stream of a double block is without the text. Terms apply to the tokens of the image.
At FLUX_BLOCK_STREAM, a term reads the stream [B, N, hidden] behind the block and must not change it in place; elsewhere
it reads the queries [B, heads, N, C], after their norm and before RoPE.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from .injection import Injection, PatchPlace
from .slots import CallState, OuterPatch, add_terms, exclude_from_compile, get_call_state, get_layer_tensors

# Names of places.
FLUX_IMAGE_ATTENTION = "flux_image_attention"  # added to the attention's output for the image, before the projection
FLUX_JOINT_ATTENTION = "flux_joint_attention"  # the same for the text and the image
FLUX_BLOCK_QUERIES = "flux_block_queries"  # computed from the queries, added to the stream behind the block
FLUX_BLOCK_STREAM = "flux_block_stream"  # computed from the stream behind the block, added to it

TOKEN_GRID_OPTION = "likeness_token_grid"  # in the options of FLUX: height and width of the image in tokens


@exclude_from_compile
def keep_queries(q: Tensor, k: Tensor, v: Tensor, *, extra_options: dict[str, Any], **_: Any) -> dict[str, Tensor]:
    """Keep the queries of a FLUX block for the terms behind its attention and behind the block."""
    get_layer_tensors(extra_options).flux_queries = q
    return {}


@dataclass(frozen=True, eq=False)
class FluxAttentionPatch:
    """The patch behind the attention of every FLUX block: the terms of injections, before the output projection."""

    injections: tuple[Injection, ...]

    @exclude_from_compile
    def __call__(self, n: Tensor, options: dict[str, Any]) -> Tensor:
        call_state = get_call_state(options)
        block, text_tokens = (options["block_type"], options["block_index"]), options["img_slice"][0]
        for name, start in ((FLUX_IMAGE_ATTENTION, text_tokens), (FLUX_JOINT_ATTENTION, 0)):
            place, part = PatchPlace(name, block), slice(start, text_tokens + _count_image_tokens(options))
            if call_state.is_any_on(self.injections, place):
                queries = _get_queries(call_state)[:, :, part]
                changed = add_terms(self.injections, place, queries, n[:, part], options)
                n = torch.cat((n[:, :start], changed, n[:, part.stop :]), dim=1)
        return n

    def __deepcopy__(self, memo: dict[int, Any]) -> FluxAttentionPatch:
        return self


@dataclass(frozen=True, eq=False)
class FluxBlockPatch(OuterPatch):
    """The patch of one FLUX block: the patch around which it stands, and the injections that add to its stream."""

    block: tuple[str, int]
    get_options: Callable[[dict[str, Any]], dict[str, Any]]  # those of the layer, from the arguments of the block
    replaced: Callable[[dict[str, Any], dict[str, Any]], dict[str, Any]] | None
    injections: tuple[Injection, ...]

    def __call__(self, args: dict[str, Any], extra: dict[str, Any]) -> dict[str, Any]:
        options, replaced = self.get_options(args), self.replaced

        def act(out: dict[str, Any]) -> dict[str, Any]:
            return {**out, "img": add_stream_terms(self.block, self.injections, out["img"], options)}

        def run_previous() -> dict[str, Any]:
            return extra["original_block"](args) if replaced is None else replaced(args, extra)

        return get_layer_tensors(options).run_patch((self.block, self.injections), run_previous, act)


@exclude_from_compile
def add_stream_terms(
    block: tuple[str, int], injections: Sequence[Injection], img: Tensor, options: dict[str, Any]
) -> Tensor:
    """The stream behind a FLUX block [B, N, hidden] with the terms added. In single blocks, the text tokens come first.

    The block's own tensor is not changed, as later blocks change theirs in place.
    """
    call_state, text_tokens = get_call_state(options), 0 if block[0] == "double" else options["img_slice"][0]
    part = slice(text_tokens, text_tokens + _count_image_tokens(options))
    out = image_tokens = img[:, part]
    for name in (FLUX_BLOCK_QUERIES, FLUX_BLOCK_STREAM):
        place = PatchPlace(name, block)
        if call_state.is_any_on(injections, place):
            q = image_tokens if name == FLUX_BLOCK_STREAM else _slice_queries(call_state, img, part)
            out = add_terms(injections, place, q, out, options)
    return img if out is image_tokens else torch.cat((img[:, :text_tokens], out, img[:, part.stop :]), dim=1)


def _slice_queries(call_state: CallState, img: Tensor, part: slice) -> Tensor:
    """The queries of a part of a block's stream."""
    queries = _get_queries(call_state)
    offset = queries.shape[2] - img.shape[1]  # the text tokens, if the stream is without them
    return queries[:, :, offset + part.start : offset + part.stop]


def _get_queries(call_state: CallState) -> Tensor:
    """The queries of the current block. Raises RuntimeError if this ComfyUI does not pass them to patches."""
    if not hasattr(call_state.layer, "flux_queries"):
        raise RuntimeError(
            "got a ComfyUI that does not pass the queries of FLUX to patches; expected 0.18 or newer; update ComfyUI, "
            "or use PuLID-FLUX, which does not need them"
        )
    return call_state.layer.flux_queries


def _count_image_tokens(options: dict[str, Any]) -> int:
    """The number of image tokens. Those of reference images follow them."""
    height, width = options[TOKEN_GRID_OPTION]
    return height * width
