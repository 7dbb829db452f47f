"""`python -m portrait_world.gallery.run FILE.html`: renders the gallery. `python -m tools.demo` starts it."""

from __future__ import annotations

import sys
from pathlib import Path

from tools.import_pack import import_pack_module


def main(arguments: list[str]) -> int:
    render = import_pack_module("portrait_world.gallery.render", comfyui=False)
    host = import_pack_module("tools.host", comfyui=False)
    (file,) = arguments
    return host.run_tool(lambda _: render.print_gallery(Path(file)))


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
