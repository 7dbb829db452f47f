"""The demo's VAE: 8 x 8 pixels to 8 latent channels of mean 0 and variance 1 that survive noise.

Latents that a decoder reads in spite of noise let a diffusion model keep small things such as eyes (Yang et al.
2507.15856). Convolutions run at half of the image's resolution at most, so that a CPU is quick.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import comfy.model_management
import comfy.sd
import torch
from comfy.taesd.taesd import TAESD
from torch import Tensor, nn
from torch.nn.functional import avg_pool2d, interpolate

DOWNSCALE = 8  # pixels per latent cell
NORM_GROUPS = 8
BATCH_NORM_MOMENTUM = 0.02
# Brightness, red against green, blue against yellow: the first three latent channels start with the colour of a cell.
COLOUR_AXES = ((0.9, 0.9, 0.9), (1.5, -1.5, 0.0), (-0.9, -0.9, 1.8))


class ResidualBlock(nn.Module):
    def __init__(self, channels: int) -> None:
        super().__init__()
        self.layers = nn.Sequential(
            nn.GroupNorm(NORM_GROUPS, channels), nn.SiLU(), nn.Conv2d(channels, channels, 3, padding=1),
            nn.GroupNorm(NORM_GROUPS, channels), nn.SiLU(), nn.Conv2d(channels, channels, 3, padding=1),
        )  # fmt: skip

    def forward(self, x: Tensor) -> Tensor:
        return x + self.layers(x)


class NativeVAE(nn.Module):
    """Images [n, 3, H, W] from -1 to 1 to latents [n, channels, H / 8, W / 8] and back.

    `widths` are the channels at 1/2, 1/4 and 1/8 of the image's resolution. The mean colour of each cell takes a
    straight way into the latents and out of them, past the convolutions.
    """

    def __init__(self, channels: int = 8, widths: Sequence[int] = (32, 64, 96), num_res_blocks: int = 2) -> None:
        super().__init__()
        half, quarter, eighth = widths
        blocks = [[ResidualBlock(width) for _ in range(num_res_blocks)] for width in (quarter, eighth)]
        self.encoder = nn.Sequential(
            nn.PixelUnshuffle(2), nn.Conv2d(12, half, 3, padding=1), ResidualBlock(half),
            nn.Conv2d(half, quarter, 4, stride=2, padding=1), *blocks[0],
            nn.Conv2d(quarter, eighth, 4, stride=2, padding=1), *blocks[1],
            nn.GroupNorm(NORM_GROUPS, eighth), nn.SiLU(), nn.Conv2d(eighth, channels, 3, padding=1),
        )  # fmt: skip
        blocks = [
            [ResidualBlock(width) for _ in range(num_res_blocks + extra)]
            for width, extra in ((eighth, 1), (quarter, 0), (half, 0))
        ]
        self.decoder = nn.Sequential(
            nn.Conv2d(channels, eighth, 3, padding=1), *blocks[0], *_upscale(eighth, quarter), *blocks[1],
            *_upscale(quarter, half), *blocks[2],
            nn.GroupNorm(NORM_GROUPS, half), nn.SiLU(), nn.Conv2d(half, 12, 3, padding=1), nn.PixelShuffle(2),
        )  # fmt: skip
        self.colour_in, self.colour_out = nn.Conv2d(3, channels, 1), nn.Conv2d(channels, 3, 1)
        self.norm = nn.BatchNorm2d(channels, affine=False, momentum=BATCH_NORM_MOMENTUM)

    @property
    def latent_channels(self) -> int:
        return self.norm.num_features

    def init_colour_path(self) -> None:
        """Let the colour of a cell reach the decoder unchanged, as long as nothing is trained."""
        axes = torch.zeros(self.latent_channels, 3)
        axes[:3] = torch.tensor(COLOUR_AXES)
        with torch.no_grad():
            self.colour_in.weight.copy_(axes[..., None, None])
            self.colour_out.weight.copy_(torch.linalg.pinv(axes)[..., None, None])

    def encode(self, images: Tensor) -> Tensor:
        return self.norm(self.encoder(images) + self.colour_in(avg_pool2d(images, DOWNSCALE)))

    def decode(self, latents: Tensor) -> Tensor:
        colour = interpolate(self.colour_out(latents), scale_factor=DOWNSCALE, mode="bilinear")
        return self.decoder(latents) + colour


def _upscale(channels: int, out_channels: int) -> list[nn.Module]:
    return [nn.Conv2d(channels, 4 * out_channels, 1), nn.PixelShuffle(2)]


def build_vae(settings: Mapping[str, Any]) -> nn.Module:
    """The VAE without weights of a file with these training settings."""
    if "widths" not in settings:
        return TAESD()
    return NativeVAE(settings["channels"], settings["widths"], settings["num_res_blocks"])


def count_latent_channels(network: nn.Module) -> int:
    return network.latent_channels if isinstance(network, NativeVAE) else 4


def wrap_vae(network: nn.Module) -> comfy.sd.VAE:
    """The network as ComfyUI's VAE."""
    # ComfyUI builds the object, with devices and data types, around its own small network of as many channels.
    vae: Any = comfy.sd.VAE(sd=TAESD(latent_channels=count_latent_channels(network)).state_dict())
    if isinstance(network, TAESD):
        vae.first_stage_model.load_state_dict(network.state_dict())
        return vae
    vae.first_stage_model = network.eval().to(vae.vae_dtype)
    comfy.model_management.archive_model_dtypes(network)
    vae.patcher = type(vae.patcher)(network, load_device=vae.device, offload_device=vae.patcher.offload_device)
    vae.size = None
    vae.model_size()
    return vae
