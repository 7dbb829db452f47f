"""The same graph through this pack's nodes and through those of another pack of the IPAdapter family, interleaved.

The other pack is given by its folder and must have IPAdapter_plus's nodes `IPAdapterFaceID` and `IPAdapterEmbeds`. Both
packs get the same random weights and embeddings; photos, face analyzer and image encoder are stand-ins that return
these, so that only the sampling is measured.
"""

from __future__ import annotations

import argparse
import importlib.util
import statistics
import subprocess
import sys
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import torch
from comfy.clip_vision import ClipVisionModel
from comfy.model_patcher import ModelPatcher
from torch import Tensor

from ..likeness.checkpoints import key_maps
from ..tools.standins import models
from .compare import BASELINE_CASE, format_markdown_table
from .ip_adapter import EMBEDDING_SHAPES, PUBLISHED_LAYOUTS, ROOT, AdapterBenchmark, apply_random_adapter
from .metrics import measure_peak_memory
from .models import build_unet_model

PEER_PACKAGE = "peer_pack"
STRENGTH = 0.8
PHOTO_SIZE = 640
SMALL_VISION_CONFIG = {
    "hidden_size": 64, "intermediate_size": 64, "num_hidden_layers": 2, "num_attention_heads": 1, "image_size": 224,
    "patch_size": 112, "num_channels": 3, "projection_dim": 64, "hidden_act": "quick_gelu",
    "model_type": "clip_vision_model",
}  # fmt: skip
# Five points of a face in a photo of PHOTO_SIZE, for the peer's own alignment.
FACE_POINTS = ((250.0, 280.0), (390.0, 280.0), (320.0, 360.0), (265.0, 430.0), (375.0, 430.0))
THIS_PACK, PEER = "this pack", "peer"
TABLE_HEADER = (
    "kind", "nodes of", "seconds per step", "to model only", "to the peer", "peak MiB", "device reads per step",
)  # fmt: skip


def import_peer(folder: Path) -> Any:
    """Import another pack's folder as ComfyUI does. Raises ValueError if it is none."""
    file = folder / "__init__.py"
    if not file.is_file():
        raise ValueError(f"got {folder}; expected the folder of a node pack, with __init__.py; clone it first")
    if PEER_PACKAGE in sys.modules:
        return sys.modules[PEER_PACKAGE]
    spec = importlib.util.spec_from_file_location(PEER_PACKAGE, file, submodule_search_locations=[str(folder)])
    assert spec is not None and spec.loader is not None
    sys.modules[PEER_PACKAGE] = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(sys.modules[PEER_PACKAGE])
    return sys.modules[PEER_PACKAGE]


def apply_peer_faceid(nodes: Mapping[str, Any], model: ModelPatcher, tensors: dict[str, dict[str, Tensor]]) -> Any:
    """FaceID: the stand-in analyzer finds one face with a random embedding."""
    embedding = torch.nn.functional.normalize(torch.randn(512), dim=0).numpy()
    face = SimpleNamespace(normed_embedding=embedding, embedding=embedding, kps=torch.tensor(FACE_POINTS).numpy())
    analyzer = SimpleNamespace(det_model=SimpleNamespace(input_size=0), get=lambda image: [face])
    photo = torch.full((1, PHOTO_SIZE, PHOTO_SIZE, 3), 0.5)
    vision = ClipVisionModel(SMALL_VISION_CONFIG)
    return nodes["IPAdapterFaceID"]().apply_ipadapter(
        model, tensors, weight=STRENGTH, start_at=0.0, end_at=1.0, weight_type="linear", image=photo,
        clip_vision=vision, insightface=analyzer,
    )[0]  # fmt: skip


def apply_peer_embeddings(nodes: Mapping[str, Any], model: ModelPatcher, tensors: dict[str, dict[str, Tensor]]) -> Any:
    """Plus-Face: hidden states of an image encoder, and those of no image."""
    shape = (1, *EMBEDDING_SHAPES["penultimate"])
    return nodes["IPAdapterEmbeds"]().apply_ipadapter(
        model, tensors, torch.randn(shape), STRENGTH, "linear", 0.0, 1.0, neg_embed=torch.zeros(shape)
    )[0]


