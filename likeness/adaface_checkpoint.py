"""AdaFace's released checkpoints, which pickle whole modules: what of them the pack's own file holds."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from torch import Tensor

from . import pickled
from .adaface import EXTRAS, TEXT
from .spec import PrompterSpec

GENERATORS = "string_to_subj_basis_generator_dict"
FACE = "z"
HEADS = 12
ARC2FACE_ROWS = 16  # of the two inverters of newer files, the one that reads so many tokens


def read(path: Path) -> tuple[dict[str, Tensor], PrompterSpec]:
    """The tensors of a checkpoint's prompt inverter under the names of the pack's file, and its spec.

    Both generations are read, 2024 (one module) and 2025 (a list of them); nothing in the file is executed. Raises
    ValueError where it is none of these.
    """
    root = pickled.items(pickled.read(path))
    faces = pickled.children(root.get(GENERATORS)).get(FACE)
    module = _arc2face(faces)
    if module is None:
        raise ValueError(
            f"got {path.name}, which holds {', '.join(sorted(root)[:5]) or 'nothing named'}; expected AdaFace's "
            f"embedding checkpoint with {GENERATORS} and the word {FACE} in it; fetch embeddings_gs-*.pt or *-ada-*.pt"
        )
    found = pickled.state_dict(module)
    stored = pickled.attributes(module).get("pad_embeddings")
    if isinstance(stored, Tensor):  # older modules keep it beside their parameters
        found["pad_embeddings"] = stored
    kept = {key: value.clone().contiguous() for key, value in found.items() if key.startswith(TEXT) or key in EXTRAS}
    kept.pop(f"{TEXT}embeddings.position_ids", None)
    return kept, PrompterSpec("SD1.5", {"l": 768}, HEADS, {"from": path.name})


def _arc2face(faces: Any) -> Any:
    """The face module itself, or the one of a list that reads Arc2Face's tokens: the last where none says so."""
    several = list(pickled.children(faces).values())
    if "prompt2token_proj" in pickled.children(faces):
        return faces
    able = [one for one in several if "prompt2token_proj" in pickled.children(one)]
    told = [one for one in able if pickled.attributes(one).get("num_id_vecs") == ARC2FACE_ROWS]
    return (told or able or [None])[-1]
