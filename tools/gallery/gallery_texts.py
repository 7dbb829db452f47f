"""A node that gives each picture of a batch a prompt of its own. The gallery's server loads it; the pack does not.

In a model as small as the demo's most of a step's time goes by however few pictures there are.
"""

from __future__ import annotations

from typing import Any

import torch


class GalleryTexts:
    RETURN_TYPES = ("CONDITIONING",)
    FUNCTION = "encode"
    CATEGORY = "likeness/gallery"

    @classmethod
    def INPUT_TYPES(cls) -> dict[str, Any]:
        return {"required": {"clip": ("CLIP",), "texts": ("STRING", {"multiline": True})}}

    def encode(self, clip: Any, texts: str) -> tuple[list[Any]]:
        """The conditioning of a batch, a picture for each line. All lines are of one length in tokens, padded."""
        encoded = [clip.encode_from_tokens_scheduled(clip.tokenize(text))[0] for text in texts.splitlines()]
        return ([[torch.cat([words for words, _ in encoded]), encoded[0][1]]],)


NODE_CLASS_MAPPINGS = {"GalleryTexts": GalleryTexts}
