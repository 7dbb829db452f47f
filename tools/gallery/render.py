"""Runs the gallery's rows on one server and writes its page."""

from __future__ import annotations

import os
import shutil
import sys
import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from .. import host
from ..server import Server, serve
from . import page
from .prompts import PICTURES, SAID, Part, Row, parts

WEIGHTS = host.ROOT / "weights"
MODELS = tuple(f"demo/{name}.safetensors" for name in ("unet", "text", "vae", "vision"))
PACK = tuple(f"insightface/models/demo/{name}.onnx" for name in ("detector", "recogniser"))
BASE = (*MODELS, *PACK)
NODE = Path(__file__).with_name("gallery_batch.py")
TITLE = "Likeness: one person, any prompt"
ABOUT = (
    "Three people, five prompts, method by method, by ComfyUI's own sampler. Models and people come from Portrait "
    "World, a world of drawn people: they are small, ship with the pack, and know no photographs.",
    "The number below a picture says how like the person its face is: the cosine to the photos, 1 at most, by the "
    "demo's own recogniser, whose vectors decoupled attention also reads.",
)


def lacking(files: Sequence[str], folder: Path) -> list[str]:
    """Those of the files that are not in the folder."""
    return [file for file in files if not (folder / file).is_file()]


def require(folder: Path) -> None:
    """Raises HostError where a file that every picture needs is not there."""
    lacks = lacking(BASE, folder)
    if lacks:
        raise host.HostError(
            f"got {folder} without {', '.join(lacks)}; expected the models of the demo; fetch the repository again, "
            "or train them as weights/README.md says"
        )


@contextmanager
def started(found: host.Host, base: Path) -> Iterator[Server]:
    """A server with the gallery's own node, and no pictures yet in `base`."""
    host.fresh(base / "output")
    (base / "custom_nodes").mkdir(exist_ok=True)
    shutil.copyfile(NODE, base / "custom_nodes" / NODE.name)
    # Without metadata pictures that are the same are files that are the same. So small models need no GPU.
    with serve(found, base, options=["--disable-metadata"]) as server:
        yield server


def make(file: Path, folder: Path = WEIGHTS) -> Path:
    """Render the gallery into an HTML file. Raises HostError (see `require`), and ServerError where a row fails."""
    require(folder)
    found, began = host.bring(), time.monotonic()
    host.say("starting ComfyUI")
    with started(found, host.HOME / "base-gallery") as server:
        try:
            sections = list(run(server, parts(), folder))
        finally:
            print(file=sys.stderr)  # behind the line of the progress
    took = time.monotonic() - began
    made = sum(len(line.pictures) for section in sections for line in section.lines)
    told = f"{made} pictures, made on this machine's {os.cpu_count()} CPU cores in {took:.0f} s."
    file.parent.mkdir(parents=True, exist_ok=True)
    file.write_text(page.html(TITLE, [*ABOUT, told], sections), encoding="utf-8")
    return file


def run(server: Server, every: Sequence[Part], folder: Path) -> Iterator[page.Section]:
    """Run the parts whose files are there; of the others a section says what is missing."""
    total, done = sum(len(part.rows) for part in every if not lacking(part.files, folder)), 0
    fronts: dict[str, page.Picture] = {}
    for part in every:
        lacks, lines = lacking(part.files, folder), list[page.Line]()
        if lacks:
            note = f"Left out, as weights/ lacks {', '.join(lacks)}."
            yield page.Section(part.title, part.text, part.heads, (), note)
            continue
        for row in part.rows:
            done += 1
            progress(f"{done}/{total} {part.title}: {row.name}")
            pictures = paint(server, row)
            fronts.setdefault(row.name, pictures[0])  # the photos come first
            lines.append(page.Line(row.name, pictures, fronts.get(row.person)))
        yield page.Section(part.title, part.text, part.heads, lines, equal(lines) if part.same else "")


def paint(server: Server, row: Row) -> list[page.Picture]:
    """Run a row; its pictures from left to right, each with what was measured."""
    outputs: Mapping[str, Any] = server.queue(row.prompt)["outputs"]
    files = server.files({"outputs": {PICTURES: outputs[PICTURES]}})
    notes = measured(outputs[SAID]["text"][0]) if SAID in row.prompt else [""] * len(files)
    return [page.Picture(file, note) for file, note in zip(files, notes, strict=True)]


def measured(report: str) -> list[str]:
    """For each picture of Measure Likeness' report the best face's cosine, or that there is none."""
    lines = [line.partition(": ")[2] for line in report.splitlines() if line.startswith("picture ")]
    return ["no face" if line == "no face found" else f"{max(map(float, line.split(', '))):.2f}" for line in lines]


def equal(lines: Sequence[page.Line]) -> str:
    """How many pictures of the lines are the same, bit for bit."""
    columns = list(zip(*([one.file.read_bytes() for one in line.pictures] for line in lines), strict=True))
    same = sum(len(set(column)) == 1 for column in columns)
    return f"{same} of {len(columns)} pictures are the same, bit for bit."


def progress(text: str) -> None:
    """One line that changes."""
    print(f"\r{f'likeness: {text}':<78.78}", end="", file=sys.stderr, flush=True)
