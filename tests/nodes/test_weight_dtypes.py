"""Files in float8, plain and scaled, and in other dtypes, through every loader: equal to the same values in float32."""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path

import comfy.model_management
import pytest
import torch
from comfyui_likeness.likeness.checkpoints import quantized_weights
from comfyui_likeness.likeness.methods import adaface, arc2face, fused_kv, omni_id
from comfyui_likeness.likeness.spec import AdaFaceSpec, Arc2FaceSpec
from comfyui_likeness.nodes.loaders import (
    adaface_loader,
    adapter_loader,
    files,
    flashface_loader,
    image_encoder,
    omni_id_loader,
)
from safetensors.torch import save_file
from support import adaface_models, flashface_models, flux_adapters, ip_adapters, omni_id_encoders, vision_towers
from support.fused_kv import apply_fused_kv, make_fused_kv_spec, make_fused_kv_tensors
from support.golden import assert_close
from support.host_models import make_small_model, sample_latent
from support.identities import make_identity
from torch import Tensor

FILE = "weights.safetensors"
Tensors = dict[str, Tensor]


@dataclass(frozen=True)
class LoaderCase:
    """A kind of file: its folder, tensors and metadata, and what the network that the loader makes of it computes."""

    folder: str
    make_tensors: Callable[[], Tensors]
    compute: Callable[[], Tensor]
    metadata: Mapping[str, str] | None = None


def apply_ip_adapter_file(kind: str) -> Tensor:
    loaded = adapter_loader.load_adapter_file(FILE)[0]
    identity = make_identity(loaded.spec.needs, ip_adapters.EMBEDDING_SHAPES[kind])
    # FaceID's LoRA of random weights, at full strength, would amplify every difference.
    return sample_latent(ip_adapters.apply_ip_adapter(make_small_model(), loaded, identity, lora_strength=0.02))


def project_flux_tokens() -> Tensor:
    layers = adapter_loader.load_adapter_file(FILE)[0].patcher.model.layers
    layer = next(module for name, module in layers.named_modules() if name.rpartition(".")[2].isdigit())
    return torch.cat(layer(make_random_rows(1, 4, flux_adapters.TOKEN_WIDTH)), -1)


def apply_fused_kv_file() -> Tensor:
    return sample_latent(apply_fused_kv(make_small_model(), adapter_loader.load_adapter_file(FILE)[0]))


def apply_flashface_file() -> Tensor:
    return sample_latent(flashface_models.apply_flashface(*flashface_loader.load_flashface(FILE, None, 1 << 20)))


def encode_image_file() -> Tensor:
    images = omni_id_encoders.make_face_images(2, size=vision_towers.IMAGE_SIZE)
    return image_encoder.load_image_encoder(FILE).encode(images)["penultimate"]


def encode_omni_id_file() -> Tensor:
    return omni_id_loader.load_omni_id_encoder(FILE).encode(omni_id_encoders.make_face_images(2), [1.0, 1.0])


def encode_face_file() -> Tensor:
    """A face through Arc2Face's text encoder."""
    model = adaface_loader.load_arc2face_encoder(files.find_model_file(FILE, "likeness"))[0]
    return arc2face.encode_face_prompt(model, make_random_rows(1, 512))


def invert_face_tokens_file() -> Tensor:
    """Arc2Face's tokens through AdaFace's prompt inverter."""
    path = files.list_folder_paths("likeness")[0] / ARC2FACE_FILE
    if not path.exists():
        save_file(make_arc2face_tensors(), path, ARC2FACE_METADATA)
    inverter = adaface_loader.load_prompter(FILE, ARC2FACE_FILE).inverter
    assert inverter is not None
    return inverter.model.invert_tokens(make_random_rows(1, 16, adaface_models.TEXT_WIDTH), 2.0)


def make_random_rows(*shape: int) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(5))


def make_flashface_tensors() -> Tensors:
    aliases = ("encoder.", "middle.", "decoder.")
    tensors = flashface_models.make_flashface_checkpoint("mini32")
    return {key: value for key, value in tensors.items() if not key.startswith(aliases)}


def make_arc2face_tensors() -> Tensors:
    return adaface_models.make_random_tensors(adaface_models.make_text_model_shapes(), 1, "text_model.")


ARC2FACE_FILE = "arc2face.safetensors"
ARC2FACE_METADATA = arc2face.make_arc2face_metadata(
    Arc2FaceSpec("test", adaface_models.NUM_HEADS, arc2face.FACE_FEATURES)
)
CASES: dict[str, LoaderCase] = {
    **{
        kind: LoaderCase(
            "ipadapter", lambda kind=kind: ip_adapters.make_ip_adapter_tensors(kind),
            lambda kind=kind: apply_ip_adapter_file(kind),
        )
        for kind in ("faceid", "pulid_v1_1")
    },
    "pulid_flux": LoaderCase(
        "ipadapter", lambda: flux_adapters.make_flux_adapter_tensors("pulid_flux"), project_flux_tokens
    ),
    "fused_kv": LoaderCase(
        "likeness", make_fused_kv_tensors, apply_fused_kv_file,
        fused_kv.make_fused_kv_metadata(make_fused_kv_spec(make_fused_kv_tensors())),
    ),
    "flashface": LoaderCase("likeness", make_flashface_tensors, apply_flashface_file),
    "image_encoder": LoaderCase(
        "clip_vision",
        lambda: vision_towers.make_open_clip_checkpoint(vision_towers.make_open_clip_tower()),
        encode_image_file,
    ),
    "omni_id": LoaderCase(
        "likeness", omni_id_encoders.make_encoder_tensors, encode_omni_id_file,
        omni_id.make_omni_id_metadata(omni_id_encoders.SMALL_SPEC),
    ),
    "arc2face": LoaderCase("likeness", make_arc2face_tensors, encode_face_file, ARC2FACE_METADATA),
    "adaface": LoaderCase(
        "likeness", adaface_models.make_inverter_tensors, invert_face_tokens_file,
        adaface.make_adaface_metadata(AdaFaceSpec("test", {"l": adaface_models.TEXT_WIDTH}, adaface_models.NUM_HEADS)),
    ),
}  # fmt: skip


