"""`python -m training.report`: measures the shipped weights, in the host's Python; see run.py for its arguments."""

from __future__ import annotations

import subprocess
import sys

from tools import host

NEEDS = (*host.RUNTIME_MODULES, "PIL")


def work(arguments: list[str]) -> int:
    found = host.bring(needs=NEEDS)
    words = [found.python, "-m", "training.report.run", *arguments]
    return subprocess.run(words, cwd=host.ROOT, env=host.environment(found)).returncode


if __name__ == "__main__":
    sys.exit(host.main(work))
