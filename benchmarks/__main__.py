"""`python -m benchmarks [--base sd15|sdxl|both] [--size small|full] ...`: the table, in the host's Python."""

from __future__ import annotations

import subprocess
import sys

from tools import host


def work(arguments: list[str]) -> int:
    found = host.bring()
    words = [found.python, "-m", "benchmarks.measure", *arguments]
    return subprocess.run(words, cwd=host.ROOT, env=host.environment(found)).returncode


if __name__ == "__main__":
    sys.exit(host.main(work))
