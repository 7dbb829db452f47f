"""Runs the benchmark that the command line asks for and prints its table as Markdown."""

from __future__ import annotations

import argparse
from collections.abc import Callable
from pathlib import Path

from .adaface import measure_adaface
from .flashface import measure_flashface
from .flux import measure_flux
from .fused import measure_fused
from .ip_adapter import PUBLISHED_LAYOUTS, format_adapter_table, measure_adapters, measure_kind_in_process
from .mixed import measure_mixed
from .peer import format_peer_table, measure_against_peer, measure_peer_in_process

METHOD_BENCHMARKS: dict[str, Callable[[argparse.Namespace], str]] = {
    "flashface": measure_flashface,
    "fused": measure_fused,
    "mixed": measure_mixed,
    "adaface": measure_adaface,
    "flux": measure_flux,
}


def parse_benchmark_arguments(argv: list[str]) -> argparse.Namespace:
    description = "Compares each adapter kind with the unpatched model: FLOPs, seconds per step, peak memory."
    parser = argparse.ArgumentParser(prog="python -m benchmarks", description=description)
    parser.add_argument(
        "--base", choices=("sd15", "sdxl", "both", *METHOD_BENCHMARKS), default="both",
        help="base model of the IP-Adapter table, or a method with a table of its own",
    )  # fmt: skip
    parser.add_argument(
        "--size", choices=("small", "full"), default="small", help="320 channels at every level, or as published"
    )
    parser.add_argument("--resolution", type=int, default=256, help="side of the image in pixels")
    parser.add_argument("--steps", type=int, default=3, help="timed steps per repeat")
    parser.add_argument("--repeats", type=int, default=2, help="repeats of the timing")
    parser.add_argument(
        "--kinds", nargs="+", choices=list(PUBLISHED_LAYOUTS), default=list(PUBLISHED_LAYOUTS),
        help="adapter kinds of the IP-Adapter table",
    )  # fmt: skip
    parser.add_argument(
        "--peer", type=Path, metavar="FOLDER",
        help="compare with the nodes of another pack in this folder, such as a clone of ComfyUI_IPAdapter_plus",
    )  # fmt: skip
    parser.add_argument("--peak", metavar="KIND", help=argparse.SUPPRESS)
    return parser.parse_args(argv)


def run_benchmarks(argv: list[str]) -> None:
    arguments = parse_benchmark_arguments(argv)
    if arguments.peak:
        measure = measure_peer_in_process if arguments.peer else measure_kind_in_process
        print(measure(arguments, arguments.base, arguments.peak))
        return
    if arguments.base in METHOD_BENCHMARKS:
        print(METHOD_BENCHMARKS[arguments.base](arguments))
        return
    for base in ("sd15", "sdxl") if arguments.base == "both" else (arguments.base,):
        if arguments.peer:
            table = format_peer_table(measure_against_peer(arguments, base))
        else:
            table = format_adapter_table(measure_adapters(arguments, base))
        print(f"\n{base}, {arguments.size}, {arguments.resolution} pixels\n\n{table}", flush=True)
