"""Measures the bare model and each adapter kind in one process, interleaved, and prints them as a Markdown table.

FLOPs are torch's own count, exact on any machine: a run of three steps less one of two is a step, and what remains is
what a run pays once. Seconds are those between steps. Memory is the peak of a process of its own (on a GPU: of the
device's allocations). Syncs are the waits for the device that torch reports during a step (GPU only).
"""

from __future__ import annotations

import argparse
import gc
import importlib.util
import os
import resource
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

ROOT = Path(__file__).resolve().parents[1]
PACKAGE = "comfyui_likeness"

# kind -> layout of the published file, by base; None: there is no such file
KINDS: dict[str, dict[str, str | None]] = {
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
FACES = {"portrait": 5}
METHODS = ("flashface", "fused", "mixed", "adaface", "flux")  # those with a module and a table of their own
BARE = "bare model"
FULL = {"sd15": {"channel_mult": [1, 2, 4, 4]}, "sdxl": {"channel_mult": [1, 2, 4]}}


def bring_pack() -> None:
    """The pack as a package and the host in front, without the repository's root: its `nodes` would hide the host's."""
    sys.path[:] = [os.environ["COMFYUI_PATH"], *(p for p in sys.path if Path(p or ".").resolve() != ROOT)]
    spec = importlib.util.spec_from_file_location(PACKAGE, ROOT / "__init__.py", submodule_search_locations=[str(ROOT)])
    assert spec is not None and spec.loader is not None
    sys.modules[PACKAGE] = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(sys.modules[PACKAGE])
    argv, sys.argv = sys.argv, [sys.argv[0], "--use-pytorch-cross-attention"]  # the one that FLOPs are counted in
    import torch

    if not torch.cuda.is_available():
        sys.argv.append("--cpu")
    import comfy.options

    comfy.options.enable_args_parsing()
    import comfy.cli_args  # noqa: F401  (reads sys.argv once)

    sys.argv = argv


def base_model(base: str, size: str) -> Any:
    """A UNet of the host with random weights: 320 channels everywhere, or as published."""
    import comfy.model_base
    import comfy.model_management
    import comfy.supported_models
    import torch
    from comfy.model_patcher import ModelPatcher

    models = importlib.import_module(f"{PACKAGE}.tools.standin_models")
    config = getattr(models, base.upper()) | (FULL[base] if size == "full" else {})
    supported = {"sd15": comfy.supported_models.SD15, "sdxl": comfy.supported_models.SDXL}[base]
    settings = supported({key: value for key, value in config.items() if key != "dims"})
    device = comfy.model_management.get_torch_device()
    dtype = torch.float16 if device.type == "cuda" else torch.float32
    settings.set_inference_dtype(dtype, None)
    kind = {"sd15": comfy.model_base.BaseModel, "sdxl": comfy.model_base.SDXL}[base]
    model = kind(settings, device=torch.device("cpu"))
    shapes = {key: tuple(value.shape) for key, value in model.diffusion_model.state_dict().items()}
    model.diffusion_model.load_state_dict(models.fill(shapes, dtype))
    model.diffusion_model.eval().requires_grad_(False)
    return ModelPatcher(model, device, torch.device("cpu"))


def with_identity(model: Any, base: str, size: str, kind: str) -> Any:
    """The model with an adapter of that kind from seeds, in the published layout, and an identity for it."""
    import comfy.model_management
    import comfy.ops
    import torch
    from comfy.model_patcher import ModelPatcher

    def part(name: str) -> Any:
        return importlib.import_module(f"{PACKAGE}.{name}")

    detect, keymaps, spec = part("likeness.detect"), part("likeness.keymaps"), part("likeness.spec")
    flat = part("tools.standin_models").adapter(KINDS[kind][base], None if size == "full" else 320)
    tensors = keymaps.rename(flat, keymaps.IP_ADAPTER)
    about, _ = detect.read_spec(tensors, variant=kind if kind == "faceid_plus_v2" else "auto")
    module = detect.build(about, tensors, comfy.ops.manual_cast).eval().requires_grad_(False)
    held = ModelPatcher(module, comfy.model_management.get_torch_device(), torch.device("cpu"))
    adapter = part("nodes.types").LoadedAdapter(about, held, keymaps.under(tensors, "lora."), kind)
    faces = FACES.get(kind, 1)
    shapes = {"raw": (512,), "projected": (1024,), "penultimate": (257, 1280), "levels": (5, 577, 1024)}
    shapes |= {"projected": (768,)} if "pulid" in kind else {}
    rows = {need.id("0" * 64): torch.randn(faces, *shapes[need.layer]) for need in about.needs}
    person = spec.Identity(
        "someone", torch.zeros(faces, 4), torch.zeros(faces, 5, 2), torch.ones(faces), torch.ones(faces),
        embeddings=rows, zeros={key: value[:1] for key, value in rows.items()},
    )  # fmt: skip
    node = part("nodes.attention.decoupled").ApplyDecoupled
    return node.execute(model, adapter, person, 0.8, 0.0, 1.0, "linear", "V only").args[0]


def count(run: Callable[[], None]) -> int:
    """FLOPs of a run."""
    import torch
    from torch.utils.flop_counter import FlopCounterMode, sdpa_flop_count

    def attention(q: Any, k: Any, v: Any, *_: Any, **__: Any) -> int:
        return sdpa_flop_count(q, k, v)

    # The counter does not know the CPU's fused attention.
    known: Any = {torch.ops.aten._scaled_dot_product_flash_attention_for_cpu: attention}
    with FlopCounterMode(display=False, custom_mapping=known) as counter:
        run()
    return counter.get_total_flops()


@dataclass(frozen=True)
class Bench:
    """A model to measure, and how to run it."""

    base: str
    resolution: int
    model: Any

    def run(self, steps: int, callback: Callable[..., None] | None = None) -> None:
        import comfy.sample
        import torch

        width = {"sd15": 768, "sdxl": 2048}[self.base]
        prompt = [[torch.zeros(1, 77, width), {"pooled_output": torch.zeros(1, 1280)}]]
        latent = torch.zeros(1, 4, self.resolution // 8, self.resolution // 8)
        with torch.inference_mode():
            comfy.sample.sample(
                self.model, torch.ones_like(latent), steps, 5.0, "euler", "normal", prompt, prompt, latent,
                callback=callback, disable_pbar=True, seed=1,
            )  # fmt: skip

    def flops(self) -> tuple[int, int]:
        """FLOPs of one step, and what a run pays once besides."""
        self.run(1)  # a LoRA is put into the weights when they are loaded, not in every run
        counts = [count(partial(self.run, steps)) for steps in (2, 3)]
        step = counts[1] - counts[0]
        return step, counts[0] - 2 * step

    def seconds(self, steps: int) -> list[float]:
        """The time of every step but the first."""
        import torch

        times: list[float] = []

        def stamp(*_: Any) -> None:
            if torch.cuda.is_available():
                torch.cuda.synchronize()
            times.append(time.perf_counter())

        self.run(steps + 1, stamp)
        return [b - a for a, b in zip(times, times[1:], strict=False)]

    def syncs(self, steps: int = 4) -> float | None:
        """Waits for the device per step, as torch reports them; None without a GPU."""
        import torch

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


def peak_bytes(arguments: argparse.Namespace, base: str, kind: str) -> int:
    """Peak memory of a run in a process of its own."""
    words = [sys.executable, "-m", "benchmarks.measure", "--peak", kind, "--base", base, "--size", arguments.size]
    done = subprocess.run([*words, "--resolution", str(arguments.resolution)], cwd=ROOT, capture_output=True, text=True)
    if done.returncode:
        raise SystemExit(done.stderr)
    return int(done.stdout.split()[-1])


def peak_here(run: Callable[[], None]) -> int:
    """Peak memory of a run, not of the making of the weights where the system can tell the two apart."""
    import torch

    status, reset = Path("/proc/self/status"), Path("/proc/self/clear_refs")
    gc.collect()
    if torch.cuda.is_available():
        torch.cuda.reset_peak_memory_stats()
    elif reset.exists():
        reset.write_text("5")  # the peak starts again from here
    run()
    if torch.cuda.is_available():
        return torch.cuda.max_memory_allocated()
    if status.is_file():  # what getrusage says on Linux begins with the parent's peak
        return next(int(line.split()[1]) * 1024 for line in status.read_text().splitlines() if line.startswith("VmHWM"))
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss


@dataclass(frozen=True)
class Row:
    kind: str
    flops: int
    once: int
    seconds: list[float]
    peak: int
    syncs: float | None

    def cells(self, bare: Row) -> Sequence[str]:
        median, spread = statistics.median(self.seconds), statistics.pstdev(self.seconds)
        waits = "-" if self.syncs is None or bare.syncs is None else f"{self.syncs - bare.syncs:+.0f}"
        return (
            self.kind,
            f"{self.flops / 1e9:.1f}",
            f"{self.flops / bare.flops:.4f}",
            f"{(self.once - bare.once) / 1e9:.1f}",
            f"{median:.3f} ± {spread:.3f}",
            f"{median / statistics.median(bare.seconds):.2f}",
            f"{self.peak / 2**20:.0f}",
            f"{self.peak / bare.peak:.2f}",
            waits,
        )


HEAD = (
    "kind", "GFLOPs per step", "ratio", "GFLOPs once per run", "seconds per step", "ratio", "peak MiB", "ratio",
    "syncs per step",
)  # fmt: skip


def measure(arguments: argparse.Namespace, base: str) -> list[Row]:
    """All kinds of one base, interleaved: bare, each kind, bare, each kind, ..."""
    model = base_model(base, arguments.size)
    kinds = [kind for kind, layouts in KINDS.items() if layouts[base] and kind in arguments.kinds]
    benches = {BARE: Bench(base, arguments.resolution, model)}
    for kind in kinds:
        benches[kind] = replace(benches[BARE], model=with_identity(model, base, arguments.size, kind))
    counts = {kind: bench.flops() for kind, bench in benches.items()}
    seconds: dict[str, list[float]] = {kind: [] for kind in benches}
    for _ in range(arguments.repeats):
        for kind, bench in benches.items():
            seconds[kind] += bench.seconds(arguments.steps)
    return [
        Row(kind, *counts[kind], seconds[kind], peak_bytes(arguments, base, kind), bench.syncs())
        for kind, bench in benches.items()
    ]


def table(rows: Sequence[Row]) -> str:
    lines = [HEAD, ["---"] * len(HEAD), *(row.cells(rows[0]) for row in rows)]
    return "\n".join(f"| {' | '.join(line)} |" for line in lines)


def parse(words: list[str]) -> argparse.Namespace:
    parser = argparse.ArgumentParser(prog="python -m benchmarks", description=__doc__)
    parser.add_argument("--base", choices=("sd15", "sdxl", "both", *METHODS), default="both")
    parser.add_argument("--size", choices=("small", "full"), default="small", help="320 channels everywhere, or all")
    parser.add_argument("--resolution", type=int, default=256, help="side of the picture in pixels")
    parser.add_argument("--steps", type=int, default=3, help="timed steps per repeat")
    parser.add_argument("--repeats", type=int, default=2)
    parser.add_argument("--kinds", nargs="+", choices=list(KINDS), default=list(KINDS))
    parser.add_argument("--peak", metavar="KIND", help=argparse.SUPPRESS)
    return parser.parse_args(words)


def main(words: list[str]) -> None:
    arguments = parse(words)
    bring_pack()
    if arguments.peak:
        model = base_model(arguments.base, arguments.size)
        if arguments.peak != BARE:
            model = with_identity(model, arguments.base, arguments.size, arguments.peak)
        bench = Bench(arguments.base, arguments.resolution, model)
        print(peak_here(partial(bench.run, 2)))
        return
    if arguments.base in METHODS:
        print(importlib.import_module(f"{PACKAGE}.benchmarks.{arguments.base}").measure(arguments))
        return
    for base in ("sd15", "sdxl") if arguments.base == "both" else (arguments.base,):
        print(
            f"\n{base}, {arguments.size}, {arguments.resolution} pixels\n\n{table(measure(arguments, base))}",
            flush=True,
        )


if __name__ == "__main__":
    main(sys.argv[1:])
