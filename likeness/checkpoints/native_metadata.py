"""Metadata of the native format: a dataclass as JSON, under the key `likeness` of a safetensors file's metadata."""

from __future__ import annotations

import json
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, fields
from typing import Any, ClassVar, Literal, TypeVar, get_args, get_origin, get_type_hints

from ..spec import Feature

NATIVE_FORMAT_VERSION = 1
JSON_TYPES: Mapping[Any, type] = {tuple: list, Mapping: dict}  # of annotations that JSON has other types for


@dataclass(frozen=True)
class NativeMetadata:
    """Fields that every kind of file has. A kind adds its own as a subclass.

    The annotations are the schema: str, int, bool, Mapping, tuple[Feature, ...], or a Literal for a choice of strings.
    `base` is the family of base models, `notes` say how the file was trained.
    """

    kind: ClassVar[str]
    base: str
    notes: Mapping[str, Any]


MetadataT = TypeVar("MetadataT", bound=NativeMetadata)


def make_native_metadata(kind: str, base: str, notes: Mapping[str, Any], **kind_fields: Any) -> dict[str, str]:
    """The metadata of a safetensors file of some kind; all values must be JSON."""
    content = {"kind": kind, "version": NATIVE_FORMAT_VERSION, "base": base, "notes": dict(notes), **kind_fields}
    return {"likeness": json.dumps(content)}


def encode_metadata(metadata_type: type[NativeMetadata], source: object, **values: Any) -> dict[str, str]:
    """The metadata of a safetensors file. Fields that `values` lacks are attributes of `source`."""
    names = [field.name for field in fields(metadata_type)]
    content = {name: values[name] if name in values else getattr(source, name) for name in names}
    return make_native_metadata(metadata_type.kind, **{name: _encode_value(value) for name, value in content.items()})


def decode_metadata(metadata_type: type[MetadataT], metadata: Mapping[str, Any], file: str) -> MetadataT:
    """A file's metadata as a dataclass. Raises ValueError where it is of another kind, incomplete, wrong or newer."""
    hints = get_type_hints(metadata_type)
    annotations = {field.name: hints[field.name] for field in fields(metadata_type)}
    _check_metadata(metadata_type.kind, annotations, metadata, file)
    values: dict[str, Any] = {
        name: parse_features(metadata[name], file) if get_origin(annotation) is tuple else metadata[name]
        for name, annotation in annotations.items()
    }
    return metadata_type(**values)


def parse_features(names: Sequence[Any], file: str) -> tuple[Feature, ...]:
    """Features of their names in a file. Raises ValueError where a name is not <network>.<layer>.<crop>."""
    return tuple(_parse_feature(str(name), file) for name in names)


def _parse_feature(name: str, file: str) -> Feature:
    match = re.fullmatch(r"(.+)\.(\w+)\.(\w+)", name)
    if match is None:
        raise ValueError(f"got {file}, which needs {name!r}; expected <network>.<layer>.<crop>; fetch the file again")
    return Feature(*match.groups())


def _encode_value(value: Any) -> Any:
    if isinstance(value, tuple):
        return [str(feature) for feature in value]
    return dict(value) if isinstance(value, Mapping) else value


def _get_json_type(annotation: Any) -> type:
    origin = get_origin(annotation)
    return str if origin is Literal else JSON_TYPES.get(origin, annotation)


def _check_metadata(kind: str, annotations: Mapping[str, Any], metadata: Mapping[str, Any], file: str) -> None:
    types = {"kind": str, "version": int, **{name: _get_json_type(value) for name, value in annotations.items()}}
    choices = {name: get_args(value) for name, value in annotations.items() if get_origin(value) is Literal}
    wrong = [name for name, type_ in types.items() if not isinstance(metadata.get(name), type_)]
    wrong += [
        f"{name} {metadata[name]!r}"
        for name, values in choices.items()
        if name not in wrong and metadata[name] not in values
    ]
    if wrong or metadata["kind"] != kind:
        options = "".join(f"; {name}: {' or '.join(values)}" for name, values in choices.items())
        raise ValueError(
            f"got {file}, whose metadata is not that of the kind {kind} ({', '.join(wrong) or metadata['kind']}); "
            f"expected {', '.join(types)}{options}; fetch the file again"
        )
    if metadata["version"] > NATIVE_FORMAT_VERSION:
        raise ValueError(
            f"got {file}, of version {metadata['version']}; this pack reads up to version {NATIVE_FORMAT_VERSION}; "
            "update the pack"
        )
