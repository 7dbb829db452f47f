"""The methods that the gallery shows, as data: what is said of each, its file, and the nodes that apply it."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

Prompt = dict[str, Any]
Socket = Sequence[Any]  # a node's key, and which of its outputs

SAY = "say"  # how a prompt is written, in place of ComfyUI's own node: all but its text
ENCODER = "omni"  # an Omni-ID encoder that all photos are read with
MODEL, CLIP, VAE, VISION = (["models", output] for output in range(4))  # of Load Demo Models
ALWAYS = {"start_percent": 0.0, "end_percent": 1.0}


def node(kind: str, **inputs: Any) -> Prompt:
    return {"class_type": kind, "inputs": inputs}


def _adapter(file: str) -> Prompt:
    return node("LikenessLoadAdapter", file=file, variant="auto")


def decoupled(file: str, who: Socket) -> Prompt:
    told = {"strength": 1.0, "layer_weights": "linear", "scaling": "V only", **ALWAYS}
    return {
        "adapter": _adapter(file),
        "apply": node("LikenessApplyDecoupled", model=MODEL, adapter=["adapter", 0], identity=who, **told),
    }


def fused(file: str, who: Socket) -> Prompt:
    told = {"vae": VAE, "strength": 1.0, "outside": "all", **ALWAYS}
    return {
        "adapter": _adapter(file),
        "apply": node("LikenessApplyFused", model=MODEL, adapter=["adapter", 0], identity=who, **told),
    }


def flashface(file: str, who: Socket) -> Prompt:
    """As the paper's Eq. 2 and 3 have it: guidance at every step, each photo once, without rescaling."""
    told = {"strength": 0.85, "reference_guidance": 2.0, "launch": 1000, "rescale": 0.0, "show_at_least": 1, **ALWAYS}
    net: Prompt = {"model": ["flashface", 0], "reference_net": ["flashface", 1], "vae": VAE}
    return {
        "flashface": node("LikenessLoadFlashFace", file=file, model=MODEL),
        "apply": node("LikenessApplyReference", identity=who, **net, **told),
    }


def mixed(file: str, who: Socket) -> Prompt:
    """As the paper has it: mixed attention with a text stream of its own, and AdaIN-mean."""
    told = {"strength": 1.0, "style": "AdaIN-mean", "attention": "mixed", "text_stream": "own", **ALWAYS}
    return {
        "adapter": _adapter(file),
        "apply": node("LikenessApplyMixed", model=MODEL, adapter=["adapter", 0], identity=who, **told),
    }


def omni(file: str, encoder: str, who: Socket) -> Prompt:
    return {ENCODER: node("LikenessLoadOmniID", file=encoder), **decoupled(file, who)}


def adaface(file: str, arc2face: str, who: Socket) -> Prompt:
    """The person in the place of the prompts' class word; the model is as it is."""
    told = {"strength": 1.0, "class_word": "person", "placeholder": "person"}
    return {
        "prompter": node("LikenessLoadAdaFace", file=file, arc2face=arc2face),
        SAY: node("LikenessPrompt", clip=CLIP, prompter=["prompter", 0], identity=who, **told),
    }


@dataclass(frozen=True)
class Method:
    """`nodes` of the names of the `files`, which lie in `weights/`, and of a person, or people, puts these into the
    model, whose output 0 is that of `apply`, or into the prompts (SAY)."""

    title: str
    text: str
    files: Sequence[str]
    nodes: Callable[..., Prompt]

    def applied(self, who: Socket) -> Prompt:
        return self.nodes(*(file.rpartition("/")[2] for file in self.files), who)


DECOUPLED = Method(
    "Decoupled attention",
    "FaceID's way (IP-Adapter, arXiv 2308.06721): a face vector becomes 4 tokens, which a second cross-attention reads "
    "beside the text's.",
    ["ipadapter/demo_faceid.safetensors"],
    decoupled,
)
PLUS = Method(
    "Plus Face",
    "The same attention, but its 8 tokens come from all that an image encoder sees of the head, hair and clothes "
    "included.",
    ["ipadapter/demo_plus_face.safetensors"],
    decoupled,
)
FUSED = Method(
    "Fused KV",
    "Keys and values of the face stand behind those of the text in each cross-attention: one softmax over both.",
    ["likeness/demo_fused.safetensors"],
    fused,
)
FLASHFACE = Method(
    "FlashFace",
    "A second UNet reads the photos at every step, and added layers of the first attend to what it saw "
    "(arXiv 2403.17008).",
    ["likeness/demo_flashface.safetensors"],
    flashface,
)
INFINITE = Method(
    "Infinite-ID",
    "A second cross-attention reads the face, while self-attention also reads a stream that the prompt alone paints, "
    "so that its words and style survive (arXiv 2403.11781).",
    ["likeness/demo_infinite_id.safetensors"],
    mixed,
)
OMNI = Method(
    "Omni-ID",
    "One encoder reads all photos together, and what each hides another shows (arXiv 2412.09694); decoupled attention "
    "reads its tokens.",
    ["likeness/demo_omni_id.safetensors", "likeness/omni_id.safetensors"],
    omni,
)
ADAFACE = Method(
    "AdaFace",
    "The person as words of the prompt, in the place of the word person: nothing of the model is patched. This small "
    "model reads hardly any looks from words, and the three people come out as one.",
    ["likeness/demo_adaface.safetensors", "likeness/demo_arc2face.safetensors"],
    adaface,
)
METHODS = (DECOUPLED, PLUS, FUSED, FLASHFACE, INFINITE, OMNI, ADAFACE)
