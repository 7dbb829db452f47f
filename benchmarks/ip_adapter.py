"""The IP-Adapter family: the unpatched model and each adapter kind in one process, interleaved.

One step is a run of three steps minus a run of two; the rest is paid once per run. Peak memory is that of a separate
process. Syncs are the device synchronizations that PyTorch reports during a step (GPU only).
"""

from __future__ import annotations

import argparse
import statistics
import subprocess
import sys
import time
import warnings
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any

import comfy.ops
import comfy.sample
import torch
from comfy.model_patcher import ModelPatcher

from ..likeness.checkpoints import checkpoint_detection, key_maps
from ..nodes.attention.apply_decoupled import ApplyDecoupled
from ..nodes.loaders.model_management import make_model_patcher
from ..nodes.types import LoadedAdapter
from ..tools.standins import models
from .compare import BASELINE_CASE, format_markdown_table
from .metrics import count_flops, measure_peak_memory
from .models import build_unet_model, make_random_identity

ROOT = Path(__file__).resolve().parents[1]

# kind -> base -> layout of the published file; None if there is no such file
PUBLISHED_LAYOUTS: dict[str, dict[str, str | None]] = {
    "image": {"sd15": "ip-adapter_sd15", "sdxl": "ip-adapter_sdxl_vit-h"},
    "plus": {"sd15": "ip-adapter-plus_sd15", "sdxl": "ip-adapter-plus_sdxl_vit-h"},
    "full_face": {"sd15": "ip-adapter-full-face_sd15", "sdxl": None},
    "faceid": {"sd15": "ip-adapter-faceid_sd15", "sdxl": "ip-adapter-faceid_sdxl"},
    "faceid_plus_v2": {"sd15": "ip-adapter-faceid-plus_sd15", "sdxl": "ip-adapter-faceid-plusv2_sdxl"},
    "portrait": {"sd15": "ip-adapter-faceid-portrait_sd15", "sdxl": "ip-adapter-faceid-portrait_sdxl"},
    "instantid": {"sd15": None, "sdxl": "instantid_ip-adapter"},
    "pulid": {"sd15": None, "sdxl": "pulid_v1"},
    "pulid_v1_1": {"sd15": None, "sdxl": "pulid_v1.1"},
}
FACES_BY_KIND = {"portrait": 5}
EMBEDDING_SHAPES = {"raw": (512,), "projected": (1024,), "penultimate": (257, 1280), "levels": (5, 577, 1024)}
TABLE_HEADER = (
    "kind", "GFLOPs per step", "ratio", "GFLOPs once per run", "seconds per step", "ratio", "peak MiB", "ratio",
    "syncs per step",
)  # fmt: skip


def apply_random_adapter(model: ModelPatcher, base: str, size: str, kind: str) -> ModelPatcher:
    """Apply an adapter with random weights in the published layout, and a random identity."""
    layout = PUBLISHED_LAYOUTS[kind][base]
    assert layout is not None
    tensors = key_maps.rename_keys(models.make_adapter(layout, None if size == "full" else 320), key_maps.IP_ADAPTER)
    variant = kind if kind == "faceid_plus_v2" else "auto"
    spec, _ = checkpoint_detection.detect_adapter_spec(tensors, variant=variant)
    patcher = make_model_patcher(checkpoint_detection.build_ip_adapter(spec, tensors, comfy.ops.manual_cast))
    adapter = LoadedAdapter(spec, patcher, key_maps.select_prefix(tensors, "lora."), kind)
    shapes = EMBEDDING_SHAPES | ({"projected": (768,)} if "pulid" in kind else {})
    identity = make_random_identity(
        {feature: shapes[feature.layer] for feature in spec.needs}, FACES_BY_KIND.get(kind, 1)
    )
    return ApplyDecoupled.execute(model, adapter, identity, 0.8, 0.0, 1.0, "linear", "V only").args[0]


