"""A file of another kind in a loader's folder: the error says what it is and which node or folder wants it."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from comfyui_likeness.likeness.checkpoints import file_kinds
from comfyui_likeness.likeness.identity import identity_file
from comfyui_likeness.nodes.identity import LoadIdentity
from comfyui_likeness.nodes.loaders import (
    adaface_loader,
    adapter_loader,
    files,
    flashface_loader,
    image_encoder,
    omni_id_loader,
)
from comfyui_likeness.tools.standins import build
from comfyui_likeness.tools.standins.models import LAYOUT_FOLDER
from safetensors.torch import save_file
from support.identity_files import make_full_identity
from support.ip_adapters import make_ip_adapter_tensors
from support.omni_id_encoders import make_encoder_metadata, make_encoder_tensors

# Some keys of published files, as their authors name them -> kind, the node or folder in the error.
EXAMPLES: dict[str, tuple[tuple[str, ...], str, str]] = {
    "kohya LoRA": (("lora_unet_down_blocks_0_attentions_0.lora_down.weight", "lora_te_1.alpha"), "lora", "Load LoRA"),
    "PEFT LoRA": (("transformer.single_transformer_blocks.0.attn.to_k.lora_A.weight",), "lora", "Load LoRA"),
    "LoKr": (("lycoris_blocks_0.lokr_w1",), "lora", "Load LoRA"),
    "diffusers LoRA": (("unet.mid_block.attentions.0.to_k.lora.down.weight",), "lora", "Load LoRA"),
    "SD1.5 checkpoint": (
        ("cond_stage_model.transformer.text_model.final_layer_norm.bias", "model.diffusion_model.out.0.bias"),
        "checkpoint", "models/checkpoints with Load Checkpoint",
    ),
    "SDXL refiner": (("conditioner.embedders.0.model.ln_final.bias",), "checkpoint", "Load Checkpoint"),
    "UNet": (("input_blocks.0.0.weight", "middle_block.0.out_layers.0.bias"), "diffusion_model", "Diffusion Model"),
    "diffusers UNet": (("conv_in.weight", "down_blocks.0.resnets.0.norm1.weight"), "diffusion_model", "Diffusion"),
    "FLUX": (("double_blocks.0.img_attn.qkv.weight",), "diffusion_model", "models/diffusion_models"),
    "FLUX in diffusers": (("transformer_blocks.0.attn.to_k.weight",), "diffusion_model", "models/diffusion_models"),
    "VAE": (("encoder.down.0.block.0.conv1.weight", "quant_conv.bias"), "vae", "models/vae"),
    "diffusers VAE": (("decoder.up_blocks.0.resnets.0.conv1.bias",), "vae", "Load VAE"),
    "ControlNet": (("control_model.zero_convs.0.0.weight",), "controlnet", "models/controlnet"),
    "SDXL ControlNet": (("controlnet_cond_embedding.conv_in.weight", "down_blocks.0.x"), "controlnet", "ControlNet"),
    "FLUX ControlNet": (("controlnet_blocks.0.weight", "double_blocks.0.x"), "controlnet", "ControlNet"),
    "T2I-Adapter": (("body.0.in_conv.weight",), "controlnet", "T2I-Adapter"),
    "PhotoMaker": (
        ("id_encoder.vision_model.embeddings.class_embedding", "lora_weights.x.lora_A.weight"),
        "photomaker", "models/photomaker",
    ),
    "SD3.5 IP-Adapter": (
        ("image_proj.latents", "ip_adapter.0.to_k_ip.weight", "ip_adapter.0.norm_ip.linear.weight"),
        "sd3_adapter", "SD1.5, SDXL or FLUX.1",
    ),
    "CLIP": (("text_model.final_layer_norm.bias", "vision_model.post_layernorm.bias"), "image_encoder", "CLIP Vision"),
    "OpenCLIP": (("visual.conv1.weight", "transformer.resblocks.0.ln_1.bias"), "image_encoder", "Load Image Encoder"),
    "CLIP-L": (("text_model.embeddings.token_embedding.weight",), "text_encoder", "models/text_encoders"),
    "T5": (("encoder.block.0.layer.0.layer_norm.weight", "shared.weight"), "text_encoder", "Load CLIP"),
    "Redux": (("redux_up.weight",), "style_model", "models/style_models"),
    "AnimateDiff": (("down_blocks.0.motion_modules.0.temporal_transformer.norm.bias",), "motion_module", "AnimateDiff"),
    "embedding": (("emb_params",), "embedding", "models/embeddings"),
    "SDXL embedding": (("clip_g", "clip_l"), "embedding", "models/embeddings"),
    "upscaler": (("body.0.rdb1.conv1.weight", "conv_first.weight"), "upscale_model", "models/upscale_models"),
    "FlashFace": (("ref_encoder.0.weight", "encoder.0.weight"), "flashface", "Load FlashFace"),
}  # fmt: skip


@pytest.mark.parametrize("name", EXAMPLES)
def test_a_foreign_file_is_named(folder: Path, name: str) -> None:
    keys, kind, remedy = EXAMPLES[name]
    for suffix in (".safetensors", ".bin"):
        path = folder / "ipadapter" / f"mystery{suffix}"
        tensors = {key: torch.ones(2, 2) for key in keys}
        save_file(tensors, path) if suffix == ".safetensors" else torch.save(tensors, path)
        with pytest.raises(ValueError, match=f"got {path.name}, ") as error:
            adapter_loader.load_adapter_file(path.name)
        title = next(one.title for one in file_kinds.FILE_KINDS if one.name == kind)
        assert title in str(error.value) and remedy in str(error.value)
        assert str(error.value).endswith("expected an identity adapter")


@pytest.mark.parametrize("layout", sorted(path.stem for path in LAYOUT_FOLDER.glob("*.json") if path.stem != "index"))
def test_published_adapters_are_adapters(layout: str) -> None:
    kind = file_kinds.detect_file_kind(json.loads((LAYOUT_FOLDER / f"{layout}.json").read_text()), None)
    assert kind is not None and kind.name == file_kinds.ADAPTER


# A complete file -> its kind. TAESD, a small VAE, is of none.
COMPLETE_FILES = {
    "flux_landmarks.safetensors": "controlnet", "flux1-dev.safetensors": "diffusion_model", "ae.safetensors": None,
    "clip_l.safetensors": file_kinds.TEXT_ENCODER, "omni_id_flux.safetensors": file_kinds.ADAPTER,
}  # fmt: skip


@pytest.mark.parametrize("name", COMPLETE_FILES)
def test_complete_files_are_of_one_kind(name: str) -> None:
    kind = file_kinds.detect_file_kind(build.STANDIN_FILES[name][1](), build.FILE_METADATA.get(name))
    assert (kind and kind.name) == COMPLETE_FILES[name]


LOADERS: dict[str, tuple[str, Callable[[str], Any], str]] = {
    "adapter": ("ipadapter", adapter_loader.load_adapter_file, "an identity adapter"),
    "FlashFace": ("likeness", lambda name: flashface_loader.load_flashface(name, None, 0), "a FlashFace file"),
    "Omni-ID": ("likeness", omni_id_loader.load_omni_id_encoder, "an Omni-ID encoder"),
    "inverter": ("likeness", lambda name: adaface_loader.load_prompter(name, "a.safetensors"), "prompt inverter"),
    "Arc2Face": ("likeness", lambda name: adaface_loader.load_prompter(adaface_loader.ARC2FACE_ONLY, name), "text enc"),
    "image encoder": ("clip_vision", image_encoder.load_image_encoder, "an image encoder"),
    "identity": ("identities", lambda name: LoadIdentity.execute(name), "an identity"),
}
LORA = {"lora_unet_mid_block.lora_up.weight": torch.ones(2, 2, dtype=torch.bfloat16)}
FOREIGN_FILES: dict[str, tuple[dict[str, torch.Tensor], dict[str, str] | None, str, str]] = {
    "a LoRA": (LORA, None, "", "Load LoRA"),
    "an identity adapter": (make_ip_adapter_tensors("image"), None, "adapter", "Load Identity Adapter"),
    "an Omni-ID encoder": (
        make_encoder_tensors(), {"likeness": json.dumps(make_encoder_metadata())}, "Omni-ID", "Load Omni-ID Encoder",
    ),
}  # fmt: skip


@pytest.mark.parametrize("loader", LOADERS)
def test_every_loader_names_foreign_files(folder: Path, loader: str) -> None:
    model_folder, load, expected = LOADERS[loader]
    identity_file.save_identity(make_full_identity(), folder / model_folder / "person.safetensors")
    cases = {title: (own, node) for title, (_, _, own, node) in FOREIGN_FILES.items()}
    for title, (tensors, metadata, _, _) in FOREIGN_FILES.items():
        save_file(tensors, folder / model_folder / f"{title}.safetensors", metadata)
    for title, (own, node) in (cases | {"an identity": ("identity", "Load Identity")}).items():
        name = "person.safetensors" if title == "an identity" else f"{title}.safetensors"
        if own != loader:
            with pytest.raises(ValueError, match=f"{node}, or choose .*got {name}, {title}; expected .*{expected}"):
                load(name)


def test_endings_may_be_in_upper_case(folder: Path) -> None:
    tensors = make_ip_adapter_tensors("image")
    save_file(tensors, folder / "ipadapter" / "A.SAFETENSORS")
    save_file(tensors, folder / "ipadapter" / "b.sft")
    torch.save(tensors, folder / "ipadapter" / "C.Bin")
    names = ["A.SAFETENSORS", "C.Bin", "b.sft"]
    assert files.list_weight_files("ipadapter") == names
    assert len({adapter_loader.load_adapter_file(name)[0].spec for name in names}) == 1
    shapes = [files.read_tensor_shape(name, "ipadapter", ["image_proj.norm.weight"]) for name in names]
    assert shapes == [[len(tensors["image_proj.norm.weight"])]] * 3
    identity_file.save_identity(make_full_identity(), folder / "identities" / "ANNA.SAFETENSORS")
    assert LoadIdentity.INPUT_TYPES()["required"]["file"][1]["options"] == ["ANNA.SAFETENSORS"]
    assert LoadIdentity.execute("ANNA.SAFETENSORS").args[0].name == make_full_identity().name


def test_a_new_kind_of_native_file_may_need_a_newer_pack(folder: Path) -> None:
    save_file(LORA, folder / "likeness" / "new.safetensors", {"likeness": '{"kind": ["x"]}'})
    with pytest.raises(ValueError, match="newer version of the pack"):
        adapter_loader.load_adapter_file("new.safetensors")
