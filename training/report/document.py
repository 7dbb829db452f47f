"""What is kept of the report, as JSON and strips of pictures, and the document written from them."""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from PIL import Image
from torch import Tensor

from .. import metrics
from . import prompts
from .expected import verdict
from .rows import CLAIMS, ROWS, TABLES, Table
from .stack import Shipped

JSON, PAGE = "evidence.json", "evidence.md"
QUALITY = 88  # of the strips
# measure -> its column's head
COLUMNS: Mapping[str, str] = {
    "similarity": "similarity", "ref": "Sim_ref", "target": "Sim_target", "paste": "Paste", "own": "own person",
    "swapped": "the other", "assigned": "assigned", "right": "each half right", "clip": "CLIP",
    "prompt": "prompt found", "style": "style found", "lost": "no face",
}  # fmt: skip
HOLDS: Mapping[bool | None, str] = {True: "yes", False: "**no**", None: "not measured"}

INTRO = """# Evidence

Written by `python -m training.report`, from the weights in `weights/`, on people of Portrait World's test split: of
them nothing was trained on. Pictures are made by the pack's own nodes and the host's sampler; the same noise for every
row. Faces are found by the demo's detector, aligned as for ArcFace, and compared by the judge, a recogniser that does
nothing else. A picture without a face counts as similarity 0; the last column is how many there are.

- **similarity**: cosine to the mean direction of four photos of the person that no method reads.
- **Sim_ref**, **Sim_target**, **Paste** (FlashFace, Sec. 4.1): the largest cosine to the photos that were read; the
  cosine to the person drawn as the prompt asks; their difference. (Without an adapter: to the first photo.)
- **CLIP**: cosine of picture and prompt by the demo's CLIP pair; **prompt found**: how often it is the likest of all.
- **style found**: how often the likest of five sentences, such as "a bronze of a person", is the right style's.
- **assigned**: pictures whose two halves together are more like the people asked for there than like those people the
  other way round; **each half right**: where each half alone says so. Without a face in a half it is neither.

Each person is asked for some of the prompts, people in turn for others, so that all prompts are asked as often.
Numbers are means over people with 95% bootstrap intervals over people."""


@dataclass(frozen=True)
class Made:
    """What numbers depend on beside the rows themselves: the sampler, and the weights, adapters apart, by file."""

    sampling: Mapping[str, Any]
    base: Mapping[str, Shipped]
    adapters: Mapping[str, Shipped]

    @property
    def told(self) -> dict[str, Any]:
        """The same as JSON has it; adapters alone may differ from one row to the next."""
        base = {file: one.digest for file, one in self.base.items()}
        return json.loads(json.dumps({"sampling": self.sampling, "base": base}))


def read(folder: Path, made: Made) -> dict[str, Any]:
    """What was measured before by the same sampler and weights: by row and measure, values by person."""
    file = folder / JSON
    told = json.loads(file.read_text(encoding="utf-8")) if file.is_file() else {}
    if {key: told.get(key) for key in made.told} != made.told:
        return {}
    same = {file for file, one in made.adapters.items() if told["adapters"].get(file) == one.digest} | {""}
    return {key: row for key, row in told["rows"].items() if key in ROWS and ROWS[key].file in same}


def write(folder: Path, made: Made, rows: Mapping[str, Any]) -> Path:
    """Keep the numbers and write the page beside the folder of pictures; the page."""
    folder.mkdir(parents=True, exist_ok=True)
    adapters = {file: one.digest for file, one in made.adapters.items()}
    kept = {**made.told, "adapters": adapters, "rows": {key: rows[key] for key in ROWS if key in rows}}
    rounded = json.loads(json.dumps(kept), parse_float=lambda x: round(float(x), 4))
    (folder / JSON).write_text(json.dumps(rounded, separators=(",", ":")) + "\n", encoding="utf-8")
    page = folder.parent / PAGE
    page.write_text("\n".join(lines(folder, made, rounded["rows"])) + "\n", encoding="utf-8")
    return page


