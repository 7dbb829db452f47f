"""Compares cases that generate the same image in different ways: FLOPs, seconds and peak memory, in one table."""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any

import comfy.samplers
import comfy_extras.nodes_custom_sampler as custom_sampler
import torch
from comfy.model_patcher import ModelPatcher
from torch import Tensor

from .metrics import count_flops, measure_peak_memory

COUNTED_STEPS = 3  # so that a refresh interval of 3 steps is averaged out
BASELINE_CASE = "model only"


@dataclass(frozen=True)
class BenchmarkCase:
    """One row of the table: a model, its prompts, and what is called before each image."""

    name: str
    model: ModelPatcher
    before_run: Callable[[], object] = lambda: None
    use_dual_cfg: bool = False
    resolution: int = 256
    num_images: int = 1
    prompt: Tensor | None = None

    def make_guider(self) -> Any:
        texts = [torch.full((1, 77, 768), value) for value in (0.1, 0.0, -0.1)]
        prompts = [[[text, {}]] for text in (texts[0] if self.prompt is None else self.prompt, *texts[1:])]
        if self.use_dual_cfg:
            guider: Any = custom_sampler.Guider_DualCFG(self.model)
            guider.set_conds(prompts[0], prompts[1], prompts[2])
            guider.set_cfg(4.0, 3.0)
        else:
            guider = comfy.samplers.CFGGuider(self.model)
            guider.set_conds(prompts[0], prompts[2])
            guider.set_cfg(7.5)
        return guider

    def run(self, steps: int, callback: Callable[..., None] | None = None) -> Tensor:
        self.before_run()
        latent = torch.zeros(self.num_images, 4, self.resolution // 8, self.resolution // 8)
        return sample_latent(self.make_guider(), latent, "sgm_uniform", steps, callback)

    def measure_step_seconds(self, steps: int) -> float:
        """Mean seconds per step without the first step."""
        times: list[float] = []
        self.run(steps + 1, lambda *_: times.append(time.perf_counter()))
        return (times[-1] - times[0]) / steps

    def count_step_flops(self) -> int:
        return (count_flops(partial(self.run, COUNTED_STEPS + 1)) - count_flops(partial(self.run, 1))) // COUNTED_STEPS


def sample_latent(
    guider: Any, latent: Tensor, scheduler: str, steps: int, callback: Callable[..., None] | None
) -> Tensor:
    """Sample with Euler from seeded noise."""
    sampling = guider.model_patcher.get_model_object("model_sampling")
    sigmas = comfy.samplers.calculate_sigmas(sampling, scheduler, steps)
    with torch.inference_mode():
        noise = torch.randn(latent.shape, generator=torch.Generator().manual_seed(2))
        sampler = comfy.samplers.sampler_object("euler")
        return guider.sample(noise, latent, sampler, sigmas, callback=callback, disable_pbar=True, seed=1)


def compare_cases(cases: Sequence[BenchmarkCase], repeats: int, baseline: str) -> str:
    """The table as Markdown. Ratios are relative to the case named `baseline`."""
    flops: dict[str, int] = {}
    for case in cases:
        for steps in (1, COUNTED_STEPS + 1):
            case.run(steps)
        flops[case.name] = case.count_step_flops()
    seconds: dict[str, list[float]] = {case.name: [] for case in cases}
    for _ in range(repeats):
        for case in cases:
            case.run(COUNTED_STEPS + 1)
            seconds[case.name].append(case.measure_step_seconds(COUNTED_STEPS))
    peaks = {case.name: measure_peak_memory(partial(case.run, 2)) for case in cases}
    return format_comparison_table(flops, {name: min(times) for name, times in seconds.items()}, peaks, baseline)


def format_comparison_table(
    flops: dict[str, int], seconds: dict[str, float], peaks: dict[str, int], baseline: str
) -> str:
    header = ("", "GFLOPs per step", "ratio", "seconds per step", "ratio", "peak MiB", "ratio")
    rows = [
        (
            name,
            f"{count / 1e9:.1f}",
            f"{count / flops[baseline]:.3f}",
            f"{seconds[name]:.3f}",
            f"{seconds[name] / seconds[baseline]:.2f}",
            f"{peaks[name] / 2**20:.0f}",
            f"{peaks[name] / peaks[baseline]:.2f}",
        )
        for name, count in flops.items()
    ]
    return format_markdown_table([header, *rows])


def format_markdown_table(rows: Sequence[Sequence[str]]) -> str:
    """A Markdown table. The first row is the header."""
    lines = [rows[0], ["---"] * len(rows[0]), *rows[1:]]
    return "\n".join(f"| {' | '.join(line)} |" for line in lines)
