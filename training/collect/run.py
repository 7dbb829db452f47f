"""The worker: photos of people to WebDataset shards that training reads, by a process for each core or by Ray.

Each folder with photos, at any depth, holds one person and perhaps strangers; photos right in FOLDER may show anybody.
A candidate's people are one shard; a second run does what is new or has changed. With --ray all machines of a cluster
that runs already see FOLDER, OUT, this repository and COMFYUI_PATH at the same places.
"""

from __future__ import annotations

import argparse
import importlib
import json
import os
import sys
from collections.abc import Iterable, Iterator
from concurrent.futures import ProcessPoolExecutor
from pathlib import Path

from ..run import PACKAGE, ROOT, bring
from . import folders, summary

Row = dict[str, str]
NO_RAY = "got no Ray ({}); expected it in ComfyUI's Python; run pip install 'ray[data]' there, or leave out --ray"


def parse(words: list[str]) -> argparse.Namespace:
    parser = argparse.ArgumentParser(prog="python -m training.collect", description=__doc__)
    parser.add_argument("folder", type=Path, metavar="FOLDER")
    parser.add_argument("out", type=Path, metavar="OUT")
    parser.add_argument("--pack", default="buffalo_l", help="insightface model pack: its name, or its folder")
    parser.add_argument("--provider", default="auto", help="as in Load Face Analyzer")
    parser.add_argument("--similarity", type=float, default=0.6, help="least cosine to the centre of a person's faces")
    parser.add_argument("--least", type=int, default=2, help="photos of a person, at least")
    parser.add_argument("--views", type=int, default=0, help="so many of everybody, no two alike in pose; 0: all")
    parser.add_argument("--face", type=int, default=64, help="pixels of a face, at least")
    parser.add_argument("--longest", type=int, default=1024, help="pixels of a photo's longer side, at most")
    parser.add_argument("--workers", type=int, default=os.cpu_count(), help="processes of this machine")
    parser.add_argument("--ray", action="store_true", help="by Ray Data, on the Ray cluster of RAY_ADDRESS or of here")
    return parser.parse_args(words)


def rows(given: argparse.Namespace) -> list[Row]:
    """What there is to do, a candidate each."""
    names = ("pack", "provider", "similarity", "least", "views", "face", "longest")
    plan = {name: getattr(given, name) for name in names}
    if Path(given.pack).is_dir():
        plan["pack"] = str(Path(given.pack).resolve())
    both = {"plan": json.dumps(plan), "out": str(given.out.resolve())}
    return [
        {"candidate": json.dumps({"name": one.name, "folder": str(one.folder), "crowd": one.crowd}), **both}
        for one in folders.candidates(given.folder.resolve())
    ]


def one(row: Row) -> Row:
    """What every process and machine runs, for one candidate."""
    if PACKAGE not in sys.modules:
        bring()
    return importlib.import_module(f"{PACKAGE}.training.collect.work").from_row(row)


def by_processes(waiting: list[Row], workers: int) -> Iterator[Row]:
    if workers < 2:
        yield from map(one, waiting)
        return
    with ProcessPoolExecutor(min(workers, len(waiting))) as pool:
        yield from pool.map(one, waiting)


def by_ray(waiting: list[Row]) -> Iterator[Row]:
    """The same on a cluster. Raises ValueError where there is no Ray."""
    try:
        import ray  # pyright: ignore[reportMissingImports]
        import ray.data  # pyright: ignore[reportMissingImports]
    except ImportError as error:
        raise ValueError(NO_RAY.format(error)) from error
    told = {"COMFYUI_PATH": os.environ["COMFYUI_PATH"], "PYTHONPATH": str(ROOT)}
    ray.init(address="auto", runtime_env={"env_vars": told})
    yield from ray.data.from_items(waiting).map(one).iter_rows()


def collected(done: Iterable[Row], count: int) -> list[dict[str, object]]:
    from tqdm import tqdm

    return [json.loads(row["told"]) for row in tqdm(done, total=count, desc="candidates")]


def main(words: list[str]) -> None:
    given = parse(words)
    waiting = rows(given)
    given.out.mkdir(parents=True, exist_ok=True)
    done = by_ray(waiting) if given.ray else by_processes(waiting, given.workers)
    results = collected(done, len(waiting))
    summary.tidy(given.out, results)
    print(summary.write(given.out, results))  # noqa: T201


if __name__ == "__main__":
    try:
        main(sys.argv[1:])
    except ValueError as error:
        sys.exit(f"error: {error}")
