"""Model folders and weight files. The only module that uses folder_paths."""

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

from ...likeness.checkpoints import file_kinds, quantized_weights

MODEL_FOLDERS = ("ipadapter", "instantid", "pulid", "clip_vision", "insightface", "likeness", "identities")
# The weights that ship with the pack, and the model folders that they belong to.
SHIPPED_WEIGHTS = Path(__file__).resolve().parents[2] / "weights"
SHIPPED_FOLDERS = ("insightface", "ipadapter", "likeness")
SAFETENSORS_SUFFIXES = (".safetensors", ".sft")
PICKLE_SUFFIXES = (".bin", ".pt", ".pth", ".ckpt")

NOT_WEIGHTS_HEADERS = (
    (b"<", "a web page, probably a login or error page"),
    (b"version https://git-lfs", "a Git LFS pointer (use git lfs or a browser)"),
)


def register_model_folders(extra_folders: Iterable[Path] = ()) -> None:
    """Register the pack's model folders with ComfyUI. Folders that it knows already keep their paths.

    The shipped weights come after the user's folders, which therefore take precedence and receive new files.
    `extra_folders` are searched last, for files of the folder `likeness`.
    """
    for folder in MODEL_FOLDERS:
        folder_paths.add_model_folder_path(folder, os.path.join(folder_paths.models_dir, folder))
        if folder in SHIPPED_FOLDERS:
            folder_paths.add_model_folder_path(folder, str(SHIPPED_WEIGHTS / folder))
        paths, extensions = folder_paths.folder_names_and_paths[folder]
        if not extensions and folder != "insightface":
            folder_paths.folder_names_and_paths[folder] = (paths, folder_paths.supported_pt_extensions)
    for extra_folder in extra_folders:
        folder_paths.add_model_folder_path("likeness", str(extra_folder))


def list_weight_files(*folders: str) -> list[str]:
    """The names of the weight files in these model folders, sorted, without duplicates."""
    names = {name for folder in folders for name in folder_paths.get_filename_list(folder)}
    return sorted(name for name in names if has_suffix(name, *SAFETENSORS_SUFFIXES, *PICKLE_SUFFIXES))


def has_suffix(name: str, *suffixes: str) -> bool:
    """Whether a file name ends with one of these suffixes, in upper or lower case."""
    return name.lower().endswith(suffixes)


def list_folder_paths(folder: str) -> list[Path]:
    """The paths that ComfyUI searches for files of `folder`. New files go into the first."""
    return [Path(path) for path in folder_paths.get_folder_paths(folder)]


def find_model_file(name: str, *folders: str) -> Path:
    """The path of a model file. Raises ValueError with the folders that were searched."""
    for folder in folders:
        path = folder_paths.get_full_path(folder, name)
        if path is not None and Path(path).is_file():
            return Path(path)
    searched = ", ".join(
        str(root) for folder in folders for root in list_folder_paths(folder) if SHIPPED_WEIGHTS not in root.parents
    )
    raise ValueError(f"could not find {name!r}; expected a file in {searched}; put it there and press R to refresh")


def get_file_signature(path: Path) -> tuple[int, int]:
    """Modification time in ns and size, which change with the file."""
    stat = path.stat()
    return stat.st_mtime_ns, stat.st_size


def hash_file(path: Path) -> str:
    """The sha256 of a file as 64 hex digits, cached until the file changes."""
    return _hash_file(path, get_file_signature(path))


@lru_cache(maxsize=64)
def _hash_file(path: Path, _signature: tuple[int, int]) -> str:
    digest = hashlib.sha256()
    with path.open("rb") as file:
        while block := file.read(1 << 20):
            digest.update(block)
    return digest.hexdigest()


def load_weights(path: Path, expected_kind: str) -> dict[str, Tensor]:
    """The tensors of a weight file of a kind in file_kinds.FILE_KINDS, in any float dtype.

    Names of nested groups in a `.bin` are joined with dots.

    No code of the file is executed: it is read by safetensors or by torch's weights-only unpickler. Scaled float8
    weights are multiplied out. Raises ValueError if the file is empty, cut short, not a weight file, of another kind,
    quantized in another way, or holds NaN or infinity.
    """
    head = path.open("rb").read(64).lstrip()
    if not head:
        raise ValueError(f"got {path.name}, an empty file; expected weights; download it again")
    for magic, description in NOT_WEIGHTS_HEADERS:
        if head.startswith(magic):
            raise ValueError(f"got {path.name}, {description}; expected weights; download it again")
    try:
        loaded = comfy.utils.load_torch_file(str(path), safe_load=True)
    except Exception as error:
        reason = (str(error) or type(error).__name__).splitlines()[0][:120]
        raise ValueError(
            f"got {path.name}, which cannot be read ({reason}); "
            "expected a complete .safetensors or .bin file of tensors; it may be cut short: download it again"
        ) from error
    tensors = flatten_tensors(loaded)
    if not tensors:
        raise ValueError(f"download {path.name} again: got a file without tensors; expected named tensors")
    file_kinds.check_file_kind(path.name, tensors, read_native_metadata(path), expected_kind)
    try:
        tensors = quantized_weights.dequantize_weights(tensors)
    except ValueError as error:
        raise ValueError(f"download {path.name} in float16 or plain float8; {error}") from error
    broken = next((key for key, value in tensors.items() if not quantized_weights.is_finite(value)), None)
    if broken is not None:
        raise ValueError(
            f"got {path.name}, whose tensor {broken} holds NaN or infinity; expected finite weights; download it again"
        )
    return tensors


def read_tensor_shape(name: str, folder: str, tensor_names: Sequence[str]) -> list[int] | None:
    """The shape of the first tensor with one of these names, read without loading weights; None if there is none."""
    shapes = read_tensor_shapes(find_model_file(name, folder))
    return next((shapes[key] for key in tensor_names if key in shapes), None)


def read_tensor_shapes(path: Path) -> dict[str, list[int]]:
    """The shapes of all tensors of a file, read without loading weights; none if it cannot be read."""
    try:
        if has_suffix(path.name, *SAFETENSORS_SUFFIXES):
            with safe_open(path, "pt") as file:
                return {key: list(file.get_slice(key).get_shape()) for key in file.keys()}  # noqa: SIM118
        tensors = flatten_tensors(torch.load(path, map_location="meta", mmap=True, weights_only=True))
        return {key: list(value.shape) for key, value in tensors.items()}
    except Exception:  # load_weights reports damaged files
        return {}


def read_native_metadata(path: Path) -> dict[str, Any] | None:
    """The metadata of a file in the native format (JSON under the key `likeness`); None for all other files.

    Raises ValueError if the metadata is not a JSON object.
    """
    try:
        with safe_open(path, "pt") as file:
            text = (file.metadata() or {}).get("likeness")
    except (SafetensorError, OSError):
        return None  # load_weights reports damaged files
    if text is None:
        return None
    try:
        metadata = json.loads(text)
    except (ValueError, RecursionError):
        metadata = None
    if not isinstance(metadata, dict):
        raise ValueError(f"got {path.name}, whose metadata is damaged; expected a JSON object; download the file again")
    return metadata


def flatten_tensors(groups: object, prefix: str = "") -> dict[str, Tensor]:
    """Join nested groups of tensors into dotted names, without what else a training loop stores beside them."""
    tensors: dict[str, Tensor] = {}
    for key, value in groups.items() if isinstance(groups, dict) else ():
        if isinstance(value, torch.Tensor):
            tensors[f"{prefix}{key}"] = value
        else:
            tensors |= flatten_tensors(value, f"{prefix}{key}.")
    return tensors
