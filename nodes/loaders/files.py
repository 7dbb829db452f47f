"""Model folders and weight files: the only file that knows folder_paths."""

from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Iterable, Sequence
from functools import lru_cache
from pathlib import Path
from typing import Any

import comfy.utils
import folder_paths
import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor

FOLDERS = ("ipadapter", "instantid", "pulid", "clip_vision", "insightface", "likeness", "identities")
# What ships with the pack, and the model folders of which a part does.
SHIPPED = Path(__file__).resolve().parents[2] / "weights"
SHIPPED_FOLDERS = ("insightface", "ipadapter", "likeness")
WEIGHTS = (".safetensors", ".bin", ".pt", ".pth", ".ckpt")

NOT_WEIGHTS = (
    (b"<", "a web page, not weights: the download was a login or error page"),
    (
        b"version https://git-lfs",
        "a Git LFS pointer, not the weights themselves: fetch the file with git lfs or a browser",
    ),
)


def register(further: Iterable[Path] = ()) -> None:
    """Tell the host of the pack's model folders; folders it knows already keep their paths.

    What ships is a further place behind the user's own, whose files count before it and where new ones go. Behind both
    are `further` places of what lies in `likeness`.
    """
    for folder in FOLDERS:
        folder_paths.add_model_folder_path(folder, os.path.join(folder_paths.models_dir, folder))
        if folder in SHIPPED_FOLDERS:
            folder_paths.add_model_folder_path(folder, str(SHIPPED / folder))
        paths, extensions = folder_paths.folder_names_and_paths[folder]
        if not extensions and folder != "insightface":
            folder_paths.folder_names_and_paths[folder] = (paths, folder_paths.supported_pt_extensions)
    for place in further:
        folder_paths.add_model_folder_path("likeness", str(place))


def names(*folders: str) -> list[str]:
    """The weight files of some model folders, as `<name>`, each name once."""
    found = {name for folder in folders for name in folder_paths.get_filename_list(folder)}
    return sorted(name for name in found if name.endswith(WEIGHTS))


def roots(folder: str) -> list[Path]:
    """Where the host looks for files of `folder`, the first being where new files go."""
    return [Path(path) for path in folder_paths.get_folder_paths(folder)]


def find(name: str, *folders: str) -> Path:
    """The path of a model file. Raises ValueError naming the folders that were searched."""
    for folder in folders:
        path = folder_paths.get_full_path(folder, name)
        if path is not None and Path(path).is_file():
            return Path(path)
    places = ", ".join(str(root) for folder in folders for root in roots(folder) if SHIPPED not in root.parents)
    raise ValueError(f"got {name!r}, which is not there; expected a file in {places}; put it there and press R")


def signature(path: Path) -> tuple[int, int]:
    """Changes when the file does: its modification time in ns and its size."""
    stat = path.stat()
    return stat.st_mtime_ns, stat.st_size


def sha256(path: Path) -> str:
    """The sha256 of a file as 64 hex digits; read once as long as the file stays as it is."""
    return _sha256(path, signature(path))


@lru_cache(maxsize=64)
def _sha256(path: Path, _signature: tuple[int, int]) -> str:
    digest = hashlib.sha256()
    with path.open("rb") as file:
        while block := file.read(1 << 20):
            digest.update(block)
    return digest.hexdigest()


def read(path: Path) -> dict[str, Tensor]:
    """The tensors of a weight file, with dotted names; nested groups of a `.bin` are joined with dots.

    Nothing in the file is executed: safetensors, or torch's weights-only reader. Raises ValueError where the file is
    empty, cut short, not weights at all, or holds a NaN or an infinity.
    """
    head = path.open("rb").read(64).lstrip()
    if not head:
        raise ValueError(f"got {path.name}, an empty file; expected adapter weights; download it again")
    for start, what in NOT_WEIGHTS:
        if head.startswith(start):
            raise ValueError(f"got {path.name}, {what}; expected adapter weights; download it again")
    try:
        loaded = comfy.utils.load_torch_file(str(path), safe_load=True)
    except Exception as error:
        why = (str(error) or type(error).__name__).splitlines()[0][:120]
        raise ValueError(
            f"got {path.name}, which cannot be read ({why}); "
            "expected a whole .safetensors or .bin file of tensors; it may be cut short: download it again"
        ) from error
    tensors = flatten(loaded)
    broken = next(
        (key for key, value in tensors.items() if value.is_floating_point() and not value.isfinite().all()), None
    )
    if broken is not None:
        raise ValueError(
            f"got {path.name}, whose tensor {broken} holds NaN or infinity; expected finite weights; download it again"
        )
    return tensors


def shape(name: str, folder: str, keys: Sequence[str]) -> list[int] | None:
    """The shape of a file's tensor that has one of these names, read without its weights; None where it has none."""
    try:
        path = find(name, folder)
        if path.suffix == ".safetensors":
            with safe_open(path, "pt") as tensors:
                key = next((key for key in keys if key in tensors.keys()), None)  # noqa: SIM118
                return None if key is None else list(tensors.get_slice(key).get_shape())
        tensors = flatten(torch.load(path, map_location="meta", mmap=True, weights_only=True))
        return next((list(tensors[key].shape) for key in keys if key in tensors), None)
    except Exception:  # whatever is wrong with it, `read` says
        return None


def told(path: Path) -> dict[str, Any] | None:
    """What a safetensors file of the pack's own says of itself (metadata `likeness`); None for all other files.

    Raises ValueError where that is not JSON.
    """
    try:
        with safe_open(path, "pt") as file:
            text = (file.metadata() or {}).get("likeness")
    except (SafetensorError, OSError):
        return None  # what is wrong with it, `read` says
    if text is None:
        return None
    try:
        found = json.loads(text)
    except (ValueError, RecursionError):
        found = None
    if not isinstance(found, dict):
        raise ValueError(f"got {path.name}, whose metadata is damaged; expected JSON; fetch the file again")
    return found


def flatten(groups: object, prefix: str = "") -> dict[str, Tensor]:
    """Join nested groups of tensors into dotted names. Raises ValueError on anything else."""
    if not isinstance(groups, dict):
        raise ValueError(f"got a {type(groups).__name__} at {prefix or 'the top'}; expected named tensors")
    out: dict[str, Tensor] = {}
    for key, value in groups.items():
        if isinstance(value, torch.Tensor):
            out[f"{prefix}{key}"] = value
        else:
            out |= flatten(value, f"{prefix}{key}.")
    return out
