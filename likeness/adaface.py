"""AdaFace (NeurIPS 2024 submission): a face as sixteen words of any prompt.

Arc2Face's text encoder makes 16 tokens of an ArcFace direction (its rows 4 to 19); the prompt inverter, a text encoder
with widened attention, makes of them 16 vectors in the space of word embeddings, which stand in a prompt like those of
textual inversion. The paper widens queries and values; its code, keys and values, and so do its files; those trained
here may hold either (clip_text).

File: safetensors, `prompt2token_proj.text_model.*`, and if there, `hidden_state_layer_weights` [3, 1 or D],
`pad_embeddings` [77, D], `static_img_suffix_embs` [1, S, D]. Metadata under `likeness`: kind, version, base, towers
(the text encoders that the vectors are for, with their widths), heads, notes.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from . import arc2face, detect, keymaps, own_file, vocabulary
from .arc2face import AT, mean_face
from .clip_text import END, LENGTH, VOCABULARY, TextModel, padded
from .spec import Feature, Identity, PrompterSpec

KIND = "adaface"
PROMPT = (1125, 539, 320)  # photo of a
COMMA = 267
VECTORS = 16
TEXT = "prompt2token_proj.text_model."
EXTRAS = ("hidden_state_layer_weights", "pad_embeddings", "static_img_suffix_embs")
CLIP_L = {"layers": 12, "width": 768, "words": VOCABULARY, "positions": LENGTH}  # what SD1.5's files are


class PromptInverter(nn.Module):
    """Arc2Face's tokens to word vectors."""

    text: TextModel
    hidden_state_layer_weights: Tensor | None
    pad_embeddings: Tensor | None
    static_img_suffix_embs: Tensor | None

    def __init__(self, text: TextModel, extras: Mapping[str, Tensor]) -> None:
        super().__init__()
        self.text = text
        for name in EXTRAS:
            self.register_buffer(name, extras.get(name))

    def forward(self, ids: list[int], rows: Tensor) -> Tensor:
        """All states [B, 77, D] of a prompt whose words from the fourth on are `rows` [B, N, D]."""
        words = self.text.words(ids, rows.device).repeat(len(rows), 1, 1)
        words[:, AT : AT + rows.shape[1]] = rows
        mix = self.hidden_state_layer_weights
        return self.text(words, None if mix is None else mix.to(rows))

    def vectors(self, rows: Tensor, scale: float = 1.0) -> Tensor:
        """Word vectors [B, N, D] of Arc2Face's tokens [B, N, D], as they are at `scale` 1, mere padding at 0."""
        count = rows.shape[1]
        made = self.forward(padded((*PROMPT, *[COMMA] * count)), rows)[:, AT : AT + count]
        return made if scale == 1 else scaled(made, self.padding(rows.device), scale)

    def padding(self, device: torch.device) -> Tensor:
        """The embeddings of padding [77, D], each at its place: those that the file keeps, or else its tables'."""
        if self.pad_embeddings is not None:
            return self.pad_embeddings.to(device).float()
        return (self.text.words([END], device) + self.text.positions(LENGTH, device))[0]


def scaled(vectors: Tensor, pad: Tensor, scale: float) -> Tensor:
    """Vectors [B, N, D] moved along the line from padding [77, D]: the authors' ID scale; above 1 goes beyond them."""
    return scale * vectors + (1 - scale) * pad[AT : AT + vectors.shape[1]]


def perturbed(x: Tensor, level: float, noise: Tensor) -> Tensor:
    """x [..., D] with `level` times its own deviation of noise, at its own norm."""
    moved = x + level * x.std(-1, keepdim=True).mean() * noise
    return moved * (x.norm(dim=-1, keepdim=True) / (moved.norm(dim=-1, keepdim=True) + 1e-8))


def _of_mean_face(model: TextModel, rows: Tensor, weight: Tensor) -> Tensor:
    return arc2face.tokens(model, mean_face(rows, weight))


def _mean_of_tokens(model: TextModel, rows: Tensor, weight: Tensor) -> Tensor:
    return (weight[:, None, None] * arc2face.tokens(model, rows)).sum(0, keepdim=True)


# What several photos become one by; the first is the authors'.
AVERAGES: Mapping[str, Callable[[TextModel, Tensor, Tensor], Tensor]] = {
    "faces": _of_mean_face, "tokens": _mean_of_tokens,
}  # fmt: skip


