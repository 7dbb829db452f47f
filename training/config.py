"""Config files: TOML tables parsed into frozen dataclasses, checked by pydantic. Unknown keys are errors.

A config that `extends` another one of its folder contains only what differs.
"""

from __future__ import annotations

import json
import sys
from collections.abc import Mapping
from dataclasses import dataclass, fields
from importlib import import_module
from pathlib import Path
from typing import Annotated, Any, Literal, TypeVar

from pydantic import Field, NonNegativeFloat, NonNegativeInt, PositiveFloat, PositiveInt, TypeAdapter, ValidationError

toml: Any = import_module("tomllib" if sys.version_info >= (3, 11) else "tomli")

CONFIG_TABLES = ("run", "task")
EXTENDS_KEY = "extends"

ConfigType = TypeVar("ConfigType")


@dataclass(frozen=True)
class RunConfig:
    """Settings of any run. `batch_size` and `num_workers` are per process.

    The learning rate rises to `learning_rate` over `warmup_steps` and falls to a hundredth of it: as a cosine, or
    linearly over the last `decay_share` of the steps if that is not 0. 0 `steps` write the initial weights. `data` is
    a folder of WebDataset shards, or the path of a function that returns an ImageSource (image_source.open_source).
    """

    folder: str
    steps: NonNegativeInt
    batch_size: PositiveInt
    learning_rate: PositiveFloat
    warmup_steps: NonNegativeInt = 100
    decay_share: Annotated[float, Field(ge=0, le=1)] = 0.0
    weight_decay: NonNegativeFloat = 0.01
    max_grad_norm: PositiveFloat = 1.0
    ema_decay: Annotated[float, Field(ge=0, lt=1)] = 0.999
    seed: int = 0
    mixed_precision: Literal["no", "bf16", "fp16"] = "no"
    data: str = "portrait_world.world_source:open_train_split"
    num_workers: NonNegativeInt = 0
    log_every: PositiveInt = 20
    sample_every: PositiveInt = 1000
    save_every: PositiveInt = 500
    keep_checkpoints: PositiveInt = 2


def read_config_tables(file: Path) -> dict[str, dict[str, Any]]:
    """The tables `run` and `task` of a file, over those of the file that it extends.

    Raises ValueError if there are other tables, one is missing, or the run would use the extended config's folder.
    """
    base_name, tables = _read_toml(file)
    if base_name is not None:
        tables = _extend_tables(file, base_name, tables)
    missing = [name for name in CONFIG_TABLES if name not in tables]
    if missing:
        raise ValueError(f"got {file} without [{'] and ['.join(missing)}]; expected [run] and [task]; add them")
    return tables


def _read_toml(file: Path) -> tuple[Any, dict[str, dict[str, Any]]]:
    try:
        tables = toml.loads(file.read_text(encoding="utf-8"))
    except (OSError, UnicodeDecodeError, toml.TOMLDecodeError) as error:
        raise ValueError(f"got {file}, which cannot be read ({error}); expected a TOML file") from error
    base_name = tables.pop(EXTENDS_KEY, None)
    wrong = [name for name in tables if name not in CONFIG_TABLES or not isinstance(tables[name], dict)]
    if wrong:
        raise ValueError(f"got {', '.join(wrong)} in {file}; expected the tables [run] and [task]; remove the others")
    return base_name, tables


def _extend_tables(file: Path, base_name: Any, changes: dict[str, dict[str, Any]]) -> dict[str, dict[str, Any]]:
    if not isinstance(base_name, str) or not (file.parent / base_name).is_file():
        raise ValueError(f"got {EXTENDS_KEY} = {base_name!r} in {file}; expected the name of a config in {file.parent}")
    base_of_base, base = _read_toml(file.parent / base_name)
    if base_of_base is not None:
        raise ValueError(
            f"got {EXTENDS_KEY} = {base_name!r} in {file}, which extends {base_of_base} itself; extend that one"
        )
    if "folder" not in changes.get("run", {}):
        raise ValueError(f"got no folder in [run] of {file}; expected one other than that of {base_name}; add it")
    return {
        name: {**base.get(name, {}), **changes.get(name, {})}
        for name in CONFIG_TABLES
        if name in base or name in changes
    }


def parse_config_table(config_type: type[ConfigType], table: Mapping[str, Any], table_name: str) -> ConfigType:
    """Make a config dataclass from a table. Raises ValueError that names unknown, missing and wrong keys."""
    known = [field.name for field in fields(config_type)]  # type: ignore[arg-type]
    unknown = [key for key in table if key not in known]
    if unknown:
        raise ValueError(f"got {', '.join(unknown)} in [{table_name}]; expected only {', '.join(known)}")
    try:
        # As JSON, since arrays pass for tuples there even in strict mode.
        return TypeAdapter(config_type).validate_json(json.dumps(dict(table), default=str), strict=True)
    except ValidationError as error:
        raise ValueError("; ".join(_format_problem(problem, table_name) for problem in error.errors())) from error


def _format_problem(problem: Mapping[str, Any], table_name: str) -> str:
    if problem["type"] == "value_error":  # raised by the dataclass itself
        return str(problem["ctx"]["error"])
    key = ".".join(map(str, problem["loc"]))
    if problem["type"] == "missing":
        return f"got no {key} in [{table_name}]; add it"
    return f"got {key} = {problem['input']!r} in [{table_name}]; {problem['msg'].replace('Input should', 'it must')}"
