"""The VAE: ComfyUI's TAESD, 8 x 8 pixels to 4 latent channels, 2.4 million parameters.

It is trained so that each latent channel, as the diffusion model sees it, has mean 0 and variance 1.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from comfy.latent_formats import SD15
from comfy.taesd.taesd import TAESD
from safetensors.torch import save_file
from torch import Generator, Tensor
from torch.nn.functional import avg_pool2d, l1_loss, mse_loss

from ...likeness.checkpoints import native_metadata
from ...nodes.loaders.native_models import load_vae
from ..data.image_source import ImageSource, load_images, make_image_grid, random_indices
from ..task import Batch, Task, init_weights
from .latents import decode_latents, encode_latents

VAE_FILE = "vae.safetensors"
NUM_SHOWN_IMAGES = 6
EDGE_SCALES = 3  # the edge loss compares images at scales 1, 1/2 and 1/4


@dataclass(frozen=True)
class VAEConfig:
    """`resolution` and `crop_size` are in pixels: training uses random square crops. `latent_noise` is the standard
    deviation of the noise on the decoder's inputs, for latents of standard deviation 1.

    `mse_weight`, `edge_weight` and `kl_weight` are the losses' weights relative to the L1 loss. `init_from` is the file
    of another run to start from.
    """

    resolution: int = 128
    crop_size: int = 128
    latent_noise: float = 0.05
    mse_weight: float = 4.0
    edge_weight: float = 0.3
    kl_weight: float = 0.01
    init_from: str = ""


class VAETask(Task):
    """Losses: L1 and mean squared error of pixels, L1 of edges, KL divergence of the latents."""

    def __init__(self, settings: VAEConfig, source: ImageSource, seed: int) -> None:
        super().__init__()
        self.settings, self.source = settings, source
        self.vae: Any = TAESD()
        self.vae.to(memory_format=torch.channels_last)  # a fifth faster on a CPU
        init_weights(self.vae, seed, 2**0.5, zero_init=("conv.4.weight",))
        with torch.no_grad():
            # ComfyUI multiplies latents by this factor for its models.
            self.vae.vae_scale.fill_(SD15().scale_factor)
            self.vae.vae_shift.zero_()
            self.vae.taesd_decoder[-1].bias.fill_(0.5)  # starts at grey
            if settings.init_from:
                self.vae.load_state_dict(load_vae(Path(settings.init_from)).state_dict())
        self.vae.vae_scale.requires_grad_(False)
        self.vae.vae_shift.requires_grad_(False)

    def make_batch(self, generator: Generator, batch_size: int) -> Batch:
        resolution, crop_size = self.settings.resolution, min(self.settings.crop_size, self.settings.resolution)
        images = load_images(self.source, random_indices(generator, batch_size), resolution)
        corners = torch.randint(resolution - crop_size + 1, (batch_size, 2), generator=generator).tolist()
        crops = [image[:, y : y + crop_size, x : x + crop_size] for image, (y, x) in zip(images, corners, strict=True)]
        return {
            "images": torch.stack(crops),
            "noise": torch.randn(batch_size, 4, crop_size // 8, crop_size // 8, generator=generator),
        }

    def forward(self, batch: Batch) -> dict[str, Tensor]:
        images = batch["images"]
        latents = encode_latents(self.vae, images).float()
        noise_std = self.settings.latent_noise / self.vae.vae_scale
        decoded = self.vae.decode(latents + batch["noise"] * noise_std).float() / 2 + 0.5
        return {
            "pixels": l1_loss(decoded, images),
            "mse": self.settings.mse_weight * mse_loss(decoded, images),  # for small details of strong color
            "edges": self.settings.edge_weight * edge_loss(decoded, images),
            "kl": self.settings.kl_weight * kl_divergence(latents * self.vae.vae_scale),
        }

    def make_samples(self, generator: Generator) -> dict[str, Tensor]:
        """Images above their reconstructions, and the peak signal-to-noise ratio in decibels."""
        indices = random_indices(generator, NUM_SHOWN_IMAGES)
        images = load_images(self.source, indices, self.settings.resolution).to(self.vae.vae_scale.device)
        decoded = decode_latents(self.vae, encode_latents(self.vae, images))
        psnr = -10 * (decoded - images).square().mean().log10()
        return {"images": make_image_grid(images, decoded), "psnr": psnr}

    def save_model(self, folder: Path, notes: Mapping[str, Any]) -> None:
        tensors = {key: value.half().contiguous() for key, value in self.vae.state_dict().items()}
        settings = {**asdict(self.settings), "channels": 4}
        metadata = native_metadata.make_native_metadata("vae", "SD1.5", notes, settings=settings)
        save_file(tensors, folder / VAE_FILE, metadata)


def edge_loss(reconstruction: Tensor, target: Tensor) -> Tensor:
    """The L1 loss of the images' gradients, over several scales; it penalizes blur."""
    total = reconstruction.new_zeros(())
    for _ in range(EDGE_SCALES):
        for axis in (-1, -2):
            total = total + l1_loss(reconstruction.diff(dim=axis), target.diff(dim=axis))
        reconstruction, target = avg_pool2d(reconstruction, 2), avg_pool2d(target, 2)
    return total


def kl_divergence(latents: Tensor) -> Tensor:
    """The KL divergence of each channel's mean and variance over the batch from a standard normal, averaged."""
    mean, variance = latents.mean((0, 2, 3)), latents.var((0, 2, 3))
    return 0.5 * (mean.square() + variance - 1 - variance.log()).mean()