@dataclass(frozen=True)
class Wording:
    """How a person is put into words: ID scale, number of vectors, a key of AVERAGES, noise on the face and its seed.

    Up to a noise of about 0.06 it stays the same person.
    """

    scale: float = 1.0
    count: int = VECTORS
    average: str = "faces"
    noise: float = 0.0
    seed: int = 0


@torch.no_grad()
def words(
    encoder: TextModel,
    inverter: PromptInverter,
    identity: Identity,
    wording: Wording,
    device: torch.device,
    features: Sequence[Feature] = arc2face.FACES,
) -> Tensor:
    """The word vectors [count, D] of a person, float32, whose face is the first of `features` that there is.

    Raises ValueError where the identity lacks the face vector.
    """
    rows, weight = arc2face.faces(identity, features)
    if wording.noise:
        # The same on every face, or their mean would lose it.
        drawn = torch.randn(1, rows.shape[-1], generator=torch.Generator().manual_seed(wording.seed))
        rows = perturbed(rows, wording.noise, drawn)
    tokens = AVERAGES[wording.average](encoder, rows.to(device), weight.to(device))
    return inverter.vectors(tokens[:, AT : AT + VECTORS], wording.scale)[0, : wording.count]


def metadata(spec: PrompterSpec) -> dict[str, str]:
    """What a file tells of itself, for safetensors."""
    return own_file.metadata(KIND, spec.base, spec.notes, towers=dict(spec.towers), heads=spec.heads)


def read_spec(told: Mapping[str, Any], file: str) -> PrompterSpec:
    """The spec of a file's metadata. Raises ValueError where it is not whole or of a newer version."""
    own_file.check(told, KIND, {"towers": dict, "heads": int}, {}, file)
    towers = told["towers"]
    if not towers or not all(isinstance(width, int) and width > 0 for width in towers.values()):
        raise ValueError(f"got {file} with the text encoders {towers}; expected a width for each; fetch the file again")
    return PrompterSpec(told["base"], towers, told["heads"], told["notes"])


def build(tensors: Mapping[str, Tensor], spec: PrompterSpec, operations: Any, file: str) -> PromptInverter:
    """The inverter with all of its tensors, uncopied. Raises ValueError naming what is missing or misshapen."""
    extras = {name: tensors[name] for name in EXTRAS if name in tensors}
    text = text_model({key: value for key, value in tensors.items() if key not in extras}, TEXT, spec.heads, operations)
    width = text.size["width"]
    wrong = [f"{name} {list(value.shape)}" for name, value in extras.items() if value.shape[-1] not in (1, width)]
    if sum(spec.towers.values()) != width:
        wrong.append(f"vectors of {width} for text encoders of {spec.towers}")
    if spec.base == "SD1.5":
        wrong += not_clip_l(text)
    if wrong:
        raise ValueError(f"got {file} with {', '.join(wrong)}; expected the inverter of {spec.base}")
    return PromptInverter(text, extras)


def text_model(tensors: Mapping[str, Tensor], prefix: str, heads: int, operations: Any) -> TextModel:
    """A text model of tensors in the transformers layout, of which the words may be a closed vocabulary.

    Raises ValueError naming what is missing or misshapen.
    """
    tensors = vocabulary.whole(tensors)
    weights = keymaps.under(tensors, prefix)
    weights.pop("embeddings.position_ids", None)  # older files keep the numbers 0 to 76
    foreign = [key for key in tensors if not key.startswith(prefix)]
    if foreign:
        raise ValueError(f"the tensor {foreign[0]!r} is none of a text model's; expected {prefix}* alone")
    try:
        with torch.device("meta"):
            model = TextModel(detect.shapes_of(weights), heads, operations)
    except (KeyError, ValueError, ZeroDivisionError) as error:
        raise ValueError(f"the text model's tensors are incomplete or misshapen ({error}); expected CLIP's") from error
    keymaps.load(model, weights)
    return model


def not_clip_l(model: TextModel) -> list[str]:
    """What makes a text model another one than CLIP-L's; nothing where it is."""
    return [f"{model.size[name]} {name} where CLIP-L has {n}" for name, n in CLIP_L.items() if model.size[name] != n]
