"""Fused KV ("Fusion is all you need", ICLR 2025 submission): only Linear_kf and Linear_vf are trained (Sec. 3.2).

They begin as the zero-shot adapter. What they read is the frozen UNet's own view of the face, without a gradient. Of
the conditions the text alone is dropped: a row without a face is the base model's own, from which nothing is learnt.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import comfy.ops
import torch
from comfy.model_patcher import ModelPatcher
from torch import Tensor

from ...likeness import fused as math
from ...likeness.bank import MemoryBank
from ...nodes.attention import fused
from ...nodes.attention.injection import ALWAYS
from ...nodes.loaders.fused import zero_shot
from ...nodes.types import LoadedFused
from ..base import clip
from ..base.source import Source
from . import stack
from .readers import Latents

FORGETS = 0  # bytes: no two steps read the same faces


@dataclass(frozen=True, kw_only=True)
class Settings(stack.Settings):
    """`noise` is the face's: `match`, the picture's own, or `clean`; `face` the side of its picture in pixels."""

    noise: str = "match"
    face: int = math.FACE_SIZE

    def __post_init__(self) -> None:
        if self.noise not in math.NOISES:
            raise ValueError(f"got noise = {self.noise!r} in [task]; expected {' or '.join(math.NOISES)}")


class Fused(stack.AdapterTask[Settings]):
    """No chance is in how it begins."""

    def __init__(self, settings: Settings, source: Source, _seed: int) -> None:
        super().__init__(settings, source)
        self.eye = Latents(Path(settings.vae), self.frozen.autoencoder, settings.face)
        self.read_pool(Path(settings.vae))
        device = torch.get_default_device()
        with torch.no_grad():
            text = self.frozen.words(clip.tokenize(self.tokenizer, [""]), device)
            made, tensors = zero_shot(self.frozen.unet.on(device), [[text, {}]], settings.noise)
        self.spec = replace(made, face_size=settings.face, notes={})
        self.adapter = math.build(self.spec, tensors, comfy.ops.disable_weight_init).requires_grad_(True)
        self.held = stack.Held(self.adapter)
        self.begin()

    @property
    def reader(self) -> Latents:
        return self.eye

    def injection(self, model: ModelPatcher, read: Tensor) -> fused.Fused:
        held = self.held.on(model.load_device)
        loaded = LoadedFused(self.spec, held, MemoryBank(FORGETS), self.settings.file)
        seen = model.model.process_latent_in(read.float())
        faces = [fused.Bound(seen, [1.0] * len(seen), None, "")]
        return fused.Fused(loaded, model, fused.fitting(self.spec, model), faces, "all", ALWAYS, unfold=True)

    def file(self, notes: Mapping[str, Any]) -> tuple[dict[str, Tensor], dict[str, str]]:
        return math.tensors(self.adapter), math.metadata(replace(self.spec, notes=notes))
