"""Load Identity Adapter: a file of the IP-Adapter family, told apart by its tensors."""

from __future__ import annotations

import comfy.ops
from comfy_api.latest import io

from ...likeness import detect, keymaps, omni_id, own_flashface
from ...likeness import fused as fused_math
from ...likeness.decoupled import KINDS
from ...likeness.spec import AdapterSpec, Feature
from .. import types
from . import care, files, fused, own

FOLDERS = ("ipadapter", "instantid", "pulid", "likeness")
VARIANTS = ("auto", *detect.NEEDS)
FLASHFACE = "ref_encoder.0.weight"

# What tells an image encoder's network: a tensor's shape, under the names of its layouts; its title; what loads it.
CLASS_EMBEDDINGS = ("vision_model.embeddings.class_embedding", "visual.class_embedding")
TOWERS: dict[str, tuple[tuple[str, ...], list[int], str, str]] = {
    "clip.vit-l-14": (CLASS_EMBEDDINGS, [1024], "CLIP", "Load CLIP Vision"),
    "clip.vit-h-14": (CLASS_EMBEDDINGS, [1280], "CLIP", "Load CLIP Vision"),
    "clip.vit-bigg-14": (CLASS_EMBEDDINGS, [1664], "CLIP", "Load CLIP Vision"),
    "clip.eva02-l-14-336": (
        ("visual.pos_embed", "visual.trunk.pos_embed"),
        [1, 577, 1024],
        "CLIP",
        "Load Image Encoder",
    ),
    "siglip.so400m-14-384": (("vision_model.head.probe",), [1, 1, 1152], "SigLIP", "Load Image Encoder"),
}
UNKNOWN = ((), [], "CLIP", "Load CLIP Vision")
CROPS = {
    "photo": "the whole photo",
    "head": "the head with a margin",
    "ffhq512": "the aligned head in grey on white",
    "face112": "the aligned face, 112 pixels",
    "face224": "the aligned face, 224 pixels",
}


# Files of the pack's own say in their metadata what they are: what loads each kind.
OWN = {fused_math.KIND: fused.load, **dict.fromkeys(own.KINDS, own.load)}

# Kinds that are no adapters: what they are, and which node loads them.
ELSEWHERE = {
    omni_id.KIND: ("an Omni-ID encoder", "Load Omni-ID Encoder"),
    own_flashface.KIND: ("a FlashFace file", "Load FlashFace"),
}


def load(file: str, variant: str = "auto") -> tuple[types.LoadedAdapter | types.LoadedFused, str]:
    """Read an adapter file: its weights under the host's care, and a report. Raises ValueError (see `files.read`)."""
    path = files.find(file, *FOLDERS)
    told = files.told(path)
    if told is not None:
        kind = told.get("kind")
        if kind in ELSEWHERE:
            what, node = ELSEWHERE[kind]
            raise ValueError(f"got {file}, {what}; expected an adapter; load it with {node}")
        if kind not in OWN:
            raise ValueError(f"got {file}, a file of this pack of kind {kind!r}; expected {', '.join(OWN)}")
        return OWN[kind](files.read(path), told, file)
    tensors = files.read(path)
    if FLASHFACE in tensors:
        raise ValueError(f"got {file}, a FlashFace checkpoint; expected an adapter; load it with Load FlashFace")
    tensors = keymaps.rename(tensors, keymaps.IP_ADAPTER)
    spec, guessed = detect.read_spec(tensors, path.as_posix(), variant)
    patcher = care.patcher_of(detect.build(spec, tensors, comfy.ops.manual_cast))
    return types.LoadedAdapter(spec, patcher, keymaps.under(tensors, "lora."), file), report(spec, file, guessed)


def report(spec: AdapterSpec, file: str, guessed: bool) -> str:
    """What the file is, which base, encoders and crops it needs, and which of these are missing."""
    lines = [f"{file}: {KINDS[spec.kind].title} for {spec.base}, {spec.tokens} tokens per {_per(spec)}"]
    if guessed:
        lines.append("This kind was guessed from the file's name, as its tensors fit several: set variant to be sure.")
    if spec.lora_rank:
        lines.append(f"Brings its own LoRA of rank {spec.lora_rank}; no second file is needed.")
    lines += dict.fromkeys(_need(feature) for feature in spec.needs)  # two layers of one network are one line
    return "\n".join(lines)


def _per(spec: AdapterSpec) -> str:
    return "identity" if KINDS[spec.kind].sequence else "face"


def _need(feature: Feature) -> str:
    family, _, which = feature.network.partition(".")
    crop = CROPS[feature.crop]
    if family == "arcface":
        there = any((root / "models" / which).is_dir() for root in files.roots("insightface"))
        where = "found" if there else f"missing: put the folder {which} into models/insightface/models"
        return f"Needs face embeddings of {which} (Load Face Analyzer) of {crop}: {where}."
    names, shape, kind, loader = TOWERS.get(feature.network, UNKNOWN)
    found = [name for name in files.names("clip_vision") if names and files.shape(name, "clip_vision", names) == shape]
    where = f"found as {', '.join(found)}" if found else "missing: put one into models/clip_vision"
    return f"Needs {kind} {which} ({loader}) of {crop}: {where}."


class LoadAdapter(io.ComfyNode):
    @classmethod
    def define_schema(cls) -> io.Schema:
        return io.Schema(
            node_id="LikenessLoadAdapter",
            display_name="Load Identity Adapter",
            category="likeness/loaders",
            description="Loads any file of the IP-Adapter, FaceID, InstantID and PuLID family, for SD1.5, SDXL and "
            "FLUX, and the pack's own files. What it is, is read from the file; the report says which base model and "
            "encoders it needs.",
            search_aliases=["ipadapter", "faceid", "instantid", "pulid", "portrait", "fused"],
            inputs=[
                io.Combo.Input(
                    "file",
                    options=files.names(*FOLDERS),
                    tooltip="Adapter file from models/ipadapter, instantid, pulid or likeness (.safetensors or .bin).",
                ),
                io.Combo.Input(
                    "variant",
                    options=list(VARIANTS),
                    default="auto",
                    tooltip="What the tensors cannot tell: Plus or Plus-Face, FaceID-Plus or PlusV2, InstantID or "
                    "Portrait unnorm. auto guesses from the file's name and shows its guess in the report.",
                ),
            ],
            outputs=[
                types.Adapter.Output(display_name="adapter"),
                io.String.Output(display_name="report", tooltip="What the file is and what it needs."),
            ],
        )

    @classmethod
    def fingerprint_inputs(cls, file: str, variant: str) -> tuple[int, int]:
        return files.signature(files.find(file, *FOLDERS))

    @classmethod
    def execute(cls, file: str, variant: str) -> io.NodeOutput:
        return io.NodeOutput(*load(file, variant))


NODES = [LoadAdapter]
