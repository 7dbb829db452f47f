"""The worker of `python -m portrait_world`: makes what is missing, in order, or checks a gate."""

from __future__ import annotations

import argparse
import sys
from typing import Any

from tools.import_pack import import_pack_module

SECONDS_PER_MINUTE = 60
FIGURE_FORMAT = "{:>20} {:.3f}{}"


def parse_arguments(arguments: list[str]) -> argparse.Namespace:
    parser = argparse.ArgumentParser(prog="python -m portrait_world", description=__doc__)
    commands = parser.add_subparsers(dest="command", required=True)
    train = commands.add_parser(
        "train", help="make all weights; stop it at any time, the same command goes on where it was"
    )
    train.add_argument("--until", metavar="STAGE", default="", help="stop after this stage")
    gate = commands.add_parser("gate", help="measure the runs; exit code 1 if it is not worth to go on")
    gate.add_argument("name", metavar="NAME", help="an unknown name lists all gates")
    return parser.parse_args(arguments)


def train_stages(until: str) -> None:
    """Run all unfinished stages under one progress bar. Raises ValueError if a gate fails."""
    from tqdm import tqdm

    stages = import_pack_module("portrait_world.pipeline.stages").STAGES
    names = [stage.name for stage in stages]
    if until and until not in names:
        raise ValueError(f"got --until {until}; expected one of {', '.join(names)}")
    stages = stages[: names.index(until) + 1 if until else None]
    progress = [stage.measure_progress() for stage in stages]
    done = sum(stage.minutes * share for stage, share in zip(stages, progress, strict=True))
    total = sum(stage.minutes for stage in stages)
    # The unit is a second of one core, so that the bar's time left holds for any machine.
    with tqdm(
        total=total * SECONDS_PER_MINUTE, initial=done * SECONDS_PER_MINUTE, unit="s", smoothing=0.02,
        bar_format="{desc}: {percentage:3.1f}%|{bar}| {elapsed} so far, {remaining} left",
    ) as bar:  # fmt: skip
        for stage, share in zip(stages, progress, strict=True):
            if share < 1:
                bar.set_description(stage.name)
                run_stage(stage, share, bar)


def run_stage(stage: Any, share: float, bar: Any) -> None:
    start = bar.n - share * stage.minutes * SECONDS_PER_MINUTE

    def report(fraction: float) -> None:
        bar.update(start + fraction * stage.minutes * SECONDS_PER_MINUTE - bar.n)

    stage.run(report)
    report(1.0)


def check_gate(name: str) -> None:
    """Print the figures of a gate. Raises ValueError if it fails."""
    gates = import_pack_module("portrait_world.pipeline.gates").GATES
    stages = import_pack_module("portrait_world.pipeline.stages")
    if name not in gates:
        raise ValueError(f"got {name}; expected one of {', '.join(gates)}")
    figures = gates[name].measure(stages.RUNS_FOLDER)
    for figure, value in figures.items():
        least = gates[name].minimums.get(figure)
        print(FIGURE_FORMAT.format(figure, value, f"  (at least {least:g})" if least is not None else ""))
    gates[name].require(figures)


def main(arguments: list[str]) -> int:
    options = parse_arguments(arguments)
    try:
        if options.command == "train":
            train_stages(options.until)
        else:
            check_gate(options.name)
    except ValueError as error:
        sys.stderr.write(f"{error}\n")
        return 1
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
