"""The VAE: latents of unit variance that bear noise, the path of the colour, the losses, and ComfyUI around it."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import comfy.sample
import pytest
import torch
from comfy.model_patcher import ModelPatcher
from comfyui_likeness.nodes.loaders import native_models, native_vae
from comfyui_likeness.training.base_models import latents, vae
from comfyui_likeness.training.data import image_source
from comfyui_likeness.training.task import make_generator
from support.host_models import SAMPLER_DEFAULTS, make_conditioning
from support.toy_tasks import DISC_WORLD, train_few_steps
from torch import Tensor, nn

SMALL: dict[str, Any] = {"widths": (16, 16, 16), "num_res_blocks": 1, "resolution": 32, "crop_size": 32}
CPU = torch.device("cpu")
IMAGES = image_source.load_images(DISC_WORLD, range(0, 320, 5), 32)  # of all colours, positions and shades


def train_small_vae(folder: Path, steps: int, **settings: Any) -> tuple[Path, list[float]]:
    """The file of a VAE after so many steps, and the losses."""
    config = vae.VAEConfig(**SMALL, **settings)
    model_folder, losses = train_few_steps(
        lambda: vae.VAETask(config, DISC_WORLD, 0),
        folder,
        steps=steps,
        batch_size=8,
        warmup_steps=5,
        learning_rate=3e-3,
    )
    return model_folder / vae.VAE_FILE, losses


@pytest.fixture(scope="module")
def trained(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The file of a small VAE after 120 steps."""
    file, losses = train_small_vae(tmp_path_factory.mktemp("vae"), 120)
    assert sum(losses[-10:]) < 0.5 * sum(losses[:10])
    return file


@torch.no_grad()
def measure_error(network: nn.Module, noise: float) -> float:
    """The mean squared error of reconstructions from latents with this much noise."""
    encoded = latents.encode_latents(network, IMAGES)
    noisy = encoded + noise * torch.randn(encoded.shape, generator=make_generator(1))
    return float((latents.decode_latents(network, noisy) - IMAGES).square().mean())


def test_latents_have_unit_variance(trained: Path) -> None:
    with torch.no_grad():
        encoded = latents.encode_latents(native_models.load_vae(trained), IMAGES)
    assert encoded.shape == (64, 8, 4, 4)
    mean, deviation = encoded.mean((0, 2, 3)), encoded.std((0, 2, 3))
    assert float(mean.abs().max()) < 0.35 and 0.75 < float(deviation.min()) < float(deviation.max()) < 1.3


def test_latents_bear_noise_if_trained_with_noise(trained: Path, tmp_path: Path) -> None:
    fragile = native_models.load_vae(train_small_vae(tmp_path, 120, latent_noise=0.02)[0])
    network = native_models.load_vae(trained)
    added, added_if_fragile = (measure_error(one, 1.0) - measure_error(one, 0.0) for one in (network, fragile))
    assert 0 < added < 0.9 * added_if_fragile


def test_the_colour_of_a_cell_passes_the_untrained_network() -> None:
    task = vae.VAETask(vae.VAEConfig(**SMALL), DISC_WORLD, 0)
    network = task.vae.eval()
    for part in (network.encoder, network.decoder):
        nn.init.zeros_(part[-1 if part is network.encoder else -2].weight)
    colours = torch.rand(5, 3, 1, 1, generator=make_generator(2)).expand(5, 3, 32, 32) * 2 - 1
    with torch.no_grad():
        assert torch.allclose(network.decode(network.encode(colours)), colours, atol=1e-3)


def test_batches_are_crops_of_the_images() -> None:
    task = vae.VAETask(vae.VAEConfig(resolution=64, crop_size=32), DISC_WORLD, 0)
    batch = task.make_batch(make_generator(5), 6)
    assert batch["images"].shape == (6, 3, 32, 32) and batch["noise"].shape == (6, 8, 4, 4)
    images = image_source.load_images(DISC_WORLD, image_source.random_indices(make_generator(5), 6), 64)
    crops = images.unfold(2, 32, 1).unfold(3, 32, 1).flatten(2, 3)  # all that there are
    for crop, all_crops in zip(batch["images"], crops.transpose(1, 2), strict=True):
        assert (all_crops == crop).flatten(1).all(1).any()
    spread = batch["noise"].std((1, 2, 3))
    assert (spread[:2] < 0.05).all() and float(spread.max()) < 0.75 and float(spread.max()) > 0.2