def quantize(tensors: Tensors, names: tuple[str, str], per_row: bool) -> tuple[Tensors, Tensors]:
    """The tensors of a scaled float8 file with these names of scales, and the same values in float32."""
    stored: Tensors = {}
    exact: Tensors = {}
    for key, value in tensors.items():
        stored[key] = exact[key] = value
        if key.endswith(".weight") and value.ndim == 2 and "embedding" not in key:
            scale = value.abs().amax(1) / 400 if per_row else value.abs().amax() / 400
            stored[key] = (value / (scale[:, None] if per_row else scale)).to(torch.float8_e4m3fn)
            layer = key.removesuffix(".weight")
            stored |= {f"{layer}.{names[0]}": scale, f"{layer}.{names[1]}": torch.tensor(0.5)}
            exact[key] = stored[key].float() * (scale[:, None] if per_row else scale)
    return stored, exact


def make_old_scaled(tensors: Tensors) -> tuple[Tensors, Tensors]:
    stored, exact = quantize(tensors, ("scale_weight", "scale_input"), per_row=False)
    return stored | {"scaled_fp8": torch.empty(0, dtype=torch.float8_e4m3fn)}, exact


def make_new_scaled(tensors: Tensors) -> tuple[Tensors, Tensors]:
    stored, exact = quantize(tensors, ("weight_scale", "input_scale"), per_row=True)
    note = torch.tensor(list(json.dumps({"format": "float8_e4m3fn"}).encode()), dtype=torch.uint8)
    marks = {
        f"{key.removesuffix('.weight')}.comfy_quant": note.clone() for key in exact if stored[key].dtype.itemsize == 1
    }
    return stored | marks, exact


def make_plain(tensors: Tensors, dtype: torch.dtype) -> tuple[Tensors, Tensors]:
    stored = {key: value.to(dtype) for key, value in tensors.items()}
    return stored, {key: value.float() for key, value in stored.items()}


# Dtype of a file -> its tensors, and the same values in float32.
STORAGES: dict[str, Callable[[Tensors], tuple[Tensors, Tensors]]] = {
    "e4m3fn": lambda tensors: make_plain(tensors, torch.float8_e4m3fn),
    "scaled, old names": make_old_scaled,
    "scaled per row, new names": make_new_scaled,
}


@torch.inference_mode()
@pytest.mark.parametrize("storage", STORAGES)
@pytest.mark.parametrize("kind", CASES)
def test_every_loader_reads_every_dtype(folder: Path, kind: str, storage: str) -> None:
    case, outputs = CASES[kind], []
    for tensors in STORAGES[storage](case.make_tensors()):
        save_file(tensors, folder / case.folder / FILE, case.metadata)
        outputs.append(case.compute())
    assert_close(*outputs, 2e-3 if "scaled" in storage else 1e-5)  # products are stored in float16


def test_plain_float8_stays_in_float8(folder: Path) -> None:
    stored, _ = make_plain(ip_adapters.make_ip_adapter_tensors("image"), torch.float8_e4m3fn)
    save_file(stored, folder / "ipadapter" / FILE)
    weights = adapter_loader.load_adapter_file(FILE)[0].patcher.model.parameters()
    assert {weight.dtype for weight in weights} == {torch.float8_e4m3fn}


@pytest.mark.parametrize("kind", ["image_encoder", "omni_id"])
@pytest.mark.parametrize("dtype", [torch.float8_e4m3fn, torch.float64])
def test_encoders_compute_in_half_precision_where_it_is_fast(
    folder: Path, monkeypatch: pytest.MonkeyPatch, kind: str, dtype: torch.dtype
) -> None:
    case = CASES[kind]
    stored, exact = make_plain(case.make_tensors(), dtype)
    save_file(exact, folder / case.folder / FILE, case.metadata)
    with torch.inference_mode():
        expected = case.compute()
        save_file(stored, folder / case.folder / FILE, case.metadata)
        monkeypatch.setattr(comfy.model_management, "should_use_fp16", lambda *_, **__: True)
        assert_close(case.compute(), expected, 2e-2)


def test_scales_of_other_formats_and_damaged_float8_are_refused(folder: Path) -> None:
    path, weight = folder / "ipadapter" / FILE, torch.ones(4, 32).to(torch.float8_e4m3fn)
    broken = weight.clone()
    broken[1, 1] = torch.nan
    scale = torch.ones(())
    for tensors, message in (
        ({"a.weight": torch.zeros(4, 16, dtype=torch.uint8), "a.weight_scale": scale}, "a.weight with uint8 values"),
        ({"a.weight": weight, "a.weight_scale": torch.ones(4, 2)}, r"scales of shape \[4, 2\]"),
        ({"a.scale_weight": scale}, "a.weight with no values"),
        ({"a.weight": broken}, "a.weight holds NaN"),
        ({"a.weight": broken, "a.scale_weight": scale}, "a.weight holds NaN"),
        ({"a.weight": weight, "a.scale_weight": scale * 1e6}, "a.weight holds NaN or infinity"),
    ):
        save_file(tensors, path)
        with pytest.raises(ValueError, match=message):
            files.load_weights(path, "adapter")
    assert quantized_weights.dequantize_weights({"a.weight": weight, "a.bias": scale}) == {
        "a.weight": weight, "a.bias": scale,
    }  # fmt: skip
