"""Makes WebDataset shards from photos of people, with one process per core or with Ray.

Each folder with photos, at any depth, holds one person and perhaps strangers; photos directly in FOLDER may show
anybody. Each folder becomes one shard. A second run processes only what is new or has changed. With --ray, all machines
of a running cluster must see FOLDER, OUT, this repository and COMFYUI_PATH at the same paths.
"""

from __future__ import annotations

import argparse
import json
import os
import sys
from collections.abc import Iterable, Iterator
from concurrent.futures import ProcessPoolExecutor
from pathlib import Path
from typing import Any

from . import photo_folders, report

Row = dict[str, str]
ROOT = Path(__file__).resolve().parents[2]
CONFIG_OPTIONS = (
    "pack", "provider", "min_similarity", "min_photos", "num_views", "min_face_size", "max_photo_size",
)  # fmt: skip
RAY_MISSING_ERROR = (
    "got no Ray ({}); expected it in ComfyUI's Python; run pip install 'ray[data]' there, or leave out --ray"
)


def parse_build_arguments(argv: list[str]) -> argparse.Namespace:
    parser = argparse.ArgumentParser(prog="python -m training.build_dataset", description=__doc__)
    parser.add_argument("folder", type=Path, metavar="FOLDER")
    parser.add_argument("out", type=Path, metavar="OUT")
    parser.add_argument("--pack", default="buffalo_l", help="insightface model pack: its name, or its folder")
    parser.add_argument("--provider", default="auto", help="onnxruntime provider, as in Load Face Analyzer")
    parser.add_argument(
        "--min-similarity", type=float, default=0.6, help="lowest cosine to the center of a person's faces"
    )
    parser.add_argument("--min-photos", type=int, default=2, help="photos per person, at least")
    parser.add_argument("--num-views", type=int, default=0, help="views of each person in different poses; 0 keeps all")
    parser.add_argument("--min-face-size", type=int, default=64, help="in pixels")
    parser.add_argument("--max-photo-size", type=int, default=1024, help="longer side of a photo in pixels, at most")
    parser.add_argument("--workers", type=int, default=os.cpu_count(), help="processes on this machine")
    parser.add_argument("--ray", action="store_true", help="run with Ray Data on the Ray cluster of RAY_ADDRESS")
    return parser.parse_args(argv)


def list_work_rows(options: argparse.Namespace) -> list[Row]:
    """One row of work for each candidate."""
    config = {name: getattr(options, name) for name in CONFIG_OPTIONS}
    if Path(options.pack).is_dir():
        config["pack"] = str(Path(options.pack).resolve())
    shared = {"config": json.dumps(config), "out": str(options.out.resolve())}
    return [
        {
            "candidate": json.dumps(
                {"name": one.name, "folder": str(one.folder), "may_show_anyone": one.may_show_anyone}
            ),
            **shared,
        }
        for one in photo_folders.find_candidates(options.folder.resolve())
    ]


def import_person_worker() -> Any:
    """The worker's module; in a process that `python -m` started, the pack is imported first."""
    if __package__ == "training.build_dataset":
        from tools.import_pack import import_pack_module

        return import_pack_module("training.build_dataset.person_worker")
    from . import person_worker

    return person_worker


def process_row(row: Row) -> Row:
    """Process one candidate; runs in any process of any machine."""
    return import_person_worker().build_from_row(row)


def run_in_processes(work_rows: list[Row], workers: int) -> Iterator[Row]:
    if workers < 2:
        yield from map(process_row, work_rows)
        return
    with ProcessPoolExecutor(min(workers, len(work_rows))) as pool:
        yield from pool.map(process_row, work_rows)


def run_in_ray(work_rows: list[Row]) -> Iterator[Row]:
    """Process all candidates on a Ray cluster. Raises ValueError if Ray is not installed."""
    try:
        import ray  # pyright: ignore[reportMissingImports]
        import ray.data  # pyright: ignore[reportMissingImports]
    except ImportError as error:
        raise ValueError(RAY_MISSING_ERROR.format(error)) from error
    variables = {"COMFYUI_PATH": os.environ["COMFYUI_PATH"], "PYTHONPATH": str(ROOT)}
    ray.init(address="auto", runtime_env={"env_vars": variables})
    yield from ray.data.from_items(work_rows).map(process_row).iter_rows()


def collect_results(finished_rows: Iterable[Row], count: int) -> list[dict[str, Any]]:
    from tqdm import tqdm

    return [json.loads(row["result"]) for row in tqdm(finished_rows, total=count, desc="candidates")]


def main(argv: list[str]) -> None:
    options = parse_build_arguments(argv)
    rows = list_work_rows(options)
    options.out.mkdir(parents=True, exist_ok=True)
    finished = run_in_ray(rows) if options.ray else run_in_processes(rows, options.workers)
    results = collect_results(finished, len(rows))
    report.remove_stale_results(options.out, results)
    print(report.write_report(options.out, results))  # noqa: T201


if __name__ == "__main__":
    try:
        main(sys.argv[1:])
    except ValueError as error:
        sys.exit(f"error: {error}")
