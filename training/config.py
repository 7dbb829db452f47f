"""Config files: TOML tables into frozen dataclasses. Whatever a dataclass does not know is an error.

A file that is `like` another beside it tells only what differs.
"""

from __future__ import annotations

import sys
from collections.abc import Mapping
from dataclasses import MISSING, dataclass, fields
from importlib import import_module
from pathlib import Path
from typing import Any, TypeVar, get_origin, get_type_hints

toml: Any = import_module("tomllib" if sys.version_info >= (3, 11) else "tomli")

TABLES = ("run", "task")
LIKE = "like"
PRECISIONS = ("no", "bf16", "fp16")

Settings = TypeVar("Settings")


@dataclass(frozen=True)
class Run:
    """How to train, whatever it is. `batch` and `workers` are per process, `rate` is the highest learning rate.

    Of 0 `steps` it writes the first weights. `data` is `world`, or a folder of WebDataset shards (data.ShardAlbum).
    The rate rises over `warmup` steps and falls as a cosine to a hundredth. `clip` bounds the gradient's norm.
    """

    folder: str
    steps: int
    batch: int
    rate: float
    warmup: int = 100
    decay: float = 0.01
    clip: float = 1.0
    ema: float = 0.999
    seed: int = 0
    precision: str = "no"
    data: str = "world"
    workers: int = 0
    log_every: int = 20
    draw_every: int = 1000
    save_every: int = 500
    keep: int = 2

    def __post_init__(self) -> None:
        positive = ("batch", "rate", "clip", "log_every", "draw_every", "save_every", "keep")
        known = {name: getattr(self, name) for name in (*positive, "steps", "warmup", "decay", "workers")}
        wrong = [f"{name} = {value}" for name, value in known.items() if value < 0 or (value == 0 and name in positive)]
        if wrong:
            raise ValueError(f"got {', '.join(wrong)} in [run]; expected more; mend the config")
        if not 0 <= self.ema < 1:
            raise ValueError(f"got ema = {self.ema} in [run]; expected at least 0 and less than 1, as 0.999")
        if self.precision not in PRECISIONS:
            raise ValueError(f"got precision = {self.precision!r} in [run]; expected {' or '.join(PRECISIONS)}")


def tables(file: Path) -> dict[str, dict[str, Any]]:
    """The tables `run` and `task` of a file, on those of the file that it is like.

    Raises ValueError where it has others, or lacks one, or would train in the other's folder.
    """
    like, told = _told(file)
    if like is not None:
        told = _like(file, like, told)
    missing = [name for name in TABLES if name not in told]
    if missing:
        raise ValueError(f"got {file} without [{'] and ['.join(missing)}]; expected [run] and [task]; add them")
    return told


def _told(file: Path) -> tuple[Any, dict[str, dict[str, Any]]]:
    try:
        told = toml.loads(file.read_text(encoding="utf-8"))
    except (OSError, UnicodeDecodeError, toml.TOMLDecodeError) as error:
        raise ValueError(f"got {file}, which cannot be read ({error}); expected a TOML file") from error
    like = told.pop(LIKE, None)
    wrong = [name for name in told if name not in TABLES or not isinstance(told[name], dict)]
    if wrong:
        raise ValueError(f"got {', '.join(wrong)} in {file}; expected the tables [run] and [task]; take out the others")
    return like, told


def _like(file: Path, like: Any, told: dict[str, dict[str, Any]]) -> dict[str, dict[str, Any]]:
    if not isinstance(like, str) or not (file.parent / like).is_file():
        raise ValueError(f"got {LIKE} = {like!r} in {file}; expected the name of a config in {file.parent}")
    further, other = _told(file.parent / like)
    if further is not None:
        raise ValueError(f"got {LIKE} = {like!r} in {file}, which is like {further} itself; name that")
    if "folder" not in told.get("run", {}):
        raise ValueError(f"got no folder in [run] of {file}; expected one, since {like} trains in its own; add it")
    return {name: {**other.get(name, {}), **told.get(name, {})} for name in TABLES if name in other or name in told}


def read(kind: type[Settings], table: Mapping[str, Any], name: str) -> Settings:
    """A dataclass of a table. Raises ValueError naming what is unknown, missing or of another type."""
    known = {field.name: field for field in fields(kind)}  # type: ignore[arg-type]
    types = get_type_hints(kind)
    unknown = [key for key in table if key not in known]
    if unknown:
        raise ValueError(f"got {', '.join(unknown)} in [{name}]; expected none but {', '.join(known)}")
    needed = [key for key, field in known.items() if field.default is MISSING and field.default_factory is MISSING]
    missing = [key for key in needed if key not in table]
    if missing:
        raise ValueError(f"got no {', '.join(missing)} in [{name}]; expected {', '.join(needed)}; add them")
    return kind(**{key: _value(table[key], types[key], f"{key} in [{name}]") for key in table})


def _value(value: Any, type_: Any, where: str) -> Any:
    """A value of TOML as the type that a field has; lists of one type become tuples."""
    if get_origin(type_) is tuple and isinstance(value, list):
        return tuple(_value(one, type_.__args__[0], where) for one in value)
    if type_ is float and isinstance(value, int) and not isinstance(value, bool):
        return float(value)
    plain = get_origin(type_) or type_
    if not isinstance(value, plain) or (isinstance(value, bool) and plain is not bool):
        raise ValueError(f"got {value!r} for {where}; expected {getattr(type_, '__name__', type_)}")
    return value
