"""FlashFace: the unpatched model, the official implementation, and this pack for a first and a second image.

The official implementation is emulated on the same weights: its second UNet runs completely at every step, and all rows
project and attend to the references, including those that do not use them.
"""

from __future__ import annotations

import argparse
from collections.abc import Mapping
from dataclasses import dataclass, fields
from typing import Any

import torch
from comfy.model_patcher import ModelPatcher
from torch import Tensor

from ..likeness.attention.feature_cache import ReferenceFeatureCache
from ..nodes.attention.flashface.apply_reference import ApplyReference
from ..nodes.attention.flashface.reference_term import ReferenceTerm, make_attention_function
from ..nodes.attention.injection import ATTN1_OUTPUT, PatchPlace
from ..nodes.attention.model_call import ModelCall
from ..nodes.attention.patch import attach_injection, capture_attention_inputs, get_branches, get_injections
from ..nodes.attention.slots import get_layer_tensors
from ..nodes.loaders.flashface_loader import build_flashface
from ..nodes.types import LoadedReferenceNet
from ..tools.standins import models
from .compare import BenchmarkCase, compare_cases
from .models import RandomLatentVAE, choose_dtype, make_random_identity

NUM_REFERENCE_FACES = 4
OFFICIAL_CASE = "official implementation"
ALIAS_PREFIXES = ("encoder.", "middle.", "decoder.")


def load_random_flashface(size: str) -> tuple[ModelPatcher, LoadedReferenceNet]:
    """MODEL and REFERENCE_NET of a checkpoint with random weights; `full` as published."""
    tensors = models.make_flashface(5, 320 if size == "full" else 32)
    dtype = choose_dtype(torch.float16)
    tensors = {key: value.to(dtype) for key, value in tensors.items() if not key.startswith(ALIAS_PREFIXES)}
    return build_flashface(tensors, "random weights", ReferenceFeatureCache())


def apply_reference(model: ModelPatcher, reference_net: LoadedReferenceNet, refresh: int = 1) -> ModelPatcher:
    crop = torch.zeros(NUM_REFERENCE_FACES, 512, 512, 3, dtype=torch.uint8)
    return ApplyReference.execute(
        model,
        reference_net,
        make_random_identity({}, NUM_REFERENCE_FACES, crop),
        RandomLatentVAE(),
        strength=1.2,
        reference_guidance=3.2,
        start_percent=0.0,
        end_percent=1.0,
        launch=1000,
        refresh=refresh,
    ).args[0]


@dataclass(frozen=True, eq=False)
class OfficialReferenceTerm(ReferenceTerm):
    """Computes reference attention as the official code does: nothing is cached, and all rows are processed."""

    def prepare_states(self, call: ModelCall) -> Mapping[PatchPlace, Any]:
        (person,) = self.people
        assert call.negative_text is not None
        unet, n = self.reference_net.patcher.model.diffusion_model, len(person.latents)
        x = person.latents.to(call.device, call.dtype)
        context = call.negative_text.to(call.device, call.dtype).expand(n, -1, -1)
        # The last place does not exist, so that the UNet is not stopped after the last attention.
        places = [*self.places, PatchPlace(ATTN1_OUTPUT, ("none", 0), 0, False)]
        features = capture_attention_inputs(unet, x, call.timesteps[:1].expand(n), context, places)
        strengths = torch.tensor(self.settings.compute_strengths(call), device=call.device)
        strengths = strengths.repeat_interleave(call.rows_per_chunk)
        return {place: (layer, features[place], strengths) for place, layer in self.attentions.items()}

    def compute_term(self, state: Any, q: Tensor, options: dict[str, Any]) -> Tensor:
        layer, features, strengths = state
        tokens = torch.cat((q, features.flatten(0, 1)[None].expand(len(q), -1, -1)), 1)
        out = layer.o(make_attention_function(options)(layer.q(q), layer.k(tokens), layer.v(tokens)))
        return strengths.to(q.dtype)[:, None, None] * (out - get_layer_tensors(options).added_layer_output.output)


def apply_official_reference(model: ModelPatcher, reference_net: LoadedReferenceNet) -> ModelPatcher:
    """The same model with reference attention computed as the official code does."""
    patched = apply_reference(model, reference_net)
    injection, branch = get_injections(patched)[-1], get_branches(patched)[-1]
    values = {field.name: getattr(injection, field.name) for field in fields(ReferenceTerm)}
    return attach_injection(model, OfficialReferenceTerm(**values), branch)


def make_flashface_cases(
    model: ModelPatcher, reference_net: LoadedReferenceNet, resolution: int
) -> list[BenchmarkCase]:
    patched, clear_cache = apply_reference(model, reference_net), reference_net.feature_cache.clear
    refreshed, official = apply_reference(model, reference_net, 3), apply_official_reference(model, reference_net)
    return [
        BenchmarkCase("model only, two rows", model, resolution=resolution),
        BenchmarkCase("model only, three rows", model, use_dual_cfg=True, resolution=resolution),
        BenchmarkCase(OFFICIAL_CASE, official, resolution=resolution),
        BenchmarkCase("this pack, first image", patched, clear_cache, resolution=resolution),
        BenchmarkCase("this pack, from the second image on", patched, resolution=resolution),
        BenchmarkCase("this pack, first image, refresh 3", refreshed, clear_cache, resolution=resolution),
    ]


def measure_flashface(arguments: argparse.Namespace) -> str:
    """The table. The second image has the same number of steps as the first."""
    cases = make_flashface_cases(*load_random_flashface(arguments.size), arguments.resolution)
    return compare_cases(cases, arguments.repeats, OFFICIAL_CASE)
