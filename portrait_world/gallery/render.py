"""Runs the rows of the gallery on one server and writes the page."""

from __future__ import annotations

import os
import re
import shutil
import sys
import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from ...tools import host
from ...tools.server import Server, ServerError, start_server
from . import page
from .gallery_prompts import IMAGES_NODE, REPORT_NODE, GalleryRow, GallerySection, build_sections

WEIGHTS_FOLDER = host.ROOT / "weights"
DEMO_MODEL_FILES = tuple(f"demo/{name}.safetensors" for name in ("unet", "text", "vae", "vision"))
FACE_MODEL_FILES = tuple(f"insightface/models/demo/{name}.onnx" for name in ("detector", "recogniser"))
REQUIRED_FILES = (*DEMO_MODEL_FILES, *FACE_MODEL_FILES)
BATCH_NODE_FILE = Path(__file__).with_name("gallery_batch.py")
GALLERY_TITLE = "Likeness: one person, any prompt"
GALLERY_INTRODUCTION = (
    "Three people, five prompts and every method, sampled by ComfyUI. The models are small and come with the pack. "
    "They are trained on Portrait World, a synthetic dataset of drawn people; no photographs are involved.",
    "The number below an image is the similarity of its face to the person: the cosine to the photos, at most 1, by "
    "the demo's recognizer. Decoupled attention is conditioned on embeddings of the same recognizer.",
)


def list_missing_files(files: Sequence[str], folder: Path) -> list[str]:
    """The files that are not in the folder."""
    return [file for file in files if not (folder / file).is_file()]


def check_required_files(folder: Path) -> None:
    """Raises HostError if the folder lacks a file that every image needs."""
    missing = list_missing_files(REQUIRED_FILES, folder)
    if missing:
        raise host.HostError(
            f"got {folder} without {', '.join(missing)}; expected the models of the demo; download the pack again, "
            "or train them as described in weights/README.md"
        )


@contextmanager
def start_gallery_server(comfyui: host.Host, base_directory: Path) -> Iterator[Server]:
    """A server with the gallery's node and an empty output folder in the base directory."""
    host.recreate_folder(base_directory / "output")
    (base_directory / "custom_nodes").mkdir(exist_ok=True)
    shutil.copyfile(BATCH_NODE_FILE, base_directory / "custom_nodes" / BATCH_NODE_FILE.name)
    # Without metadata, equal images are equal files. The models are small enough for the CPU.
    with start_server(
        comfyui, base_directory, options=["--disable-metadata", "--use-pytorch-cross-attention"]
    ) as server:
        yield server


def render_gallery(file: Path, weights_folder: Path = WEIGHTS_FOLDER) -> Path:
    """Render the gallery to an HTML file. Raises HostError if a base model is missing, ServerError if a row fails."""
    check_required_files(weights_folder)
    comfyui, start = host.prepare_host(), time.monotonic()
    host.print_status("starting ComfyUI")
    with start_gallery_server(comfyui, host.HOST_FOLDER / "base-gallery") as server:
        try:
            sections = list(run_sections(server, build_sections(), weights_folder))
        finally:
            print(file=sys.stderr)  # ends the progress line
    seconds = time.monotonic() - start
    count = sum(len(row.images) for section in sections for row in section.rows)
    summary = f"{count} images, generated on {os.cpu_count()} CPU cores in {seconds:.0f} s."
    file.parent.mkdir(parents=True, exist_ok=True)
    file.write_text(page.render_page(GALLERY_TITLE, [*GALLERY_INTRODUCTION, summary], sections), encoding="utf-8")
    return file


def print_gallery(file: Path) -> int:
    """Render the gallery and print the path of the page. Raises HostError."""
    try:
        print(render_gallery(file))
    except ServerError as error:
        raise host.HostError(str(error)) from error
    return 0


def run_sections(
    server: Server, sections: Sequence[GallerySection], weights_folder: Path
) -> Iterator[page.PageSection]:
    """Run the sections whose files exist; the other sections name the missing files."""
    available = [section for section in sections if not list_missing_files(section.files, weights_folder)]
    total, done = sum(len(section.rows) for section in available), 0
    photos: dict[str, page.PageImage] = {}
    for section in sections:
        missing, rows = list_missing_files(section.files, weights_folder), list[page.PageRow]()
        if missing:
            note = f"Skipped: weights/ lacks {', '.join(missing)}."
            yield page.PageSection(section.title, section.text, section.column_titles, (), note)
            continue
        for row in section.rows:
            done += 1
            print_progress(f"{done}/{total} {section.title}: {row.name}")
            images = run_row(server, row)
            photos.setdefault(row.name, images[0])  # the first section has the photos, one row per person
            rows.append(page.PageRow(row.name, images, photos.get(row.person)))
        note = count_equal_images(rows) if section.expect_identical else ""
        yield page.PageSection(section.title, section.text, section.column_titles, rows, note)


def run_row(server: Server, row: GalleryRow) -> list[page.PageImage]:
    """Run a row; its images from left to right, with their similarities if measured."""
    outputs: Mapping[str, Any] = server.run_prompt(row.prompt)["outputs"]
    files = server.list_output_files({"outputs": {IMAGES_NODE: outputs[IMAGES_NODE]}})
    notes = parse_similarities(outputs[REPORT_NODE]["text"][0]) if REPORT_NODE in row.prompt else [""] * len(files)
    return [page.PageImage(file, note) for file, note in zip(files, notes, strict=True)]


def parse_similarities(report: str) -> list[str]:
    """The highest cosine of each image in the report of Measure Likeness, or "no face"."""
    lines = re.findall(r"^image \d+: (.+)$", report, re.MULTILINE)
    return ["no face" if line == "no face found" else f"{max(map(float, line.split(', '))):.2f}" for line in lines]


def count_equal_images(rows: Sequence[page.PageRow]) -> str:
    """A sentence on how many images are bit-identical in all rows."""
    columns = list(zip(*([image.file.read_bytes() for image in row.images] for row in rows), strict=True))
    same = sum(len(set(column)) == 1 for column in columns)
    return f"{same} of {len(columns)} images are identical, bit for bit."


def print_progress(text: str) -> None:
    """Overwrite the progress line."""
    print(f"\r{f'likeness: {text}':<78.78}", end="", file=sys.stderr, flush=True)
