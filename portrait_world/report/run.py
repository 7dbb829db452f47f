"""The report's worker: one process per CPU core, or one on a GPU, each with its share of the people; then the page."""

from __future__ import annotations

import argparse
import os
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

from tools.import_pack import ROOT, import_pack, import_pack_module

EVIDENCE_FOLDER = ROOT / "docs" / "evidence"


def parse_arguments(arguments: list[str]) -> argparse.Namespace:
    parser = argparse.ArgumentParser(prog="python -m portrait_world.report", description=__doc__)
    parser.add_argument("--only", nargs="*", default=[], metavar="ROW", help="measure these rows, keep all others")
    parser.add_argument("--people", type=int, default=64, help="maximum number of people")
    parser.add_argument("--prompts", type=int, default=8, help="maximum number of prompts per person")
    parser.add_argument("--steps", type=int, default=8, help="sampling steps")
    parser.add_argument("--workers", type=int, default=0, help="processes (0: one per CPU core, or one on a GPU)")
    parser.add_argument("--out", type=Path, default=EVIDENCE_FOLDER, help="folder for numbers and images")
    parser.add_argument("--share", default="", help=argparse.SUPPRESS)
    return parser.parse_args(arguments)


def import_report_module(name: str) -> Any:
    return import_pack_module(f"portrait_world.report.{name}")


def measure_share(options: argparse.Namespace, number: int, count: int, file: Path) -> None:
    """Measure share `number` of `count` of the people and save the result to a file."""
    import torch
    from tqdm import tqdm

    measure, demo_stack = import_report_module("measure"), import_report_module("demo_stack")
    stack = demo_stack.load_demo_stack(options.steps)  # also registers the folders in which the plan looks for adapters
    plan = measure.make_plan(options.only, options.people, options.prompts)
    numbers = range(number, options.people, count)
    total = sum(1 for _ in plan.list_jobs(numbers))
    with tqdm(total=total, desc=f"report {number + 1}/{count}", position=number) as bar:

        def on_progress(key: str) -> None:
            bar.set_postfix_str(key)
            bar.update()

        results = measure.measure_rows(stack, plan, numbers, on_progress)
    torch.save({"values": results.values, "images": results.images, "photos": results.photos}, file)


def count_workers(options: argparse.Namespace) -> int:
    import torch

    return options.workers or (1 if torch.cuda.is_available() else max(1, min(os.cpu_count() or 1, options.people)))


def main(arguments: list[str]) -> None:
    options = parse_arguments(arguments)
    if options.share:
        import_pack()
        number, count, file = options.share.split("/", 2)
        return measure_share(options, int(number), int(count), Path(file))
    count = count_workers(options)
    with tempfile.TemporaryDirectory() as folder:
        files = [Path(folder) / f"{number}.pt" for number in range(count)]
        environment = {**os.environ, "OMP_NUM_THREADS": str(max(1, (os.cpu_count() or 1) // count))}
        processes = [
            subprocess.Popen(
                [sys.executable, "-m", "portrait_world.report.run", *arguments, "--share", f"{number}/{count}/{file}"],
                cwd=ROOT, env=environment,
            )
            for number, file in enumerate(files)
        ]  # fmt: skip
        if any([process.wait() for process in processes]):
            raise SystemExit("a worker of the report failed, see above")
        import_pack()
        page = import_report_module("finish").finish_report(options.out, options.steps, files)
    print(page)


if __name__ == "__main__":
    main(sys.argv[1:])
