"""The worker of the report: on a CPU one process a core, each with a part of the people; then the document."""

from __future__ import annotations

import argparse
import importlib
import os
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

from ..run import PACKAGE, ROOT, bring

DOCS = ROOT / "docs" / "evidence"


def parse(words: list[str]) -> argparse.Namespace:
    parser = argparse.ArgumentParser(prog="python -m training.report", description=__doc__)
    parser.add_argument("--only", nargs="*", default=[], metavar="ROW", help="these rows; the others stay as they are")
    parser.add_argument("--people", type=int, default=64, help="at most so many")
    parser.add_argument("--prompts", type=int, default=8, help="for each person, at most so many")
    parser.add_argument("--steps", type=int, default=8, help="of the sampler")
    parser.add_argument("--workers", type=int, default=0, help="processes; 0: one a core, on a GPU one")
    parser.add_argument("--out", type=Path, default=DOCS, help="folder of the numbers and pictures")
    parser.add_argument("--share", default="", help=argparse.SUPPRESS)
    return parser.parse_args(words)


def part(name: str) -> Any:
    return importlib.import_module(f"{PACKAGE}.training.report.{name}")


def measure(given: argparse.Namespace, number: int, count: int, file: Path) -> None:
    """One process's part of the people, into a file."""
    import torch
    from tqdm import tqdm

    measuring, stack = part("measure"), part("stack")
    models = stack.load(given.steps)  # with it the host knows where adapters lie
    plan = measuring.planned(given.only, given.people, given.prompts)
    numbers = range(number, given.people, count)
    jobs = sum(1 for _ in plan.jobs(numbers))
    with tqdm(total=jobs, desc=f"report {number + 1}/{count}", position=number) as bar:

        def tick(key: str) -> None:
            bar.set_postfix_str(key)
            bar.update()

        found = measuring.run(models, plan, numbers, tick)
    torch.save({"values": found.values, "pictures": found.pictures, "photos": found.photos}, file)


def workers(given: argparse.Namespace) -> int:
    import torch

    return given.workers or (1 if torch.cuda.is_available() else max(1, min(os.cpu_count() or 1, given.people)))


def main(words: list[str]) -> None:
    given = parse(words)
    if given.share:
        bring()
        number, count, file = given.share.split("/", 2)
        return measure(given, int(number), int(count), Path(file))
    count = workers(given)
    with tempfile.TemporaryDirectory() as folder:
        files = [Path(folder) / f"{number}.pt" for number in range(count)]
        told = {**os.environ, "OMP_NUM_THREADS": str(max(1, (os.cpu_count() or 1) // count))}
        started = [
            subprocess.Popen(
                [sys.executable, "-m", "training.report.run", *words, "--share", f"{number}/{count}/{file}"],
                cwd=ROOT, env=told,
            )
            for number, file in enumerate(files)
        ]  # fmt: skip
        if any([process.wait() for process in started]):
            raise SystemExit("the report was broken off, see above")
        bring()
        page = part("finish").finish(given.out, given.steps, files)
    print(page)  # noqa: T201


if __name__ == "__main__":
    main(sys.argv[1:])
