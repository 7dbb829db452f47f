"""Portrait World: drawn people in drawn scenes. `python -m portrait_world.world OUT.png` renders a contact sheet."""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence
from pathlib import Path

if __name__ == "__main__":  # started outside the package, where its imports of other packages fail
    from tools.import_pack import import_pack_module

    sys.exit(import_pack_module("portrait_world.world", comfyui=False).main(sys.argv[1:]))

import numpy as np
from numpy.typing import NDArray
from PIL import Image

from .drawing.captions import CAPTION_WORDS, format_caption, list_looks, make_caption
from .drawing.painter import PaintedImage, paint_scene
from .drawing.people import SPLIT_REMAINDERS, Person, make_person
from .drawing.scenes import Figure, Scene, make_scene, measure_pose_difference

__all__ = [
    "CAPTION_WORDS", "Figure", "PaintedImage", "Person", "Scene", "align_painted_face", "format_caption",
    "list_looks", "make_caption", "make_contact_sheet", "make_person", "make_scene", "measure_pose_difference",
    "paint_scene",
]  # fmt: skip


def align_painted_face(painted: PaintedImage, face_index: int, resolution: int = 112) -> NDArray[np.uint8]:
    """A face aligned as for ArcFace: uint8 [resolution, resolution, 3], `resolution` a multiple of 112 or 128."""
    # The painter itself does not need torch.
    import torch

    from ..likeness.faces import alignment

    photo = torch.from_numpy(painted.image).double() / 255
    key_points = torch.from_numpy(painted.key_points[face_index])
    return alignment.convert_to_uint8(alignment.align_face(photo, key_points, resolution)).numpy()


def make_contact_sheet(rows: Sequence[Sequence[NDArray[np.uint8]]]) -> Image.Image:
    """Arrange images of one size in rows."""
    return Image.fromarray(np.concatenate([np.concatenate(row, axis=1) for row in rows], axis=0))


def main(argv: Sequence[str]) -> int:
    parser = argparse.ArgumentParser(prog="python -m portrait_world.world", description=__doc__)
    parser.add_argument("out", type=Path, metavar="OUT.png")
    parser.add_argument("--split", choices=list(SPLIT_REMAINDERS), default="test")
    parser.add_argument("--people", type=int, default=16, help="number of rows, one person each")
    parser.add_argument("--scenes", type=int, default=8, help="number of columns, one scene each")
    parser.add_argument("--resolution", type=int, default=128, help="of each image, in pixels")
    options = parser.parse_args(argv)
    people = [make_person(number, options.split) for number in range(options.people)]
    scenes = [make_scene(number) for number in range(options.scenes)]
    rows = [[paint_scene([person], scene, options.resolution).image for scene in scenes] for person in people]
    make_contact_sheet(rows).save(options.out)
    return 0