PEER_KINDS: Mapping[str, Callable[..., Any]] = {"faceid": apply_peer_faceid, "plus": apply_peer_embeddings}


def apply_peer_adapter(folder: Path, model: ModelPatcher, base: str, size: str, kind: str) -> ModelPatcher:
    """The model with the same random adapter as apply_random_adapter, by the peer's nodes."""
    layout = PUBLISHED_LAYOUTS[kind][base]
    assert layout is not None
    published = models.make_adapter(layout, None if size == "full" else 320)
    tensors = {part: key_maps.select_prefix(published, f"{part}.") for part in ("image_proj", "ip_adapter")}
    return PEER_KINDS[kind](import_peer(folder).NODE_CLASS_MAPPINGS, model, tensors)


@dataclass(frozen=True)
class PeerRow:
    """One pack's measurement of an adapter kind."""

    kind: str
    pack: str
    step_seconds: float
    peak_bytes: int
    reads_per_step: float | None


def make_benchmarks(arguments: argparse.Namespace, base: str) -> dict[tuple[str, str], AdapterBenchmark]:
    """By kind and pack; the unpatched model first."""
    model = build_unet_model(base, arguments.size)
    make = partial(AdapterBenchmark, base, arguments.resolution)
    benchmarks = {(BASELINE_CASE, ""): make(model)}
    for kind in PEER_KINDS:
        if PUBLISHED_LAYOUTS[kind][base] is not None:
            benchmarks[kind, THIS_PACK] = make(apply_random_adapter(model, base, arguments.size, kind))
            benchmarks[kind, PEER] = make(apply_peer_adapter(arguments.peer, model, base, arguments.size, kind))
    return benchmarks


def measure_peer_in_process(arguments: argparse.Namespace, base: str, case: str) -> int:
    """Peak memory in this process; `case` is a kind and a pack, separated by a slash."""
    kind, _, pack = case.partition("/")
    model = build_unet_model(base, arguments.size)
    if pack == THIS_PACK:
        model = apply_random_adapter(model, base, arguments.size, kind)
    elif pack == PEER:
        model = apply_peer_adapter(arguments.peer, model, base, arguments.size, kind)
    return measure_peak_memory(partial(AdapterBenchmark(base, arguments.resolution, model).run, 2))


def measure_case_peak_memory(arguments: argparse.Namespace, base: str, kind: str, pack: str) -> int:
    """The same in a separate process."""
    command = [
        sys.executable, "-m", "benchmarks.measure", "--peer", str(arguments.peer), "--peak", f"{kind}/{pack}", "--base",
        base, "--size", arguments.size, "--resolution", str(arguments.resolution),
    ]  # fmt: skip
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True)
    if done.returncode:
        raise SystemExit(done.stderr)
    return int(done.stdout.split()[-1])


def measure_against_peer(arguments: argparse.Namespace, base: str) -> list[PeerRow]:
    """All kinds of both packs on one model, their steps interleaved."""
    benchmarks = make_benchmarks(arguments, base)
    seconds: dict[tuple[str, str], list[float]] = {case: [] for case in benchmarks}
    for benchmark in benchmarks.values():
        benchmark.run(2)
    for _ in range(arguments.repeats):
        for case, benchmark in benchmarks.items():
            seconds[case] += benchmark.measure_step_times(arguments.steps)
    return [
        PeerRow(
            kind,
            pack,
            statistics.median(seconds[kind, pack]),
            measure_case_peak_memory(arguments, base, kind, pack),
            benchmark.count_syncs_per_step(),
        )
        for (kind, pack), benchmark in benchmarks.items()
    ]


def format_peer_table(rows: list[PeerRow]) -> str:
    seconds = {(row.kind, row.pack): row.step_seconds for row in rows}
    bare = rows[0].step_seconds
    lines = [
        (
            row.kind,
            row.pack,
            f"{row.step_seconds:.3f}",
            f"{row.step_seconds / bare:.2f}",
            f"{row.step_seconds / seconds[row.kind, PEER]:.2f}" if (row.kind, PEER) in seconds else "-",
            f"{row.peak_bytes / 2**20:.0f}",
            "-" if row.reads_per_step is None else f"{row.reads_per_step:.0f}",
        )
        for row in rows
    ]
    return format_markdown_table([TABLE_HEADER, *lines])
