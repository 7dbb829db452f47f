"""What the pack's own adapter files say of themselves: JSON under the key `likeness` of a file's metadata."""

from __future__ import annotations

import json
import re
from collections.abc import Mapping, Sequence
from typing import Any

from .spec import Feature

VERSION = 1
ALWAYS: Mapping[str, type] = {"kind": str, "version": int, "base": str, "notes": dict}


def metadata(kind: str, base: str, notes: Mapping[str, Any], **fields: Any) -> dict[str, str]:
    """What to write; `notes` say how the adapter was trained, `fields` are the kind's own."""
    told = {"kind": kind, "version": VERSION, "base": base, "notes": dict(notes), **fields}
    return {"likeness": json.dumps(told)}


def check(
    told: Mapping[str, Any], kind: str, fields: Mapping[str, type], choices: Mapping[str, Sequence[str]], file: str
) -> None:
    """Raise ValueError unless that is the whole metadata of such a kind, of a version that this pack knows."""
    wanted = {**ALWAYS, **fields}
    wrong = [key for key, type_ in wanted.items() if not isinstance(told.get(key), type_)]
    wrong += [f"{key} {told[key]!r}" for key, values in choices.items() if key not in wrong and told[key] not in values]
    if wrong or told["kind"] != kind:
        options = "; ".join(f"{key}: {' or '.join(values)}" for key, values in choices.items())
        raise ValueError(
            f"got {file}, whose metadata is not that of the kind {kind} ({', '.join(wrong) or told['kind']}); "
            f"expected {', '.join(wanted)}; {options}; fetch the file again"
        )
    if told["version"] > VERSION:
        raise ValueError(
            f"got {file}, of version {told['version']}; this pack reads up to version {VERSION}; update the pack"
        )


def features(names: Sequence[Any], file: str) -> tuple[Feature, ...]:
    """The features that a file needs, by their names. Raises ValueError where one is none."""
    return tuple(_feature(str(name), file) for name in names)


def _feature(name: str, file: str) -> Feature:
    match = re.fullmatch(r"(.+)\.(\w+)\.(\w+)", name)
    if match is None:
        raise ValueError(f"got {file}, which needs {name!r}; expected <network>.<layer>.<crop>; fetch the file again")
    return Feature(*match.groups())
