"""The UNet: the host's, of SD1.5's kind, with its own sampling (noise prediction; Rombach et al. 2112.10752)."""

from __future__ import annotations

import functools
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import comfy.sample
import torch
from comfy.model_base import BaseModel, ModelType
from comfy.model_patcher import ModelPatcher
from comfy.taesd.taesd import TAESD
from safetensors.torch import save_file
from torch import Generator, Tensor, nn
from torch.nn.functional import mse_loss

from ...likeness import own_file
from ...nodes.loaders import small
from ...nodes.loaders.small import PREDICTIONS, PREFIX, base_model
from ..data import View
from ..task import Batch, Task, start
from . import clip, latents, vae, widen
from .source import PICTURES, Source, captions, pictures, sheet, some

FILE = "unet.safetensors"
load = small.load_unet
SILENT = ("out_layers.3.weight", "proj_out.weight", "to_out.0.weight", "out.2.weight")
SHOWN = 6
HEAD = 0.35  # of a face's box, on each side: hair and ears
SAMPLING: dict[str, Any] = {"steps": 20, "cfg": 4.0, "sampler_name": "euler", "scheduler": "karras"}


@dataclass(frozen=True)
class Settings:
    """`vae` and `text` are files trained before; `side` in pixels; `unprompted` is the part without a caption.

    Steps count by their signal-to-noise ratio, but not above `snr` (min-SNR, Hang et al. 2303.09556, Eq. 8); where the
    `prediction` is the velocity, by one more than that ratio. A small model should say that: it can hardly give back
    nearly pure noise so exactly that a picture remains, while the velocity there is nearly the picture itself.

    What lies in the head of somebody counts `heads_count` times as much as what lies elsewhere.

    With a `pool` it trains on the first so many pictures, whose latents are made once. It may `begin` with the file of
    another run, of these widths or of half of them at some levels.
    """

    vae: str
    text: str
    side: int = 128
    channels: int = 32
    levels: tuple[int, ...] = (1, 2, 2, 3)
    blocks: int = 2
    depth: tuple[int, ...] = (1, 1, 1, 0)
    heads: int = 8
    unprompted: float = 0.1
    snr: float = 5.0
    prediction: str = "noise"
    heads_count: float = 1.0
    pool: int = 0
    checkpointing: bool = False
    begin: str = ""

    def __post_init__(self) -> None:
        if len(self.levels) != len(self.depth):
            raise ValueError(f"got {len(self.levels)} levels and {len(self.depth)} depths in [task]; expected as many")
        if self.prediction not in PREDICTIONS:
            raise ValueError(f"got prediction = {self.prediction!r} in [task]; expected {' or '.join(PREDICTIONS)}")


