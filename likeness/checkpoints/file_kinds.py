"""What a weight file is, by the names of its tensors or its native metadata, and which node loads it.

So that a loader can say what a file of another kind is. The loader itself decides whether a file of its own kind, or of
none, is complete.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Any


@dataclass(frozen=True)
class FileKind:
    """A kind of file: what it is, what to do with it, and a pattern of the beginnings of some of its keys."""

    name: str
    title: str
    remedy: str
    keys: str


ADAPTER, FLASHFACE, OMNI_ID, ADAFACE = "adapter", "flashface", "omni_id", "adaface"
TEXT_ENCODER, IMAGE_ENCODER, IDENTITY, EMBEDDING = "text_encoder", "image_encoder", "identity", "embedding"

# Specific before broad: the first kind with a matching key decides. The kinds without keys have metadata.
FILE_KINDS: tuple[FileKind, ...] = (
    FileKind(
        "sd3_adapter", "an IP-Adapter for SD3.5", "choose an adapter for SD1.5, SDXL or FLUX.1",
        r"ip_adapter\.\d+\.norm_ip\.",
    ),
    FileKind(
        "photomaker", "a PhotoMaker file", "load it from models/photomaker with PhotoMaker Loader", r"id_encoder\."
    ),
    FileKind(
        ADAPTER, "an identity adapter", "load it from models/ipadapter with Load Identity Adapter",
        r".*\.(to_[kv]_ip|id_to_[kv]|ip_adapter_double_stream_[kv]_proj|to_[kv]_f)\.|pulid_ca\.",
    ),
    FileKind(FLASHFACE, "a FlashFace file", "load it from models/likeness with Load FlashFace", r"ref_encoder\."),
    FileKind(OMNI_ID, "an Omni-ID encoder", "load it from models/likeness with Load Omni-ID Encoder", r"trunk\."),
    FileKind(
        ADAFACE, "AdaFace's prompt inverter", "load it from models/likeness with Load AdaFace", r"prompt2token_proj\."
    ),
    FileKind(IDENTITY, "an identity", "load it from models/identities with Load Identity", r"face/box"),
    FileKind(
        "controlnet", "a ControlNet or T2I-Adapter", "load it from models/controlnet with Load ControlNet Model",
        r"control_model\.|zero_conv|input_hint_block\.|control(net)?_|(adapter\.)?body\.\d+\.(resnets|in_conv|block1)\.",
    ),
    FileKind(
        "lora", "a LoRA", "load it from models/loras with Load LoRA",
        r".*[._](lora(_up|_down|_mid|_[AB]|\.up|\.down)|hada_w\d|lokr_w\d|dora_scale|oft_blocks)|lora_(unet|te)",
    ),
    FileKind(
        "motion_module", "a motion module", "load it from models/animatediff_models with an AnimateDiff node",
        r".*motion_modules?\.",
    ),
    FileKind("style_model", "a style model", "load it from models/style_models with Load Style Model", r"redux_"),
    FileKind(
        "checkpoint", "a checkpoint", "load it from models/checkpoints with Load Checkpoint",
        r"model\.diffusion_model\.|first_stage_model\.|cond_stage_model\.|conditioner\.",
    ),
    FileKind(
        "diffusion_model", "a diffusion model", "load it from models/diffusion_models with Load Diffusion Model",
        r"input_blocks\.0\.0\.|(double|single|joint|transformer)_blocks\.0\.|(down|up)_blocks\.0\.|time_embedding\.",
    ),
    FileKind(
        "vae", "a VAE", "load it from models/vae with Load VAE",
        r"(encoder|decoder)\.(conv_in|mid|down|up)[._]|(post_)?quant_conv\.",
    ),
    FileKind(
        IMAGE_ENCODER, "an image encoder",
        "load it from models/clip_vision with Load CLIP Vision or Load Image Encoder",
        r"(module\.)?visual\.|vision_model\.",
    ),
    FileKind(
        TEXT_ENCODER, "a text encoder",
        "load it from models/text_encoders with Load CLIP, or Arc2Face's with Load AdaFace",
        r"text_model\.|(encoder\.block|transformer\.resblocks|model\.layers)\.0\.|shared\.weight",
    ),
    FileKind(
        EMBEDDING, "a textual inversion", "put it into models/embeddings and write embedding:<file name> into a prompt",
        r"emb_params$|string_to_param\.|clip_[lg]$",
    ),
    FileKind(
        "upscale_model", "an upscale model", "load it from models/upscale_models with Load Upscale Model",
        r"(model\.\d+\.sub|body\.\d+\.rdb|RRDB_trunk|conv_first|conv_up)",
    ),
)  # fmt: skip

# Kind in the native metadata -> kind of file.
NATIVE_KINDS: Mapping[str, str] = {
    **dict.fromkeys(("decoupled", "omni_id_adapter", "fused_kv", "infinite_id"), ADAPTER),
    "flashface": FLASHFACE, "omni_id": OMNI_ID, "adaface": ADAFACE, "arc2face": TEXT_ENCODER, "embedding": EMBEDDING,
}  # fmt: skip


def detect_file_kind(keys: Iterable[str], metadata: Mapping[str, Any] | None) -> FileKind | None:
    """The kind of a file with these tensors and native metadata, or None if it is none of FILE_KINDS."""
    if metadata is not None and "kind" in metadata:
        name = NATIVE_KINDS.get(str(metadata["kind"]))
        return next((kind for kind in FILE_KINDS if kind.name == name), None)
    keys = list(keys)
    return next((kind for kind in FILE_KINDS if any(re.match(kind.keys, key) for key in keys)), None)


def check_file_kind(file: str, keys: Iterable[str], metadata: Mapping[str, Any] | None, expected: str) -> None:
    """Raise ValueError if a file is known to be of another kind than `expected`, the name of one in FILE_KINDS."""
    kind = detect_file_kind(keys, metadata)
    if kind is not None and kind.name != expected:
        title = next(kind.title for kind in FILE_KINDS if kind.name == expected)
        raise ValueError(f"{kind.remedy}, or choose another file: got {file}, {kind.title}; expected {title}")
