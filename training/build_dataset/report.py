"""The report on all photos, as report.json and report.md. Uses only the standard library."""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from .photo_folders import RESULTS_FOLDER


def remove_stale_results(out: Path, results: Sequence[dict[str, Any]]) -> None:
    """Delete older results of these candidates, made from other photos or settings."""
    keys = {result["candidate"]: result["key"] for result in results}
    for file in (out / RESULTS_FOLDER).glob("*.json"):
        old = json.loads(file.read_text(encoding="utf-8"))
        if keys.get(old["candidate"], old["key"]) != old["key"]:
            file.unlink()
            (out / f"{old['key']}.tar").unlink(missing_ok=True)


def summarize_results(results: Sequence[dict[str, Any]]) -> dict[str, Any]:
    sizes = {name: len(photos) for result in results for name, photos in result["kept"].items()}
    dropped = Counter(reason for result in results for reason in result["dropped"].values())
    return {
        "candidates": len(results),
        "photos": sum(result["photos"] for result in results),
        "faces": sum(result["faces"] for result in results),
        "kept": sum(result["photos"] - len(result["dropped"]) for result in results),
        "dropped": dict(dropped.most_common()),
        "identities": len(sizes),
        "sizes": sizes,
        "shards": {result["candidate"]: f"{result['key']}.tar" for result in results if result["kept"]},
    }


def format_report(totals: dict[str, Any]) -> str:
    sizes = Counter(totals["sizes"].values())
    lines = [
        "# Dataset", "",
        "| | count |", "|---|---|",
        *(f"| {name} | {totals[name]} |" for name in ("candidates", "photos", "faces", "kept", "identities")),
        "", "| reason for dropping a photo | photos |", "|---|---|",
        *(f"| {reason} | {count} |" for reason, count in totals["dropped"].items()),
        "", "| photos per person | people |", "|---|---|",
        *(f"| {size} | {sizes[size]} |" for size in sorted(sizes)),
    ]  # fmt: skip
    return "\n".join(lines) + "\n"


def write_report(out: Path, results: Sequence[dict[str, Any]]) -> Path:
    """Write both files into `out`. Returns the path of report.md."""
    totals = summarize_results(sorted(results, key=lambda result: result["candidate"]))
    (out / "report.json").write_text(json.dumps(totals, indent=1) + "\n", encoding="utf-8")
    (out / "report.md").write_text(format_report(totals), encoding="utf-8")
    return out / "report.md"
