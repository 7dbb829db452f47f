"""AdaFace's published checkpoints, which pickle complete modules, converted to the native format."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from torch import Tensor

from ..methods.adaface import EXTRA_TENSORS, TEXT_MODEL_PREFIX
from ..spec import AdaFaceSpec
from . import pickle_reader

SUBJECT_GENERATORS_KEY = "string_to_subj_basis_generator_dict"
FACE_GENERATOR_KEY = "z"
NUM_HEADS = 12
NUM_ARC2FACE_TOKENS = 16  # newer files hold two inverters; this one reads Arc2Face's tokens


def read_adaface_checkpoint(path: Path) -> tuple[dict[str, Tensor], AdaFaceSpec]:
    """The tensors of a checkpoint's prompt inverter under the names of the native format, and its spec.

    Reads both generations, 2024 (one module) and 2025 (a list of modules), without executing anything in the file.
    Raises ValueError on any other file.
    """
    root = pickle_reader.get_dict_items(pickle_reader.read_pickled_checkpoint(path))
    generator = pickle_reader.get_child_modules(root.get(SUBJECT_GENERATORS_KEY)).get(FACE_GENERATOR_KEY)
    module = _find_face_inverter(generator)
    if module is None:
        raise ValueError(
            f"got {path.name}, which holds {', '.join(sorted(root)[:5]) or 'no named items'}; expected AdaFace's "
            f"embedding checkpoint with {SUBJECT_GENERATORS_KEY} and the key {FACE_GENERATOR_KEY} in it; "
            "fetch embeddings_gs-*.pt or *-ada-*.pt"
        )
    state_dict = pickle_reader.collect_state_dict(module)
    padding = pickle_reader.get_object_attributes(module).get("pad_embeddings")
    if isinstance(padding, Tensor):  # in older modules a plain attribute
        state_dict["pad_embeddings"] = padding
    tensors = {
        key: value.clone().contiguous()
        for key, value in state_dict.items()
        if key.startswith(TEXT_MODEL_PREFIX) or key in EXTRA_TENSORS
    }
    tensors.pop(f"{TEXT_MODEL_PREFIX}embeddings.position_ids", None)
    return tensors, AdaFaceSpec("SD1.5", {"l": 768}, NUM_HEADS, {"from": path.name})


def _find_face_inverter(generator: Any) -> Any:
    """The module itself, or of a list the last inverter that reads Arc2Face's tokens; the last one if none says so."""
    children = pickle_reader.get_child_modules(generator)
    if "prompt2token_proj" in children:
        return generator
    inverters = [one for one in children.values() if "prompt2token_proj" in pickle_reader.get_child_modules(one)]
    of_arc2face = [
        one for one in inverters if pickle_reader.get_object_attributes(one).get("num_id_vecs") == NUM_ARC2FACE_TOKENS
    ]
    return (of_arc2face or inverters or [None])[-1]
