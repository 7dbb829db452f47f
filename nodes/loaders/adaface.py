"""Load AdaFace: Arc2Face's text encoder, and the prompt inverter that makes words of what it says."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import comfy.ops
from comfy_api.latest import io

from ...likeness import adaface as math
from ...likeness import arc2face as arc2face_math
from ...likeness.clip_text import TextModel
from ...likeness.spec import Arc2FaceSpec
from .. import types
from . import care, files

FOLDER, ENCODERS = "likeness", ("likeness", "text_encoders")
ALONE = "none (Arc2Face alone)"
ENCODER = "text_model."
PICKLED = (".pt", ".bin", ".ckpt", ".pth")
CONVERT = "python -m tools.convert_adaface in.pt out.safetensors"


def load(file: str, arc2face: str) -> types.LoadedPrompter:
    """Both text models under the host's care. Raises ValueError (see `files.read`)."""
    model, read = encoder(files.find(arc2face, *ENCODERS))
    held = care.patcher_of(model)
    if file == ALONE:
        return types.LoadedPrompter(held, None, None, arc2face, read.faces)
    path = files.find(file, FOLDER)
    told = files.told(path)
    if told is None or told.get("kind") != math.KIND:
        if path.suffix not in PICKLED:
            files.read(path)  # where it is damaged, that is said
        what = "a checkpoint of pickled modules" if path.suffix in PICKLED else "no AdaFace file of this pack"
        raise ValueError(
            f"got {file}, {what}; expected the prompt inverter as safetensors; convert AdaFace's checkpoint once, in "
            f"this pack's folder: {CONVERT}"
        )
    spec = math.read_spec(told, file)
    inverter = math.build(files.read(path), spec, comfy.ops.manual_cast, file)
    if inverter.text.size["width"] != model.size["width"]:
        raise ValueError(
            f"got {file}, {inverter.text.size['width']} wide, for {arc2face}, which is {model.size['width']} wide; "
            "expected the text encoder that the inverter was trained on; choose it as arc2face"
        )
    return types.LoadedPrompter(held, care.patcher_of(inverter), spec, file, read.faces)


def encoder(path: Path) -> tuple[TextModel, Arc2FaceSpec]:
    """Arc2Face's text encoder, the authors' or one trained here. Raises ValueError where the file is neither."""
    told = files.told(path)
    own = told is not None and told.get("kind") == arc2face_math.KIND
    spec = arc2face_math.read_spec(told, path.name) if told and own else arc2face_math.PUBLISHED
    tensors: dict[str, Any] = files.read(path)
    try:
        model = math.text_model(tensors, ENCODER, spec.heads, comfy.ops.manual_cast)
        if spec.base == arc2face_math.PUBLISHED.base and (wrong := math.not_clip_l(model)):
            raise ValueError(", ".join(wrong))
    except ValueError as error:
        raise ValueError(
            f"got {path.name}, which is not Arc2Face's text encoder ({error}); expected its encoder/pytorch_model.bin; "
            "fetch it from the authors' repository"
        ) from error
    return model, spec


class LoadAdaFace(io.ComfyNode):
    @classmethod
    def define_schema(cls) -> io.Schema:
        return io.Schema(
            node_id="LikenessLoadAdaFace",
            display_name="Load AdaFace",
            category="likeness/loaders",
            description="Loads what puts a person into words: AdaFace's prompt inverter, and Arc2Face's text encoder "
            "that it reads. Arc2Face alone serves Arc2Face's own model.",
            search_aliases=["adaface", "arc2face", "prompt", "textual inversion"],
            inputs=[
                io.Combo.Input(
                    "file",
                    options=[*files.names(FOLDER), ALONE],
                    tooltip=f"Prompt inverter from models/likeness (.safetensors). The published .pt is converted once "
                    f"by {CONVERT}.",
                ),
                io.Combo.Input(
                    "arc2face",
                    options=files.names(*ENCODERS),
                    tooltip="Arc2Face's text encoder, encoder/pytorch_model.bin of its authors, from models/likeness "
                    "or models/text_encoders, under any name; or one of your own training.",
                ),
            ],
            outputs=[types.Prompter.Output(display_name="prompter")],
        )

    @classmethod
    def fingerprint_inputs(cls, file: str, arc2face: str) -> tuple[Any, ...]:
        own = () if file == ALONE else files.signature(files.find(file, FOLDER))
        return *own, *files.signature(files.find(arc2face, *ENCODERS))

    @classmethod
    def execute(cls, file: str, arc2face: str) -> io.NodeOutput:
        return io.NodeOutput(load(file, arc2face))


NODES = [LoadAdaFace]
