"""Every custom socket type of the pack, once, and what travels through those that two stages share."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

from comfy.model_patcher import ModelPatcher
from comfy_api.latest import io
from torch import Tensor

from ..likeness.spec import AdapterSpec

Identity = io.Custom("LIKENESS_IDENTITY")
Adapter = io.Custom("LIKENESS_ADAPTER")
FaceAnalyzer = io.Custom("LIKENESS_FACE_ANALYZER")
ImageEncoder = io.Custom("LIKENESS_IMAGE_ENCODER")


@dataclass(frozen=True, eq=False)
class LoadedAdapter:
    """What goes through LIKENESS_ADAPTER: what the file is, its weights under the host's care, its LoRA if any.

    `lora` maps `<number>.<q|k|v|out>.<down|up>` to matrices; the number is the file's own, even for self-attentions.
    """

    spec: AdapterSpec
    patcher: ModelPatcher
    lora: Mapping[str, Tensor]
    file: str
