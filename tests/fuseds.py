"""Fused KV for the tests: adapters from seeds in the pack's own layout, people, a VAE with given latents, the node."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from typing import Any

import torch
from comfy.model_patcher import ModelPatcher
from comfyui_likeness.likeness.spec import FusedSpec, Identity, Person
from comfyui_likeness.nodes.attention.fused import ApplyFused
from comfyui_likeness.nodes.attention.unet import sites
from comfyui_likeness.nodes.loaders import fused as loader
from comfyui_likeness.nodes.types import LoadedFused
from identities import identity
from models import FAMILIES, patcher, prompt
from torch import Tensor

SIDE = 64  # pixels of a face picture


class Vae:
    """A VAE of 8 x 8 pixels that gives each picture latents of its own, from its pixels."""

    def encode(self, pictures: Tensor) -> Tensor:
        grey = pictures.mean(dim=-1).unfold(1, 8, 8).unfold(2, 8, 8).flatten(-2).std(dim=-1)
        return torch.stack([(grey * (3 + c) * 7).sin() for c in range(4)], 1)


def tensors(family: str = "SD1.5", seed: int = 0) -> dict[str, Tensor]:
    """A file's tensors under their names."""
    generator = torch.Generator().manual_seed(seed)
    out = {"text.hidden": torch.randn(7, FAMILIES[family][0]["context_dim"], generator=generator)}
    if family == "SDXL":
        out["text.pooled"] = torch.randn(1, 1280, generator=generator)
    for site in sites(patcher(family).model.diffusion_model):
        for part in "kv":
            weight = torch.randn(site.hidden, site.hidden, generator=generator) / site.hidden**0.5
            out[f"{site.key}.attn2.to_{part}_f.weight"] = weight
    return out


def spec(given: dict[str, Tensor], family: str = "SD1.5", noise: str = "clean", side: int = SIDE) -> FusedSpec:
    layers = {key.partition(".attn2.")[0]: len(value) for key, value in given.items() if ".attn2." in key}
    return FusedSpec(family, noise, side, layers, {"steps": 1})


def adapter(family: str = "SD1.5", seed: int = 0, noise: str = "clean") -> LoadedFused:
    given = tensors(family, seed)
    return loader.build(spec(given, family, noise), given, f"fused {seed}")


def zero_shot(model: ModelPatcher, family: str = "SD1.5", noise: str = "clean") -> LoadedFused:
    made, weights = loader.zero_shot(model, prompt(3, family), noise)
    return loader.build(replace(made, face_size=SIDE), weights, "zero shot")


def person(seed: int = 0, faces: int = 1) -> Identity:
    """An identity that holds crops alone, at the faces' size."""
    generator = torch.Generator().manual_seed(seed)
    crop = torch.randint(0, 256, (faces, SIDE, SIDE, 3), generator=generator, dtype=torch.uint8)
    return replace(identity((), (), faces, seed), crop=crop)


def halves(height: int = 64, width: int = 64, count: int = 2) -> list[Tensor]:
    """Upright stripes of a picture, from left to right, as masks [1, H, W]."""
    edges = [round(i * width / count) for i in range(count + 1)]
    masks = [torch.zeros(1, height, width) for _ in range(count)]
    for mask, left, right in zip(masks, edges, edges[1:], strict=False):
        mask[:, :, left:right] = 1
    return masks


def people(masks: Sequence[Tensor | None], **changes: Any) -> tuple[Person, ...]:
    return tuple(Person(person(seed=i), mask, **changes) for i, mask in enumerate(masks))


SETTINGS: dict[str, Any] = {"strength": 1.0, "start_percent": 0.0, "end_percent": 1.0, "outside": "all"}


def fused(model: ModelPatcher, given: LoadedFused | None = None, who: Any = None, **changes: Any) -> ModelPatcher:
    """The model with people in it, by the node."""
    given = given or adapter()
    return ApplyFused.execute(model, given, who or person(), Vae(), **{**SETTINGS, **changes}).args[0]
