"""Prompt with Identity, Arc2Face Conditioning and Save as Embedding: an identity as token embeddings of a prompt."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import comfy.model_management
import torch
from comfy_api.latest import io, ui
from safetensors.torch import save

from ..likeness.attention import regions
from ..likeness.identity import identity_file
from ..likeness.methods import adaface, arc2face, prompt_placeholders
from ..likeness.spec import AdaFaceSpec, Identity, People
from . import types
from .loaders import files
from .prompt_tokens import EMBEDDING_PREFIX, TokenEmbeddings, encode_prompt, get_text_transformer

EMBEDDINGS_FOLDER, EMBEDDING_KIND = "embeddings", "embedding"
SINGLE_ENCODER_KEY = "emb_params"  # the key that all interfaces use for the tensor of an embedding file
# Weights of the text encoder's last layers, the last layer last; empty: ComfyUI and its clip skip decide.
LAYER_MIXES: Mapping[str, tuple[float, ...]] = {"off": (), "last two": (1, 1), "last three": (1, 2, 2)}


def get_inverter_spec(prompter: types.LoadedPrompter) -> AdaFaceSpec:
    """The spec of the prompt inverter. Raises ValueError if only Arc2Face was loaded."""
    if prompter.spec is None:
        raise ValueError(
            f"got Arc2Face without a prompt inverter ({prompter.file}); select AdaFace's prompt inverter in Load "
            "AdaFace"
        )
    return prompter.spec


def check_text_encoders(clip: Any, prompter: types.LoadedPrompter) -> None:
    """Raise ValueError if there is no prompt inverter, or if its token embeddings do not fit the CLIP."""
    spec = get_inverter_spec(prompter)
    remedy = f"connect the CLIP of a {spec.base} checkpoint, or load another file"
    encoders, expected = sorted(clip.tokenize("")), sorted(spec.towers)
    if encoders != expected:
        raise ValueError(
            f"got a CLIP with the text encoders {', '.join(encoders)}; {prompter.file} makes token embeddings for "
            f"{', '.join(expected)} ({spec.base}); {remedy}"
        )
    # The host silently ignores embeddings of another width.
    for encoder, expected_width in spec.towers.items():
        width = get_text_transformer(clip, encoder).get_input_embeddings().weight.shape[1]
        if width != expected_width:
            raise ValueError(
                f"got a CLIP with token embeddings of width {width}; {prompter.file} makes them with width "
                f"{expected_width} ({spec.base}); {remedy}"
            )


def compute_token_embeddings(
    prompter: types.LoadedPrompter, identity: Identity, options: adaface.FaceEmbeddingOptions
) -> TokenEmbeddings:
    """The token embeddings of a person for each text encoder, float32 on the CPU."""
    assert prompter.inverter is not None and prompter.spec is not None  # see check_text_encoders
    comfy.model_management.load_models_gpu([prompter.arc2face, prompter.inverter])
    device = prompter.inverter.load_device
    models = prompter.arc2face.model, prompter.inverter.model
    embeddings = adaface.make_token_embeddings(*models, identity, options, device, prompter.face_features).cpu()
    split = embeddings.split(list(prompter.spec.towers.values()), dim=-1)
    return {encoder: rows.contiguous() for encoder, rows in zip(prompter.spec.towers, split, strict=True)}


def make_inverter_inputs() -> list[Any]:
    """The inputs of every node that computes token embeddings, `strength` first."""
    return [
        io.Float.Input(
            "strength", default=1.0, min=0.0, max=8.0, step=0.05,
            tooltip="Scales from padding (0) to the trained embedding (1), 0 to 8. Above 1 exaggerates; the authors' "
            "demo uses 4. 0 leaves the person out.",
        ),
        io.Int.Input(
            "vectors", default=adaface.NUM_FACE_VECTORS, min=1, max=adaface.NUM_FACE_VECTORS,
            optional=True, advanced=True,
            tooltip="How many of the 16 token embeddings to use, 1 to 16, starting with the first.",
        ),
        io.Combo.Input(
            "average", options=list(adaface.AVERAGING_METHODS), default="faces", optional=True, advanced=True,
            tooltip="What is averaged over photos: face embeddings (as published) or Arc2Face's tokens.",
        ),
        io.Float.Input(
            "variation", default=0.0, min=0.0, max=0.2, step=0.005, optional=True, advanced=True,
            tooltip="Noise on the average of the photos, 0 to 0.2 of its standard deviation. Up to 0.06, the person "
            "stays the same.",
        ),
        io.Int.Input(
            "variation_seed", default=0, min=0, max=2**32 - 1, optional=True, advanced=True,
            tooltip="Seed of the noise, 0 to 4294967295.",
        ),
    ]  # fmt: skip


class PromptWithIdentity(io.ComfyNode):
    @classmethod
    def define_schema(cls) -> io.Schema:
        return io.Schema(
            node_id="LikenessPrompt",
            display_name="Prompt with Identity",
            category="likeness/prompt",
            description="Puts a person into a prompt as token embeddings, like a textual inversion. The model is not "
            "patched, so it works wherever a prompt works. The second output has a class word instead of the person.",
            search_aliases=["adaface", "clip text encode", "embedding", "textual inversion"],
            inputs=[
                io.Clip.Input("clip", tooltip="The CLIP of an SD1.5 checkpoint. LoRAs and clip skip are allowed."),
                types.PrompterSocket.Input("prompter", tooltip="From Load AdaFace, with a prompt inverter."),
                types.make_identity_input("Encode with antelopev2 or Arc2Face's arcface.onnx. Masks are ignored."),
                io.String.Input(
                    "text", multiline=True, dynamic_prompts=True,
                    tooltip="The prompt. @ and the name stand for the person, e.g. @anna. If no name appears, the "
                    "person comes first. Weights work as usual: (@anna:1.2).",
                ),
                *make_inverter_inputs()[:1],
                io.String.Input(
                    "class_word", default="person",
                    tooltip="Replaces the person in the second prompt, and in the first at strength 0: person, "
                    "woman, man.",
                ),
                io.String.Input(
                    "placeholder", default="", optional=True,
                    tooltip="Your own word to use instead of @ and the name. For several people, one word each, "
                    "separated by commas. Empty: @ and the name.",
                ),
                *make_inverter_inputs()[1:],
                io.Combo.Input(
                    "layer_mix", options=list(LAYER_MIXES), default="off", optional=True, advanced=True,
                    tooltip="Averages the hidden states of the text encoder's last layers. off: as usual, with clip "
                    "skip. The authors evaluated with last two.",
                ),
            ],
            outputs=[
                io.Conditioning.Output(display_name="conditioning", tooltip="The prompt with the person."),
                io.Conditioning.Output(display_name="class word", tooltip="The prompt with the class word."),
            ],
        )  # fmt: skip

    @classmethod
    def execute(
        cls,
        clip: Any,
        prompter: types.LoadedPrompter,
        identity: Identity | People,
        text: str,
        strength: float,
        class_word: str,
        placeholder: str = "",
        vectors: int = adaface.NUM_FACE_VECTORS,
        average: str = "faces",
        variation: float = 0.0,
        variation_seed: int = 0,
        layer_mix: str = "off",
    ) -> io.NodeOutput:
        check_text_encoders(clip, prompter)
        people, mix = regions.convert_to_people(identity), LAYER_MIXES[layer_mix]
        names = [person.identity.name for person in people]
        placeholders = prompt_placeholders.parse_placeholders(names, placeholder)
        parts = prompt_placeholders.split_prompt(text, placeholders)
        embeddings: dict[int, TokenEmbeddings] = {}
        for number in sorted({part for part in parts if isinstance(part, int)}):
            scale = strength * people[number].strength
            if scale:
                options = adaface.FaceEmbeddingOptions(scale, vectors, average, variation, variation_seed)
                embeddings[number] = compute_token_embeddings(prompter, people[number].identity, options)
        identity_prompt: prompt_placeholders.PromptParts = [
            class_word if isinstance(part, int) and part not in embeddings else part for part in parts
        ]
        class_prompt: prompt_placeholders.PromptParts = [prompt_placeholders.join_prompt(parts, lambda _: class_word)]
        preview = prompt_placeholders.join_prompt(identity_prompt, lambda number: f"[{names[number]}]")
        return io.NodeOutput(
            encode_prompt(clip, identity_prompt, embeddings, mix),
            encode_prompt(clip, class_prompt, {}, mix),
            ui=ui.PreviewText(
                "\n".join(filter(None, (preview, prompt_placeholders.describe_missing_people(text, placeholders))))
            ),
        )


class Arc2FaceConditioning(io.ComfyNode):
    @classmethod
    def define_schema(cls) -> io.Schema:
        return io.Schema(
            node_id="LikenessArc2Face",
            display_name="Arc2Face Conditioning",
            category="likeness/prompt",
            description="Makes the conditioning for Arc2Face's own model, which loads like any SD1.5 checkpoint: the "
            "face encoded in the authors' prompt of 77 tokens, and the empty prompt, both by Arc2Face's text encoder.",
            search_aliases=["arc2face", "face to image"],
            inputs=[
                types.PrompterSocket.Input("prompter", tooltip="From Load AdaFace. Arc2Face alone is enough."),
                types.IdentitySocket.Input(
                    "identity", tooltip="The person, encoded with Arc2Face's arcface.onnx or antelopev2."
                ),
            ],
            outputs=[
                io.Conditioning.Output(display_name="positive"),
                io.Conditioning.Output(display_name="negative"),
            ],
        )

    @classmethod
    def execute(cls, prompter: types.LoadedPrompter, identity: Identity) -> io.NodeOutput:
        patcher = prompter.arc2face
        vectors, weight = arc2face.get_face_vectors(identity, prompter.face_features)
        comfy.model_management.load_model_gpu(patcher)
        device = comfy.model_management.intermediate_device()
        with torch.no_grad():
            face = arc2face.average_face_vectors(vectors, weight).to(patcher.load_device)
            positive = arc2face.encode_face_prompt(patcher.model, face)
            negative = arc2face.encode_empty_prompt(patcher.model, face.device)
        return io.NodeOutput([[positive.to(device), {}]], [[negative.to(device), {}]])


class SaveEmbedding(io.ComfyNode):
    @classmethod
    def define_schema(cls) -> io.Schema:
        return io.Schema(
            node_id="LikenessSaveEmbedding",
            display_name="Save as Embedding",
            category="likeness/prompt",
            description="Saves a person as a textual inversion file, models/embeddings/<name>.safetensors. Any SD1.5 "
            "interface can use it without this pack; in ComfyUI, write embedding:<name> into a prompt.",
            search_aliases=["textual inversion", "adaface", "save person"],
            is_output_node=True,
            inputs=[
                types.PrompterSocket.Input("prompter", tooltip="From Load AdaFace, with a prompt inverter."),
                types.IdentitySocket.Input(
                    "identity", tooltip="The person, encoded with antelopev2 or Arc2Face's arcface.onnx."
                ),
                io.String.Input(
                    "name", default="",
                    tooltip="File name of up to 120 characters: letters, digits, - _ . and no spaces. Empty: the "
                    "name of the identity.",
                ),
                *make_inverter_inputs(),
            ],
            outputs=[
                io.String.Output(display_name="words", tooltip="What to write into a prompt: embedding:<name>."),
            ],
        )  # fmt: skip

    @classmethod
    def execute(
        cls,
        prompter: types.LoadedPrompter,
        identity: Identity,
        name: str,
        strength: float,
        vectors: int = adaface.NUM_FACE_VECTORS,
        average: str = "faces",
        variation: float = 0.0,
        variation_seed: int = 0,
    ) -> io.NodeOutput:
        if not strength:
            raise ValueError("got strength 0, which leaves the person out; expected more than 0; 1 is as trained")
        spec = get_inverter_spec(prompter)
        path = get_embedding_path(name.strip() or identity.name)
        options = adaface.FaceEmbeddingOptions(strength, vectors, average, variation, variation_seed)
        embeddings = compute_token_embeddings(prompter, identity, options)
        if len(embeddings) == 1:
            tensors = {SINGLE_ENCODER_KEY: next(iter(embeddings.values()))}
        else:
            tensors = {f"clip_{encoder}": rows for encoder, rows in embeddings.items()}
        metadata = {"kind": EMBEDDING_KIND, "name": identity.name, "base": spec.base, "strength": strength}
        identity_file.write_file_atomically(save(tensors, {"likeness": json.dumps(metadata)}), path)
        stem = path.relative_to(files.list_folder_paths(EMBEDDINGS_FOLDER)[0]).with_suffix("").as_posix()
        words = f"{EMBEDDING_PREFIX}{stem}"
        message = f"{identity.name}: saved as {path}; write {words} into a prompt"
        return io.NodeOutput(words, ui=ui.PreviewText(message))


def get_embedding_path(name: str) -> Path:
    """The file of an embedding of this name.

    Raises ValueError if prompts cannot contain the name, or if a file that is not of this pack would be overwritten.
    """
    stem = identity_file.check_identity_name(name.removesuffix(identity_file.IDENTITY_FILE_SUFFIX))
    if any(char in stem for char in " ,()[]<>:"):
        raise ValueError(
            f"got the name {stem!r}, which cannot be used in a prompt; expected a name without spaces, commas, "
            "brackets or colons; set name"
        )
    path = files.list_folder_paths(EMBEDDINGS_FOLDER)[0] / f"{stem}{identity_file.IDENTITY_FILE_SUFFIX}"
    if path.exists() and (files.read_native_metadata(path) or {}).get("kind") != EMBEDDING_KIND:
        raise ValueError(f"got {path.name}, which exists and is not an embedding of this pack; set another name")
    return path


NODES = [PromptWithIdentity, Arc2FaceConditioning, SaveEmbedding]
