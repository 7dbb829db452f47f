"""FLUX stand-ins are recognized: the models by ComfyUI, the adapters by the pack's loaders."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import comfy.model_base
import comfy.sd
import comfy.utils
import folder_paths
import pytest
import torch
from comfy.model_patcher import ModelPatcher
from comfyui_likeness.likeness.checkpoints import checkpoint_detection, native_omni_adapter
from comfyui_likeness.likeness.spec import AdapterSpec
from comfyui_likeness.nodes.attention.apply_decoupled import ApplyDecoupled
from comfyui_likeness.nodes.loaders import adapter_loader, files
from comfyui_likeness.tools.standins import build, flux_models
from support.flux_adapters import HOST_PASSES_QUERIES
from support.host_models import all_close, make_small_model, sample_latent
from support.identities import make_identity

ADAPTERS = {
    "xlabs_flux_ip_adapter_v2.safetensors": ("xlabs", ((768,),)),
    "instantx_flux_ip_adapter.bin": ("instantx", ((1152,),)),
    "pulid_flux_v0.9.1.safetensors": ("pulid_flux", ((512,), (768,), (5, 17, 1024))),
    "omni_id_flux.safetensors": (native_omni_adapter.KIND, ((256, 1280),)),
}
FOLDERS = ("diffusion_models", "vae", "ipadapter", "pulid", "likeness", "clip_vision")


@pytest.fixture(scope="module")
def base(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("standins")
    build.write_standins(path, ["flux1-dev.safetensors", "ae.safetensors", "omni_id_sd15.safetensors", *ADAPTERS])
    return path / "models"


@pytest.fixture
def models(base: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    files.register_model_folders()
    for folder in FOLDERS:
        monkeypatch.setitem(
            folder_paths.folder_names_and_paths, folder, ([str(base / folder)], {".safetensors", ".bin"})
        )
    monkeypatch.setattr(folder_paths, "filename_list_cache", {})
    return base


def load_flux(models: Path) -> ModelPatcher:
    path = models / "diffusion_models" / "flux1-dev.safetensors"
    return comfy.sd.load_diffusion_model(str(path), {"dtype": torch.float32})


def make_person(spec: AdapterSpec, *shapes: tuple[int, ...]) -> Any:
    return make_identity((*spec.needs, checkpoint_detection.CLIP_L_BLACK), (*shapes, shapes[0]))


def test_comfyui_recognizes_model_and_vae(models: Path) -> None:
    model = load_flux(models)
    assert type(model.model) is comfy.model_base.Flux
    config = model.model.model_config.unet_config
    assert {key: config[key] for key in flux_models.FLUX_CONFIG if key in config} == {
        key: value for key, value in flux_models.FLUX_CONFIG.items() if key in config
    }
    vae = comfy.sd.VAE(sd=comfy.utils.load_torch_file(str(models / "vae" / "ae.safetensors")))
    assert vae.decode(torch.zeros(1, 16, 4, 4)).shape == (1, 32, 32, 3)


@pytest.mark.skipif(not HOST_PASSES_QUERIES, reason="the host shows FLUX's queries to no patch")
@pytest.mark.parametrize("file", ADAPTERS)
def test_adapters_are_recognized_and_fit(models: Path, file: str) -> None:
    kind, shapes = ADAPTERS[file]
    adapter, report = adapter_loader.load_adapter_file(file)
    assert adapter.spec.kind == kind and adapter.spec.base == "FLUX.1"
    assert "FLUX.1" in report and str(adapter.spec.tokens) in report
    model = load_flux(models)
    identity = make_person(adapter.spec, *shapes)
    patched = ApplyDecoupled.execute(model, adapter, identity, 1.0, 0.0, 1.0, "linear", "V only").args[0]
    text = [[torch.ones(1, 7, 768), {"pooled_output": torch.ones(1, 768)}]]
    run = {"cfg": 1.0, "positive": text, "negative": text, "steps": 1}
    assert not all_close(sample_latent(patched, "FLUX.1", **run), sample_latent(model, "FLUX.1", **run), 1e-3)


def test_omni_id_on_sd15(models: Path) -> None:
    """On SD1.5 tokens go through the projector, and the layers are those of the UNet."""
    adapter, report = adapter_loader.load_adapter_file("omni_id_sd15.safetensors")
    assert adapter.spec.base == "SD1.5" and "16 layers" in report
    base = make_small_model(model_channels=320, channel_mult=[1, 1, 1, 1], context_dim=768)
    identity = make_person(adapter.spec, (256, 1280))
    model = ApplyDecoupled.execute(base, adapter, identity, 1.0, 0.0, 1.0, "linear", "V only").args[0]
    text = [[torch.ones(1, 7, 768), {"pooled_output": torch.ones(1, 768)}]]
    run = {"positive": text, "negative": text, "steps": 1}
    assert not all_close(sample_latent(model, **run), sample_latent(base, **run), 1e-3)
    assert all_close(
        sample_latent(model, **run, cfg=0.0), sample_latent(base, **run, cfg=0.0), 1e-6
    )  # no effect on the negative prompt


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda t, m: t.pop("layers.double_blocks.0.k.weight"), "not all matrices"),
        (lambda t, m: t.pop("layers.single_blocks.3.v.weight"), "misses layers.single_blocks.3.v.weight"),
        (
            lambda t, m: t.update({"layers.double_blocks.0.k.bias": torch.ones(256)}),
            "has unknown layers.double_blocks.0",
        ),
        (lambda t, m: m.update(version=2), "of version 2"),
        (lambda t, m: m.update(base="SDXL"), "base 'SDXL'"),
        (lambda t, m: m.pop("tokens"), "tokens"),
        (lambda t, m: m.update(unconditional="maybe"), "unconditional: none or zero"),
    ],
)
def test_damaged_file_is_an_error(change: Any, message: str) -> None:
    from comfyui_likeness.nodes.loaders import native_adapters
    from support.flux_adapters import make_flux_adapter_tensors, make_omni_adapter_metadata

    weights, metadata = make_flux_adapter_tensors(), make_omni_adapter_metadata()
    change(weights, metadata)
    with pytest.raises(ValueError, match=message):
        native_adapters.load_native_adapter(weights, metadata, "damaged")


@pytest.mark.parametrize("kind", ["xlabs", "instantx", "pulid_flux"])
def test_truncated_published_file_is_an_error(kind: str) -> None:
    import comfy.ops
    from comfyui_likeness.likeness.checkpoints import key_maps
    from support.flux_adapters import make_flux_adapter_tensors

    complete = key_maps.rename_keys(make_flux_adapter_tensors(kind), key_maps.IP_ADAPTER)
    for name in (key for key in complete if key.endswith((".v.weight", ".to_kv.weight")) or ".norm" in key):
        truncated = {key: value for key, value in complete.items() if key != name}
        with pytest.raises(ValueError, match=r"misses|fit no adapter|incomplete|expected 16|cut short"):
            checkpoint_detection.build_ip_adapter(
                checkpoint_detection.detect_adapter_spec(truncated)[0], truncated, comfy.ops.manual_cast
            )