def test_crops_are_around_faces_or_anywhere() -> None:
    sample = DISC_WORLD.load_annotated_image(1, 64)._replace(box=torch.tensor([2.0, 30, 14, 42]))
    places = torch.arange(64 * 64).view(64, 64, 1)

    def find_corners(face_share: float) -> Tensor:
        generator = make_generator(3)
        crops = [vae.crop_at_random(sample._replace(image=places), 16, face_share, generator) for _ in range(200)]
        assert all(crop.shape == (16, 16, 1) for crop in crops)
        first = torch.stack([crop[0, 0, 0] for crop in crops])
        return torch.stack((first // 64, first % 64), dim=1)

    around, anywhere = find_corners(1.0), find_corners(0.0)
    assert (around >= torch.tensor([24, 0])).all() and (around <= torch.tensor([32, 4])).all()
    assert anywhere.amin(0).tolist() == [0, 0] and anywhere.amax(0).tolist() == [48, 48]


def test_losses_on_edges_and_chroma() -> None:
    image = image_source.load_images(DISC_WORLD, [5], 32)
    blurred = nn.functional.avg_pool2d(image, 5, 1, 2)
    assert vae.edge_loss(image, image) == 0 and vae.edge_loss(image + 0.1, image).item() < 1e-6
    assert vae.edge_loss(blurred, image) > 0.01
    grey, pink = torch.full((1, 3, 8, 8), 0.5), torch.tensor([0.8, 0.4, 0.6]).view(1, 3, 1, 1).expand(1, 3, 8, 8)
    assert vae.chroma_loss(grey, grey) == 0 and vae.chroma_loss(grey + 0.1, grey).item() < 1e-6  # brightness alone
    # Red against green differs by 0.4, blue against both by 0; the means over squares count three times.
    assert vae.chroma_loss(pink, grey).item() == pytest.approx((0.4 + 0.0) / 2 * (1 + 3), rel=1e-4)


@pytest.mark.parametrize("changes", [{"channels": 4}, {"channels": 2}, {"widths": (16, 20, 32)}])
def test_impossible_sizes_are_errors(changes: dict[str, Any]) -> None:
    with pytest.raises(ValueError, match="in .task.; expected at least 3 channels, but not 4, .* multiples of 8"):
        vae.VAEConfig(**changes)


def test_comfyui_encodes_and_decodes(trained: Path) -> None:
    network = native_models.load_vae(trained)
    host = native_vae.wrap_vae(network)
    images = IMAGES[:3].movedim(1, -1)
    with torch.inference_mode():
        encoded = host.encode(images)
        decoded, tiled = host.decode(encoded), host.decode_tiled(encoded, tile_x=8, tile_y=8, overlap=2)
    assert host.latent_channels == 8 and encoded.shape == (3, 8, 4, 4) and decoded.shape == (3, 32, 32, 3)
    own = native_models.load_vae(trained)
    with torch.no_grad():
        assert torch.allclose(encoded, latents.encode_latents(own, IMAGES[:3]), atol=1e-4)
        assert torch.allclose(decoded.movedim(-1, 1), latents.decode_latents(own, encoded), atol=1e-4)
    assert tiled.shape == decoded.shape and bool(tiled.isfinite().all())
    assert host.model_size() == sum(value.nbytes for value in network.state_dict().values())
    assert host.patcher.model is host.first_stage_model is network and host.encode(images[:, :31, :27]).shape[2:] == (
        3,
        3,
    )


def test_comfyui_samples_in_the_latents(trained: Path) -> None:
    """Its empty latent of 4 channels is widened, and the model takes the latents as they are."""
    config = {
        "image_size": 4, "in_channels": 8, "out_channels": 8, "model_channels": 32, "num_res_blocks": [1],
        "channel_mult": [1], "transformer_depth": [1], "transformer_depth_output": [1, 1],
        "transformer_depth_middle": 1, "context_dim": 64, "num_heads": 2, "use_spatial_transformer": True,
        "legacy": False,
    }  # fmt: skip
    base = native_models.build_base_model(config)
    for value in base.diffusion_model.parameters():
        nn.init.normal_(value, std=0.02)
    model = ModelPatcher(base, CPU, CPU)
    ones = torch.ones(1, 8, 4, 4)
    assert torch.equal(base.process_latent_in(ones), ones) and torch.equal(base.process_latent_out(ones), ones)
    empty = comfy.sample.fix_empty_latent_channels(model, torch.zeros(2, 4, 4, 6))
    assert empty.shape == (2, 8, 4, 6)
    noise = comfy.sample.prepare_noise(empty, 3)
    with torch.inference_mode():
        sampled = comfy.sample.sample(
            model, noise, positive=make_conditioning(1), negative=make_conditioning(2), latent_image=empty,
            disable_pbar=True, seed=3, **SAMPLER_DEFAULTS,
        )  # fmt: skip
        image = native_vae.wrap_vae(native_models.load_vae(trained)).decode(sampled)
    assert sampled.shape == empty.shape and image.shape == (2, 32, 48, 3) and bool(image.isfinite().all())
