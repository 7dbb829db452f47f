"""What became of all photos, as report.json and report.md. No more than the standard library."""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from .folders import DONE


def tidy(out: Path, results: Sequence[dict[str, Any]]) -> None:
    """Delete older results of these candidates, made of other photos or settings."""
    keys = {told["candidate"]: told["key"] for told in results}
    for file in (out / DONE).glob("*.json"):
        old = json.loads(file.read_text(encoding="utf-8"))
        if keys.get(old["candidate"], old["key"]) != old["key"]:
            file.unlink()
            (out / f"{old['key']}.tar").unlink(missing_ok=True)


def summary(results: Sequence[dict[str, Any]]) -> dict[str, Any]:
    sizes = {name: len(photos) for told in results for name, photos in told["kept"].items()}
    dropped = Counter(why for told in results for why in told["dropped"].values())
    return {
        "candidates": len(results),
        "photos": sum(told["photos"] for told in results),
        "faces": sum(told["faces"] for told in results),
        "kept": sum(told["photos"] - len(told["dropped"]) for told in results),
        "dropped": dict(dropped.most_common()),
        "identities": len(sizes),
        "sizes": sizes,
        "shards": {told["candidate"]: f"{told['key']}.tar" for told in results if told["kept"]},
    }


def page(told: dict[str, Any]) -> str:
    sizes = Counter(told["sizes"].values())
    lines = [
        "# Collected people", "",
        "| what | how many |", "|---|---|",
        *(f"| {name} | {told[name]} |" for name in ("candidates", "photos", "faces", "kept", "identities")),
        "", "| photos left out, as | how many |", "|---|---|",
        *(f"| {why} | {count} |" for why, count in told["dropped"].items()),
        "", "| photos of a person | people |", "|---|---|",
        *(f"| {size} | {sizes[size]} |" for size in sorted(sizes)),
    ]  # fmt: skip
    return "\n".join(lines) + "\n"


def write(out: Path, results: Sequence[dict[str, Any]]) -> Path:
    """Both files in `out`; the page."""
    told = summary(sorted(results, key=lambda one: one["candidate"]))
    (out / "report.json").write_text(json.dumps(told, indent=1) + "\n", encoding="utf-8")
    (out / "report.md").write_text(page(told), encoding="utf-8")
    return out / "report.md"
