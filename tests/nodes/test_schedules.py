"""Schedules are percents of the sampling as it is when sampling starts: nodes behind an Apply node may change it."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from comfy.model_patcher import ModelPatcher
from comfy_extras.nodes_model_advanced import ModelSamplingDiscrete, ModelSamplingFlux
from comfyui_likeness.nodes.attention.schedule import ALWAYS_ON, NO_SCHEDULES, ResolvedSchedules, Schedule
from support.flux_adapters import FLUX_FAMILY, HOST_PASSES_QUERIES, apply_flux_adapter
from support.host_models import all_close, make_small_model, sample_latent
from support.method_cases import METHODS, make_method_case
from torch import Tensor

MIDDLE: dict[str, Any] = {"start_percent": 0.1, "end_percent": 0.9}


def change_sampling(model: ModelPatcher) -> ModelPatcher:
    return ModelSamplingDiscrete().patch(model, "v_prediction", True)[0]


def shift_flux(model: ModelPatcher) -> ModelPatcher:
    return ModelSamplingFlux().patch(model, 3.0, 0.5, 64, 64)[0]


@pytest.mark.parametrize("method", METHODS)
def test_a_sampling_node_before_or_behind_the_apply_node_gives_the_same_image(method: str) -> None:
    case = make_method_case(method)
    behind = sample_latent(change_sampling(case.apply(**MIDDLE)), steps=6)
    before = sample_latent(case.apply_to(change_sampling(case.base), **MIDDLE), steps=6)
    assert torch.equal(behind, before)
    assert not all_close(behind, sample_latent(change_sampling(case.apply()), steps=6), 1e-3)


def test_launch_follows_the_sampled_model() -> None:
    case = make_method_case("reference")
    behind = sample_latent(change_sampling(case.apply(launch=600)), steps=6)
    assert torch.equal(behind, sample_latent(case.apply_to(change_sampling(case.base), launch=600), steps=6))
    assert not all_close(behind, sample_latent(change_sampling(case.apply(launch=900)), steps=6), 1e-3)


@pytest.mark.skipif(not HOST_PASSES_QUERIES, reason="this ComfyUI does not pass the queries of FLUX to patches")
def test_flux_schedules_follow_the_sampled_model() -> None:
    base, early = make_small_model(FLUX_FAMILY), {"end_percent": 0.3}
    settings = {"family": FLUX_FAMILY, "steps": 6, "cfg": 1.0, "scheduler": "simple"}
    behind = sample_latent(shift_flux(apply_flux_adapter(base, **early)), **settings)
    assert torch.equal(behind, sample_latent(apply_flux_adapter(shift_flux(base), **early), **settings))
    assert not all_close(behind, sample_latent(apply_flux_adapter(base, **early), **settings), 1e-3)


def test_a_model_can_run_with_two_samplings_in_turn() -> None:
    """What one run resolved is not used by the next."""
    model = make_method_case("decoupled").apply(**MIDDLE)
    first = sample_latent(model, steps=6)
    changed = sample_latent(change_sampling(model), steps=6)
    assert torch.equal(sample_latent(model, steps=6), first)
    assert torch.equal(sample_latent(change_sampling(model), steps=6), changed) and not torch.equal(first, changed)


def test_schedules_from_timesteps_and_without_a_run() -> None:
    sampling = make_small_model().get_model_object("model_sampling")
    resolved = ResolvedSchedules(sampling)
    for timestep in (0.5, 600.5, 998.5):
        expected = float(sampling.sigma(torch.tensor(timestep)))
        window = resolved.get_window(Schedule.from_timestep(timestep))
        assert window.start_sigma == pytest.approx(expected, rel=1e-5) and window.end_sigma == -1
    assert resolved.get_window(Schedule.from_timestep(999.5)).is_full
    assert NO_SCHEDULES.get_window(ALWAYS_ON).compute_gate(Tensor([3.0])) is True
    with pytest.raises(RuntimeError, match="without a guider"):
        NO_SCHEDULES.get_window(Schedule(0.1, 1.0))