@dataclass(frozen=True)
class AdapterBenchmark:
    """A model to measure."""

    base: str
    resolution: int
    model: ModelPatcher

    def run(self, steps: int, callback: Callable[..., None] | None = None) -> None:
        text_width = {"sd15": 768, "sdxl": 2048}[self.base]
        prompt = [[torch.zeros(1, 77, text_width), {"pooled_output": torch.zeros(1, 1280)}]]
        latent = torch.zeros(1, 4, self.resolution // 8, self.resolution // 8)
        with torch.inference_mode():
            comfy.sample.sample(
                self.model, torch.ones_like(latent), steps, 5.0, "euler", "normal", prompt, prompt, latent,
                callback=callback, disable_pbar=True, seed=1,
            )  # fmt: skip

    def count_step_and_run_flops(self) -> tuple[int, int]:
        """FLOPs of one step, and FLOPs paid once per run."""
        self.run(1)  # loading the model applies the LoRA, which is not part of a run
        counts = [count_flops(partial(self.run, steps)) for steps in (2, 3)]
        step = counts[1] - counts[0]
        return step, counts[0] - 2 * step

    def measure_step_times(self, steps: int) -> list[float]:
        """Seconds of every step except the first."""
        times: list[float] = []

        def record_time(*_: Any) -> None:
            if torch.cuda.is_available():
                torch.cuda.synchronize()
            times.append(time.perf_counter())

        self.run(steps + 1, record_time)
        return [b - a for a, b in zip(times, times[1:], strict=False)]

    def count_syncs_per_step(self, steps: int = 4) -> float | None:
        """Device synchronizations per step as reported by PyTorch; None without a GPU."""
        if not torch.cuda.is_available():
            return None
        counts = []
        for n in (steps, 2 * steps):
            with warnings.catch_warnings(record=True) as caught:
                warnings.simplefilter("always")
                torch.cuda.set_sync_debug_mode("warn")
                self.run(n)
                torch.cuda.set_sync_debug_mode("default")
            counts.append(sum("synchroniz" in str(w.message) for w in caught))
        return (counts[1] - counts[0]) / steps


@dataclass(frozen=True)
class BenchmarkRow:
    kind: str
    flops_per_step: int
    flops_per_run: int
    step_seconds: list[float]
    peak_bytes: int
    syncs_per_step: float | None

    def format_cells(self, baseline: BenchmarkRow) -> Sequence[str]:
        median, deviation = statistics.median(self.step_seconds), statistics.pstdev(self.step_seconds)
        syncs = "-"
        if self.syncs_per_step is not None and baseline.syncs_per_step is not None:
            syncs = f"{self.syncs_per_step - baseline.syncs_per_step:+.0f}"
        return (
            self.kind,
            f"{self.flops_per_step / 1e9:.1f}",
            f"{self.flops_per_step / baseline.flops_per_step:.4f}",
            f"{(self.flops_per_run - baseline.flops_per_run) / 1e9:.1f}",
            f"{median:.3f} ± {deviation:.3f}",
            f"{median / statistics.median(baseline.step_seconds):.2f}",
            f"{self.peak_bytes / 2**20:.0f}",
            f"{self.peak_bytes / baseline.peak_bytes:.2f}",
            syncs,
        )


def measure_kind_in_process(arguments: argparse.Namespace, base: str, kind: str) -> int:
    """Peak memory of a run with an adapter kind, or with none (`BASELINE_CASE`), in this process."""
    model = build_unet_model(base, arguments.size)
    if kind != BASELINE_CASE:
        model = apply_random_adapter(model, base, arguments.size, kind)
    return measure_peak_memory(partial(AdapterBenchmark(base, arguments.resolution, model).run, 2))


def measure_kind_peak_memory(arguments: argparse.Namespace, base: str, kind: str) -> int:
    """The same in a separate process."""
    command = [sys.executable, "-m", "benchmarks.measure", "--peak", kind, "--base", base, "--size", arguments.size]
    done = subprocess.run(
        [*command, "--resolution", str(arguments.resolution)], cwd=ROOT, capture_output=True, text=True
    )
    if done.returncode:
        raise SystemExit(done.stderr)
    return int(done.stdout.split()[-1])


def measure_adapters(arguments: argparse.Namespace, base: str) -> list[BenchmarkRow]:
    """All kinds for one base model, with interleaved timing."""
    model = build_unet_model(base, arguments.size)
    kinds = [kind for kind, layouts in PUBLISHED_LAYOUTS.items() if layouts[base] and kind in arguments.kinds]
    benchmarks = {BASELINE_CASE: AdapterBenchmark(base, arguments.resolution, model)}
    for kind in kinds:
        adapted = apply_random_adapter(model, base, arguments.size, kind)
        benchmarks[kind] = replace(benchmarks[BASELINE_CASE], model=adapted)
    counts = {kind: benchmark.count_step_and_run_flops() for kind, benchmark in benchmarks.items()}
    seconds: dict[str, list[float]] = {kind: [] for kind in benchmarks}
    for _ in range(arguments.repeats):
        for kind, benchmark in benchmarks.items():
            seconds[kind] += benchmark.measure_step_times(arguments.steps)
    return [
        BenchmarkRow(
            kind,
            *counts[kind],
            seconds[kind],
            measure_kind_peak_memory(arguments, base, kind),
            benchmark.count_syncs_per_step(),
        )
        for kind, benchmark in benchmarks.items()
    ]


def format_adapter_table(rows: Sequence[BenchmarkRow]) -> str:
    return format_markdown_table([TABLE_HEADER, *(row.format_cells(rows[0]) for row in rows)])
