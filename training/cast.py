"""`python -m training.cast`: paints the demo's people, four photos of each side by side, into weights/demo/people."""

from __future__ import annotations

import sys
from pathlib import Path

from PIL import Image

from . import world
from .report.prompts import SPLIT, Prompt, scenes

FOLDER = Path(__file__).resolve().parents[1] / "weights" / "demo" / "people"
SIDE = 128
# Names as nodes/loaders/demo.py has them, and numbers of the split that nothing is trained on: not alike at a glance.
CAST = {"Ada": 12, "Bo": 5, "Cleo": 15, "Dev": 39, "Finn": 20, "Kim": 9}
PHOTOS = (
    Prompt("photo", "room"),
    Prompt("photo", "city", "smiling"),
    Prompt("photo", "meadow"),
    Prompt("photo", "plain"),
)


def strip(number: int) -> Image.Image:
    """Photos of a person, each in a pose of its own."""
    who = world.person(number, SPLIT)
    shown = [prompt.shown(scene) for prompt, scene in zip(PHOTOS, scenes(number), strict=False)]
    return world.sheet([[world.paint([who], scene, SIDE).image for scene in shown]])


def main() -> int:
    FOLDER.mkdir(parents=True, exist_ok=True)
    for name, number in CAST.items():
        strip(number).save(FOLDER / f"{name}.png", optimize=True)
    return 0


if __name__ == "__main__":
    sys.exit(main())
