"""The UNet: its losses and batches, its text encoder, and ComfyUI runs the files."""

from __future__ import annotations

import math
from dataclasses import replace
from pathlib import Path

import comfy.sample
import pytest
import torch
from comfy.model_patcher import ModelPatcher
from comfyui_likeness.nodes.loaders import native_models, native_vae
from comfyui_likeness.portrait_world.world_album import WorldAlbum
from comfyui_likeness.training.base_models import clip_pair, latents, unet, vae
from comfyui_likeness.training.data import image_source, shard_source, shards
from comfyui_likeness.training.task import init_weights, make_generator
from safetensors.torch import load_file
from support import small_models
from support.host_models import SAMPLER_DEFAULTS
from support.small_models import load_host_clip, make_unet_config, read_metadata
from support.toy_tasks import DISC_WORLD, DiscWorld, train_few_steps
from torch import Tensor

CPU = torch.device("cpu")


@pytest.fixture(scope="module")
def trained(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return small_models.train_base_models(tmp_path_factory.mktemp("trained"))


def test_comfyui_samples_the_unet(trained: Path) -> None:
    file = trained / "unet" / "model" / unet.UNET_FILE
    model = native_models.load_unet(file)
    clip = load_host_clip(trained / "clip" / "model" / clip_pair.TEXT_FILE)
    positive, negative = (clip.encode_from_tokens_scheduled(clip.tokenize(text)) for text in ("a red disc", ""))
    patcher = ModelPatcher(model, CPU, CPU)
    empty = comfy.sample.fix_empty_latent_channels(patcher, torch.zeros(1, 4, 4, 6))
    noise = comfy.sample.prepare_noise(empty, 2)
    with torch.inference_mode():
        latent = comfy.sample.sample(
            patcher, noise, positive=positive, negative=negative, latent_image=empty, disable_pbar=True, seed=1,
            **SAMPLER_DEFAULTS,
        )  # fmt: skip
        image = native_vae.wrap_vae(native_models.load_vae(trained / "vae" / "model" / vae.VAE_FILE)).decode(latent)
    assert latent.shape == (1, 8, 4, 6) and image.shape == (1, 32, 48, 3) and bool(image.isfinite().all())
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
    again, noisy = native_models.load_unet(tmp_path / unet.UNET_FILE), clean + sigma * batch["noise"]
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
    cached = task.pools[0].cached_latents
    assert cached is not None and cached.shape == (6, 8, 4, 4)
    encoded = latents.encode_latents(task.frozen.autoencoder, image_source.load_images(DISC_WORLD, range(6), 32))
    assert torch.allclose(cached.float(), encoded, atol=6e-2)  # bfloat16
    batch = task.make_batch(make_generator(1), 5)
    assert {tuple(row.flatten().tolist()) for row in batch["latents"]} <= {
        tuple(row.flatten().tolist()) for row in cached.float()
    }
    generator = make_generator(1)
    torch.rand((), generator=generator)  # whether the batch is of wide images
    numbers = image_source.random_indices(generator, 5, 6)
    uncached = {key: value for key, value in batch.items() if key != "latents"}
    uncached["images"] = image_source.load_images(DISC_WORLD, numbers, 32)
    task.model.diffusion_model.out[2].weight.data.normal_(generator=make_generator(2))
    assert float(task(batch)["noise"].detach()) == pytest.approx(float(task(uncached)["noise"].detach()), rel=1e-2)
    (last,) = Path(settings.vae).parent.glob("latents-*-32/00000004.safetensors")
    assert len(load_file(last)["kept"]) == 4
    first = last.with_name("00000000.safetensors")
    stamps = first.stat().st_mtime_ns, last.unlink()
    again = unet.TextToImage(settings, DISC_WORLD, 0).pools[0].cached_latents
    assert again is not None and torch.equal(again, cached)
    assert last.is_file() and first.stat().st_mtime_ns == stamps[0]

    class Darker(DiscWorld):
        def load_image(self, number: int, resolution: int, aspect_ratio: float = 1.0) -> Tensor:
            return super().load_image(number, resolution, aspect_ratio) // 2

    darker = unet.TextToImage(settings, Darker(), 0).pools[0].cached_latents
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
    (top,) = task.pools[0].make_loss_weights(
        [next(number for number in range(99) if DISC_WORLD.load_caption(number).endswith("top"))]
    )["loss_weights"]
    assert top[:2].max() > top[3].max()
    init_weights(task.model.diffusion_model, 4)
    noised = unet.NoisedLatents.from_batch(task.model, {**batch, "latents": torch.zeros(3, 8, 4, 4)})
    text = task.frozen.encode_tokens(batch["tokens"], CPU)
    with torch.no_grad():
        plain = unet.denoising_loss(task.model, noised, 5.0, c_crossattn=text)
        ones = unet.denoising_loss(task.model, noised, 5.0, loss_weights=torch.ones(3, 4, 4), c_crossattn=text)
        weighted = unet.denoising_loss(task.model, noised, 5.0, loss_weights=weights, c_crossattn=text)
    assert torch.allclose(plain, ones) and not torch.allclose(plain, weighted)


def test_the_unet_learns_and_samples_do_not_change_it(trained: Path, tmp_path: Path) -> None:
    def make() -> unet.TextToImage:
        return unet.TextToImage(replace(make_unet_config(trained), snr_gamma=math.inf), DISC_WORLD, 0)

    options = {"steps": 16, "batch_size": 4, "warmup_steps": 0}
    plain, losses = train_few_steps(make, tmp_path / "plain", **options)
    sampled, others = train_few_steps(make, tmp_path / "sampled", sample_every=6, **options)
    assert sum(losses[-4:]) < sum(losses[:4]) and others == pytest.approx(losses, rel=1e-5)
    a, b = (load_file(folder / unet.UNET_FILE) for folder in (plain, sampled))
    assert all(torch.allclose(a[key], b[key], atol=1e-4) for key in a)
    assert len(list((tmp_path / "sampled" / "samples").glob("images-*.png"))) == 3
    fresh = {unet.UNET_PREFIX + key: value for key, value in make().model.diffusion_model.state_dict().items()}
    still = [key for key, value in a.items() if torch.equal(value, fresh[key].half())]
    assert still == []


def test_captions_describe_people_in_a_share(trained: Path) -> None:
    task = unet.TextToImage(make_unet_config(trained, detailed_share=0.5), DISC_WORLD, 0)
    tokens = task.make_batch(make_generator(1), 400)["tokens"]
    endings = [clip_pair.tokenize_texts(task.tokenizer, [f", {word}"])[0][1:3] for word in ("left", "right")]
    ends = [row[: row.index(49407)][-2:] for row in tokens]
    described = [sum(end == ending for end in ends) for ending in endings]
    assert all(60 < count < 120 for count in described)  # 0.9 x 0.5 / 2 of 400


def test_timesteps_are_uniform_or_logit_normal(trained: Path) -> None:
    def sample(**changes: float) -> Tensor:
        task = unet.TextToImage(make_unet_config(trained, **changes), DISC_WORLD, 0)
        return task.make_batch(make_generator(1), 2000)["timesteps"].float()

    assert sample().quantile(torch.tensor([0.25, 0.5, 0.75])).tolist() == pytest.approx([250, 500, 750], abs=30)
    drawn = sample(timestep_mean=0.5, timestep_std=1.2)
    normal = torch.logit((drawn + 0.5) / 1000)
    assert float(normal.mean()) == pytest.approx(0.5, abs=0.1) and float(normal.std()) == pytest.approx(1.2, abs=0.1)
    extreme = sample(timestep_mean=40.0, timestep_std=1.0)
    assert extreme.unique().tolist() == [999]


@pytest.mark.parametrize("checkpointing", [False, True])
def test_the_text_encoder_learns_with_the_unet(trained: Path, tmp_path: Path, checkpointing: bool) -> None:
    settings = make_unet_config(
        trained, text="", text_width=32, text_layers=2, text_heads=2, gradient_checkpointing=checkpointing,
        prediction="velocity", snr_gamma=math.inf,
    )  # fmt: skip
    made: list[unet.TextToImage] = []

    def make() -> unet.TextToImage:
        made.append(unet.TextToImage(settings, DISC_WORLD, 0))
        return made[-1]

    folder, losses = train_few_steps(make, tmp_path, steps=40, batch_size=8, warmup_steps=0, learning_rate=3e-3)
    assert sum(losses[-10:]) < 0.85 * sum(losses[:10])
    file = folder / clip_pair.TEXT_FILE
    fresh, saved = make().text.transformer.state_dict(), load_file(file)
    still = [key for key, value in fresh.items() if torch.equal(value.half(), saved[key])]
    assert still == ["text_projection.weight"]  # no image uses it
    host, own = load_host_clip(file), native_models.load_text_encoder(file)
    tokens = clip_pair.tokenize_texts(made[0].tokenizer, ["a red disc at the left"])
    with torch.inference_mode():
        states = host.encode_from_tokens(host.tokenize("a red disc at the left")).float()
        assert torch.allclose(states, own(tokens)[0], atol=2e-3)
        assert not torch.allclose(states, make().text(tokens)[0], atol=1e-1)
    # A UNet for this text encoder leaves it as it is, and writes no other.
    other = unet.TextToImage(replace(settings, text=str(file)), DISC_WORLD, 0)
    assert other.text is None and not any("text" in name for name, _ in other.named_parameters())
    (tmp_path / "other").mkdir()
    other.save_model(tmp_path / "other", {})
    assert not (tmp_path / "other" / clip_pair.TEXT_FILE).exists()


@pytest.fixture
def wide_folder(tmp_path: Path) -> Path:
    """Shards of three images of two people each, 32 x 48 pixels."""
    album = WorldAlbum("train", 32, 3, people_per_image=2)
    shards.write_shards(album, tmp_path / "wide", 1, lossless=True)
    return tmp_path / "wide"


@pytest.mark.parametrize("cached_samples", [0, 9])
def test_wide_images_make_up_a_share_of_the_batches(trained: Path, wide_folder: Path, cached_samples: int) -> None:
    settings = make_unet_config(
        trained, text="", text_width=32, text_layers=1, text_heads=2, wide_data=str(wide_folder), wide_share=0.3,
        cached_samples=cached_samples, face_loss_weight=2.0, caption_dropout=0.0,
    )  # fmt: skip
    task = unet.TextToImage(settings, DISC_WORLD, 0)
    pairs = shard_source.ShardSource(wide_folder)
    wide_texts = clip_pair.tokenize_texts(task.tokenizer, [pairs.load_caption(number) for number in range(3)])
    counts = {(4, 4): 0, (4, 6): 0}
    for seed in range(60):
        batch = task.make_batch(make_generator(seed), 2)
        size = tuple(batch["noise"].shape[2:])
        counts[size] += 1
        assert batch["noise"].shape[1] == 8 and batch["loss_weights"].shape == (2, *size)
        if cached_samples:
            assert batch["latents"].shape == batch["noise"].shape
        else:
            assert batch["images"].shape[2:] == (8 * size[0], 8 * size[1])
        assert all((row in wide_texts) == (size == (4, 6)) for row in batch["tokens"])
        if seed < 8:
            assert bool(task(batch)["noise"].isfinite())
    assert 8 < counts[4, 6] < 30
    words = {token for row in wide_texts for token in row}
    assert words <= set(task.text.transformer.get_input_embeddings().known_tokens)  # those of both folders
    if cached_samples:
        assert [len(pool.cached_latents) for pool in task.pools] == [9, 3]  # as many as there are


def test_both_heads_of_wide_images_have_a_larger_loss_weight() -> None:
    sample = WorldAlbum("train", 128, 1, people_per_image=2).load_annotated_image(0, 0)
    weights = unet.compute_loss_weights(sample, 3.0)
    assert weights.shape == (16, 24) and float(weights.mean()) == pytest.approx(1)
    for box in (sample.box.view(2, 2), sample.other_faces[0, :2]):
        x, y = (box.mean(0) / 8).long().tolist()
        assert float(weights[y, x]) == pytest.approx(3 * float(weights[0, 0]))
