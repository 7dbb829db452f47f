"""Where photos lie, and what they are known by. No more than the standard library, as every process reads this."""

from __future__ import annotations

import hashlib
import os
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

PHOTOS = (".jpg", ".jpeg", ".png", ".webp", ".bmp", ".tif", ".tiff")
DONE = "done"  # the folder of what is told of each shard, by its name


@dataclass(frozen=True)
class Candidate:
    """A folder and the photos right in it. `crowd`: they may show anybody; otherwise one person, and strangers."""

    name: str
    folder: Path
    crowd: bool

    def photos(self) -> list[Path]:
        return sorted(Path(entry.path) for entry in os.scandir(self.folder) if _is_photo(entry))


def _is_photo(entry: os.DirEntry[str]) -> bool:
    return entry.is_file() and not entry.name.startswith(".") and entry.name.lower().endswith(PHOTOS)


def candidates(root: Path) -> list[Candidate]:
    """Every folder with photos, at any depth; those in `root` itself may show anybody. Raises ValueError on none."""
    found = []
    for folder, below, _ in os.walk(root):
        below.sort()
        path = Path(folder)
        name = root.resolve().name if path == root else path.relative_to(root).as_posix()
        candidate = Candidate(name, path, crowd=path == root)
        if candidate.photos():
            found.append(candidate)
    if not found:
        raise ValueError(f"got {root} without a photo; expected {', '.join(PHOTOS)} in it or in folders below it")
    return found


def key(told: Sequence[str], digests: Mapping[str, str]) -> str:
    """What a result is kept under: all that it is made of, its photos by name and content."""
    parts = [*told, *(part for pair in sorted(digests.items()) for part in pair)]
    return hashlib.sha256("\0".join(parts).encode()).hexdigest()[:16]
