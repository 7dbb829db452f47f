"""`python -m tools.test [pytest arguments]`: installs a ComfyUI if needed and runs the tests in its Python."""

from __future__ import annotations

import os
import subprocess
import sys

from . import host, real_photos

COVERAGE_OPTIONS = ("--cov=likeness", "--cov-report=term-missing:skip-covered", "--cov-fail-under=95")
SELECTING_OPTIONS = (
    "-k", "-m", "-h", "--help", "--lf", "--last-failed", "--sw", "--stepwise", "--co", "--des", "--ign",
)  # fmt: skip


def is_whole_suite(arguments: list[str]) -> bool:
    """Whether the pytest arguments select all tests: no path and no selecting option."""
    return all(word.startswith("-") and not word.startswith(SELECTING_OPTIONS) for word in arguments)


def main(arguments: list[str]) -> int:
    if host.find_chromium() is None:
        if os.environ.get("LIKENESS_BROWSER") == "required":
            raise host.HostError(
                "LIKENESS_BROWSER=required, but no Chromium was found; install chromium, or set LIKENESS_CHROMIUM"
            )
        host.print_status(
            "no Chromium was found: browser tests are skipped (install chromium, or set LIKENESS_CHROMIUM)"
        )
    comfyui = host.prepare_host(required_modules=host.TEST_MODULES)
    real_photos.prepare_photos(comfyui.python)
    host.print_status(f"testing on {comfyui.path}")
    command = [comfyui.python, "-m", "pytest", *(COVERAGE_OPTIONS if is_whole_suite(arguments) else ()), *arguments]
    return subprocess.run(command, cwd=host.ROOT, env=host.build_environment(comfyui)).returncode


if __name__ == "__main__":
    sys.exit(host.run_tool(main))
