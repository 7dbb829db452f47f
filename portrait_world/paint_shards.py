"""`python -m portrait_world.paint_shards FOLDER` renders Portrait World to WebDataset shards.

Shards that exist are kept, so an interrupted run continues.
"""

from __future__ import annotations

import argparse
import multiprocessing
import os
import sys
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import ProcessPoolExecutor, as_completed
from pathlib import Path
from typing import Any

from tools.import_pack import import_pack_module

PEOPLE_PER_SHARD = 250


def paint_shards(
    folder: Path,
    people: range,
    album_fields: Mapping[str, Any],
    workers: int = 0,
    report: Callable[[float], object] = lambda fraction: None,
) -> None:
    """Render the missing shards of these people, and `report` the finished fraction.

    `album_fields` are those of WorldAlbum except the number of people.
    """
    folder.mkdir(parents=True, exist_ok=True)
    shards = list_shards(folder, people)
    missing = [shard for shard in shards if not shard[1].exists()]
    # Not by fork: the process that calls may have started threads.
    with ProcessPoolExecutor(workers or os.cpu_count(), multiprocessing.get_context("spawn")) as pool:
        jobs = [pool.submit(paint_shard, {**album_fields, "num_people": people.stop}, *shard) for shard in missing]
        for number, job in enumerate(as_completed(jobs), len(shards) - len(missing) + 1):
            job.result()
            report(number / len(shards))


def list_shards(folder: Path, people: range) -> list[tuple[range, Path]]:
    """The people and the file of each shard."""
    shards = [people[start : start + PEOPLE_PER_SHARD] for start in range(0, len(people), PEOPLE_PER_SHARD)]
    return [(shard, folder / f"{shard.start:06d}.tar") for shard in shards]


def paint_shard(album_fields: Mapping[str, Any], people: range, path: Path) -> None:
    """Render one shard; runs in a process of its own."""
    album = import_pack_module("portrait_world.world_album", comfyui=False).WorldAlbum(**album_fields)
    shards = import_pack_module("training.data.shards", comfyui=False)
    shards.write_shard(album, people, path, album.images_per_person)


def main(argv: Sequence[str]) -> int:
    parser = argparse.ArgumentParser(prog="python -m portrait_world.paint_shards", description=__doc__)
    parser.add_argument("folder", type=Path, metavar="FOLDER")
    parser.add_argument("--split", default="train", help="train, validation or test; no person is in two of them")
    parser.add_argument("--first-person", type=int, default=0)
    parser.add_argument("--people", type=int, default=8000)
    parser.add_argument("--images-per-person", type=int, default=6)
    parser.add_argument(
        "--min-pose-distance", type=float, default=0.0, help="degrees between any two images of a person"
    )
    parser.add_argument("--people-per-image", type=int, default=1, help="1, or 2 in images 1.5 times as wide")
    parser.add_argument("--resolution", type=int, default=128, help="height of each image, in pixels")
    parser.add_argument("--workers", type=int, default=0, help="processes (0: one per CPU core)")
    options = parser.parse_args(argv)
    names = ("split", "images_per_person", "min_pose_distance", "people_per_image", "resolution")
    people = range(options.first_person, options.first_person + options.people)
    from tqdm import tqdm

    with tqdm(
        total=1.0, desc=options.folder.name, bar_format="{desc}: {percentage:3.1f}%|{bar}| {remaining} left"
    ) as bar:
        paint_shards(
            options.folder, people, {name: getattr(options, name) for name in names}, options.workers,
            report=lambda fraction: bar.update(fraction - bar.n),
        )  # fmt: skip
    return 0


if __name__ == "__main__":
    try:
        sys.exit(main(sys.argv[1:]))
    except ValueError as error:
        sys.exit(f"error: {error}")
