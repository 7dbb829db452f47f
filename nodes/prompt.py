"""Prompt with Identity, Arc2Face Conditioning, Save as Embedding: an identity as words."""

from __future__ import annotations

import copy
import json
import secrets
import tempfile
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import comfy.model_management
import comfy.sd1_clip
import torch
from comfy_api.latest import io, ui
from safetensors.torch import save
from torch import Tensor

from ..likeness import adaface as math
from ..likeness import arc2face, identity_file, prompts, regions
from ..likeness.spec import Identity, People, PrompterSpec
from . import types
from .loaders import files

FOLDER, KIND = "embeddings", "embedding"
ALONE_KEY = "emb_params"  # what all interfaces call an embedding's one tensor
EMBEDDING = "embedding:"  # the host's own syntax
# What the text encoder's last layers weigh, the last one last; none: as the host and its clip skip have it.
LAYER_MIXES: Mapping[str, tuple[float, ...]] = {"off": (), "last two": (1, 1), "last three": (1, 2, 2)}

Vectors = Mapping[str, Tensor]  # text encoder -> [n, D]
Tokens = dict[str, list[list[tuple[Any, ...]]]]


def inverter_spec(prompter: types.LoadedPrompter) -> PrompterSpec:
    """What the prompter's inverter is. Raises ValueError where it has none."""
    if prompter.spec is None:
        raise ValueError(
            f"got {prompter.file}, Arc2Face alone; expected AdaFace's prompt inverter too; choose it in Load AdaFace"
        )
    return prompter.spec


def check(clip: Any, prompter: types.LoadedPrompter) -> None:
    """Raise ValueError where the prompter has no inverter, or its vectors are not for such text encoders."""
    spec = inverter_spec(prompter)
    how = f"connect the CLIP of a {spec.base} checkpoint, or load another file"
    found, wanted = sorted(clip.tokenize("")), sorted(spec.towers)
    if found != wanted:
        raise ValueError(
            f"got a CLIP with the text encoders {', '.join(found)}; {prompter.file} makes words for "
            f"{', '.join(wanted)} ({spec.base}); {how}"
        )
    # The host leaves out vectors of another width, and goes on.
    for tower, width in spec.towers.items():
        words = _tower(clip, tower).get_input_embeddings().weight.shape[1]
        if words != width:
            raise ValueError(
                f"got a CLIP whose words are {words} wide; {prompter.file} makes words for {width} ({spec.base}); {how}"
            )


def _tower(clip: Any, name: str) -> Any:
    """The transformer of one of a CLIP's text encoders."""
    return getattr(clip.cond_stage_model, f"clip_{name}").transformer


def word_vectors(prompter: types.LoadedPrompter, identity: Identity, wording: math.Wording) -> Vectors:
    """The word vectors of a person for each text encoder, float32 on the CPU."""
    assert prompter.inverter is not None and prompter.spec is not None  # see `check`
    comfy.model_management.load_models_gpu([prompter.arc2face, prompter.inverter])
    device = prompter.inverter.load_device
    models = prompter.arc2face.model, prompter.inverter.model
    made = math.words(*models, identity, wording, device, prompter.faces).cpu()
    split = made.split(list(prompter.spec.towers.values()), dim=-1)
    return {tower: rows.contiguous() for tower, rows in zip(prompter.spec.towers, split, strict=True)}


def encode(clip: Any, text: prompts.Parts, said: Mapping[int, Vectors], mix: Sequence[float]) -> list[Any]:
    """The host's conditioning of a text with vectors at its places, which go in as the host's own embeddings do."""
    own, base = clip.clone(), f"likeness_{secrets.token_hex(8)}_"
    with tempfile.TemporaryDirectory() as folder:
        for number, rows in said.items():
            data = save({f"clip_{tower}": value for tower, value in rows.items()})
            Path(folder, f"{base}{number}.safetensors").write_bytes(data)
        own.tokenizer = looking_into(clip.tokenizer, folder)
        whole = prompts.joined(text, lambda number: f" {EMBEDDING}{base}{number} ")
        tokens = whole_embeddings(own, whole, f"{EMBEDDING}{base}", list(said.values()))
    if not mix:
        return own.encode_from_tokens_scheduled(tokens)
    if len(tokens) > 1:
        raise ValueError(
            f"got layer_mix for a CLIP of several text encoders ({', '.join(sorted(tokens))}); expected SD1.5's; set "
            "it to off"
        )
    own.clip_layer(None)
    with mixed_layers(own, next(iter(tokens)), mix):
        return own.encode_from_tokens_scheduled(tokens)


