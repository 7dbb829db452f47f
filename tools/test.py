"""`python -m tools.test [pytest arguments]`: brings a host and tests in its Python; pytest's exit code."""

from __future__ import annotations

import os
import subprocess
import sys

from . import host

COVERAGE = ("--cov=likeness", "--cov-report=term-missing:skip-covered", "--cov-fail-under=95")
SELECTING = ("-k", "-m", "-h", "--help", "--lf", "--last-failed", "--sw", "--stepwise", "--co", "--des", "--ign")


def whole(arguments: list[str]) -> bool:
    """Whether pytest arguments leave the whole suite to run: no path and nothing that selects tests."""
    return all(word.startswith("-") and not word.startswith(SELECTING) for word in arguments)


def work(arguments: list[str]) -> int:
    if host.browser() is None:
        if os.environ.get("LIKENESS_BROWSER") == "required":
            raise host.HostError("LIKENESS_BROWSER=required, but there is no Chromium; install it")
        host.say("no Chromium was found: the browser tests are left out (install chromium, or set LIKENESS_CHROMIUM)")
    found = host.bring(needs=host.TEST_MODULES)
    host.say(f"testing on {found.path}")
    words = [found.python, "-m", "pytest", *(COVERAGE if whole(arguments) else ()), *arguments]
    return subprocess.run(words, cwd=host.ROOT, env=host.environment(found)).returncode


if __name__ == "__main__":
    sys.exit(host.main(work))
