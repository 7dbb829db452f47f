"""Portrait World: drawn people in drawn places. `python -m training.world OUT.png` writes a contact sheet of it."""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence
from pathlib import Path

import numpy as np
from numpy.typing import NDArray
from PIL import Image

from .portrait.painter import Painted, paint
from .portrait.people import SPLITS, Person, person
from .portrait.scenes import WORDS, Figure, Scene, caption, scene, turned

__all__ = [
    "WORDS", "Figure", "Painted", "Person", "Scene", "aligned", "caption", "paint", "person", "scene", "turned",
]  # fmt: skip


def aligned(painted: Painted, index: int, side: int = 112) -> NDArray[np.uint8]:
    """The face of person `index` in ArcFace's framing: uint8 [side, side, 3], `side` a multiple of 112 or 128."""
    # The painter itself needs no torch.
    import torch

    from ..likeness import faces

    photo = torch.from_numpy(painted.image).double() / 255
    return faces.pixels(faces.align(photo, torch.from_numpy(painted.kps[index]), side)).numpy()


def sheet(rows: Sequence[Sequence[NDArray[np.uint8]]]) -> Image.Image:
    """Pictures of one size, row by row."""
    return Image.fromarray(np.concatenate([np.concatenate(row, axis=1) for row in rows], axis=0))


def main(words: Sequence[str]) -> int:
    parser = argparse.ArgumentParser(prog="python -m training.world", description=__doc__)
    parser.add_argument("out", type=Path, metavar="OUT.png")
    parser.add_argument("--split", choices=list(SPLITS), default="test")
    parser.add_argument("--people", type=int, default=16, help="rows, a person each")
    parser.add_argument("--scenes", type=int, default=8, help="columns, a scene each")
    parser.add_argument("--side", type=int, default=128, help="pixels of a picture")
    given = parser.parse_args(words)
    who = [person(number, given.split) for number in range(given.people)]
    rows = [[paint([one], scene(number), given.side).image for number in range(given.scenes)] for one in who]
    sheet(rows).save(given.out)
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