def looking_into(tokenizer: Any, folder: str) -> Any:
    """A copy of the host's tokenizer that finds embeddings in one more folder."""
    made = copy.copy(tokenizer)
    for name, part in vars(tokenizer).items():
        if hasattr(part, "embedding_directory"):
            part, known = copy.copy(part), part.embedding_directory or []
            part.embedding_directory = [folder, *([known] if isinstance(known, str) else known)]
            setattr(made, name, part)
    return made


def whole_embeddings(clip: Any, text: str, mark: str, said: Sequence[Vectors]) -> Tokens:
    """The host's tokens of a text, but for embeddings that it would part between two chunks: these begin a new one.

    `mark` is what the name of each of ours begins with.
    """
    tokens: Tokens = clip.tokenize(text, return_word_ids=True)
    tower = next(iter(tokens))
    number = _first_parted(tokens[tower], [rows[tower] for rows in said])
    plain: Tokens = {name: [[token[:2] for token in chunk] for chunk in chunks] for name, chunks in tokens.items()}
    if number is None:
        return plain
    before, after = _cut(text, mark, number)
    first, rest = clip.tokenize(before), whole_embeddings(clip, after, mark, said)
    return {name: [*first[name], *rest[name]] for name in plain}


def _first_parted(chunks: Sequence[Sequence[tuple[Any, ...]]], ours: Sequence[Tensor]) -> int | None:
    """Which of our embeddings in a prompt, counted from the first, is the first to lie in two chunks; None: none."""
    words: dict[int, list[tuple[int, Tensor]]] = {}
    for i, chunk in enumerate(chunks):
        for token, _, word in chunk:
            if isinstance(token, Tensor):
                words.setdefault(word, []).append((i, token))
    number = 0
    for members in words.values():
        rows = torch.stack([row for _, row in members])
        if any(rows.shape == one.shape and torch.equal(rows.cpu(), one) for one in ours):
            if members[0][0] != members[-1][0]:
                return number
            number += 1
    return None


def _cut(text: str, mark: str, number: int) -> tuple[str, str]:
    """A prompt's text before and from its embedding number `number` on, each word at the weight that it had."""
    segments = comfy.sd1_clip.token_weights(comfy.sd1_clip.escape_important(text), 1.0)
    for i, (words, weight) in enumerate(segments):
        if number < (here := words.count(mark)):
            at = [m for m in range(len(words)) if words.startswith(mark, m)][number]
            return _written([*segments[:i], (words[:at], weight)]), _written([(words[at:], weight), *segments[i + 1 :]])
        number -= here
    raise AssertionError("the host's tokens hold an embedding that its text does not")


def _written(segments: Sequence[tuple[str, float]]) -> str:
    """A prompt's text of words and weights, as the host parses it."""
    kept = [(comfy.sd1_clip.unescape_important(words), weight) for words, weight in segments if words]
    return "".join("({}:{!r})".format(words.replace("(", "\\(").replace(")", "\\)"), weight) for words, weight in kept)


@contextmanager
def mixed_layers(clip: Any, tower: str, mix: Sequence[float]) -> Iterator[None]:
    """While it lasts, a text encoder gives a mix of its last layers' states, ahead of the final norm."""
    *layers, last = _tower(clip, tower).text_model.encoder.layers[-len(mix) :]
    seen: list[Tensor] = []

    def keep(_module: Any, _given: Any, out: Tensor) -> None:
        seen.append(out.clone())  # the next layer adds to it in place

    def blend(_module: Any, _given: Any, out: Tensor) -> Tensor:
        streams = [*seen, out]
        seen.clear()
        return sum((share / sum(mix) * one for share, one in zip(mix, streams, strict=True)), torch.zeros_like(out))

    hooks = [*(layer.register_forward_hook(keep) for layer in layers), last.register_forward_hook(blend)]
    try:
        yield
    finally:
        for hook in hooks:
            hook.remove()


