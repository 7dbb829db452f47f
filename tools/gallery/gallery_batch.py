"""A node that gives each picture of a batch a prompt of its own. The gallery's server loads it; the pack does not.

In a model as small as the demo's most of a step's time goes by however few pictures there are.
"""

from __future__ import annotations

from typing import Any

import torch

MOST = 8  # prompts


class GalleryBatch:
    RETURN_TYPES = ("CONDITIONING",)
    FUNCTION = "join"
    CATEGORY = "likeness/gallery"

    @classmethod
    def INPUT_TYPES(cls) -> dict[str, Any]:
        kind = ("CONDITIONING",)
        return {"required": {"prompt_0": kind}, "optional": {f"prompt_{number}": kind for number in range(1, MOST)}}

    def join(self, **prompts: list[Any]) -> tuple[list[Any]]:
        """The conditioning of a batch, a picture for each prompt, in order. All are of one length in tokens, padded."""
        every = [prompts[name][0] for name in sorted(prompts)]
        return ([[torch.cat([words for words, _ in every]), every[0][1]]],)


NODE_CLASS_MAPPINGS = {"GalleryBatch": GalleryBatch}
