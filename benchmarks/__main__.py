"""`python -m benchmarks [--base sd15|sdxl|both|flashface|...] [--size small|full] ...`: prints the tables."""

from __future__ import annotations

import sys

from tools import host


def run_benchmarks(arguments: list[str]) -> int:
    return host.run_module("benchmarks.measure", arguments)


if __name__ == "__main__":
    sys.exit(host.run_tool(run_benchmarks))
