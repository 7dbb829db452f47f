"""Load Identity Adapter: published adapters, detected by their tensors, and adapters in the native format."""

from __future__ import annotations

from collections.abc import Sequence

import comfy.ops
from comfy_api.latest import io

from ...likeness.checkpoints import checkpoint_detection, file_kinds, key_maps, training_checkpoint
from ...likeness.methods import fused_kv
from ...likeness.methods.ip_adapter import ADAPTER_KINDS
from ...likeness.spec import AdapterSpec, Feature
from .. import types
from . import files, fused_kv_loader, model_management, native_adapters

ADAPTER_FOLDERS = ("ipadapter", "instantid", "pulid", "likeness")
VARIANT_OPTIONS = ("auto", *checkpoint_detection.REQUIRED_FEATURES)

# Network -> names of one tensor in its layouts, the tensor's shape, the encoder's family, the loader node.
EVA_POSITION_NAMES = ("visual.pos_embed", "visual.trunk.pos_embed")
CLASS_EMBEDDING_NAMES = ("vision_model.embeddings.class_embedding", "visual.class_embedding")
IMAGE_ENCODER_SIGNATURES: dict[str, tuple[tuple[str, ...], list[int], str, str]] = {
    "clip.vit-l-14": (CLASS_EMBEDDING_NAMES, [1024], "CLIP", "Load CLIP Vision"),
    "clip.vit-h-14": (CLASS_EMBEDDING_NAMES, [1280], "CLIP", "Load CLIP Vision"),
    "clip.vit-bigg-14": (CLASS_EMBEDDING_NAMES, [1664], "CLIP", "Load CLIP Vision"),
    "clip.eva02-l-14-336": (EVA_POSITION_NAMES, [1, 577, 1024], "CLIP", "Load Image Encoder"),
    "siglip.so400m-14-384": (("vision_model.head.probe",), [1, 1, 1152], "SigLIP", "Load Image Encoder"),
}
UNKNOWN_IMAGE_ENCODER = ((), [], "CLIP", "Load CLIP Vision")
CROP_DESCRIPTIONS = {
    "photo": "the whole photo",
    "head": "the head with a margin",
    "ffhq512": "the aligned head in grey on white",
    "face112": "the aligned face, 112 pixels",
    "face224": "the aligned face, 224 pixels",
}

# Loaders of the native kinds, which a file names in its metadata.
NATIVE_LOADERS = {
    fused_kv.KIND: fused_kv_loader.load_fused_kv,
    **dict.fromkeys(native_adapters.NATIVE_KINDS, native_adapters.load_native_adapter),
}


def load_adapter_file(file: str, variant: str = "auto") -> tuple[types.LoadedAdapter | types.LoadedFusedKV, str]:
    """Load an adapter file, with a report. Raises ValueError if it is damaged or not an adapter."""
    path = files.find_model_file(file, *ADAPTER_FOLDERS)
    metadata, tensors = files.read_native_metadata(path), files.load_weights(path, file_kinds.ADAPTER)
    if metadata is not None:
        kind = str(metadata.get("kind"))
        if kind not in NATIVE_LOADERS:
            raise ValueError(
                f"got {file}, a native file of kind {kind!r}; expected {', '.join(NATIVE_LOADERS)}; it may need a "
                "newer version of the pack"
            )
        return NATIVE_LOADERS[kind](tensors, metadata, file)
    tensors, left_out = training_checkpoint.extract_adapter_tensors(tensors)
    tensors = key_maps.rename_keys(tensors, key_maps.IP_ADAPTER)
    spec, is_guess = checkpoint_detection.detect_adapter_spec(tensors, path.as_posix(), variant)
    module = checkpoint_detection.build_ip_adapter(spec, tensors, comfy.ops.manual_cast)
    lora = key_maps.select_prefix(tensors, "lora.")
    adapter = types.LoadedAdapter(spec, model_management.make_model_patcher(module), lora, file)
    return adapter, describe_adapter(spec, file, is_guess, left_out)


