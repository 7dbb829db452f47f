"""SigLIP's tower and its pooling head, against the official outputs and the library that publishes its files."""

from __future__ import annotations

from pathlib import Path

import folder_paths
import pytest
import torch
from comfyui_likeness.likeness import clip, keymaps
from comfyui_likeness.likeness.siglip import PoolingHead
from comfyui_likeness.nodes import encode
from comfyui_likeness.nodes.loaders import files, image_encoder
from comfyui_likeness.nodes.loaders.adapter import report
from fluxes import adapter
from golden import assert_close, cases
from safetensors.torch import save_file
from transformers import SiglipConfig, SiglipModel

SIZE, PATCH, WIDTH, LAYERS, INNER = 56, 14, 192, 3, 320


@pytest.fixture
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    files.register()
    monkeypatch.setitem(folder_paths.folder_names_and_paths, "clip_vision", ([str(tmp_path)], {".safetensors"}))
    monkeypatch.setattr(folder_paths, "filename_list_cache", {})
    return tmp_path


def published() -> SiglipModel:
    """A small SigLIP of both halves, as its library makes it."""
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


def saved(folder: Path, model: SiglipModel, *without: str) -> str:
    weights = {key: value.contiguous() for key, value in model.state_dict().items() if key not in without}
    save_file(weights, folder / "siglip.safetensors")
    return "siglip.safetensors"


def test_pooling_head() -> None:
    case = cases("ip_adapter", "encoder")["siglip_pooling_head_tiny"]
    config = case.config
    head = PoolingHead(config["hidden_size"], config["heads"], config["intermediate_size"])
    keymaps.load(head, keymaps.under(case.weights(), "vision_model.head."))
    assert_close(head.requires_grad_(False)(case.input("hidden")), case.outputs()["pooled"])


def test_the_whole_tower_pools_as_its_library_does(folder: Path) -> None:
    model = published()
    encoder = image_encoder.load(saved(folder, model))
    assert (encoder.family, encoder.architecture) == ("siglip", f"so-{WIDTH}-{LAYERS}-{PATCH}-{SIZE}")
    pictures = (torch.rand(2, SIZE, SIZE, 3, generator=torch.Generator().manual_seed(1)) * 255).round() / 255
    made = encoder.encode(pictures)
    expected = model.vision_model((pictures.movedim(-1, 1) - 0.5) / 0.5).pooler_output
    assert made.keys() == {"pooled"}
    assert_close(made["pooled"], expected, 1e-5)
    assert encoder.zero() == {}
    wide = encoder.encode(pictures[:, :, : SIZE // 2])  # stretched, not cropped
    assert wide["pooled"].isfinite().all() and not torch.allclose(wide["pooled"], made["pooled"], atol=1e-3)


def test_a_file_without_the_head_is_refused(folder: Path) -> None:
    name = saved(folder, published(), "vision_model.head.mlp.fc2.bias")
    with pytest.raises(ValueError, match="misses head.mlp.fc2.bias"):
        image_encoder.load(name)
    name = saved(folder, published(), "vision_model.head.probe")
    with pytest.raises(ValueError, match="ComfyUI's own Load CLIP Vision"):
        image_encoder.load(name)


def test_published_size() -> None:
    assert clip.architecture(1152, 27, 14, clip.SIGLIP_SIZES[729, 14], "so") == "so400m-14-384"
    assert 1152 // clip.HEAD_WIDTHS[1152] == 16


def test_the_report_finds_it(folder: Path) -> None:
    spec = adapter("instantx").spec
    assert "Needs SigLIP so400m-14-384 (Load Image Encoder) of the whole photo: missing" in report(spec, "x", False)
    save_file({"vision_model.head.probe": torch.zeros(1, 1, 1152)}, folder / "so400m.safetensors")
    folder_paths.filename_list_cache.clear()
    assert "found as so400m.safetensors" in report(spec, "x", False)


def photographed(encoder: encode.types.Encoder) -> encode.Features:
    photo = torch.rand(24, 24, 3, generator=torch.Generator().manual_seed(2))
    face = encode.Face(torch.tensor([0.0, 0, 24, 24]), torch.zeros(5, 2), 1.0)
    taken = [encode.Taken(photo, face, (face,), "photo 1: taken")]
    return encode.image_features(taken, torch.zeros(1, 8, 8, 3, dtype=torch.uint8), encoder, crops_known=False)


def test_an_identity_holds_what_the_adapters_ask_for(folder: Path) -> None:
    made = photographed(image_encoder.load(saved(folder, published())))
    (key,) = made.embeddings
    assert key.startswith(f"siglip.so-{WIDTH}-{LAYERS}-{PATCH}-{SIZE}.pooled.photo-")
    assert made.embeddings[key].shape == (1, WIDTH) and not made.zeros
