"""SigLIP's tower and its pooling head, against golden cases and transformers."""

from __future__ import annotations

from pathlib import Path

import folder_paths
import pytest
import torch
from comfyui_likeness.likeness.checkpoints import key_maps
from comfyui_likeness.likeness.encoders import clip_vision
from comfyui_likeness.nodes import encode
from comfyui_likeness.nodes.loaders import files, image_encoder, vision_towers
from comfyui_likeness.nodes.loaders.adapter_loader import describe_adapter
from safetensors.torch import save_file
from support.flux_adapters import make_flux_adapter
from support.golden import assert_close, read_golden_cases
from transformers import SiglipConfig, SiglipModel

SIZE, PATCH, WIDTH, LAYERS, INNER = 56, 14, 192, 3, 320


@pytest.fixture
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    files.register_model_folders()
    monkeypatch.setitem(folder_paths.folder_names_and_paths, "clip_vision", ([str(tmp_path)], {".safetensors"}))
    monkeypatch.setattr(folder_paths, "filename_list_cache", {})
    return tmp_path


def make_siglip() -> SiglipModel:
    """A small SigLIP from transformers."""
    torch.manual_seed(0)
    vision = {
        "hidden_size": WIDTH, "intermediate_size": INNER, "num_hidden_layers": LAYERS, "image_size": SIZE,
        "num_attention_heads": WIDTH // 64, "patch_size": PATCH,
    }  # fmt: skip
    text = {"hidden_size": WIDTH, "intermediate_size": 64, "num_hidden_layers": 1, "num_attention_heads": 2}
    model = SiglipModel(SiglipConfig(text_config={**text, "vocab_size": 11}, vision_config=vision))
    for weight in model.parameters():
        torch.nn.init.normal_(weight, std=0.2)
    return model.eval().requires_grad_(False)


def save_siglip(folder: Path, model: SiglipModel, *without: str) -> str:
    weights = {key: value.contiguous() for key, value in model.state_dict().items() if key not in without}
    save_file(weights, folder / "siglip.safetensors")
    return "siglip.safetensors"


def test_pooling_head() -> None:
    case = read_golden_cases("ip_adapter", "encoder")["siglip_pooling_head_tiny"]
    config = case.config
    head = vision_towers.build_siglip_pooling_head(config["hidden_size"], config["heads"], config["intermediate_size"])
    key_maps.load_module_weights(head, key_maps.select_prefix(case.build_weights(), "vision_model.head."))
    assert_close(head.requires_grad_(False)(case.build_input("hidden")), case.load_outputs()["pooled"])


def test_tower_matches_transformers(folder: Path) -> None:
    model = make_siglip()
    encoder = image_encoder.load_image_encoder(save_siglip(folder, model))
    assert (encoder.family, encoder.architecture) == ("siglip", f"so-{WIDTH}-{LAYERS}-{PATCH}-{SIZE}")
    images = (torch.rand(2, SIZE, SIZE, 3, generator=torch.Generator().manual_seed(1)) * 255).round() / 255
    made = encoder.encode(images)
    expected = model.vision_model((images.movedim(-1, 1) - 0.5) / 0.5).pooler_output
    assert made.keys() == {"pooled"}
    assert_close(made["pooled"], expected, 1e-5)
    assert encoder.encode_zero_image() == {}
    wide = encoder.encode(images[:, :, : SIZE // 2])  # stretched, not cropped
    assert wide["pooled"].isfinite().all() and not torch.allclose(wide["pooled"], made["pooled"], atol=1e-3)


def test_files_without_the_head_are_rejected(folder: Path) -> None:
    name = save_siglip(folder, make_siglip(), "vision_model.head.mlp.fc2.bias")
    with pytest.raises(ValueError, match="misses head.mlp.fc2.bias"):
        image_encoder.load_image_encoder(name)
    name = save_siglip(folder, make_siglip(), "vision_model.head.probe")
    with pytest.raises(ValueError, match="ComfyUI's own Load CLIP Vision"):
        image_encoder.load_image_encoder(name)


def test_published_architecture() -> None:
    assert clip_vision.name_architecture(1152, 27, 14, clip_vision.SIGLIP_IMAGE_SIZES[729, 14], "so") == "so400m-14-384"
    assert 1152 // clip_vision.HEAD_DIMS[1152] == 16


def test_adapter_report_finds_the_encoder(folder: Path) -> None:
    spec = make_flux_adapter("instantx").spec
    assert "Needs SigLIP so400m-14-384 (Load Image Encoder) of the whole photo: missing" in describe_adapter(
        spec, "x", False
    )
    save_file({"vision_model.head.probe": torch.zeros(1, 1, 1152)}, folder / "so400m.safetensors")
    folder_paths.filename_list_cache.clear()
    assert "found as so400m.safetensors" in describe_adapter(spec, "x", False)


def encode_photo(encoder: encode.types.ImageEncoderProtocol) -> encode.ImageFeatures:
    photo = torch.rand(24, 24, 3, generator=torch.Generator().manual_seed(2))
    face = encode.Face(torch.tensor([0.0, 0, 24, 24]), torch.zeros(5, 2), 1.0)
    taken = [encode.SelectedFace(photo, face, (face,), "photo 1: taken")]
    return encode.encode_image_features(taken, torch.zeros(1, 8, 8, 3, dtype=torch.uint8), encoder, has_faces=False)


def test_identity_gets_the_feature_that_adapters_need(folder: Path) -> None:
    made = encode_photo(image_encoder.load_image_encoder(save_siglip(folder, make_siglip())))
    (key,) = made.embeddings
    assert key.startswith(f"siglip.so-{WIDTH}-{LAYERS}-{PATCH}-{SIZE}.pooled.photo-")
    assert made.embeddings[key].shape == (1, WIDTH) and not made.zero_embeddings
