"""Training for real: the configs of real scale, and Portrait World through the command."""

from __future__ import annotations

import json
import math
import subprocess
import sys
from dataclasses import replace
from pathlib import Path
from typing import Any

import comfy.ldm.modules.attention as attention
import comfy.ops
import pytest
import torch
from comfy import model_base, supported_models
from comfy.model_patcher import ModelPatcher
from comfyui_likeness.likeness import faces, keymaps, omni_adapter, own_decoupled, own_flashface
from comfyui_likeness.likeness import flashface as flashface_math
from comfyui_likeness.likeness import fused as fused_math
from comfyui_likeness.likeness import infinite_id as infinite_math
from comfyui_likeness.likeness.bank import MemoryBank
from comfyui_likeness.likeness.spec import AdapterSpec, Feature, FusedSpec, Identity, OmniIDSpec
from comfyui_likeness.nodes.attention import decoupled as decoupled_node
from comfyui_likeness.nodes.attention import fused as fused_node
from comfyui_likeness.nodes.attention import patch
from comfyui_likeness.nodes.attention.added import with_added
from comfyui_likeness.nodes.attention.injection import ALWAYS, Injection
from comfyui_likeness.nodes.attention.unet import sites as attention_sites
from comfyui_likeness.nodes.loaders.flashface import with_place
from comfyui_likeness.nodes.types import LoadedAdapter, LoadedFused, LoadedReferenceNet
from comfyui_likeness.tools import standin_models
from comfyui_likeness.training import data, loop, tasks
from comfyui_likeness.training.adapters import decoupled, flashface, infinite_id
from comfyui_likeness.training.base import clip, recogniser, source, unet, vae
from comfyui_likeness.training.omni_id import encoder, masked
from golden import GOLDEN
from PIL import Image
from torch import Tensor, nn
from trainings import DISCS

ROOT = Path(__file__).resolve().parents[1]
EIGHT_GPUS = ROOT / "training" / "configs" / "eight_gpus"
META = torch.device("meta")


def test_the_demos_unet_has_the_attentions_of_sd15() -> None:
    _, about = tasks.settings("unet", ROOT / "training" / "configs" / "two_cores" / "unet.toml")
    with torch.device("meta"):
        net = unet.base_model(unet.config(about, 128)).diffusion_model
    weights = sum(value.numel() for value in net.parameters())
    names = [name for name, _ in net.named_modules() if name.endswith("attn2")]
    assert names == [
        name.removesuffix(".to_q.weight") for name in published_sd15() if name.endswith("attn2.to_q.weight")
    ]
    assert 4e6 < weights < 5e6


