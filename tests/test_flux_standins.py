"""FLUX's stand-ins are what they stand for: the host knows them natively, the pack's loaders know the adapters."""

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
from comfyui_likeness.likeness import detect, omni_adapter
from comfyui_likeness.likeness.spec import AdapterSpec
from comfyui_likeness.nodes.attention.decoupled import ApplyDecoupled
from comfyui_likeness.nodes.loaders import adapter as loader
from comfyui_likeness.nodes.loaders import files
from comfyui_likeness.tools import standin_flux, standins
from fluxes import SHOWN
from identities import identity
from models import close, patcher, sample

ADAPTERS = {
    "xlabs_flux_ip_adapter_v2.safetensors": ("xlabs", ((768,),)),
    "instantx_flux_ip_adapter.bin": ("instantx", ((1152,),)),
    "pulid_flux_v0.9.1.safetensors": ("pulid_flux", ((512,), (768,), (5, 17, 1024))),
    "omni_id_flux.safetensors": (omni_adapter.KIND, ((256, 1280),)),
}
FOLDERS = ("diffusion_models", "vae", "ipadapter", "pulid", "likeness", "clip_vision")


@pytest.fixture(scope="module")
def base(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("standins")
    standins.make(path, ["flux1-dev.safetensors", "ae.safetensors", "omni_id_sd15.safetensors", *ADAPTERS])
    return path / "models"


@pytest.fixture
def models(base: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    files.register()
    for folder in FOLDERS:
        monkeypatch.setitem(
            folder_paths.folder_names_and_paths, folder, ([str(base / folder)], {".safetensors", ".bin"})
        )
    monkeypatch.setattr(folder_paths, "filename_list_cache", {})
    return base


def flux(models: Path) -> ModelPatcher:
    path = models / "diffusion_models" / "flux1-dev.safetensors"
    return comfy.sd.load_diffusion_model(str(path), {"dtype": torch.float32})


def person(spec: AdapterSpec, *shapes: tuple[int, ...]) -> Any:
    return identity((*spec.needs, detect.BLACK), (*shapes, shapes[0]))


def test_the_host_knows_the_model_and_its_vae(models: Path) -> None:
    model = flux(models)
    assert type(model.model) is comfy.model_base.Flux
    config = model.model.model_config.unet_config
    assert {key: config[key] for key in standin_flux.FLUX if key in config} == {
        key: value for key, value in standin_flux.FLUX.items() if key in config
    }
    vae = comfy.sd.VAE(sd=comfy.utils.load_torch_file(str(models / "vae" / "ae.safetensors")))
    assert vae.decode(torch.zeros(1, 16, 4, 4)).shape == (1, 32, 32, 3)


@pytest.mark.skipif(not SHOWN, reason="the host shows FLUX's queries to no patch")
@pytest.mark.parametrize("file", ADAPTERS)
def test_each_adapter_is_known_and_fits(models: Path, file: str) -> None:
    kind, shapes = ADAPTERS[file]
    given, report = loader.load(file)
    assert given.spec.kind == kind and given.spec.base == "FLUX.1"
    assert "FLUX.1" in report and str(given.spec.tokens) in report
    model = flux(models)
    who = person(given.spec, *shapes)
    patched = ApplyDecoupled.execute(model, given, who, 1.0, 0.0, 1.0, "linear", "V only").args[0]
    text = [[torch.ones(1, 7, 768), {"pooled_output": torch.ones(1, 768)}]]
    run = {"cfg": 1.0, "positive": text, "negative": text, "steps": 1}
    assert not close(sample(patched, "FLUX.1", **run), sample(model, "FLUX.1", **run), 1e-3)


def test_omni_id_on_sd15(models: Path) -> None:
    """Tokens go through the projector there, and the layers are those of the UNet."""
    given, report = loader.load("omni_id_sd15.safetensors")
    assert given.spec.base == "SD1.5" and "16 layers" in report
    base = patcher(model_channels=320, channel_mult=[1, 1, 1, 1], context_dim=768)
    who = person(given.spec, (256, 1280))
    model = ApplyDecoupled.execute(base, given, who, 1.0, 0.0, 1.0, "linear", "V only").args[0]
    text = [[torch.ones(1, 7, 768), {"pooled_output": torch.ones(1, 768)}]]
    run = {"positive": text, "negative": text, "steps": 1}
    assert not close(sample(model, **run), sample(base, **run), 1e-3)
    assert close(sample(model, **run, cfg=0.0), sample(base, **run, cfg=0.0), 1e-6)  # nothing for the negative prompt


@pytest.mark.parametrize(
    ("change", "words"),
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
def test_a_damaged_file_is_refused(change: Any, words: str) -> None:
    from comfyui_likeness.nodes.loaders import own
    from fluxes import tensors, told

    weights, metadata = tensors(), told()
    change(weights, metadata)
    with pytest.raises(ValueError, match=words):
        own.load(weights, metadata, "damaged")


@pytest.mark.parametrize("kind", ["xlabs", "instantx", "pulid_flux"])
def test_a_published_file_cut_short_is_refused(kind: str) -> None:
    import comfy.ops
    from comfyui_likeness.likeness import keymaps
    from fluxes import tensors

    whole = keymaps.rename(tensors(kind), keymaps.IP_ADAPTER)
    for name in (key for key in whole if key.endswith((".v.weight", ".to_kv.weight")) or ".norm" in key):
        short = {key: value for key, value in whole.items() if key != name}
        with pytest.raises(ValueError, match=r"misses|fit no adapter|incomplete|expected 16|cut short"):
            detect.build(detect.read_spec(short)[0], short, comfy.ops.manual_cast)
