"""Load AdaFace: Arc2Face's text encoder, and the prompt inverter that turns its output into token embeddings."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import comfy.ops
from comfy_api.latest import io

from ...likeness.checkpoints import file_kinds
from ...likeness.encoders.clip_text import CLIPTextModel
from ...likeness.methods import adaface, arc2face
from ...likeness.spec import AdaFaceSpec, Arc2FaceSpec
from .. import types
from . import files, model_management

INVERTER_FOLDER, TEXT_ENCODER_FOLDERS = "likeness", ("likeness", "text_encoders")
ARC2FACE_ONLY = "none (Arc2Face alone)"
ARC2FACE_TEXT_PREFIX = "text_model."
CONVERT_COMMAND = "python -m tools.convert_adaface in.pt out.safetensors"


def load_prompter(file: str, arc2face_file: str) -> types.LoadedPrompter:
    """Load both text models. Raises ValueError if a file is damaged or of another kind."""
    inverter, spec = (None, None) if file == ARC2FACE_ONLY else load_inverter(file)
    model, arc2face_spec = load_arc2face_encoder(files.find_model_file(arc2face_file, *TEXT_ENCODER_FOLDERS))
    patcher = model_management.make_model_patcher(model)
    if inverter is None:
        return types.LoadedPrompter(patcher, None, None, arc2face_file, arc2face_spec.faces)
    width, expected_width = model.sizes["width"], inverter.text.sizes["width"]
    if width != expected_width:
        raise ValueError(
            f"got {arc2face_file} of width {width}; {file} expects a text encoder of width {expected_width}; choose "
            "the text encoder that it was trained with as arc2face"
        )
    inverter_patcher = model_management.make_model_patcher(inverter)
    return types.LoadedPrompter(patcher, inverter_patcher, spec, file, arc2face_spec.faces)


def load_inverter(file: str) -> tuple[adaface.PromptInverter, AdaFaceSpec]:
    """AdaFace's prompt inverter. Raises ValueError if the file is damaged or of another kind."""
    path = files.find_model_file(file, INVERTER_FOLDER)
    metadata = files.read_native_metadata(path)
    # Only the converter reads pickled modules.
    is_pickled = files.has_suffix(file, *files.PICKLE_SUFFIXES) and not files.read_tensor_shapes(path)
    tensors = {} if is_pickled else files.load_weights(path, file_kinds.ADAFACE)
    if metadata is None or metadata.get("kind") != adaface.KIND:
        got = "a checkpoint of pickled modules" if is_pickled else "which is not an AdaFace file of this pack"
        raise ValueError(
            f"got {file}, {got}; expected the prompt inverter as safetensors; convert AdaFace's checkpoint once, in "
            f"this pack's folder: {CONVERT_COMMAND}"
        )
    spec = adaface.read_adaface_spec(metadata, file)
    return adaface.build_prompt_inverter(tensors, spec, comfy.ops.manual_cast, file), spec


def load_arc2face_encoder(path: Path) -> tuple[CLIPTextModel, Arc2FaceSpec]:
    """Arc2Face's text encoder, as published or in the native format. Raises ValueError for any other file."""
    metadata, spec = files.read_native_metadata(path), arc2face.PUBLISHED_SPEC
    if metadata is not None and metadata.get("kind") == arc2face.KIND:
        spec = arc2face.read_arc2face_spec(metadata, path.name)
    tensors: dict[str, Any] = files.load_weights(path, file_kinds.TEXT_ENCODER)
    try:
        model = adaface.build_text_model(tensors, ARC2FACE_TEXT_PREFIX, spec.heads, comfy.ops.manual_cast)
        if spec.base == arc2face.PUBLISHED_SPEC.base and (mismatches := adaface.find_clip_l_mismatches(model)):
            raise ValueError(", ".join(mismatches))
    except ValueError as error:
        raise ValueError(
            f"got {path.name}, which is not Arc2Face's text encoder ({error}); expected encoder/pytorch_model.bin; "
            "download it from the authors' repository"
        ) from error
    return model, spec


class LoadAdaFace(io.ComfyNode):
    @classmethod
    def define_schema(cls) -> io.Schema:
        return io.Schema(
            node_id="LikenessLoadAdaFace",
            display_name="Load AdaFace",
            category="likeness/loaders",
            description="Loads AdaFace's prompt inverter and Arc2Face's text encoder, which turn an identity into "
            "token embeddings of a prompt. For Arc2Face's own model, Arc2Face alone is enough.",
            search_aliases=["adaface", "arc2face", "prompt", "textual inversion"],
            inputs=[
                io.Combo.Input(
                    "file",
                    options=[*files.list_weight_files(INVERTER_FOLDER), ARC2FACE_ONLY],
                    tooltip="Prompt inverter from models/likeness (.safetensors). Convert the published .pt once with: "
                    f"{CONVERT_COMMAND}",
                ),
                io.Combo.Input(
                    "arc2face",
                    options=files.list_weight_files(*TEXT_ENCODER_FOLDERS),
                    tooltip="Arc2Face's text encoder from models/likeness or models/text_encoders: the published "
                    "encoder/pytorch_model.bin under any file name, or one that you trained.",
                ),
            ],
            outputs=[types.PrompterSocket.Output(display_name="prompter")],
        )

    @classmethod
    def fingerprint_inputs(cls, file: str, arc2face: str) -> tuple[Any, ...]:
        inverter = ()
        if file != ARC2FACE_ONLY:
            inverter = files.get_file_signature(files.find_model_file(file, INVERTER_FOLDER))
        return *inverter, *files.get_file_signature(files.find_model_file(arc2face, *TEXT_ENCODER_FOLDERS))

    @classmethod
    def execute(cls, file: str, arc2face: str) -> io.NodeOutput:
        return io.NodeOutput(load_prompter(file, arc2face))


NODES = [LoadAdaFace]