class TextToImage(Task):
    """Loss: the mean squared difference of the noise and what the host's model says it is."""

    def __init__(self, settings: Settings, source: Source, seed: int) -> None:
        super().__init__()
        self.settings, self.source = settings, source
        file, text = Path(settings.vae), clip.load_text(Path(settings.text))
        self.tokenizer = clip.SDTokenizer()
        self.frozen = Frozen(text, vae.load(file))
        if settings.pool:
            autoencoder = self.frozen.autoencoder
            self.frozen.pool = latents.pool(source, file, autoencoder, settings.side, settings.pool)
        width = text.transformer.get_input_embeddings().weight.shape[1]
        self.config = config(settings, width)
        self.model: Any = base_model(self.config, settings.prediction)
        start(self.model.diffusion_model, seed, silent=SILENT)
        self.counts = counting(source, settings.side, settings.heads_count)
        if settings.begin:
            self._begin(Path(settings.begin), seed)

    def _begin(self, file: Path, seed: int) -> None:
        old, new = (model.diffusion_model.state_dict() for model in (load(file), self.model))
        same = {key: weight.shape for key, weight in old.items()} == {key: weight.shape for key, weight in new.items()}
        wide = old if same else widen.widened(old, new, Generator().manual_seed(seed))
        self.model.diffusion_model.load_state_dict(wide)

    def batch(self, chance: Generator, size: int) -> Batch:
        side, pool = self.settings.side, self.frozen.pool
        numbers = some(chance, size, PICTURES if pool is None else len(pool))
        shown = (
            {"pictures": pictures(self.source, numbers, side)} if pool is None else {"latents": pool[numbers].float()}
        )
        dropped = (torch.rand(size, generator=chance) < self.settings.unprompted).tolist()
        texts = ["" if gone else self.source.caption(number) for number, gone in zip(numbers, dropped, strict=True)]
        return {
            **shown, **self.counts(numbers), "tokens": clip.tokenize(self.tokenizer, texts),
            "noise": torch.randn(size, 4, side // 8, side // 8, generator=chance),
            "times": torch.randint(self.model.model_sampling.num_timesteps, (size,), generator=chance),
        }  # fmt: skip

    def forward(self, batch: Batch) -> dict[str, Tensor]:
        with torch.no_grad():
            if "latents" not in batch:
                batch = {**batch, "latents": latents.encode(self.frozen.autoencoder, batch["pictures"])}
            text = self.frozen.words(batch["tokens"], batch["noise"].device)
        told = {"counts": batch.get("counts"), "c_crossattn": text}
        return {"noise": wrong_noise(self.model, Noised.of(self.model, batch), self.settings.snr, **told)}

    def draw(self, chance: Generator) -> dict[str, Tensor]:
        """Pictures of some captions, by the host's own sampler."""
        texts = list(captions(self.source, chance, SHOWN))
        device = next(self.model.parameters()).device
        with_text, without = (
            [[self.frozen.words(clip.tokenize(self.tokenizer, some), device), {}]] for some in (texts, [""])
        )
        side = self.settings.side // 8
        noise = torch.randn(len(texts), 4, side, side, generator=chance)
        made = sample(ModelPatcher(self.model, device, device), noise, with_text, without)
        return {"pictures": sheet(latents.decode(self.frozen.autoencoder, made.to(device)))}

    def save(self, folder: Path, notes: Mapping[str, Any]) -> None:
        weights = self.model.diffusion_model.state_dict()
        tensors = {PREFIX + key: value.half().contiguous() for key, value in weights.items()}
        told = {**asdict(self.settings), "config": self.config}
        save_file(tensors, folder / FILE, own_file.metadata("unet", "SD1.5", notes, settings=told))


@dataclass(frozen=True)
class Noised:
    """Pictures of a batch as the model samples them: noise [n, 4, h, w], its spread sigma [n], and both together."""

    noise: Tensor
    sigma: Tensor
    noisy: Tensor

    @classmethod
    def of(cls, model: BaseModel, batch: Batch) -> Noised:
        """Of the VAE's `latents`, `noise`, and `times` [n], steps of the model's own schedule."""
        sampling: Any = model.model_sampling
        sigma = sampling.sigma(batch["times"])
        return cls(
            batch["noise"],
            sigma,
            sampling.noise_scaling(sigma, batch["noise"], model.process_latent_in(batch["latents"])),
        )


def wrong_noise(model: BaseModel, given: Noised, snr: float, counts: Tensor | None = None, **told: Any) -> Tensor:
    """The mean squared difference of the noise and what the model says it is, weighed (Settings.snr).

    `told` is what the model is given besides, as its text; `counts` [n, h, w], how much each place counts.
    """
    wrong = mse_loss(said_noise(model, given.noisy, given.sigma, **told), given.noise, reduction="none").mean(1)
    wrong = (wrong if counts is None else wrong * counts).mean((1, 2))
    variance = given.sigma.square()
    most = 1 + variance if model.model_type == ModelType.V_PREDICTION else torch.ones_like(variance)
    return (wrong * (snr * variance).minimum(most)).mean()


def counts(view: View, side: int, heads: float) -> Tensor:
    """How much each cell of a picture's latents counts, [side / 8, side / 8], 1 on average; `heads` times in heads."""
    cells = torch.arange(side // 8) * 8 + 3.5
    found = torch.ones(side // 8, side // 8)
    for low, high in [view.box.view(2, 2).unbind(), *(other[:2].unbind() for other in view.others)]:
        margin = HEAD * (high - low)
        x, y = ((cells > a) & (cells < b) for a, b in zip(low - margin, high + margin, strict=True))
        found[y[:, None] & x] = heads
    return found / found.mean()


def counting(source: Source, side: int, heads: float) -> Callable[[Sequence[int]], Batch]:
    """What tells a batch of pictures by number how much each place counts: nothing where all count the same."""
    if heads == 1:
        return lambda numbers: {}
    one = functools.cache(lambda number: counts(source.shown(number, side), side, heads))
    return lambda numbers: {"counts": torch.stack([one(number) for number in numbers])}


def said_noise(model: BaseModel, noisy: Tensor, sigma: Tensor, **told: Any) -> Tensor:
    """The noise that the model sees in pictures [n, 4, h, w] of the spreads sigma [n]."""
    clean = model.apply_model(noisy, sigma, **told)
    # The host's model gives the picture that its noise leaves.
    return ((noisy - clean) / sigma[:, None, None, None]).float()


def sample(model: ModelPatcher, noise: Tensor, positive: list[Any], negative: list[Any]) -> Tensor:
    """What the host's sampler makes of noise [n, 4, h, w]: latents."""
    return comfy.sample.sample(
        model, noise, positive=positive, negative=negative, latent_image=torch.zeros_like(noise), disable_pbar=True,
        seed=0, **SAMPLING,
    )  # fmt: skip


class Frozen:
    """What is trained already and only used: no part of the module, so that no checkpoint or process group has it."""

    def __init__(self, text: nn.Module, autoencoder: TAESD) -> None:
        self.text, self.autoencoder = text, autoencoder
        self.pool: Tensor | None = None

    def words(self, tokens: clip.Tokens, device: torch.device) -> Tensor:
        """What the UNet reads of texts, [n, 77, width]."""
        return self.text.to(device)(tokens)[0]


def config(settings: Settings, width: int) -> dict[str, Any]:
    """The host's description of the UNet; text is `width` wide."""
    inner = [depth for depth in settings.depth for _ in range(settings.blocks)]
    outer = [depth for depth in settings.depth for _ in range(settings.blocks + 1)]
    return {
        "image_size": settings.side // 8, "in_channels": 4, "out_channels": 4, "model_channels": settings.channels,
        "num_res_blocks": [settings.blocks] * len(settings.levels), "channel_mult": list(settings.levels),
        "transformer_depth": inner, "transformer_depth_output": outer,
        "transformer_depth_middle": 1, "context_dim": width, "num_heads": settings.heads,
        "use_spatial_transformer": True, "legacy": False, "use_checkpoint": settings.checkpointing,
    }  # fmt: skip
