"""`python -m portrait_world.report`: evaluates the shipped weights in ComfyUI's Python; run.py has the arguments."""

from __future__ import annotations

import sys

from tools import host

REQUIRED_MODULES = (*host.RUNTIME_MODULES, "PIL")


def main(arguments: list[str]) -> int:
    return host.run_module("portrait_world.report.run", arguments, REQUIRED_MODULES)


if __name__ == "__main__":
    sys.exit(host.run_tool(main))