def wording_inputs() -> list[Any]:
    """How a person is put into words, for every node that does so."""
    return [
        io.Float.Input(
            "strength", default=1.0, min=0.0, max=8.0, step=0.05,
            tooltip="How far the words go from mere padding to the person, 0 to 8: 1 as trained, above goes beyond; "
            "the authors' page has 4. 0 leaves the person out.",
        ),
        io.Int.Input(
            "vectors", default=math.VECTORS, min=1, max=math.VECTORS, optional=True, advanced=True,
            tooltip="How many of the 16 word vectors are used, 1 to 16, from the first on.",
        ),
        io.Combo.Input(
            "average", options=list(math.AVERAGES), default="faces", optional=True, advanced=True,
            tooltip="Of several photos: the mean of their face vectors (as published), or of Arc2Face's tokens.",
        ),
        io.Float.Input(
            "variation", default=0.0, min=0.0, max=0.2, step=0.005, optional=True, advanced=True,
            tooltip="Noise on the face vector, 0 to 0.2 of its deviation. Up to 0.06 it stays the same person.",
        ),
        io.Int.Input(
            "variation_seed", default=0, min=0, max=2**32 - 1, optional=True, advanced=True,
            tooltip="Which variation, 0 to 4294967295.",
        ),
    ]  # fmt: skip


