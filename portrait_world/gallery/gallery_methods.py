"""The methods in the gallery as data: title, description, adapter files, and the nodes that apply each."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

ApiPrompt = dict[str, Any]
Link = Sequence[Any]  # [node key, output index]

PROMPT_NODE = "encode_prompt"  # replaces CLIPTextEncode for every prompt; without its text
OMNI_ENCODER_NODE = "omni_encoder"  # an Omni-ID encoder for all photos
MODEL_LINK, CLIP_LINK, VAE_LINK, CLIP_VISION_LINK = (["models", output] for output in range(4))  # of Load Demo Models
FULL_SCHEDULE = {"start_percent": 0.0, "end_percent": 1.0}


def make_node(class_type: str, **inputs: Any) -> ApiPrompt:
    return {"class_type": class_type, "inputs": inputs}


def _adapter_node(file: str) -> ApiPrompt:
    return make_node("LikenessLoadAdapter", file=file, variant="auto")


def make_decoupled_nodes(file: str, identity: Link) -> ApiPrompt:
    inputs: ApiPrompt = {"model": MODEL_LINK, "adapter": ["adapter", 0], "identity": identity, "strength": 1.0}
    inputs |= {"layer_weights": "linear", "scaling": "V only", **FULL_SCHEDULE}
    return {"adapter": _adapter_node(file), "apply": make_node("LikenessApplyDecoupled", **inputs)}


def make_fused_nodes(file: str, identity: Link) -> ApiPrompt:
    inputs: ApiPrompt = {"model": MODEL_LINK, "adapter": ["adapter", 0], "identity": identity, "vae": VAE_LINK}
    inputs |= {"strength": 1.0, "outside": "all", **FULL_SCHEDULE}
    return {"adapter": _adapter_node(file), "apply": make_node("LikenessApplyFused", **inputs)}


def make_flashface_nodes(file: str, identity: Link) -> ApiPrompt:
    """FlashFace by the paper's Eq. 2 and 3: guidance in every step, each photo once, no rescaling."""
    inputs: ApiPrompt = {"model": ["flashface", 0], "reference_net": ["flashface", 1], "vae": VAE_LINK}
    inputs |= {"identity": identity, "strength": 0.85, "reference_guidance": 2.0, "launch": 1000, "rescale": 0.0}
    inputs |= {"show_at_least": 1, **FULL_SCHEDULE}
    return {
        "flashface": make_node("LikenessLoadFlashFace", file=file, model=MODEL_LINK),
        "apply": make_node("LikenessApplyReference", **inputs),
    }


def make_mixed_nodes(file: str, identity: Link) -> ApiPrompt:
    """Infinite-ID as in the paper: mixed attention with its own text stream, and AdaIN-mean."""
    inputs: ApiPrompt = {"model": MODEL_LINK, "adapter": ["adapter", 0], "identity": identity, "strength": 1.0}
    inputs |= {"style": "AdaIN-mean", "attention": "mixed", "text_stream": "own", **FULL_SCHEDULE}
    return {"adapter": _adapter_node(file), "apply": make_node("LikenessApplyMixed", **inputs)}


def make_omni_id_nodes(file: str, encoder: str, identity: Link) -> ApiPrompt:
    return {OMNI_ENCODER_NODE: make_node("LikenessLoadOmniID", file=encoder), **make_decoupled_nodes(file, identity)}


def make_adaface_nodes(file: str, arc2face: str, identity: Link) -> ApiPrompt:
    """AdaFace: the identity replaces the prompts' class word; the model is not patched."""
    inputs: ApiPrompt = {"clip": CLIP_LINK, "prompter": ["prompter", 0], "identity": identity, "strength": 1.0}
    inputs |= {"class_word": "person", "placeholder": "person"}
    return {
        "prompter": make_node("LikenessLoadAdaFace", file=file, arc2face=arc2face),
        PROMPT_NODE: make_node("LikenessPrompt", **inputs),
    }


@dataclass(frozen=True)
class GalleryMethod:
    """A method of the gallery.

    `files` are paths in `weights/`. `make_nodes` gets their names and a link to an identity or people; the nodes patch
    the model (output 0 of the node `apply`) or encode the prompts (the node PROMPT_NODE).
    """

    title: str
    text: str
    files: Sequence[str]
    make_nodes: Callable[..., ApiPrompt]

    def apply_to(self, identity: Link) -> ApiPrompt:
        return self.make_nodes(*(file.rpartition("/")[2] for file in self.files), identity)


DECOUPLED = GalleryMethod(
    "Decoupled attention",
    "As in FaceID (IP-Adapter, arXiv 2308.06721): a face embedding becomes 4 tokens, and a second cross-attention "
    "attends to them.",
    ["ipadapter/demo_faceid.safetensors"],
    make_decoupled_nodes,
)
PLUS_FACE = GalleryMethod(
    "Plus Face",
    "Decoupled attention with 8 tokens from the CLIP image embedding of the head, including hair and clothes.",
    ["ipadapter/demo_plus_face.safetensors"],
    make_decoupled_nodes,
)
FUSED = GalleryMethod(
    "Fused KV",
    "Each cross-attention appends the keys and values of the face to those of the text: one softmax over both.",
    ["likeness/demo_fused.safetensors"],
    make_fused_nodes,
)
FLASHFACE = GalleryMethod(
    "FlashFace",
    "A second UNet encodes the photos, and additional self-attention layers of the first attend to its features "
    "(arXiv 2403.17008).",
    ["likeness/demo_flashface.safetensors"],
    make_flashface_nodes,
)
INFINITE_ID = GalleryMethod(
    "Infinite-ID",
    "A second cross-attention attends to the face, and self-attention also attends to a stream that sees the prompt "
    "only, which preserves the prompt and its style (arXiv 2403.11781).",
    ["likeness/demo_infinite_id.safetensors"],
    make_mixed_nodes,
)
OMNI_ID = GalleryMethod(
    "Omni-ID",
    "An encoder combines all photos of a person into one set of tokens (arXiv 2412.09694); decoupled attention attends "
    "to them.",
    ["likeness/demo_omni_id.safetensors", "likeness/omni_id.safetensors"],
    make_omni_id_nodes,
)
ADAFACE = GalleryMethod(
    "AdaFace",
    "The identity becomes token embeddings that replace the word person in the prompt; the model is not patched. The "
    "demo's text encoder is too small to carry a face: the three people come out alike.",
    ["likeness/demo_adaface.safetensors", "likeness/demo_arc2face.safetensors"],
    make_adaface_nodes,
)
GALLERY_METHODS = (DECOUPLED, PLUS_FACE, FUSED, FLASHFACE, INFINITE_ID, OMNI_ID, ADAFACE)
