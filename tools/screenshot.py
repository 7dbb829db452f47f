"""`python -m tools.screenshot PAGE.html OUT.jpg`: a screenshot of a page in the system's Chromium."""

from __future__ import annotations

import argparse
import sys
from pathlib import Path

from . import browser, host

PAGE_WIDTH, JPEG_QUALITY = 1280, 82


def take_screenshot(page: Path, output_file: Path, height: int = 0, dark: bool = False) -> None:
    """Save the top `height` pixels of a page, or all of it if 0, as a JPEG. Raises HostError without Chromium."""
    with browser.launch_browser() as chromium:
        view = chromium.new_page(
            viewport={"width": PAGE_WIDTH, "height": height or 800}, color_scheme="dark" if dark else "light"
        )
        view.goto(page.resolve().as_uri())
        view.screenshot(path=output_file, type="jpeg", quality=JPEG_QUALITY, full_page=not height)


def main(arguments: list[str]) -> int:
    parser = argparse.ArgumentParser(prog="python -m tools.screenshot", description=__doc__)
    parser.add_argument("page", type=Path, metavar="PAGE.html")
    parser.add_argument("out", type=Path, metavar="OUT.jpg")
    parser.add_argument("--height", type=int, default=0, metavar="PIXELS", help="height (default: all of it)")
    parser.add_argument("--dark", action="store_true", help="use the dark color scheme")
    options = parser.parse_args(arguments)
    if not options.page.is_file():
        raise host.HostError(f"got the page {options.page}, which does not exist; expected an HTML file")
    take_screenshot(options.page, options.out, options.height, options.dark)
    return 0


if __name__ == "__main__":
    sys.exit(host.run_tool(main))
