"""`python -m training.report`: measures the shipped weights, in the host's Python; see run.py for its arguments."""

from __future__ import annotations

import sys

from tools import host

NEEDS = (*host.RUNTIME_MODULES, "PIL")


def work(arguments: list[str]) -> int:
    return host.start("training.report.run", arguments, NEEDS)


if __name__ == "__main__":
    sys.exit(host.main(work))
