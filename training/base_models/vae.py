"""The VAE: 8 x 8 pixels to 8 latent channels that bear noise; nodes/loaders/native_vae.py has the network.

Its decoder learns from latents with noise of random strength, so that details do not lie in single values that little
noise erases. Small bright things need the losses on color: by pixels alone, pink hair comes back beige.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file
from torch import Generator, Tensor
from torch.nn.functional import avg_pool2d, l1_loss, mse_loss

from ...likeness.checkpoints import native_metadata
from ...nodes.loaders.native_vae import DOWNSCALE, NORM_GROUPS, NativeVAE
from ..data.clusters import AnnotatedImage
from ..data.image_source import ImageSource, load_images, make_image_grid, random_indices
from ..task import Batch, Task, init_weights
from .latents import decode_latents, encode_latents

VAE_FILE = "vae.safetensors"
NUM_SHOWN_IMAGES = 6
EDGE_SCALES = 3  # the edge loss compares images at scales 1, 1/2 and 1/4
CHROMA_POOL, CHROMA_POOL_WEIGHT = 4, 3.0  # the chroma loss also compares means of 4 x 4 pixels
CLEAN_SHARE, CLEAN_NOISE = 1 / 3, 0.02  # of each batch gets almost no noise
FACE_OFFSET = 0.25  # of crops around faces: the maximum distance from the face's center, in crops


@dataclass(frozen=True)
class VAEConfig:
    """The network's sizes (NativeVAE); `resolution` and `crop_size` in pixels: training uses square crops, the share
    `face_share` of them around a face. `latent_noise` is the largest standard deviation of noise on the latents.

    `mse_weight`, `edge_weight` and `chroma_weight` are the losses' weights relative to the L1 loss.
    """

    channels: int = 8
    widths: tuple[int, int, int] = (32, 64, 96)
    num_res_blocks: int = 2
    resolution: int = 128
    crop_size: int = 64
    face_share: float = 0.6
    latent_noise: float = 0.6
    mse_weight: float = 3.0
    edge_weight: float = 0.5
    chroma_weight: float = 0.5

    def __post_init__(self) -> None:
        if self.channels < 3 or self.channels == 4 or any(width % NORM_GROUPS for width in self.widths):
            raise ValueError(
                f"got channels = {self.channels} and widths = {list(self.widths)} in [task]; expected at least 3 "
                f"channels, but not 4, for which UNets expect latents of another scale, and multiples of {NORM_GROUPS}"
            )


class VAETask(Task):
    """Losses: L1 and mean squared error of pixels, L1 of edges, L1 of color differences."""

    def __init__(self, settings: VAEConfig, source: ImageSource, seed: int) -> None:
        super().__init__()
        self.settings, self.source = settings, source
        self.vae = NativeVAE(settings.channels, settings.widths, settings.num_res_blocks)
        init_weights(self.vae, seed, 2**0.5, zero_init=("layers.5.weight",))
        self.vae.init_colour_path()
        network: Any = self.vae
        network.to(memory_format=torch.channels_last)  # faster on a CPU

    def make_batch(self, generator: Generator, batch_size: int) -> Batch:
        resolution, crop_size = self.settings.resolution, min(self.settings.crop_size, self.settings.resolution)
        crops = [
            crop_at_random(
                self.source.load_annotated_image(number, resolution), crop_size, self.settings.face_share, generator
            )
            for number in random_indices(generator, batch_size)
        ]
        scale = torch.rand(batch_size, 1, 1, 1, generator=generator) * self.settings.latent_noise
        scale[: int(batch_size * CLEAN_SHARE)] = CLEAN_NOISE
        size = crop_size // DOWNSCALE
        noise = torch.randn(batch_size, self.settings.channels, size, size, generator=generator)
        return {"images": torch.stack(crops).movedim(-1, 1).float() / 255, "noise": noise * scale}

    def forward(self, batch: Batch) -> dict[str, Tensor]:
        images = batch["images"].contiguous(memory_format=torch.channels_last)
        latents = encode_latents(self.vae, images).float()
        decoded = self.vae.decode(latents + batch["noise"]).float() / 2 + 0.5
        return {
            "pixels": l1_loss(decoded, images),
            "mse": self.settings.mse_weight * mse_loss(decoded, images),  # for small details of strong color
            "edges": self.settings.edge_weight * edge_loss(decoded, images),
            "chroma": self.settings.chroma_weight * chroma_loss(decoded, images),
        }

    def make_samples(self, generator: Generator) -> dict[str, Tensor]:
        """Images above their reconstructions without and with noise, and the peak signal-to-noise ratio in decibels."""
        images = load_images(self.source, random_indices(generator, NUM_SHOWN_IMAGES), self.settings.resolution)
        images = images.to(self.vae.colour_in.weight.device)
        latents = encode_latents(self.vae, images)
        noise = torch.randn(latents.shape, generator=generator).to(latents) * self.settings.latent_noise
        decoded, noisy = decode_latents(self.vae, latents), decode_latents(self.vae, latents + noise)
        psnr = -10 * (decoded - images).square().mean().log10()
        return {"images": make_image_grid(images, decoded, noisy), "psnr": psnr}

    def save_model(self, folder: Path, notes: Mapping[str, Any]) -> None:
        tensors = {
            key: value.half().contiguous() if value.is_floating_point() else value
            for key, value in self.vae.state_dict().items()
        }
        metadata = native_metadata.make_native_metadata("vae", "SD1.5", notes, settings=asdict(self.settings))
        save_file(tensors, folder / VAE_FILE, metadata)


def crop_at_random(sample: AnnotatedImage, crop_size: int, face_share: float, generator: Generator) -> Tensor:
    """A square crop [crop_size, crop_size, 3]: with probability `face_share` around the face, else anywhere."""
    around_face, *offsets = torch.rand(3, generator=generator).tolist()
    room = torch.tensor(sample.image.shape[:2]) - crop_size
    corner = torch.tensor(offsets) * (room + 1)
    if around_face < face_share:
        center = (sample.box[:2] + sample.box[2:]).flip(0) / 2
        corner = center - crop_size / 2 + (torch.tensor(offsets) - 0.5) * 2 * FACE_OFFSET * crop_size
    top, left = (int(min(max(float(at), 0), int(most))) for at, most in zip(corner, room, strict=True))
    return sample.image[top : top + crop_size, left : left + crop_size]


def edge_loss(reconstruction: Tensor, target: Tensor) -> Tensor:
    """The L1 loss of the images' gradients, over several scales; it penalizes blur."""
    total = reconstruction.new_zeros(())
    for _ in range(EDGE_SCALES):
        for axis in (-1, -2):
            total = total + l1_loss(reconstruction.diff(dim=axis), target.diff(dim=axis))
        reconstruction, target = avg_pool2d(reconstruction, 2), avg_pool2d(target, 2)
    return total


def chroma_loss(reconstruction: Tensor, target: Tensor) -> Tensor:
    """The L1 loss of red against green and of blue against both, of pixels and of means over small squares."""
    red, green, blue = (reconstruction - target).unbind(1)
    chroma = torch.stack((red - green, blue - (red + green) / 2), dim=1)
    return chroma.abs().mean() + CHROMA_POOL_WEIGHT * avg_pool2d(chroma, CHROMA_POOL).abs().mean()
