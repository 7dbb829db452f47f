"""FlashFace for the tests: checkpoints rebuilt from names, calls through the nodes, identities with crops."""

from __future__ import annotations

import json
from dataclasses import replace
from functools import lru_cache
from typing import Any

import comfy.samplers
import torch
from comfy.model_patcher import ModelPatcher
from comfy.patcher_extension import WrappersMP
from comfyui_likeness.likeness.bank import MemoryBank
from comfyui_likeness.likeness.spec import Identity
from comfyui_likeness.nodes.attention.reference import ApplyReference
from comfyui_likeness.nodes.loaders import flashface as loader
from comfyui_likeness.nodes.types import LoadedReferenceNet
from golden import GOLDEN, WEIGHTS
from identities import identity
from torch import Tensor

CASES: dict[str, Any] = json.loads((GOLDEN / "flashface" / "cases.json").read_text())


def checkpoint(name: str) -> dict[str, Tensor]:
    """All tensors of a model of the golden cases under all of their names, as in the published file."""
    manifest = json.loads((GOLDEN / "flashface" / CASES["models"][name]["manifest"]).read_text())
    tensors = WEIGHTS.state_dict(manifest["parameters"], salt="")
    return tensors | {alias: tensors[key] for alias, key in manifest["aliases"].items()}


@lru_cache(maxsize=2)
def loaded(name: str = "mini32") -> tuple[ModelPatcher, LoadedReferenceNet]:
    return loader.build(checkpoint(name), name, MemoryBank())


class Latents:
    """A VAE whose pictures have these latents, as the model sees them: golden cases begin behind the VAE."""

    def __init__(self, latents: Tensor) -> None:
        self.latents = latents

    def encode(self, pictures: Tensor) -> Tensor:
        assert pictures.shape == (len(self.latents), 224, 224, 3)
        return self.latents / 0.18215


def person(faces: int = 1, seed: int = 0) -> Identity:
    """An identity that holds crops alone."""
    generator = torch.Generator().manual_seed(seed)
    crop = torch.randint(0, 256, (faces, 512, 512, 3), generator=generator, dtype=torch.uint8)
    return replace(identity((), (), faces, seed), crop=crop)


def latents(faces: int = 1, seed: int = 0, side: int = 8) -> Tensor:
    return torch.randn(faces, 4, side, side, generator=torch.Generator().manual_seed(seed))


SETTINGS: dict[str, Any] = {
    "strength": 1.2, "reference_guidance": 3.2, "start_percent": 0.0, "end_percent": 1.0, "show_at_least": 1,
}  # fmt: skip


def referenced(
    model: ModelPatcher, net: LoadedReferenceNet, faces: Tensor | None = None, **changes: Any
) -> ModelPatcher:
    """The model with references to faces of these latents [n, 4, h, w]."""
    faces = latents() if faces is None else faces
    who = changes.pop("identity", None) or person(len(faces))
    return ApplyReference.execute(model, net, who, Latents(faces), **{**SETTINGS, **changes}).args[0]


def look(
    model: ModelPatcher, x: Tensor, t: int, positive: Tensor, negative: Tensor, cfg: float = 7.5
) -> tuple[Tensor, list[Tensor]]:
    """One call by the host's own guider at timestep t, of x as the UNet sees it.

    The guided noise prediction, and that of each prompt: positive, negative, then those of branches.
    """
    rows: list[Tensor] = []
    sigma = model.get_model_object("model_sampling").sigmas[t]
    x = x * (1 + sigma**2) ** 0.5

    def keep(executor: Any, *args: Any) -> Any:
        out = executor(*args)
        rows.extend((x - one) / sigma for one in out)
        return out

    denoised: list[Tensor] = []

    def once(guider: Any, _x: Tensor, _sigmas: Tensor, extra_args: dict[str, Any], **_: Any) -> Tensor:
        denoised.append(guider(x, sigma.expand(len(x)), **extra_args))
        return denoised[0]

    watched = model.clone()
    watched.add_wrapper_with_key(WrappersMP.CALC_COND_BATCH, "watching", keep)
    guider = comfy.samplers.CFGGuider(watched)
    guider.set_conds([[positive, {}]], [[negative, {}]])
    guider.set_cfg(cfg)
    with torch.inference_mode():
        sampler = comfy.samplers.KSAMPLER(once)
        guider.sample(x, torch.zeros_like(x), sampler, torch.stack((sigma, sigma * 0)), disable_pbar=True, seed=1)
    return (x - denoised[0]) / sigma, rows
