"""FlashFace for tests: checkpoints rebuilt from tensor names, calls through the nodes, identities with crops."""

from __future__ import annotations

import json
from dataclasses import replace
from functools import lru_cache
from typing import Any

import comfy.samplers
import torch
from comfy.model_patcher import ModelPatcher
from comfy.patcher_extension import WrappersMP
from comfyui_likeness.likeness.attention.feature_cache import ReferenceFeatureCache
from comfyui_likeness.likeness.spec import Identity
from comfyui_likeness.nodes.attention.flashface.apply_reference import ApplyReference
from comfyui_likeness.nodes.loaders import flashface_loader
from comfyui_likeness.nodes.types import LoadedReferenceNet
from torch import Tensor

from support.golden import DETERMINISTIC_WEIGHTS, GOLDEN_FOLDER
from support.identities import make_identity

FLASHFACE_CASES: dict[str, Any] = json.loads((GOLDEN_FOLDER / "flashface" / "cases.json").read_text())


def make_flashface_checkpoint(name: str) -> dict[str, Tensor]:
    """The tensors of a golden model under all of their names and aliases, as in the published file."""
    manifest = json.loads((GOLDEN_FOLDER / "flashface" / FLASHFACE_CASES["models"][name]["manifest"]).read_text())
    tensors = DETERMINISTIC_WEIGHTS.state_dict(manifest["parameters"], salt="")
    return tensors | {alias: tensors[key] for alias, key in manifest["aliases"].items()}


@lru_cache(maxsize=2)
def load_flashface(name: str = "mini32") -> tuple[ModelPatcher, LoadedReferenceNet]:
    return flashface_loader.build_flashface(make_flashface_checkpoint(name), name, ReferenceFeatureCache())


class FixedLatentVAE:
    """A VAE that returns these latents, as the model gets them: golden cases start behind the VAE."""

    def __init__(self, latents: Tensor) -> None:
        self.latents = latents

    def encode(self, images: Tensor) -> Tensor:
        assert images.shape == (len(self.latents), 224, 224, 3)
        return self.latents / 0.18215


def make_flashface_identity(faces: int = 1, seed: int = 0) -> Identity:
    """An identity with face crops only."""
    generator = torch.Generator().manual_seed(seed)
    crop = torch.randint(0, 256, (faces, 512, 512, 3), generator=generator, dtype=torch.uint8)
    return replace(make_identity((), (), faces, seed), crop=crop)


def make_face_latents(faces: int = 1, seed: int = 0, size: int = 8) -> Tensor:
    return torch.randn(faces, 4, size, size, generator=torch.Generator().manual_seed(seed))


APPLY_REFERENCE_DEFAULTS: dict[str, Any] = {
    "strength": 1.2, "reference_guidance": 3.2, "start_percent": 0.0, "end_percent": 1.0, "show_at_least": 1,
}  # fmt: skip


def apply_flashface(
    model: ModelPatcher, reference_net: LoadedReferenceNet, face_latents: Tensor | None = None, **changes: Any
) -> ModelPatcher:
    """The model with faces of these latents [n, 4, h, w] applied by the node."""
    face_latents = make_face_latents() if face_latents is None else face_latents
    identity = changes.pop("identity", None) or make_flashface_identity(len(face_latents))
    return ApplyReference.execute(
        model, reference_net, identity, FixedLatentVAE(face_latents), **{**APPLY_REFERENCE_DEFAULTS, **changes}
    ).args[0]


def predict_guided_noise(
    model: ModelPatcher, x: Tensor, timestep: int, positive: Tensor, negative: Tensor, cfg: float = 7.5
) -> tuple[Tensor, list[Tensor]]:
    """The noise predictions of one call of ComfyUI's guider at a timestep, for x as the UNet gets it.

    Returns the guided prediction, and those of the prompts: positive, negative, then branches.
    """
    rows: list[Tensor] = []
    sigma = model.get_model_object("model_sampling").sigmas[timestep]
    x = x * (1 + sigma**2) ** 0.5

    def record_rows(executor: Any, *args: Any) -> Any:
        out = executor(*args)
        rows.extend((x - one) / sigma for one in out)
        return out

    denoised: list[Tensor] = []

    def sample_once(guider: Any, _x: Tensor, _sigmas: Tensor, extra_args: dict[str, Any], **_: Any) -> Tensor:
        denoised.append(guider(x, sigma.expand(len(x)), **extra_args))
        return denoised[0]

    watched = model.clone()
    watched.add_wrapper_with_key(WrappersMP.CALC_COND_BATCH, "watching", record_rows)
    guider = comfy.samplers.CFGGuider(watched)
    guider.set_conds([[positive, {}]], [[negative, {}]])
    guider.set_cfg(cfg)
    with torch.inference_mode():
        sampler = comfy.samplers.KSAMPLER(sample_once)
        guider.sample(x, torch.zeros_like(x), sampler, torch.stack((sigma, sigma * 0)), disable_pbar=True, seed=1)
    return (x - denoised[0]) / sigma, rows
