"""The VAE: the host's TAESD, 8 x 8 pixels to 4 latent channels, 2.4 million parameters.

Its latents are trained to be the model's: each channel of mean 0 and variance 1, as a denoiser wants them.
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

from ...likeness import own_file
from ...nodes.loaders.small import load_vae as load
from ..task import Batch, Task, start
from .latents import decode, encode
from .source import Source, pictures, sheet, some

FILE = "vae.safetensors"
SHOWN = 6
SCALES = 3  # of the pictures whose edges are compared: 1, 1/2, 1/4


@dataclass(frozen=True)
class Settings:
    """`side` in pixels, of which squares of `crop` are trained on; `noise` is the spread of what the decoder has to
    bear, in latents of spread 1. `squares`, `edges` and `moments` weigh what is beside the plain difference of pixels.

    It may `begin` with the file of another run.
    """

    side: int = 128
    crop: int = 128
    noise: float = 0.05
    squares: float = 4.0
    edges: float = 0.3
    moments: float = 0.01
    begin: str = ""


class Vae(Task):
    """Losses: the differences of pixels and of their edges, and how far the latents are from normal."""

    def __init__(self, settings: Settings, source: Source, seed: int) -> None:
        super().__init__()
        self.settings, self.source = settings, source
        self.vae: Any = TAESD()
        self.vae.to(memory_format=torch.channels_last)  # a fifth faster on a CPU
        start(self.vae, seed, 2**0.5, silent=("conv.4.weight",))
        with torch.no_grad():  # what the host multiplies latents with for its models is taken off here
            self.vae.vae_scale.fill_(SD15().scale_factor)
            self.vae.vae_shift.zero_()
            self.vae.taesd_decoder[-1].bias.fill_(0.5)  # around grey
            if settings.begin:
                self.vae.load_state_dict(load(Path(settings.begin)).state_dict())
        self.vae.vae_scale.requires_grad_(False)
        self.vae.vae_shift.requires_grad_(False)

    def batch(self, chance: Generator, size: int) -> Batch:
        side, crop = self.settings.side, min(self.settings.crop, self.settings.side)
        seen = pictures(self.source, some(chance, size), side)
        corners = torch.randint(side - crop + 1, (size, 2), generator=chance).tolist()
        cut = [whole[:, y : y + crop, x : x + crop] for whole, (y, x) in zip(seen, corners, strict=True)]
        return {"pictures": torch.stack(cut), "noise": torch.randn(size, 4, crop // 8, crop // 8, generator=chance)}

    def forward(self, batch: Batch) -> dict[str, Tensor]:
        asked = batch["pictures"]
        latents = encode(self.vae, asked).float()
        spread = self.settings.noise / self.vae.vae_scale
        made = self.vae.decode(latents + batch["noise"] * spread).float() / 2 + 0.5
        return {
            "pixels": l1_loss(made, asked),
            "squares": self.settings.squares * mse_loss(made, asked),  # a small thing of a strong colour counts
            "edges": self.settings.edges * edges(made, asked),
            "moments": self.settings.moments * moments(latents * self.vae.vae_scale),
        }

    def draw(self, chance: Generator) -> dict[str, Tensor]:
        """Pictures above what becomes of them, and the signal-to-noise ratio in decibels."""
        asked = pictures(self.source, some(chance, SHOWN), self.settings.side).to(self.vae.vae_scale.device)
        made = decode(self.vae, encode(self.vae, asked))
        return {"pictures": sheet(asked, made), "psnr": -10 * (made - asked).square().mean().log10()}

    def save(self, folder: Path, notes: Mapping[str, Any]) -> None:
        tensors = {key: value.half().contiguous() for key, value in self.vae.state_dict().items()}
        told = {**asdict(self.settings), "channels": 4}
        save_file(tensors, folder / FILE, own_file.metadata("vae", "SD1.5", notes, settings=told))


def edges(made: Tensor, asked: Tensor) -> Tensor:
    """The mean absolute difference of both pictures' slopes, over scales: what a blurred picture pays for."""
    total = made.new_zeros(())
    for _ in range(SCALES):
        for axis in (-1, -2):
            total = total + l1_loss(made.diff(dim=axis), asked.diff(dim=axis))
        made, asked = avg_pool2d(made, 2), avg_pool2d(asked, 2)
    return total


def moments(latents: Tensor) -> Tensor:
    """The Kullback-Leibler divergence of each channel's mean and variance over the batch from a normal's, averaged."""
    mean, variance = latents.mean((0, 2, 3)), latents.var((0, 2, 3))
    return 0.5 * (mean.square() + variance - 1 - variance.log()).mean()
