"""`python -m training.shards FOLDER`: Portrait World as WebDataset shards, painted once and read by every run."""

from __future__ import annotations

import argparse
import os
import sys
from collections.abc import Sequence
from concurrent.futures import ProcessPoolExecutor
from pathlib import Path

from .data import WorldAlbum, write_shard
from .portrait.people import SPLITS
from .portrait.scenes import FRAMINGS

PER_SHARD = 250  # people


def missing(folder: Path, given: argparse.Namespace) -> list[tuple[WorldAlbum, range, Path]]:
    """What there is to write: people alone, then pairs, but for the shards that are there."""
    albums = {
        "alone": WorldAlbum(given.split, given.side, given.people, given.each, 1, given.apart, given.framing),
        "pairs": WorldAlbum(given.split, given.side, given.pairs, 1, 2, framing=given.framing),
    }
    found = []
    for name, album in albums.items():
        for number, start in enumerate(range(0, len(album), PER_SHARD)):
            path = folder / f"{name}-{number:06d}.tar"
            people = range(start, min(start + PER_SHARD, len(album)))
            if not path.exists():
                found.append((album, people, path))
    return found


def main(words: Sequence[str]) -> int:
    parser = argparse.ArgumentParser(prog="python -m training.shards", description=__doc__)
    parser.add_argument("folder", type=Path, metavar="FOLDER")
    parser.add_argument("--split", choices=list(SPLITS), default="train", help="nobody is in two of them")
    parser.add_argument("--people", type=int, default=8000)
    parser.add_argument("--each", type=int, default=6, help="pictures of everyone")
    parser.add_argument("--apart", type=float, default=0.0, help="degrees of pose between any two of somebody's")
    parser.add_argument("--pairs", type=int, default=7000, help="pictures of two people")
    parser.add_argument("--side", type=int, default=128, help="pixels of a picture")
    parser.add_argument("--framing", choices=list(FRAMINGS), default="", help="of all pictures, in place of any")
    parser.add_argument("--least", type=float, default=0.0, help="pixels; pictures with a lower face are left out")
    given = parser.parse_args(words)
    given.folder.mkdir(parents=True, exist_ok=True)
    from tqdm import tqdm

    with ProcessPoolExecutor(os.cpu_count()) as pool:
        waiting = [
            pool.submit(write_shard, album, people, path, album.each, least=given.least)
            for album, people, path in missing(given.folder, given)
        ]
        for done in tqdm(waiting, desc="shards"):
            done.result()
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
