"""The base stack: each part takes steps by the loop, and the host, the pack or insightface runs the file it becomes."""

from __future__ import annotations

import json
import math
from dataclasses import replace
from pathlib import Path
from typing import Any

import comfy.clip_vision
import comfy.sample
import comfy.sd
import comfy.utils
import pytest
import stacks
import torch
from analyzers import folder as folder
from analyzers import models as models
from analyzers import packs as packs
from comfy.model_patcher import ModelPatcher
from comfyui_likeness.likeness import vocabulary
from comfyui_likeness.training.base import clip, latents, portraits, source, unet, vae
from comfyui_likeness.training.task import chance, start
from models import SAMPLING
from safetensors import safe_open
from safetensors.torch import load_file
from torch import Tensor
from trainings import DISCS, Discs, fit, values

CPU = torch.device("cpu")
ROOT = Path(__file__).resolve().parents[1]

SMALL_CLIP = clip.Settings(
    width=32, layers=2, heads=2, vision_width=32, vision_layers=2, vision_heads=2, side=32, patch=8
)


def told(file: Path) -> dict[str, Any]:
    with safe_open(file, "pt") as opened:
        return json.loads(opened.metadata()["likeness"])


@pytest.fixture(scope="module")
def trained(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with a VAE, a CLIP pair and a UNet after two steps each."""
    base = tmp_path_factory.mktemp("trained")
    fit(lambda: vae.Vae(vae.Settings(side=32), DISCS, 0), base / "vae", batch=2)
    fit(lambda: clip.ClipPair(SMALL_CLIP, DISCS, 0), base / "clip")
    fit(lambda: unet.TextToImage(small_unet(base), DISCS, 0), base / "unet", batch=2)
    return base


def small_unet(base: Path) -> unet.Settings:
    files = {"vae": str(base / "vae" / "model" / vae.FILE), "text": str(base / "clip" / "model" / clip.TEXT)}
    return unet.Settings(side=32, channels=32, levels=(1, 1), depth=(1, 0), blocks=1, heads=2, **files)


def test_the_host_loads_the_vae(trained: Path) -> None:
    file = trained / "vae" / "model" / vae.FILE
    about = told(file)
    assert about["kind"] == "vae" and about["notes"]["steps"] == 2 and about["settings"]["side"] == 32
    host = comfy.sd.VAE(sd=comfy.utils.load_torch_file(str(file)))
    picture = source.pictures(DISCS, [3], 64).movedim(1, -1)
    with torch.inference_mode():
        latent = host.encode(picture)
        back = host.decode(latent)
    assert latent.shape == (1, 4, 8, 8) and back.shape == (1, 64, 64, 3)
    own = vae.load(file)
    with torch.no_grad():
        assert torch.allclose(latent, own.encode(picture.movedim(-1, 1) * 2 - 1), atol=1e-3)
    # The model's own latents are of the size that the VAE's losses ask for.
    assert torch.allclose(latent * 0.18215, own.taesd_encoder(picture.movedim(-1, 1)), atol=1e-3)


def test_the_vae_goes_on_from_a_file(trained: Path) -> None:
    file = trained / "vae" / "model" / vae.FILE
    fresh, begun = (vae.Vae(vae.Settings(side=32, begin=begin), DISCS, 3) for begin in ("", str(file)))
    first = vae.load(file).state_dict()
    assert all(torch.equal(value, first[key]) for key, value in begun.vae.state_dict().items())
    assert not torch.equal(fresh.vae.taesd_encoder[0].weight, begun.vae.taesd_encoder[0].weight)
    assert {value.requires_grad for value in begun.vae.taesd_encoder.parameters()} == {True}


def host_clip(base: Path) -> comfy.sd.CLIP:
    """The trained text encoder as the host's CLIP, from its file alone."""
    file = base / "clip" / "model" / clip.TEXT
    options = {"model_config": told(file)["settings"]["config"]}
    return comfy.sd.load_text_encoder_state_dicts([vocabulary.whole(load_file(file))], model_options=options)


def test_the_host_loads_the_text_encoder(trained: Path) -> None:
    host, own = host_clip(trained), clip.load_text(trained / "clip" / "model" / clip.TEXT)
    for text in ("a red disc at the left", "an elephant, (red:1.3)", ""):
        tokens = host.tokenize(text)
        plain = [[token for token, _ in tokens["l"][0]]]
        assert plain == clip.tokenize(clip.SDTokenizer(), [text])
        with torch.inference_mode():
            seen = host.encode_from_tokens(host.tokenize(text.replace("(red:1.3)", "red")))
            expected = own(clip.tokenize(clip.SDTokenizer(), [text.replace("(red:1.3)", "red")]))[0]
        assert seen.shape == (1, 77, 32) and torch.allclose(seen.float(), expected, atol=2e-3)


def test_unknown_words_are_all_alike(trained: Path) -> None:
    own = clip.load_text(trained / "clip" / "model" / clip.TEXT)

    def encode(text: str) -> Tensor:
        return own(clip.tokenize(clip.SDTokenizer(), [text]))[0]

    with torch.no_grad():
        assert torch.equal(encode("a cat at the left"), encode("a dog at the left"))
        assert not torch.equal(encode("a red disc"), encode("a blue disc"))
        assert not torch.equal(encode("a cat"), encode("a"))


def test_the_host_loads_the_vision_tower(trained: Path) -> None:
    file = trained / "clip" / "model" / clip.VISION
    host = comfy.clip_vision.ClipVisionModel(told(file)["settings"]["config"])
    assert host.load_sd(load_file(file)) == ([], [])
    picture = source.pictures(DISCS, [3, 4], 64).movedim(1, -1)
    with torch.inference_mode():
        out = host.encode_image(picture)
    assert out["image_embeds"].shape == (2, 32) and out["penultimate_hidden_states"].shape == (2, 17, 32)
    assert not torch.allclose(out["image_embeds"][0], out["image_embeds"][1])


def test_the_clip_pair_learns_all_its_weights(tmp_path: Path) -> None:
    made: list[clip.ClipPair] = []

    def make() -> clip.ClipPair:
        made.append(clip.ClipPair(replace(SMALL_CLIP, forget=0.2), DISCS, 0))
        return made[0]

    _, losses = fit(make, tmp_path, steps=30, batch=8, warmup=0, rate=3e-3)
    assert sum(losses[-5:]) < 0.8 * sum(losses[:5])
    fresh = clip.ClipPair(SMALL_CLIP, DISCS, 0).state_dict()
    still = [key for key, value in made[0].state_dict().items() if torch.equal(value, fresh[key])]
    assert still == []
    shown = made[0].draw(chance(1))
    assert 0 <= float(shown["caption_found"]) <= 1 and set(shown) == {"caption_found", "picture_found"}


def test_a_pair_goes_on_and_its_tower_learns_to_tell_people(tmp_path: Path) -> None:
    first = tmp_path / "first"
    first.mkdir()
    stacks.make(first)
    told = replace(stacks.TOWERS, heads_alike=2.0, begin=str(first))
    made: list[clip.ClipPair] = []

    def make() -> clip.ClipPair:
        made.append(clip.ClipPair(told, portraits.Shards(first), 0))
        return made[0]

    folder, _ = fit(make, tmp_path, steps=20, batch=4, warmup=0)
    heads = [*values(tmp_path, "heads").values()]
    assert sum(heads[-4:]) < 0.7 * sum(heads[:4])
    before, after = (load_file(place / clip.TEXT) for place in (first, folder))
    assert before.keys() == after.keys() and all(torch.equal(before[key], after[key]) for key in before)
    before, after = (load_file(place / clip.VISION) for place in (first, folder))
    assert before.keys() == after.keys()
    assert [key for key in before if torch.equal(before[key], after[key])] == []
    pairs = made[0].batch(chance(3), 6)["heads"]
    assert pairs.shape == (2, 3, 3, 128, 128)
    assert torch.equal(pairs, made[0].batch(chance(3), 6)["heads"])
    assert len(pairs.flatten(0, 1).flatten(1).unique(dim=0)) == 6  # six heads, of three people
    with pytest.raises(ValueError, match="expected a folder of shards"):
        clip.ClipPair(told, DISCS, 0)


def test_what_the_towers_norms_read_is_kept_for_the_gradient() -> None:
    """The host's layers add in place; the gradients are those of layers that do not."""
    torch.manual_seed(1)
    pair = clip.ClipPair(SMALL_CLIP, DISCS, 0)
    layer = pair.vision.vision_model.encoder.layers[0]
    attention: Any = lambda q, k, v, heads, mask=None: v  # noqa: E731
    x = torch.randn(1, 5, 32, requires_grad=True)
    layer(x * 1, None, attention).square().sum().backward()
    found, x.grad = x.grad, None
    y = x + layer.self_attn(layer.layer_norm1(x), None, attention)
    (y + layer.mlp(layer.layer_norm2(y))).square().sum().backward()
    assert found is not None and torch.allclose(found, x.grad, atol=1e-5)


def test_captions_of_a_batch_differ() -> None:
    found = source.captions(DISCS, chance(4), 12)
    assert len(found) == 12 and all(DISCS.caption(number) == text for text, number in found.items())
    assert len(source.captions(DISCS, chance(4), 50)) == 16  # there are no more
    with pytest.raises(ValueError, match="got 16 different captions; expected 17; take a smaller batch"):
        clip.ClipPair(SMALL_CLIP, DISCS, 0).batch(chance(4), 17)


def test_the_host_samples_the_unet(trained: Path) -> None:
    file = trained / "unet" / "model" / unet.FILE
    model = unet.load(file)
    clip_ = host_clip(trained)
    positive, negative = (clip_.encode_from_tokens_scheduled(clip_.tokenize(text)) for text in ("a red disc", ""))
    held = ModelPatcher(model, CPU, CPU)
    noise = torch.randn(1, 4, 4, 4, generator=chance(2))
    with torch.inference_mode():
        latent = comfy.sample.sample(
            held, noise, positive=positive, negative=negative, latent_image=torch.zeros_like(noise),
            disable_pbar=True, seed=1, **SAMPLING,
        )  # fmt: skip
        picture = comfy.sd.VAE(sd=load_file(trained / "vae" / "model" / vae.FILE)).decode(latent)
    assert picture.shape == (1, 32, 32, 3) and bool(picture.isfinite().all())
    assert told(file)["base"] == "SD1.5"


def test_the_loss_is_the_noises(trained: Path) -> None:
    task = unet.TextToImage(replace(small_unet(trained), snr=math.inf), DISCS, 0)
    batch = task.batch(chance(1), 6)
    # Its last layer begins at 0: it says that there is no noise.
    assert float(task(batch)["noise"].detach()) == pytest.approx(float(batch["noise"].square().mean()), rel=1e-3)
    clear = task.model.process_latent_in(latents.encode(task.frozen.autoencoder, batch["pictures"]))
    sigma = task.model.model_sampling.sigma(batch["times"])[:, None, None, None]
    each = batch["noise"].square().mean((1, 2, 3))
    weighed = unet.TextToImage(small_unet(trained), DISCS, 0)(batch)["noise"]  # min(SNR, 5) / SNR each
    assert float(weighed.detach()) == pytest.approx(
        float((each * (5 * sigma.flatten() ** 2).clamp(max=1)).mean()), rel=1e-3
    )
    scaled = (clear + sigma * batch["noise"]) / (1 + sigma**2) ** 0.5
    given: list[Tensor] = []
    task.model.diffusion_model.input_blocks[0][0].register_forward_pre_hook(lambda _, args: given.append(args[0]))
    task(batch)
    assert torch.allclose(given[0], scaled, atol=1e-5)


@pytest.mark.parametrize("snr", [math.inf, 5.0])
def test_the_loss_of_the_velocity(trained: Path, tmp_path: Path, snr: float) -> None:
    task = unet.TextToImage(replace(small_unet(trained), prediction="velocity", snr=snr), DISCS, 0)
    batch = task.batch(chance(1), 6)
    clear = task.model.process_latent_in(latents.encode(task.frozen.autoencoder, batch["pictures"]))
    sigma = task.model.model_sampling.sigma(batch["times"])[:, None, None, None]
    velocity = (batch["noise"] - sigma * clear) / (1 + sigma**2) ** 0.5
    # Its last layer begins at 0. min(SNR + 1, 5) / (SNR + 1) each
    ratio = sigma.flatten() ** -2
    counts = (ratio + 1).clamp(max=snr) / (ratio + 1)
    wanted = (velocity.square().mean((1, 2, 3)) * counts).mean()
    assert float(task(batch)["noise"].detach()) == pytest.approx(float(wanted), rel=1e-3)
    task.save(tmp_path, {})
    again, noisy = unet.load(tmp_path / unet.FILE), clear + sigma * batch["noise"]
    with torch.no_grad():
        made = again.apply_model(noisy, sigma.flatten(), c_crossattn=task.frozen.words(batch["tokens"], CPU))
    assert torch.allclose(made, noisy / (1 + sigma**2), atol=1e-5)


def test_what_a_unet_says_is_known(trained: Path) -> None:
    with pytest.raises(ValueError, match="got prediction = 'picture' in .task.; expected noise or velocity"):
        replace(small_unet(trained), prediction="picture")


def test_a_pool_of_latents_is_made_once_and_trains_alike(trained: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(latents, "PIECE", 4)
    settings = replace(small_unet(trained), pool=6)
    task = unet.TextToImage(settings, DISCS, 0)
    pool = task.frozen.pool
    assert pool is not None and pool.shape == (6, 4, 4, 4)
    seen = latents.encode(task.frozen.autoencoder, source.pictures(DISCS, range(6), 32))
    assert torch.allclose(pool.float(), seen, atol=6e-2)  # bfloat16
    batch = task.batch(chance(1), 5)
    assert {tuple(row.flatten().tolist()) for row in batch["latents"]} <= {
        tuple(row.flatten().tolist()) for row in pool.float()
    }
    numbers = source.some(chance(1), 5, 6)
    whole = {key: value for key, value in batch.items() if key != "latents"}
    whole["pictures"] = source.pictures(DISCS, numbers, 32)
    task.model.diffusion_model.out[2].weight.data.normal_(generator=chance(2))
    assert float(task(batch)["noise"].detach()) == pytest.approx(float(task(whole)["noise"].detach()), rel=1e-2)
    (piece,) = Path(settings.vae).parent.glob("latents-*-32/00000004.safetensors")
    assert len(load_file(piece)["kept"]) == 4
    first = piece.with_name("00000000.safetensors")
    stamps = first.stat().st_mtime_ns, piece.unlink()
    again = unet.TextToImage(settings, DISCS, 0).frozen.pool
    assert again is not None and torch.equal(again, pool)
    assert piece.is_file() and first.stat().st_mtime_ns == stamps[0]

    class Darker(Discs):
        def picture(self, number: int, side: int) -> Tensor:
            return super().picture(number, side) // 2

    darker = unet.TextToImage(settings, Darker(), 0).frozen.pool
    assert darker is not None and not torch.equal(darker, pool)


def test_captions_are_dropped(trained: Path) -> None:
    task = unet.TextToImage(replace(small_unet(trained), unprompted=0.5), DISCS, 0)
    empty = clip.tokenize(task.tokenizer, [""])[0]
    dropped = sum(row == empty for row in task.batch(chance(1), 200)["tokens"])
    assert 70 < dropped < 130


def test_heads_count_more(trained: Path) -> None:
    plain, task = (unet.TextToImage(replace(small_unet(trained), heads_count=n), DISCS, 0) for n in (1.0, 3.0))
    assert "counts" not in plain.batch(chance(2), 3)
    batch = task.batch(chance(2), 3)
    counts = batch["counts"]
    assert counts.shape == (3, 4, 4) and torch.allclose(counts.mean((1, 2)), torch.ones(3))
    assert torch.allclose(counts.amax((1, 2)), 3 * counts.amin((1, 2)))
    (top,) = task.counts([next(number for number in range(99) if DISCS.caption(number).endswith("top"))])["counts"]
    assert top[:2].max() > top[3].max()
    start(task.model.diffusion_model, 4)
    given = unet.Noised.of(task.model, {**batch, "latents": torch.zeros(3, 4, 4, 4)})
    text = task.frozen.words(batch["tokens"], CPU)
    with torch.no_grad():
        whole = unet.wrong_noise(task.model, given, 5.0, c_crossattn=text)
        ones = unet.wrong_noise(task.model, given, 5.0, counts=torch.ones(3, 4, 4), c_crossattn=text)
        weighed = unet.wrong_noise(task.model, given, 5.0, counts=counts, c_crossattn=text)
    assert torch.allclose(whole, ones) and not torch.allclose(whole, weighed)


def test_a_unet_goes_on_in_a_wider_one(trained: Path) -> None:
    file = str(trained / "unet" / "model" / unet.FILE)
    same, wide = (unet.TextToImage(replace(small_unet(trained), begin=file, channels=n), DISCS, 3) for n in (32, 64))
    first = unet.load(Path(file)).diffusion_model.state_dict()
    assert all(torch.equal(value, first[key]) for key, value in same.model.diffusion_model.state_dict().items())
    assert torch.equal(wide.model.diffusion_model.out[2].bias, first["out.2.bias"])
    wrong = [({"channels": 96}, "got [0-9]+ channels to widen"), ({"levels": (1, 3)}, "got a UNet of other blocks")]
    for told, why in [*wrong, ({"levels": (1,), "depth": (1,)}, "got a UNet of other blocks")]:
        with pytest.raises(ValueError, match=why):
            unet.TextToImage(replace(small_unet(trained), begin=file, **told), DISCS, 3)


def test_the_unet_learns_and_drawing_leaves_no_trace(trained: Path, tmp_path: Path) -> None:
    def make() -> unet.TextToImage:
        return unet.TextToImage(replace(small_unet(trained), snr=math.inf), DISCS, 0)

    plain, losses = fit(make, tmp_path / "plain", steps=8, batch=4, warmup=0)
    drawn, others = fit(make, tmp_path / "drawn", steps=8, batch=4, warmup=0, draw_every=3)
    assert losses[-1] < losses[0] and others == pytest.approx(losses, rel=1e-5)
    a, b = (load_file(folder / unet.FILE) for folder in (plain, drawn))
    assert all(torch.allclose(a[key], b[key], atol=1e-4) for key in a)
    assert len(list((tmp_path / "drawn" / "drawn").glob("pictures-*.png"))) == 3
    fresh = {unet.PREFIX + key: value for key, value in make().model.diffusion_model.state_dict().items()}
    still = [key for key, value in a.items() if torch.equal(value, fresh[key].half())]
    assert still == []


def test_files_that_are_not_there_or_wrong_are_named(trained: Path, tmp_path: Path) -> None:
    other = trained / "vae" / "model" / vae.FILE
    for load, file in ((vae.load, tmp_path / "no"), (clip.load_text, other), (unet.load, other)):
        with pytest.raises(ValueError, match=f"got {file}.*train"):
            load(file)


def test_a_vocabulary_is_the_table_it_stands_for() -> None:
    short = vocabulary.Vocabulary([5, 320, 49407], 8)
    tensors = {
        vocabulary.TABLE: short.weight.detach(),
        vocabulary.KNOWN: torch.tensor(short.known),
        "other": torch.ones(1),
    }
    table = vocabulary.whole(tensors)
    assert table[vocabulary.TABLE].shape == (49408, 8) and set(table) == {vocabulary.TABLE, "other"}
    tokens = torch.tensor([[5, 49407, 17, 320, 18]])
    assert torch.equal(table[vocabulary.TABLE][tokens], short(tokens))
    assert short(tokens, out_dtype=torch.float16).dtype == torch.float16
    assert vocabulary.whole({"other": tensors["other"]}).keys() == {"other"}
    with pytest.raises(ValueError, match="3 token embeddings for 3 known tokens; expected one more"):
        vocabulary.whole({**tensors, vocabulary.TABLE: short.weight.detach()[:3]})
    with pytest.raises(ValueError, match="different numbers"):
        vocabulary.rows_of(torch.tensor([1, 1]))
