"""Finds the folders of photos. Uses only the standard library, so that the main process needs nothing else."""

from __future__ import annotations

import hashlib
import os
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

PHOTO_SUFFIXES = (".jpg", ".jpeg", ".png", ".webp", ".bmp", ".tif", ".tiff")
RESULTS_FOLDER = "done"  # the result of each candidate as JSON, named like its shard


@dataclass(frozen=True)
class Candidate:
    """A folder and the photos directly in it: of one person and perhaps strangers, or of anyone."""

    name: str
    folder: Path
    may_show_anyone: bool

    def list_photos(self) -> list[Path]:
        return sorted(Path(entry.path) for entry in os.scandir(self.folder) if _is_photo(entry))


def _is_photo(entry: os.DirEntry[str]) -> bool:
    return entry.is_file() and not entry.name.startswith(".") and entry.name.lower().endswith(PHOTO_SUFFIXES)


def find_candidates(root: Path) -> list[Candidate]:
    """All folders with photos, at any depth; photos in `root` itself may show anyone. Raises ValueError without any."""
    candidates = []
    for folder, subfolders, _ in os.walk(root):
        subfolders.sort()
        path = Path(folder)
        name = root.resolve().name if path == root else path.relative_to(root).as_posix()
        candidate = Candidate(name, path, may_show_anyone=path == root)
        if candidate.list_photos():
            candidates.append(candidate)
    if not candidates:
        raise ValueError(
            f"got {root} without a photo; expected {', '.join(PHOTO_SUFFIXES)} in it or in folders below it"
        )
    return candidates


def make_result_key(settings: Sequence[str], digests: Mapping[str, str]) -> str:
    """The key of a result: a hash of the settings and of the photos, by name and content."""
    parts = [*settings, *(part for pair in sorted(digests.items()) for part in pair)]
    return hashlib.sha256("\0".join(parts).encode()).hexdigest()[:16]