class PromptWithIdentity(io.ComfyNode):
    @classmethod
    def define_schema(cls) -> io.Schema:
        return io.Schema(
            node_id="LikenessPrompt",
            display_name="Prompt with Identity",
            category="likeness/prompt",
            description="Writes a person into a prompt, as words that the text encoder reads: works wherever a prompt "
            "works, with no patch of the model. The second prompt says a class word instead.",
            search_aliases=["adaface", "clip text encode", "embedding", "textual inversion"],
            inputs=[
                io.Clip.Input("clip", tooltip="The CLIP of an SD1.5 checkpoint, with any LoRAs and clip skip."),
                types.Prompter.Input("prompter", tooltip="From Load AdaFace."),
                types.who_input("Encoded with antelopev2, best with Arc2Face's own arcface.onnx. Masks do not count."),
                io.String.Input(
                    "text", multiline=True, dynamic_prompts=True,
                    tooltip="The prompt. @ and the person's name stand for the person, as @anna; without one the "
                    "person comes first. Weights as ever: (@anna:1.2).",
                ),
                *wording_inputs()[:1],
                io.String.Input(
                    "class_word", default="person",
                    tooltip="What the second prompt says instead, as person, woman, man; also at strength 0.",
                ),
                io.String.Input(
                    "placeholder", default="", optional=True,
                    tooltip="A word of your own in place of @ and the name; of several people one each, parted by "
                    "commas. Empty: @ and the name.",
                ),
                *wording_inputs()[1:],
                io.Combo.Input(
                    "layer_mix", options=list(LAYER_MIXES), default="off", optional=True, advanced=True,
                    tooltip="Which last layers of the text encoder are blended. off: as ever, with clip skip. The "
                    "authors evaluated with the last two.",
                ),
            ],
            outputs=[
                io.Conditioning.Output(display_name="conditioning", tooltip="The prompt with the person."),
                io.Conditioning.Output(display_name="class word", tooltip="The same prompt with the class word."),
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
        vectors: int = math.VECTORS,
        average: str = "faces",
        variation: float = 0.0,
        variation_seed: int = 0,
        layer_mix: str = "off",
    ) -> io.NodeOutput:
        check(clip, prompter)
        people, mix = regions.everyone(identity), LAYER_MIXES[layer_mix]
        found = prompts.parts(text, prompts.placeholders([person.identity.name for person in people], placeholder))
        said: dict[int, Vectors] = {}
        for number in sorted({item for item in found if isinstance(item, int)}):
            scale = strength * people[number].strength
            if scale:
                wording = math.Wording(scale, vectors, average, variation, variation_seed)
                said[number] = word_vectors(prompter, people[number].identity, wording)
        named: prompts.Parts = [class_word if isinstance(i, int) and i not in said else i for i in found]
        plain: prompts.Parts = [prompts.joined(found, lambda _: class_word)]
        shown = prompts.joined(named, lambda number: f"[{people[number].identity.name}]")
        return io.NodeOutput(encode(clip, named, said, mix), encode(clip, plain, {}, mix), ui=ui.PreviewText(shown))


class Arc2FaceConditioning(io.ComfyNode):
    @classmethod
    def define_schema(cls) -> io.Schema:
        return io.Schema(
            node_id="LikenessArc2Face",
            display_name="Arc2Face Conditioning",
            category="likeness/prompt",
            description="The prompts of Arc2Face's own model, which loads as an ordinary SD1.5 checkpoint: the face as "
            "the authors' 77 tokens, and the empty prompt as its text encoder reads it.",
            search_aliases=["arc2face", "face to image"],
            inputs=[
                types.Prompter.Input("prompter", tooltip="From Load AdaFace; Arc2Face alone is enough."),
                types.Identity.Input("identity", tooltip="Encoded with Arc2Face's arcface.onnx, or antelopev2."),
            ],
            outputs=[
                io.Conditioning.Output(display_name="positive"),
                io.Conditioning.Output(display_name="negative"),
            ],
        )

    @classmethod
    def execute(cls, prompter: types.LoadedPrompter, identity: Identity) -> io.NodeOutput:
        patcher = prompter.arc2face
        rows, weight = arc2face.faces(identity, prompter.faces)
        comfy.model_management.load_model_gpu(patcher)
        device = comfy.model_management.intermediate_device()
        with torch.no_grad():
            face = arc2face.mean_face(rows, weight).to(patcher.load_device)
            pair = arc2face.tokens(patcher.model, face), arc2face.nothing(patcher.model, face.device)
        return io.NodeOutput(*([[states.to(device), {}]] for states in pair))


class SaveEmbedding(io.ComfyNode):
    @classmethod
    def define_schema(cls) -> io.Schema:
        return io.Schema(
            node_id="LikenessSaveEmbedding",
            display_name="Save as Embedding",
            category="likeness/prompt",
            description="Keeps a person as an ordinary textual inversion file, models/embeddings/<name>.safetensors, "
            "which any SD1.5 interface reads without this pack: embedding:<name> in a prompt.",
            search_aliases=["textual inversion", "adaface", "save person"],
            is_output_node=True,
            inputs=[
                types.Prompter.Input("prompter", tooltip="From Load AdaFace."),
                types.Identity.Input("identity", tooltip="Encoded with antelopev2, or Arc2Face's own arcface.onnx."),
                io.String.Input(
                    "name", default="",
                    tooltip="File name of up to 120 letters, digits, - _ . without blanks, as prompts name it. Empty: "
                    "the identity's own name.",
                ),
                *wording_inputs(),
            ],
            outputs=[
                io.String.Output(display_name="words", tooltip="What a prompt says for the person: embedding:<name>."),
            ],
        )  # fmt: skip

    @classmethod
    def execute(
        cls,
        prompter: types.LoadedPrompter,
        identity: Identity,
        name: str,
        strength: float,
        vectors: int = math.VECTORS,
        average: str = "faces",
        variation: float = 0.0,
        variation_seed: int = 0,
    ) -> io.NodeOutput:
        if not strength:
            raise ValueError("got strength 0, which leaves nobody to save; expected more than 0, 1 as trained")
        spec = inverter_spec(prompter)
        path = path_of(name.strip() or identity.name)
        rows = word_vectors(prompter, identity, math.Wording(strength, vectors, average, variation, variation_seed))
        tensors = {ALONE_KEY: rows[next(iter(rows))]} if len(rows) == 1 else {f"clip_{k}": v for k, v in rows.items()}
        told = {"kind": KIND, "name": identity.name, "base": spec.base, "strength": strength}
        identity_file.write(save(tensors, {"likeness": json.dumps(told)}), path)
        plain = path.relative_to(files.roots(FOLDER)[0]).with_suffix("").as_posix()
        said = f"{EMBEDDING}{plain}"
        return io.NodeOutput(said, ui=ui.PreviewText(f"{identity.name}: saved as {path}; write {said} into a prompt"))


def path_of(name: str) -> Path:
    """Where an embedding of this name is kept. Raises ValueError on a name that a prompt cannot say, or is taken."""
    plain = identity_file.check_name(name.removesuffix(identity_file.SUFFIX))
    if any(part in plain for part in " ,()[]<>:"):
        raise ValueError(f"got the name {plain!r}, which no prompt can say; expected one without blanks; set name")
    path = files.roots(FOLDER)[0] / f"{plain}{identity_file.SUFFIX}"
    if path.exists() and (files.told(path) or {}).get("kind") != KIND:
        raise ValueError(
            f"got {path.name}, which is there and no embedding of this pack; expected a free name; set name"
        )
    return path


NODES = [PromptWithIdentity, Arc2FaceConditioning, SaveEmbedding]