def strips(folder: Path, pictures: Mapping[str, Mapping[Any, Tensor]], photos: Mapping[Any, Tensor]) -> None:
    """A JPEG of each row: a line for each person, the first photo in front of what was made."""
    folder.mkdir(parents=True, exist_ok=True)
    for key, people in pictures.items():
        lines = [torch.cat([photos[number][:1], people[number]]) for number in sorted(people)]
        sheet = torch.cat([torch.cat(list(line), dim=1) for line in lines])
        Image.fromarray(sheet.numpy()).save(folder / f"{key}.jpg", quality=QUALITY)


def values(rows: Mapping[str, Any]) -> dict[str, dict[str, Tensor]]:
    """One value a person [n], by row and measure."""
    return {
        key: {name: torch.tensor(list(people.values())) for name, people in measured.items()}
        for key, measured in rows.items()
    }


def lines(folder: Path, made: Made, rows: Mapping[str, Any]) -> Iterator[str]:
    """The page, line by line."""
    found = values(rows)
    yield INTRO
    yield "\nSampler: " + ", ".join(f"{name} {value}" for name, value in made.sampling.items()) + "."
    yield "\n## What is expected\n"
    yield "| claim | holds | numbers |\n|---|---|---|"
    for claim in CLAIMS:
        said = verdict(claim, found)
        tried = f"; {claim.tried}" if said.holds is False and claim.tried else ""
        yield f"| {claim.text} | {HOLDS[said.holds]} | {claim.measure}: {said.told}{tried} |"
    for table in TABLES:
        yield from _table(table, found, made.adapters)
    yield "\n## Weights\n\n| file | sha256 | training |\n|---|---|---|"
    every = {**made.base, **made.adapters}
    yield from (f"| {file} | {one.digest} | {one.notes} |" for file, one in every.items())
    yield "\n## Pictures\n\nIn front a photo of the person, then the person's turn of these:\n"
    yield from (f"{number}. {prompt.text()}" for number, prompt in enumerate(prompts.ALONE, 1))
    yield "\nTwo people:\n"
    yield from (f"{number}. {prompt.text(2)}" for number, prompt in enumerate(prompts.PAIRS, 1))
    for table in TABLES:
        for key in table.rows:
            if (folder / f"{key}.jpg").is_file():
                yield f"\n{_title(table, key)}:\n\n![]({folder.name}/{key}.jpg)"


def _title(table: Table, key: str) -> str:
    """A strip's: only in sweeps does a row's name need that of what is swept."""
    name = ROWS[key].name
    return f"{table.title}: {name}" if table.first == "method" else f"{table.title}: {table.first} {name}"


def _table(table: Table, found: Mapping[str, Mapping[str, Tensor]], adapters: Mapping[str, Shipped]) -> Iterator[str]:
    there = {name for key in table.rows for name in found.get(key, {})}
    names = [name for name in COLUMNS if name in there]
    yield f"\n## {table.title}\n\n{table.text}\n"
    yield f"| {table.first} | photos | people | {' | '.join(COLUMNS[name] for name in names)} |"
    yield "|---" * (3 + len(names)) + "|"
    for key in table.rows:
        row, measured = ROWS[key], found.get(key, {})
        people = len(next(iter(measured.values()), ()))
        missing = f": no {row.file}" if row.file and row.file not in adapters else ""
        cells = [_cell(measured.get(name)) for name in names] if people else [f"not measured{missing}"]
        yield f"| {row.name} | {row.photos} | {people} | {' | '.join(cells)} |"


def _cell(values: Tensor | None) -> str:
    if values is None:
        return ""
    one = metrics.interval(values)
    return f"{one.mean:.3f} [{one.low:.3f}, {one.high:.3f}]"


def merged(before: Mapping[str, Any], shares: Sequence[Mapping[str, Any]]) -> dict[str, Any]:
    """What was measured before, with all rows that were measured now in their place; people in order."""
    out: dict[str, Any] = dict(before)
    new: dict[str, dict[str, dict[str, float]]] = {}
    for share in shares:
        for key, measured in share.items():
            for name, people in measured.items():
                new.setdefault(key, {}).setdefault(name, {}).update({str(who): one for who, one in people.items()})
    for key, measured in new.items():
        out[key] = {
            name: dict(sorted(people.items(), key=lambda item: int(item[0]))) for name, people in measured.items()
        }
    return out