def describe_adapter(spec: AdapterSpec, file: str, is_guess: bool, left_out: Sequence[str] = ()) -> str:
    """The report of a published adapter: kind, base model, and the encoders it needs, with those that are missing.

    `left_out` are the parts of a training checkpoint that are not the adapter.
    """
    unit = native_adapters.get_token_unit(spec)
    lines = [f"{file}: {ADAPTER_KINDS[spec.kind].title} for {spec.base}, {spec.tokens} tokens per {unit}"]
    if is_guess:
        lines.append("Guessed from the file name, because the tensors fit several kinds. If it is wrong, set variant.")
    if left_out:
        lines.append(f"A training checkpoint; its {', '.join(left_out)} are not used.")
    if spec.lora_rank:
        lines.append(f"Contains its LoRA of rank {spec.lora_rank}; no separate LoRA file is needed.")
    # Several layers of one network make one line.
    lines += dict.fromkeys(_describe_feature(feature) for feature in spec.needs)
    return "\n".join(lines)


def _describe_feature(feature: Feature) -> str:
    family, _, network = feature.network.partition(".")
    crop = CROP_DESCRIPTIONS[feature.crop]
    if family == "arcface":
        found = any((root / "models" / network).is_dir() for root in files.list_folder_paths("insightface"))
        status = "found" if found else f"missing: put the folder {network} into models/insightface/models"
        return f"Needs {network} face embeddings (Load Face Analyzer) of {crop}: {status}."
    names, shape, family_name, loader = IMAGE_ENCODER_SIGNATURES.get(feature.network, UNKNOWN_IMAGE_ENCODER)
    matches = [
        name
        for name in files.list_weight_files("clip_vision")
        if names and files.read_tensor_shape(name, "clip_vision", names) == shape
    ]
    status = f"found as {', '.join(matches)}" if matches else "missing: put it into models/clip_vision"
    return f"Needs {family_name} {network} ({loader}) of {crop}: {status}."


class LoadAdapter(io.ComfyNode):
    @classmethod
    def define_schema(cls) -> io.Schema:
        return io.Schema(
            node_id="LikenessLoadAdapter",
            display_name="Load Identity Adapter",
            category="likeness/loaders",
            description="Loads adapters of the IP-Adapter, FaceID, InstantID and PuLID families for SD1.5, SDXL and "
            "FLUX, and adapters trained with this pack. The kind is detected from the file. The report lists the "
            "base model and the encoders that the adapter needs.",
            search_aliases=["ipadapter", "faceid", "instantid", "pulid", "portrait", "fused"],
            inputs=[
                io.Combo.Input(
                    "file",
                    options=files.list_weight_files(*ADAPTER_FOLDERS),
                    tooltip="Adapter file from models/ipadapter, instantid, pulid or likeness (.safetensors or .bin).",
                ),
                io.Combo.Input(
                    "variant",
                    options=list(VARIANT_OPTIONS),
                    default="auto",
                    tooltip="The kind of adapter, for files whose tensors are ambiguous: Plus or Plus-Face, "
                    "FaceID-Plus or PlusV2, InstantID or Portrait unnorm. auto guesses from the file name; see the "
                    "report.",
                ),
            ],
            outputs=[
                types.AdapterSocket.Output(display_name="adapter"),
                io.String.Output(
                    display_name="report", tooltip="Kind, base model, and the encoders that the adapter needs."
                ),
            ],
        )

    @classmethod
    def fingerprint_inputs(cls, file: str, variant: str) -> tuple[int, int]:
        return files.get_file_signature(files.find_model_file(file, *ADAPTER_FOLDERS))

    @classmethod
    def execute(cls, file: str, variant: str) -> io.NodeOutput:
        return io.NodeOutput(*load_adapter_file(file, variant))


NODES = [LoadAdapter]
