"""`python -m benchmarks [--base sd15|sdxl|both] [--size small|full] ...`: the table, in the host's Python."""

from __future__ import annotations

import sys

from tools import host


def work(arguments: list[str]) -> int:
    return host.start("benchmarks.measure", arguments)


if __name__ == "__main__":
    sys.exit(host.main(work))
