"""The base models: each trains a few steps, and ComfyUI and the pack run the files."""

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
import torch
from comfy.model_patcher import ModelPatcher
from comfyui_likeness.likeness.encoders import token_embedding
from comfyui_likeness.training.base_models import clip_pair, latents, unet, vae
from comfyui_likeness.training.data import image_source, shard_source
from comfyui_likeness.training.task import init_weights, make_generator
from safetensors import safe_open
from safetensors.torch import load_file
from support import base_stack
from support.host_models import SAMPLER_DEFAULTS
from support.toy_tasks import DISC_WORLD, DiscWorld, read_logged_values, train_few_steps
from torch import Tensor

CPU = torch.device("cpu")
ROOT = Path(__file__).resolve().parents[2]

SMALL_CLIP = clip_pair.CLIPConfig(
    width=32, layers=2, num_heads=2, vision_width=32, vision_layers=2, vision_num_heads=2, resolution=32, patch=8
)


def read_metadata(file: Path) -> dict[str, Any]:
    with safe_open(file, "pt") as opened:
        return json.loads(opened.metadata()["likeness"])


@pytest.fixture(scope="module")
def trained(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with a VAE, a CLIP pair and a UNet after two steps each."""
    base = tmp_path_factory.mktemp("trained")
    train_few_steps(lambda: vae.VAETask(vae.VAEConfig(resolution=32), DISC_WORLD, 0), base / "vae", batch_size=2)
    train_few_steps(lambda: clip_pair.CLIPPair(SMALL_CLIP, DISC_WORLD, 0), base / "clip")
    train_few_steps(lambda: unet.TextToImage(make_unet_config(base), DISC_WORLD, 0), base / "unet", batch_size=2)
    return base


def make_unet_config(base: Path) -> unet.UNetConfig:
    files = {
        "vae": str(base / "vae" / "model" / vae.VAE_FILE),
        "text": str(base / "clip" / "model" / clip_pair.TEXT_FILE),
    }
    return unet.UNetConfig(
        resolution=32,
        model_channels=32,
        channel_mult=(1, 1),
        transformer_depth=(1, 0),
        num_res_blocks=1,
        num_heads=2,
        **files,
    )


def test_comfyui_loads_the_vae(trained: Path) -> None:
    file = trained / "vae" / "model" / vae.VAE_FILE
    metadata = read_metadata(file)
    assert metadata["kind"] == "vae" and metadata["notes"]["steps"] == 2
    assert metadata["settings"]["resolution"] == 32
    host = comfy.sd.VAE(sd=comfy.utils.load_torch_file(str(file)))
    image = image_source.load_images(DISC_WORLD, [3], 64).movedim(1, -1)
    with torch.inference_mode():
        latent = host.encode(image)
        back = host.decode(latent)
    assert latent.shape == (1, 4, 8, 8) and back.shape == (1, 64, 64, 3)
    own = vae.load_vae(file)
    with torch.no_grad():
        assert torch.allclose(latent, own.encode(image.movedim(-1, 1) * 2 - 1), atol=1e-3)
    # The model's latents have the scale that the VAE's losses ask for.
    assert torch.allclose(latent * 0.18215, own.taesd_encoder(image.movedim(-1, 1)), atol=1e-3)


def test_the_vae_starts_from_a_file(trained: Path) -> None:
    file = trained / "vae" / "model" / vae.VAE_FILE
    fresh, started = (
        vae.VAETask(vae.VAEConfig(resolution=32, init_from=init_from), DISC_WORLD, 3) for init_from in ("", str(file))
    )
    first = vae.load_vae(file).state_dict()
    assert all(torch.equal(value, first[key]) for key, value in started.vae.state_dict().items())
    assert not torch.equal(fresh.vae.taesd_encoder[0].weight, started.vae.taesd_encoder[0].weight)
    assert {value.requires_grad for value in started.vae.taesd_encoder.parameters()} == {True}


def load_host_clip(base: Path) -> comfy.sd.CLIP:
    """The trained text encoder as ComfyUI's CLIP, from its file alone."""
    file = base / "clip" / "model" / clip_pair.TEXT_FILE
    options = {"model_config": read_metadata(file)["settings"]["config"]}
    return comfy.sd.load_text_encoder_state_dicts(
        [token_embedding.expand_token_table(load_file(file))], model_options=options
    )


def test_comfyui_loads_the_text_encoder(trained: Path) -> None:
    host, own = load_host_clip(trained), clip_pair.load_text_encoder(trained / "clip" / "model" / clip_pair.TEXT_FILE)
    for text in ("a red disc at the left", "an elephant, (red:1.3)", ""):
        tokens = host.tokenize(text)
        plain = [[token for token, _ in tokens["l"][0]]]
        assert plain == clip_pair.tokenize_texts(clip_pair.SDTokenizer(), [text])
        with torch.inference_mode():
            seen = host.encode_from_tokens(host.tokenize(text.replace("(red:1.3)", "red")))
            expected = own(clip_pair.tokenize_texts(clip_pair.SDTokenizer(), [text.replace("(red:1.3)", "red")]))[0]
        assert seen.shape == (1, 77, 32) and torch.allclose(seen.float(), expected, atol=2e-3)


def test_unknown_words_share_an_embedding(trained: Path) -> None:
    own = clip_pair.load_text_encoder(trained / "clip" / "model" / clip_pair.TEXT_FILE)

    def encode(text: str) -> Tensor:
        return own(clip_pair.tokenize_texts(clip_pair.SDTokenizer(), [text]))[0]

    with torch.no_grad():
        assert torch.equal(encode("a cat at the left"), encode("a dog at the left"))
        assert not torch.equal(encode("a red disc"), encode("a blue disc"))
        assert not torch.equal(encode("a cat"), encode("a"))


def test_comfyui_loads_the_vision_tower(trained: Path) -> None:
    file = trained / "clip" / "model" / clip_pair.VISION_FILE
    host = comfy.clip_vision.ClipVisionModel(read_metadata(file)["settings"]["config"])
    assert host.load_sd(load_file(file)) == ([], [])
    image = image_source.load_images(DISC_WORLD, [3, 4], 64).movedim(1, -1)
    with torch.inference_mode():
        out = host.encode_image(image)
    assert out["image_embeds"].shape == (2, 32) and out["penultimate_hidden_states"].shape == (2, 17, 32)
    assert not torch.allclose(out["image_embeds"][0], out["image_embeds"][1])


def test_the_clip_pair_learns_all_its_weights(tmp_path: Path) -> None:
    made: list[clip_pair.CLIPPair] = []

    def make() -> clip_pair.CLIPPair:
        made.append(clip_pair.CLIPPair(replace(SMALL_CLIP, token_dropout=0.2), DISC_WORLD, 0))
        return made[0]

    _, losses = train_few_steps(make, tmp_path, steps=30, batch_size=8, warmup_steps=0, learning_rate=3e-3)
    assert sum(losses[-5:]) < 0.8 * sum(losses[:5])
    fresh = clip_pair.CLIPPair(SMALL_CLIP, DISC_WORLD, 0).state_dict()
    still = [key for key, value in made[0].state_dict().items() if torch.equal(value, fresh[key])]
    assert still == []
    shown = made[0].make_samples(make_generator(1))
    assert 0 <= float(shown["caption_found"]) <= 1 and set(shown) == {"caption_found", "image_found"}


def test_a_pair_starts_from_a_folder_and_its_vision_tower_learns_heads(tmp_path: Path) -> None:
    first = tmp_path / "first"
    first.mkdir()
    base_stack.make_base_stack(first)
    settings = replace(base_stack.CLIP_PAIR_CONFIG, head_contrast_weight=2.0, init_from=str(first))
    made: list[clip_pair.CLIPPair] = []

    def make() -> clip_pair.CLIPPair:
        made.append(clip_pair.CLIPPair(settings, shard_source.ShardSource(first), 0))
        return made[0]

    folder, _ = train_few_steps(make, tmp_path, steps=20, batch_size=4, warmup_steps=0)
    heads = [*read_logged_values(tmp_path, "head_contrast").values()]
    assert sum(heads[-4:]) < 0.7 * sum(heads[:4])
    before, after = (load_file(place / clip_pair.TEXT_FILE) for place in (first, folder))
    assert before.keys() == after.keys() and all(torch.equal(before[key], after[key]) for key in before)
    before, after = (load_file(place / clip_pair.VISION_FILE) for place in (first, folder))
    assert before.keys() == after.keys()
    assert [key for key in before if torch.equal(before[key], after[key])] == []
    pairs = made[0].make_batch(make_generator(3), 6)["head_crops"]
    assert pairs.shape == (2, 3, 3, 128, 128)
    assert torch.equal(pairs, made[0].make_batch(make_generator(3), 6)["head_crops"])
    assert len(pairs.flatten(0, 1).flatten(1).unique(dim=0)) == 6  # two of each of three people
    with pytest.raises(ValueError, match="expected a folder of shards"):
        clip_pair.CLIPPair(settings, DISC_WORLD, 0)


def test_gradients_through_layers_that_add_in_place() -> None:
    """ComfyUI's layers add in place; the gradients are those of layers that do not."""
    torch.manual_seed(1)
    pair = clip_pair.CLIPPair(SMALL_CLIP, DISC_WORLD, 0)
    layer = pair.vision.vision_model.encoder.layers[0]
    attention: Any = lambda q, k, v, heads, mask=None: v  # noqa: E731
    x = torch.randn(1, 5, 32, requires_grad=True)
    layer(x * 1, None, attention).square().sum().backward()
    found, x.grad = x.grad, None
    y = x + layer.self_attn(layer.layer_norm1(x), None, attention)
    (y + layer.mlp(layer.layer_norm2(y))).square().sum().backward()
    assert found is not None and torch.allclose(found, x.grad, atol=1e-5)


def test_the_captions_of_a_batch_differ() -> None:
    found = image_source.sample_captions(DISC_WORLD, make_generator(4), 12)
    assert len(found) == 12 and all(DISC_WORLD.load_caption(number) == text for text, number in found.items())
    assert len(image_source.sample_captions(DISC_WORLD, make_generator(4), 50)) == 16  # there are no more
    with pytest.raises(ValueError, match="got 16 different captions; expected 17; lower batch_size"):
        clip_pair.CLIPPair(SMALL_CLIP, DISC_WORLD, 0).make_batch(make_generator(4), 17)


def test_comfyui_samples_the_unet(trained: Path) -> None:
    file = trained / "unet" / "model" / unet.UNET_FILE
    model = unet.load_unet(file)
    clip = load_host_clip(trained)
    positive, negative = (clip.encode_from_tokens_scheduled(clip.tokenize(text)) for text in ("a red disc", ""))
    patcher = ModelPatcher(model, CPU, CPU)
    noise = torch.randn(1, 4, 4, 4, generator=make_generator(2))
    with torch.inference_mode():
        latent = comfy.sample.sample(
            patcher, noise, positive=positive, negative=negative, latent_image=torch.zeros_like(noise),
            disable_pbar=True, seed=1, **SAMPLER_DEFAULTS,
        )  # fmt: skip
        image = comfy.sd.VAE(sd=load_file(trained / "vae" / "model" / vae.VAE_FILE)).decode(latent)
    assert image.shape == (1, 32, 32, 3) and bool(image.isfinite().all())
    assert read_metadata(file)["base"] == "SD1.5"


def test_the_loss_of_epsilon_prediction(trained: Path) -> None:
    task = unet.TextToImage(replace(make_unet_config(trained), snr_gamma=math.inf), DISC_WORLD, 0)
    batch = task.make_batch(make_generator(1), 6)
    # Its last layer starts at 0: it predicts no noise.
    assert float(task(batch)["noise"].detach()) == pytest.approx(float(batch["noise"].square().mean()), rel=1e-3)
    clean = task.model.process_latent_in(latents.encode_latents(task.frozen.autoencoder, batch["images"]))
    sigma = task.model.model_sampling.sigma(batch["timesteps"])[:, None, None, None]
    each = batch["noise"].square().mean((1, 2, 3))
    weighted = unet.TextToImage(make_unet_config(trained), DISC_WORLD, 0)(batch)["noise"]  # min(SNR, 5) / SNR each
    assert float(weighted.detach()) == pytest.approx(
        float((each * (5 * sigma.flatten() ** 2).clamp(max=1)).mean()), rel=1e-3
    )
    scaled = (clean + sigma * batch["noise"]) / (1 + sigma**2) ** 0.5
    inputs: list[Tensor] = []
    task.model.diffusion_model.input_blocks[0][0].register_forward_pre_hook(lambda _, args: inputs.append(args[0]))
    task(batch)
    assert torch.allclose(inputs[0], scaled, atol=1e-5)


@pytest.mark.parametrize("snr_gamma", [math.inf, 5.0])
def test_the_loss_of_v_prediction(trained: Path, tmp_path: Path, snr_gamma: float) -> None:
    task = unet.TextToImage(
        replace(make_unet_config(trained), prediction="velocity", snr_gamma=snr_gamma), DISC_WORLD, 0
    )
    batch = task.make_batch(make_generator(1), 6)
    clean = task.model.process_latent_in(latents.encode_latents(task.frozen.autoencoder, batch["images"]))
    sigma = task.model.model_sampling.sigma(batch["timesteps"])[:, None, None, None]
    velocity = (batch["noise"] - sigma * clean) / (1 + sigma**2) ** 0.5
    # Its last layer starts at 0. min(SNR + 1, 5) / (SNR + 1) each
    ratio = sigma.flatten() ** -2
    weights = (ratio + 1).clamp(max=snr_gamma) / (ratio + 1)
    expected = (velocity.square().mean((1, 2, 3)) * weights).mean()
    assert float(task(batch)["noise"].detach()) == pytest.approx(float(expected), rel=1e-3)
    task.save_model(tmp_path, {})
    again, noisy = unet.load_unet(tmp_path / unet.UNET_FILE), clean + sigma * batch["noise"]
    with torch.no_grad():
        denoised = again.apply_model(
            noisy, sigma.flatten(), c_crossattn=task.frozen.encode_tokens(batch["tokens"], CPU)
        )
    assert torch.allclose(denoised, noisy / (1 + sigma**2), atol=1e-5)


def test_unknown_predictions_are_rejected(trained: Path) -> None:
    with pytest.raises(ValueError, match="got prediction = 'image' in .task.; expected noise or velocity"):
        replace(make_unet_config(trained), prediction="image")


def test_cached_latents_are_computed_once_and_train_alike(trained: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(latents, "IMAGES_PER_FILE", 4)
    settings = replace(make_unet_config(trained), cached_samples=6)
    task = unet.TextToImage(settings, DISC_WORLD, 0)
    cached = task.frozen.cached_latents
    assert cached is not None and cached.shape == (6, 4, 4, 4)
    encoded = latents.encode_latents(task.frozen.autoencoder, image_source.load_images(DISC_WORLD, range(6), 32))
    assert torch.allclose(cached.float(), encoded, atol=6e-2)  # bfloat16
    batch = task.make_batch(make_generator(1), 5)
    assert {tuple(row.flatten().tolist()) for row in batch["latents"]} <= {
        tuple(row.flatten().tolist()) for row in cached.float()
    }
    numbers = image_source.random_indices(make_generator(1), 5, 6)
    uncached = {key: value for key, value in batch.items() if key != "latents"}
    uncached["images"] = image_source.load_images(DISC_WORLD, numbers, 32)
    task.model.diffusion_model.out[2].weight.data.normal_(generator=make_generator(2))
    assert float(task(batch)["noise"].detach()) == pytest.approx(float(task(uncached)["noise"].detach()), rel=1e-2)
    (last,) = Path(settings.vae).parent.glob("latents-*-32/00000004.safetensors")
    assert len(load_file(last)["kept"]) == 4
    first = last.with_name("00000000.safetensors")
    stamps = first.stat().st_mtime_ns, last.unlink()
    again = unet.TextToImage(settings, DISC_WORLD, 0).frozen.cached_latents
    assert again is not None and torch.equal(again, cached)
    assert last.is_file() and first.stat().st_mtime_ns == stamps[0]

    class Darker(DiscWorld):
        def load_image(self, number: int, resolution: int) -> Tensor:
            return super().load_image(number, resolution) // 2

    darker = unet.TextToImage(settings, Darker(), 0).frozen.cached_latents
    assert darker is not None and not torch.equal(darker, cached)


def test_captions_are_dropped(trained: Path) -> None:
    task = unet.TextToImage(replace(make_unet_config(trained), caption_dropout=0.5), DISC_WORLD, 0)
    empty = clip_pair.tokenize_texts(task.tokenizer, [""])[0]
    dropped = sum(row == empty for row in task.make_batch(make_generator(1), 200)["tokens"])
    assert 70 < dropped < 130


def test_heads_have_a_larger_loss_weight(trained: Path) -> None:
    plain, task = (
        unet.TextToImage(replace(make_unet_config(trained), face_loss_weight=n), DISC_WORLD, 0) for n in (1.0, 3.0)
    )
    assert "loss_weights" not in plain.make_batch(make_generator(2), 3)
    batch = task.make_batch(make_generator(2), 3)
    weights = batch["loss_weights"]
    assert weights.shape == (3, 4, 4) and torch.allclose(weights.mean((1, 2)), torch.ones(3))
    assert torch.allclose(weights.amax((1, 2)), 3 * weights.amin((1, 2)))
    (top,) = task.make_loss_weights(
        [next(number for number in range(99) if DISC_WORLD.load_caption(number).endswith("top"))]
    )["loss_weights"]
    assert top[:2].max() > top[3].max()
    init_weights(task.model.diffusion_model, 4)
    noised = unet.NoisedLatents.from_batch(task.model, {**batch, "latents": torch.zeros(3, 4, 4, 4)})
    text = task.frozen.encode_tokens(batch["tokens"], CPU)
    with torch.no_grad():
        plain = unet.denoising_loss(task.model, noised, 5.0, c_crossattn=text)
        ones = unet.denoising_loss(task.model, noised, 5.0, loss_weights=torch.ones(3, 4, 4), c_crossattn=text)
        weighted = unet.denoising_loss(task.model, noised, 5.0, loss_weights=weights, c_crossattn=text)
    assert torch.allclose(plain, ones) and not torch.allclose(plain, weighted)


def test_a_unet_starts_from_a_narrower_one(trained: Path) -> None:
    file = str(trained / "unet" / "model" / unet.UNET_FILE)
    same, wide = (
        unet.TextToImage(replace(make_unet_config(trained), init_from=file, model_channels=n), DISC_WORLD, 3)
        for n in (32, 64)
    )
    first = unet.load_unet(Path(file)).diffusion_model.state_dict()
    assert all(torch.equal(value, first[key]) for key, value in same.model.diffusion_model.state_dict().items())
    assert torch.equal(wide.model.diffusion_model.out[2].bias, first["out.2.bias"])
    for changes, message in (
        ({"model_channels": 96}, "got [0-9]+ channels to widen"),
        ({"channel_mult": (1, 3)}, "got a UNet of other blocks"),
        ({"channel_mult": (1,), "transformer_depth": (1,)}, "got a UNet of other blocks"),
    ):
        with pytest.raises(ValueError, match=message):
            unet.TextToImage(replace(make_unet_config(trained), init_from=file, **changes), DISC_WORLD, 3)


def test_the_unet_learns_and_samples_do_not_change_it(trained: Path, tmp_path: Path) -> None:
    def make() -> unet.TextToImage:
        return unet.TextToImage(replace(make_unet_config(trained), snr_gamma=math.inf), DISC_WORLD, 0)

    plain, losses = train_few_steps(make, tmp_path / "plain", steps=8, batch_size=4, warmup_steps=0)
    sampled, others = train_few_steps(make, tmp_path / "sampled", steps=8, batch_size=4, warmup_steps=0, sample_every=3)
    assert losses[-1] < losses[0] and others == pytest.approx(losses, rel=1e-5)
    a, b = (load_file(folder / unet.UNET_FILE) for folder in (plain, sampled))
    assert all(torch.allclose(a[key], b[key], atol=1e-4) for key in a)
    assert len(list((tmp_path / "sampled" / "samples").glob("images-*.png"))) == 3
    fresh = {unet.UNET_PREFIX + key: value for key, value in make().model.diffusion_model.state_dict().items()}
    still = [key for key, value in a.items() if torch.equal(value, fresh[key].half())]
    assert still == []


def test_missing_and_wrong_files_are_named(trained: Path, tmp_path: Path) -> None:
    other = trained / "vae" / "model" / vae.VAE_FILE
    for load, file in ((vae.load_vae, tmp_path / "no"), (clip_pair.load_text_encoder, other), (unet.load_unet, other)):
        with pytest.raises(ValueError, match=f"got {file}.*train"):
            load(file)


def test_a_closed_vocabulary_expands_to_the_full_table() -> None:
    short = token_embedding.ClosedVocabularyEmbedding([5, 320, 49407], 8)
    tensors = {
        token_embedding.TOKEN_TABLE_NAME: short.weight.detach(),
        token_embedding.KNOWN_TOKENS_NAME: torch.tensor(short.known_tokens),
        "other": torch.ones(1),
    }
    table = token_embedding.expand_token_table(tensors)
    assert table[token_embedding.TOKEN_TABLE_NAME].shape == (49408, 8) and set(table) == {
        token_embedding.TOKEN_TABLE_NAME,
        "other",
    }
    tokens = torch.tensor([[5, 49407, 17, 320, 18]])
    assert torch.equal(table[token_embedding.TOKEN_TABLE_NAME][tokens], short(tokens))
    assert short(tokens, out_dtype=torch.float16).dtype == torch.float16
    assert token_embedding.expand_token_table({"other": tensors["other"]}).keys() == {"other"}
    with pytest.raises(ValueError, match="3 token embeddings for 3 known tokens; expected one more"):
        token_embedding.expand_token_table({**tensors, token_embedding.TOKEN_TABLE_NAME: short.weight.detach()[:3]})
    with pytest.raises(ValueError, match="different numbers"):
        token_embedding.index_known_tokens(torch.tensor([1, 1]))
