"""Launcher in ComfyUI's Python: imports ComfyUI and the pack, then runs the benchmarks."""

from __future__ import annotations

import sys

from tools.import_pack import import_pack_module

if __name__ == "__main__":
    import_pack_module("benchmarks.runner").run_benchmarks(sys.argv[1:])
