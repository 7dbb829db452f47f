"""`python -m portrait_world.make_demo_people`: renders four photos of each demo person into weights/demo."""

from __future__ import annotations

import sys
from collections.abc import Sequence
from pathlib import Path

if __name__ == "__main__":  # started outside the package, where its imports of other packages fail
    from tools.import_pack import import_pack_module

    sys.exit(import_pack_module("portrait_world.make_demo_people", comfyui=False).main(sys.argv[1:]))

from PIL import Image

from . import world
from .report.prompts import EVAL_SPLIT, EvalPrompt, iterate_scenes

PEOPLE_FOLDER = Path(__file__).resolve().parents[1] / "weights" / "demo" / "people"
PHOTO_SIZE = 128
# The names of nodes/loaders/demo_loader.py, and people of the test split that are easy to tell apart.
DEMO_PEOPLE = {"Ada": 12, "Bo": 5, "Cleo": 15, "Dev": 39, "Finn": 20, "Kim": 9}
PHOTO_PROMPTS = (
    EvalPrompt("photo", "room"),
    EvalPrompt("photo", "city", "smiling"),
    EvalPrompt("photo", "meadow"),
    EvalPrompt("photo", "plain"),
)


def paint_photo_strip(number: int) -> Image.Image:
    """Photos of a person in different poses, side by side."""
    person = world.make_person(number, EVAL_SPLIT)
    scenes = [
        prompt.apply_to_scene(scene) for prompt, scene in zip(PHOTO_PROMPTS, iterate_scenes(number), strict=False)
    ]
    return world.make_contact_sheet([[world.paint_scene([person], scene, PHOTO_SIZE).image for scene in scenes]])


def main(argv: Sequence[str]) -> int:
    PEOPLE_FOLDER.mkdir(parents=True, exist_ok=True)
    for name, number in DEMO_PEOPLE.items():
        paint_photo_strip(number).save(PEOPLE_FOLDER / f"{name}.png", optimize=True)
    return 0
