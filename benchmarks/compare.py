"""Ways of making the same picture, measured in one run against one of them: FLOPs, seconds, memory."""

from __future__ import annotations

import importlib
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any

from .measure import PACKAGE, count, peak_here

COUNTED = 3  # steps, so that a refresh of 3 is counted fairly


def part(name: str) -> Any:
    """A module of the pack."""
    return importlib.import_module(f"{PACKAGE}.{name}")


@dataclass(frozen=True)
class Case:
    """One row of the table: a model, the prompts it is sampled with, and what is done before each picture."""

    name: str
    model: Any
    before: Callable[[], None]
    three: bool = False
    resolution: int = 256
    pictures: int = 1
    prompt: Any = None

    def run(self, steps: int, callback: Callable[..., None] | None = None) -> Any:
        import comfy.samplers
        import comfy_extras.nodes_custom_sampler as custom
        import torch

        self.before()
        texts = [torch.full((1, 77, 768), value) for value in (0.1, 0.0, -0.1)]
        prompts = [[[text, {}]] for text in (texts[0] if self.prompt is None else self.prompt, *texts[1:])]
        if self.three:
            guider: Any = custom.Guider_DualCFG(self.model)
            guider.set_conds(prompts[0], prompts[1], prompts[2])
            guider.set_cfg(4.0, 3.0)
        else:
            guider = comfy.samplers.CFGGuider(self.model)
            guider.set_conds(prompts[0], prompts[2])
            guider.set_cfg(7.5)
        latent = torch.zeros(self.pictures, 4, self.resolution // 8, self.resolution // 8)
        sampling = self.model.get_model_object("model_sampling")
        sigmas = comfy.samplers.calculate_sigmas(sampling, "sgm_uniform", steps)
        with torch.inference_mode():
            noise = torch.randn(latent.shape, generator=torch.Generator().manual_seed(2))
            sampler = comfy.samplers.sampler_object("euler")
            return guider.sample(noise, latent, sampler, sigmas, callback=callback, disable_pbar=True, seed=1)

    def seconds(self, steps: int) -> float:
        """Seconds per step, the first left out."""
        times: list[float] = []
        self.run(steps + 1, lambda *_: times.append(time.perf_counter()))
        return (times[-1] - times[0]) / steps

    def flops(self) -> int:
        return (count(partial(self.run, COUNTED + 1)) - count(partial(self.run, 1))) // COUNTED


def compare(found: Sequence[Case], repeats: int, base: str) -> str:
    """The table, ratios against the case named `base`."""
    flops: dict[str, int] = {}
    for case in found:
        for steps in (1, COUNTED + 1):
            case.run(steps)
        flops[case.name] = case.flops()
    seconds: dict[str, list[float]] = {case.name: [] for case in found}
    for _ in range(repeats):
        for case in found:
            case.run(COUNTED + 1)
            seconds[case.name].append(case.seconds(COUNTED))
    peaks = {case.name: peak_here(partial(case.run, 2)) for case in found}
    return table(flops, {name: min(times) for name, times in seconds.items()}, peaks, base)


def table(flops: dict[str, int], seconds: dict[str, float], peaks: dict[str, int], base: str) -> str:
    head = ("", "GFLOPs per step", "ratio", "seconds per step", "ratio", "peak MiB", "ratio")
    lines = [head, ("---",) * len(head)]
    for name, number in flops.items():
        lines.append(
            (
                name,
                f"{number / 1e9:.1f}",
                f"{number / flops[base]:.3f}",
                f"{seconds[name]:.3f}",
                f"{seconds[name] / seconds[base]:.2f}",
                f"{peaks[name] / 2**20:.0f}",
                f"{peaks[name] / peaks[base]:.2f}",
            )
        )
    return "\n".join(f"| {' | '.join(line)} |" for line in lines)
