"""`python -m training.collect FOLDER OUT`: photos to shards, in the host's Python; see run.py for its arguments."""

from __future__ import annotations

import sys

from tools import host

NEEDS = (*host.RUNTIME_MODULES, "PIL", "scipy", "tqdm")


def work(arguments: list[str]) -> int:
    return host.start("training.collect.run", arguments, NEEDS)


if __name__ == "__main__":
    sys.exit(host.main(work))
