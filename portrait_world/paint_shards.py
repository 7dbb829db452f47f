"""`python -m portrait_world.paint_shards FOLDER` renders Portrait World to WebDataset shards.

Shards that exist are kept, so an interrupted run continues.
"""

from __future__ import annotations

import argparse
import os
import sys
from collections.abc import Iterator, Mapping, Sequence
from concurrent.futures import ProcessPoolExecutor
from pathlib import Path
from typing import Any

from tools.import_pack import import_pack_module

PEOPLE_PER_SHARD = 250


def list_missing_shards(options: argparse.Namespace) -> Iterator[tuple[Mapping[str, Any], range, Path]]:
    """The shards to render, of people alone and of pairs: the fields of a WorldAlbum, the people, the file."""
    shared = {"split": options.split, "resolution": options.resolution, "framing": options.framing}
    albums = {
        "alone": {
            **shared, "num_people": options.people, "images_per_person": options.images_per_person,
            "min_pose_distance": options.min_pose_distance,
        },
        "pairs": {**shared, "num_people": options.pairs, "images_per_person": 1, "people_per_image": 2},
    }  # fmt: skip
    for name, album in albums.items():
        for number, start in enumerate(range(0, album["num_people"], PEOPLE_PER_SHARD)):
            path = options.folder / f"{name}-{number:06d}.tar"
            if not path.exists():
                yield album, range(start, min(start + PEOPLE_PER_SHARD, album["num_people"])), path


def paint_shard(album_fields: Mapping[str, Any], people: range, path: Path, min_face_height: float) -> None:
    """Render one shard; runs in a process of its own."""
    album = import_pack_module("portrait_world.world_album", comfyui=False).WorldAlbum(**album_fields)
    shards = import_pack_module("training.data.shards", comfyui=False)
    shards.write_shard(album, people, path, album.images_per_person, min_face_height=min_face_height)


def main(argv: Sequence[str]) -> int:
    parser = argparse.ArgumentParser(prog="python -m portrait_world.paint_shards", description=__doc__)
    parser.add_argument("folder", type=Path, metavar="FOLDER")
    parser.add_argument("--split", default="train", help="train, validation or test; no person is in two of them")
    parser.add_argument("--people", type=int, default=8000)
    parser.add_argument("--images-per-person", type=int, default=6)
    parser.add_argument(
        "--min-pose-distance", type=float, default=0.0, help="degrees between any two images of a person"
    )
    parser.add_argument("--pairs", type=int, default=7000, help="images of two people")
    parser.add_argument("--resolution", type=int, default=128, help="of each image, in pixels")
    parser.add_argument("--framing", default="", help="of all images: close, bust or wide; random by default")
    parser.add_argument(
        "--min-face-height", type=float, default=0.0, help="in pixels; images with smaller faces are skipped"
    )
    options = parser.parse_args(argv)
    options.folder.mkdir(parents=True, exist_ok=True)
    from tqdm import tqdm

    with ProcessPoolExecutor(os.cpu_count()) as pool:
        jobs = [pool.submit(paint_shard, *shard, options.min_face_height) for shard in list_missing_shards(options)]
        for job in tqdm(jobs, desc="shards"):
            job.result()
    return 0


if __name__ == "__main__":
    try:
        sys.exit(main(sys.argv[1:]))
    except ValueError as error:
        sys.exit(f"error: {error}")
