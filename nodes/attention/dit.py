"""What stands in FLUX's blocks, which have no slots: terms that follow an attention (Joint) or a whole block (behind).

A block is ("double", 3) or ("single", 0). Its tokens are the text's, the picture's own and those of reference pictures,
in this order; in a double block the stream of pictures goes without the text's. Terms are for the picture's own tokens.
At STREAM a term reads these [B, N, hidden] as the block left them, and must leave them so; elsewhere it reads their
queries [B, heads, N, C], normed but not yet rotated.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from .injection import Injection, Place
from .slots import Now, and_terms, now_of

PICTURE = "dit_picture"  # added to the attention's result, ahead of the output projection
EVERYTHING = "dit_everything"  # so too, the text's tokens in front included
QUERIED = "dit_queried"  # of the queries, added to the stream behind the whole block
STREAM = "dit_stream"  # of the stream behind the whole block, added to it

CELLS = "likeness_cells"  # in the options of FLUX: height and width of the picture in tokens


def keep_queries(q: Tensor, k: Tensor, v: Tensor, *, extra_options: dict[str, Any], **_: Any) -> dict[str, Tensor]:
    """Keep the queries of a FLUX block for what follows its attention and the block itself."""
    now_of(extra_options).queries[:] = [q]
    return {}


@dataclass(frozen=True, eq=False)
class Joint:
    """What follows the attention of every FLUX block: the terms of one injection, ahead of the output projection."""

    injection: Injection

    def __call__(self, n: Tensor, options: dict[str, Any]) -> Tensor:
        now, block, text = now_of(options), (options["block_type"], options["block_index"]), options["img_slice"][0]
        for name, start in ((PICTURE, text), (EVERYTHING, 0)):
            place, part = Place(name, block), slice(start, text + _tokens(options))
            if now.state(self.injection, place) is not None:
                own = and_terms((self.injection,), place, _queries(now)[:, :, part], n[:, part], options)
                n = torch.cat((n[:, :start], own, n[:, part.stop :]), dim=1)
        return n

    def __deepcopy__(self, memo: dict[int, Any]) -> Joint:
        return self


def behind(block: tuple[str, int], injections: Sequence[Injection], img: Tensor, options: dict[str, Any]) -> Tensor:
    """The stream of a FLUX block [B, N, hidden], in single blocks the text's tokens first, with the terms added to it.

    The block's own tensor is left as it is, as later blocks change theirs in place.
    """
    now, text = now_of(options), 0 if block[0] == "double" else options["img_slice"][0]
    part = slice(text, text + _tokens(options))
    out = own = img[:, part]
    for name in (QUERIED, STREAM):
        place = Place(name, block)
        if any(now.state(injection, place) is not None for injection in injections):
            read = own if name == STREAM else _asked(now, img, part)
            out = and_terms(injections, place, read, out, options)
    return img if out is own else torch.cat((img[:, :text], out, img[:, part.stop :]), dim=1)


def _asked(now: Now, img: Tensor, part: slice) -> Tensor:
    """The queries of a part of a block's stream."""
    queries = _queries(now)
    ahead = queries.shape[2] - img.shape[1]  # the text's, where the stream is without it
    return queries[:, :, ahead + part.start : ahead + part.stop]


def _queries(now: Now) -> Tensor:
    """The queries of the block that runs. Raises RuntimeError where the host keeps them to itself."""
    if not now.queries:
        raise RuntimeError(
            "got a ComfyUI whose FLUX shows its queries to no patch; expected 0.18 or newer; update it, or use "
            "PuLID-FLUX, which needs none"
        )
    return now.queries[0]


def _tokens(options: dict[str, Any]) -> int:
    """How many tokens of FLUX are the picture's own; those of reference pictures follow."""
    height, width = options[CELLS]
    return height * width
