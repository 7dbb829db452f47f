"""Fused KV: the unpatched model, clean and matched face noise, first and later images, two people with masks.

The dense variant is emulated on the same weights: one attention with a mask of queries x keys in every layer.
"""

from __future__ import annotations

import argparse
from collections.abc import Callable, Sequence
from typing import Any

import torch
from comfy.model_patcher import ModelPatcher
from torch import Tensor

from ..likeness.attention.grouped_attention import BiasedAttentionFunction, KeyValueBlock, QueryGroup
from ..likeness.spec import Identity, People, Person
from ..nodes.attention import slots
from ..nodes.attention.apply_fused import ApplyFused
from ..nodes.loaders.fused_kv_loader import make_loaded_fused_kv, make_zero_shot_fused_kv
from ..nodes.types import LoadedFusedKV
from .compare import BASELINE_CASE, BenchmarkCase, compare_cases
from .models import RandomLatentVAE, build_unet_model, make_random_identity


def make_crop_person(value: int) -> Identity:
    """An identity whose face crop has one gray value."""
    return make_random_identity({}, crop=torch.full((1, 512, 512, 3), value, dtype=torch.uint8))


def make_two_people(resolution: int) -> People:
    """Two people, each in one half of the image."""
    left = torch.zeros(1, resolution, resolution)
    left[..., : resolution // 2] = 1
    return Person(make_crop_person(1), left), Person(make_crop_person(2), 1 - left)


def apply_fused_kv(
    model: ModelPatcher, adapter: LoadedFusedKV, people: Identity | People, resolution: int
) -> ModelPatcher:
    return ApplyFused.execute(model, adapter, people, RandomLatentVAE(), 1.0, 0.0, 1.0, "all", resolution).args[0]


def attend_blocks_densely(
    q: Tensor, blocks: Sequence[KeyValueBlock], _groups: Sequence[QueryGroup], attend: BiasedAttentionFunction
) -> Tensor:
    """Eq. 7 of the fusion paper as an additive mask of queries x keys."""
    k, v = (
        torch.cat([part.expand(len(q), -1, -1) for part in parts], 1)
        for parts in zip(*((block.k, block.v) for block in blocks), strict=True)
    )
    masks = [q.new_zeros(1, q.shape[1], block.k.shape[1]) for block in blocks]
    for mask, block in zip(masks, blocks, strict=True):
        if block.visible_queries is not None:
            mask.masked_fill_(~block.visible_queries[..., None].to(q.device), -torch.inf)
    return attend(q, k, v, torch.cat(masks, 2))


def apply_dense_fused_kv(
    model: ModelPatcher, adapter: LoadedFusedKV, people: Identity | People, resolution: int
) -> ModelPatcher:
    """The same with a dense attention mask instead of grouped queries."""

    def replace_attention(executor: Any, *args: Any, **kwargs: Any) -> Any:
        grouped, slots.attend_blocks = slots.attend_blocks, attend_blocks_densely
        try:
            return executor(*args, **kwargs)
        finally:
            slots.attend_blocks = grouped

    patched = apply_fused_kv(model, adapter, people, resolution).clone()
    patched.add_wrapper_with_key("outer_sample", "dense", replace_attention)
    return patched


def make_fused_kv_cases(size: str, resolution: int) -> list[BenchmarkCase]:
    model, empty = build_unet_model("sd15", size), [[torch.zeros(1, 77, 768), {}]]
    clean, match = (
        make_loaded_fused_kv(*make_zero_shot_fused_kv(model, empty, noise), noise) for noise in ("clean", "match")
    )

    def make_case(
        name: str,
        adapter: LoadedFusedKV,
        people: Identity | People,
        before_run: Callable[[], object] = lambda: None,
        apply_adapter: Callable[..., ModelPatcher] = apply_fused_kv,
    ) -> BenchmarkCase:
        return BenchmarkCase(name, apply_adapter(model, adapter, people, resolution), before_run, resolution=resolution)

    person, two_people = make_crop_person(1), make_two_people(resolution)
    return [
        BenchmarkCase(BASELINE_CASE, model, resolution=resolution),
        make_case("fused KV, clean", clean, person),
        make_case("fused KV, match, first image", match, person, match.feature_cache.clear),
        make_case("fused KV, match, from the second image on", match, person),
        make_case("fused KV, clean, two people by masks", clean, two_people),
        make_case("the same with a dense attention mask", clean, two_people, apply_adapter=apply_dense_fused_kv),
    ]


def measure_fused(arguments: argparse.Namespace) -> str:
    return compare_cases(make_fused_kv_cases(arguments.size, arguments.resolution), arguments.repeats, BASELINE_CASE)
