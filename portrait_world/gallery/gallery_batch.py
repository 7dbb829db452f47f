"""A node that joins one prompt per image into a batch. The gallery's server loads it; it is no part of the pack.

With models as small as the demo's, the time of a sampling step hardly depends on the batch size.
"""

from __future__ import annotations

from typing import Any

import torch

MAX_PROMPTS = 8


class GalleryBatch:
    RETURN_TYPES = ("CONDITIONING",)
    FUNCTION = "join"
    CATEGORY = "likeness/gallery"

    @classmethod
    def INPUT_TYPES(cls) -> dict[str, Any]:
        kind = ("CONDITIONING",)
        return {
            "required": {"prompt_0": kind},
            "optional": {f"prompt_{number}": kind for number in range(1, MAX_PROMPTS)},
        }

    def join(self, **prompts: list[Any]) -> tuple[list[Any]]:
        """The conditioning of a batch with one image per prompt, in order. All must have the same number of tokens."""
        conditionings = [prompts[name][0] for name in sorted(prompts)]
        return ([[torch.cat([states for states, _ in conditionings]), conditionings[0][1]]],)


NODE_CLASS_MAPPINGS = {"GalleryBatch": GalleryBatch}