def test_the_configs_of_real_scale_build_and_take_a_step(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(attention, "optimized_attention", attention.attention_pytorch)  # which run.py asks for
    _, about = tasks.settings("unet", EIGHT_GPUS / "unet.toml")
    _, towers = tasks.settings("clip", EIGHT_GPUS / "clip.toml")
    _, faces = tasks.settings("recogniser", EIGHT_GPUS / "recogniser.toml")
    with torch.device("meta"):
        net = unet.base_model(unet.config(about, towers.width)).diffusion_model.requires_grad_(True)
        pair = clip.ClipPair(towers, DISCS, 0)
        network = recogniser.build(faces)
        face = step(network, torch.zeros(2, 3, 112, 112))
        seen = step(pair.vision, torch.zeros(2, 3, 224, 224))[2]
        noise = step(net, torch.zeros(2, 4, 64, 64), torch.zeros(2), context=torch.zeros(2, 77, 768))
    assert seen.shape == (2, 768) and noise.shape == (2, 4, 64, 64)
    names = {key: tuple(value.shape) for key, value in net.state_dict().items()}
    assert names == published_sd15()
    assert sum(value.numel() for value in pair.vision.parameters()) == 303966208  # CLIP ViT-L/14's, with its projection
    assert face.shape == (2, 512)


def sd15(monkeypatch: pytest.MonkeyPatch) -> ModelPatcher:
    """The UNet of real scale, frozen, as a MODEL on no device."""
    for module in (attention, patch):
        monkeypatch.setattr(module, "optimized_attention", attention.attention_pytorch)  # which run.py asks for
    about = tasks.settings("unet", EIGHT_GPUS / "unet.toml")[1]
    with META:
        model = unet.base_model({**unet.config(about, 768), "use_checkpoint": False}).requires_grad_(False)
    return ModelPatcher(model, META, META)


def adapter_step(held: ModelPatcher, injection: Injection, *adapters: nn.Module, **told: Tensor) -> None:
    """The step of an adapter's modules in a model, for two rows."""
    width, beside = attention_sites(held.model.diffusion_model)[0].context, held.model.adm_channels
    latent, text = torch.zeros(2, 4, 64, 64, device=META), torch.zeros(2, 77, width, device=META)
    given = unet.Noised(latent, torch.ones(2, device=META), latent)
    told |= {"c_crossattn": text} | ({"y": torch.zeros(2, beside, device=META)} if beside else {})
    options = patch.directly(patch.attach(held, injection), 1.0)
    unet.wrong_noise(held.model, given, math.inf, **told, **options).backward()
    adapter = nn.ModuleList(adapters)
    assert all(value.grad is not None for value in adapter.parameters() if value.requires_grad)
    torch.optim.SGD(loop.groups(adapter, 0.01), lr=0.1).step()


@pytest.mark.parametrize(
    ("name", "features", "layout"),
    [("arcface", (512,), "ip-adapter-faceid_sd15"), ("image", (257, 1280), "ip-adapter-plus_sd15")],
)
def test_decoupled_attention_of_real_scale_is_the_published_one_and_takes_a_step(
    monkeypatch: pytest.MonkeyPatch, name: str, features: tuple[int, ...], layout: str
) -> None:
    run, about = tasks.settings("decoupled", EIGHT_GPUS / f"decoupled_{name}.toml")
    assert (run.batch, run.rate, run.decay, run.steps, about.snr) == (8, 1e-4, 0.01, 1000000, math.inf)
    held, kind, read = sd15(monkeypatch), decoupled.READS[about.reads].kind, Feature("x", "y", "z")
    sites = attention_sites(held.model.diffusion_model)
    spec = AdapterSpec(kind, "SD1.5", about.tokens, 768, tuple(site.hidden for site in sites), (read,))
    with META:
        module = decoupled.build(about, spec, features[-1]).requires_grad_(True)
        rows, zero = torch.zeros(2, *features), torch.zeros(1, *features)
    key, two = read.id("0" * 64), torch.ones(2)
    who = Identity("batch", two, two, two, two, embeddings={key: rows}, zeros={key: zero})
    loaded = LoadedAdapter(spec, ModelPatcher(module, META, META), {}, name)
    spread = decoupled_node.shares(sites, "SD1.5", "linear", "")
    injection = decoupled_node.Decoupled(loaded, who, spread, 1.0, "V only", 1.0, True, None, ALWAYS)
    adapter_step(held, injection, module)
    saved = keymaps.rename(module.state_dict(), own_decoupled.PUBLISHED)
    shapes = json.loads((GOLDEN / "ip_adapter" / "layouts" / f"{layout}.json").read_text())
    published = {key: tuple(shape) for key, shape in shapes.items() if "_lora." not in key}
    assert {key: tuple(value.shape) for key, value in saved.items()} == published


def test_fused_kv_of_real_scale_takes_a_step(monkeypatch: pytest.MonkeyPatch) -> None:
    _, about = tasks.settings("fused", EIGHT_GPUS / "fused.toml")
    held = sd15(monkeypatch)
    layers = {site.key: site.hidden for site in attention_sites(held.model.diffusion_model)}
    spec = FusedSpec("SD1.5", about.noise, about.face, layers)
    with META:
        module = fused_math.FusedAdapter(spec, torch.zeros(77, 768), None, comfy.ops.disable_weight_init)
        faces = torch.zeros(2, 4, about.face // 8, about.face // 8)
    loaded = LoadedFused(spec, ModelPatcher(module, META, META), MemoryBank(0), "fused")
    people = [fused_node.Bound(faces, [1.0] * 2, None, "")]
    places = fused_node.fitting(spec, held)
    adapter_step(held, fused_node.Fused(loaded, held, places, people, "all", ALWAYS, unfold=True), module)


def test_infinite_id_of_the_papers_scale_takes_a_step(monkeypatch: pytest.MonkeyPatch) -> None:
    run, about = tasks.settings("infinite_id", EIGHT_GPUS / "infinite_id.toml")
    told = (run.batch, run.rate, run.decay, run.steps, about.snr, about.enhanced)
    assert told == (4, 1e-4, 0.01, 1000000, math.inf, True)
    for module in (attention, patch):
        monkeypatch.setattr(module, "optimized_attention", attention.attention_pytorch)
    wide = {**standin_models.SDXL, "model_channels": 320, "channel_mult": [1, 2, 4]}
    with META:
        settings = supported_models.SDXL(dict(wide))
        settings.unet_config |= {key: wide[key] for key in ("num_heads", "num_head_channels")}
        settings.set_inference_dtype(torch.float32, None)
        held = ModelPatcher(model_base.SDXL(settings, device=META).requires_grad_(False), META, META)
        sites = attention_sites(held.model.diffusion_model)
        layers = tuple(site.hidden for site in sites)
        spec = AdapterSpec(infinite_math.KIND, "SDXL", 257 + about.tokens, 2048, layers, infinite_math.NEEDS)
        module = infinite_id.build(about, spec, 1280).requires_grad_(True)
        read = {spec.needs[0].id("0" * 64): torch.zeros(2, 512), spec.needs[1].id("0" * 64): torch.zeros(2, 257, 1280)}
    assert len(sites) == 70 and spec.layers.count(1280) == 60  # of each a pair of keys and values (Sec. 4.1)
    loaded = LoadedAdapter(spec, ModelPatcher(module, META, META), {}, "infinite_id")
    adapter_step(held, infinite_id.bound(infinite_id.CROSS[about.enhanced], loaded, read, sites), module)


def test_flashface_of_real_scale_has_the_published_shapes_and_takes_a_step(monkeypatch: pytest.MonkeyPatch) -> None:
    run, about = tasks.settings("flashface", EIGHT_GPUS / "flashface.toml")
    assert (8 * run.batch, run.rate, run.steps, about.side, about.references) == (32, 2e-5, 50000, 768, 4)
    assert about.tuned and (about.no_text, about.no_face, about.no_place) == (0.1, 0.1, 0.1)
    base = sd15(monkeypatch).model
    with META:
        net, added = flashface.build(base, about, 8)
        main = flashface.tuned(base, 8)
    shapes = json.loads((GOLDEN / "flashface" / "manifest_sd15.json").read_text())["parameters"]
    published = flashface_math.parts({key: torch.empty(shape, device=META) for key, shape in shapes.items()})
    for mine, theirs in ((main, published.main), (net, published.reference)):
        assert {key: value.shape for key, value in mine.diffusion_model.state_dict().items()} == {
            key: value.shape for key, value in theirs.items()
        }
    saved = own_flashface.tensors({}, added, {})
    assert {key: value.shape for key, value in saved.items()} == {
        f"added.{key}": value.shape for key, value in published.added.items()
    }
    eyes, layers = (ModelPatcher(module, META, META) for module in (net, added))
    loaded = LoadedReferenceNet(eyes, layers, MemoryBank(0), "flashface")
    painter = with_added(with_place(ModelPatcher(main, META, META)), layers)
    read, text = (
        torch.zeros(2 * 3, 4, about.face // 8, about.face // 8, device=META),
        torch.zeros(1, 77, 768, device=META),
    )
    seen = torch.ones(2, 1, 1, device=META)
    place = torch.zeros(2, 1, 64, 64, device=META)
    shown = flashface.shown(painter, loaded, read, seen, text)
    adapter_step(painter, shown, net, added, main, c_concat=place)


def test_omni_id_of_real_scale_is_the_papers_and_takes_a_step() -> None:
    run, told = tasks.settings("omni_masked", EIGHT_GPUS / "omni_masked.toml")
    assert (run.batch, run.rate, told.mask, told.least, told.most, told.targets) == (32, 1e-4, 0.95, 1, 3, 8)
    assert replace(told.spec, image_size=224) == OmniIDSpec() and told.spec.image_size == 448
    with META:
        module = encoder.fresh(replace(told, trunk=""), 0)
        decoder = masked.MaskedDecoder(told.spec, replace(told, checkpointing=False))
        seen, targets = (torch.zeros(1, n, 448, 448, 4, dtype=torch.uint8) for n in (3, 2))
        hidden = torch.zeros(1, 2, 1024, dtype=torch.bool)
        masked.wrong(masked.reconstruct(module, decoder, seen, targets, hidden), targets).backward()
    parts = {name: sum(w.numel() for w in part.parameters()) // 10**6 for name, part in module.named_children()}
    # ViT-H/14's 632 millions, and its positions for pictures twice as large.
    assert parts == {"trunk": 633, "cross": 39, "self": 39, "norm": 0} and len(decoder.cross) == 6 == 3 * len(
        decoder.self
    )
    for part in (module, decoder):
        assert all((value.grad is not None) == value.requires_grad for value in part.parameters())
        torch.optim.SGD(loop.groups(part, 0.01), lr=0.1).step()


def test_the_adapter_to_omni_id_of_real_scale_takes_a_step(monkeypatch: pytest.MonkeyPatch) -> None:
    _, about = tasks.settings("decoupled", EIGHT_GPUS / "omni_adapter.toml")
    run, second = tasks.settings("omni_flow", EIGHT_GPUS / "omni_flow.toml")
    assert (run.batch * 8, run.steps, second.targets, about.photos) == (32, 5000, 8, 3)
    held, told = sd15(monkeypatch), OmniIDSpec()
    sites = attention_sites(held.model.diffusion_model)
    widths = tuple(site.hidden for site in sites)
    spec = AdapterSpec(omni_adapter.KIND, "SD1.5", told.tokens, 768, widths, (omni_adapter.TOKENS,), as_text=False)
    with META:
        module = decoupled.build(about, spec, told.width).requires_grad_(True)
        rows = torch.zeros(2, told.tokens, told.width, requires_grad=True)
    two, key = torch.ones(2), omni_adapter.TOKENS.id("0" * 64)
    who = Identity("batch", two, two, two, two, embeddings={key: rows})
    spread = decoupled_node.shares(sites, "SD1.5", "linear", "")
    loaded = LoadedAdapter(spec, ModelPatcher(module, META, META), {}, "omni")
    injection = decoupled_node.Decoupled(loaded, who, spread, 1.0, "V only", 1.0, True, None, ALWAYS)
    adapter_step(held, injection, module)
    assert rows.grad is not None  # and with it the encoder's, in the second stage
    written = json.loads(omni_adapter.metadata(spec, {})["likeness"])
    assert omni_adapter.read_spec(module.state_dict(), written, "a file") == spec


def step(module: nn.Module, *given: Tensor, **named: Tensor) -> Any:
    """What a module makes of this, once all its weights have had a gradient of it and a step."""
    made = module(*given, **named)
    (made if isinstance(made, Tensor) else made[2]).square().mean().backward()
    assert all(value.grad is not None for value in module.parameters())
    torch.optim.SGD(loop.groups(module, 0.01), lr=0.1).step()  # AdamW counts its steps, and there are no numbers here
    return made


def published_sd15() -> dict[str, tuple[int, ...]]:
    """The shapes of SD1.5's UNet, by the host's own detection: it knows the model only by these."""
    full = {**standin_models.SD15, "channel_mult": [1, 2, 4, 4]}
    return standin_models.unet(full)


def test_shards_are_a_source(tmp_path: Path) -> None:
    album = data.WorldAlbum("train", 64, people=3)
    data.write_shards(album, tmp_path, pictures=2, lossless=True)
    pairs = data.WorldAlbum("train", 64, people=2, figures=2)
    data.write_shard(pairs, range(2), tmp_path / "pairs.tar", 1, lossless=True)
    order = [(album, 0, 0), (album, 1, 0), (album, 2, 0), (pairs, 0, 0), (pairs, 1, 0), (album, 0, 1), (album, 1, 1)]
    shards = source.find(str(tmp_path))
    for number, (of, person, picture) in enumerate([*order, (album, 2, 1), (album, 0, 0)]):
        view = of.view(person, picture)
        assert torch.equal(shards.picture(number, 64), view.picture) and shards.caption(number) == view.caption
    assert shards.picture(0, 32).shape == (32, 32, 3)
    view = album.view(1, 1)
    crop = faces.pixels(faces.align(view.picture.double() / 255, view.kps, 112))
    assert torch.equal(shards.face(4, 1), crop) and not torch.equal(shards.face(4, 0), crop)
    said = {word.strip(",") for number in range(8) for word in shards.caption(number).split()}
    assert shards.words == sorted(said)
    assert list(clip.tokens_of(clip.SDTokenizer(), None)) == list(range(49408))
    with pytest.raises(ValueError, match="0 shards"):
        source.find(str(tmp_path / "none"))


def test_portrait_world_is_a_source(tmp_path: Path) -> None:
    world = source.find("world")
    picture = world.picture(8, 64)
    assert picture.shape == (64, 64, 3) and picture.dtype == torch.uint8
    assert torch.equal(picture, world.picture(8, 64)) and not torch.equal(picture, world.picture(9, 64))
    assert world.face(1, 5).shape == (112, 112, 3)
    captions = [world.caption(number) for number in range(64)]
    words = {word.strip(",") for text in captions for word in text.split()}
    assert words <= set(world.words)
    assert sum("two" in text or "people" in text for text in captions) == 8
    config = tmp_path / "vae.toml"
    config.write_text(
        f'[run]\nfolder = "{tmp_path}/run"\nsteps = 1\nbatch = 1\nrate = 1e-3\nprecision = "bf16"\n[task]\nside = 32\n'
    )
    done = subprocess.run(
        [sys.executable, "-m", "training", "vae", "--config", str(config)], cwd=ROOT, capture_output=True
    )
    assert done.returncode == 0, done.stderr.decode()
    assert (tmp_path / "run" / "model" / vae.FILE).is_file()
    drawn = Image.open(tmp_path / "run" / "drawn" / "pictures-00000001.png")
    assert drawn.size == (vae.SHOWN * 32, 2 * 32)
