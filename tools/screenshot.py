"""`python -m tools.screenshot PAGE.html OUT.jpg`: a picture of a page as the system's own Chromium shows it."""

from __future__ import annotations

import argparse
import sys
from pathlib import Path

from . import frontend, host

WIDTH, QUALITY = 1280, 82


def take(page: Path, out: Path, height: int = 0, dark: bool = False) -> None:
    """Save the upper `height` pixels of a page, 0 for all of it, as a JPEG. Raises HostError without a Chromium."""
    with frontend.browser() as chromium:
        view = chromium.new_page(
            viewport={"width": WIDTH, "height": height or 800}, color_scheme="dark" if dark else "light"
        )
        view.goto(page.resolve().as_uri())
        view.screenshot(path=out, type="jpeg", quality=QUALITY, full_page=not height)


def work(arguments: list[str]) -> int:
    parser = argparse.ArgumentParser(prog="python -m tools.screenshot", description=__doc__)
    parser.add_argument("page", type=Path, metavar="PAGE.html")
    parser.add_argument("out", type=Path, metavar="OUT.jpg")
    parser.add_argument("--height", type=int, default=0, metavar="PIXELS", help="from the top (default: all of it)")
    parser.add_argument("--dark", action="store_true", help="as those see it who prefer dark pages")
    given = parser.parse_args(arguments)
    if not given.page.is_file():
        raise host.HostError(f"got the page {given.page}, which is not there; name an HTML file")
    take(given.page, given.out, given.height, given.dark)
    return 0


if __name__ == "__main__":
    sys.exit(host.main(work))
