"""The methods that the gallery shows, as data: what is said of each, its file, and the nodes that apply it."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

Prompt = dict[str, Any]
Socket = Sequence[Any]  # a node's key, and which of its outputs

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


@dataclass(frozen=True)
class Method:
    """`file` lies in `weights/`; `nodes` puts a person, or people, into the model: its output 0 is that of `apply`."""

    title: str
    text: str
    file: str
    nodes: Callable[[str, Socket], Prompt]

    def applied(self, who: Socket) -> Prompt:
        return self.nodes(self.file.rpartition("/")[2], who)


DECOUPLED = Method(
    "Decoupled attention",
    "FaceID's way (IP-Adapter, arXiv 2308.06721): a face vector becomes 4 tokens, which a second cross-attention reads "
    "beside the text's.",
    "ipadapter/demo_faceid.safetensors",
    decoupled,
)
PLUS = Method(
    "Plus Face",
    "The same attention, but its 8 tokens come from all that an image encoder sees of the head, hair and clothes "
    "included.",
    "ipadapter/demo_plus_face.safetensors",
    decoupled,
)
FUSED = Method(
    "Fused KV",
    "Keys and values of the face stand behind those of the text in each cross-attention: one softmax over both.",
    "likeness/demo_fused.safetensors",
    fused,
)
FLASHFACE = Method(
    "FlashFace",
    "A second UNet reads the photos at every step, and added layers of the first attend to what it saw "
    "(arXiv 2403.17008).",
    "likeness/demo_flashface.safetensors",
    flashface,
)
METHODS = (DECOUPLED, PLUS, FUSED, FLASHFACE)
