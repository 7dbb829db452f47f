"""The UNet: ComfyUI's, of SD1.5's architecture and noise schedule (Rombach et al. 2112.10752)."""

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
from safetensors.torch import save_file
from torch import Generator, Tensor, nn
from torch.nn.functional import mse_loss

from ...likeness.checkpoints import native_metadata
from ...nodes.loaders import native_models, native_vae
from ...nodes.loaders.native_models import (
    PREDICTION_TYPES,
    UNET_PREFIX,
    build_base_model,
    load_vae,
)
from ..data.clusters import AnnotatedImage
from ..data.image_source import (
    MAX_IMAGES,
    ImageSource,
    load_images,
    make_image_grid,
    open_source,
    random_indices,
    sample_captions,
)
from ..data.shard_source import ShardSource
from ..task import Batch, Task, init_weights
from . import clip_pair, latents

UNET_FILE = "unet.safetensors"
ZERO_INIT_WEIGHTS = ("out_layers.3.weight", "proj_out.weight", "to_out.0.weight", "out.2.weight")
NUM_SHOWN_IMAGES = 6
WIDE_ASPECT = 1.5  # width of wide images relative to their height
HEAD_MARGIN = 0.35  # around the face box on each side, as a fraction of its size: covers hair and ears
SAMPLING_OPTIONS: dict[str, Any] = {"steps": 20, "cfg": 4.0, "sampler_name": "euler", "scheduler": "karras"}


@dataclass(frozen=True)
class UNetConfig:
    """`vae` and `text` are files of earlier runs. Without `text` a new text encoder learns with the UNet; `text_width`,
    `text_layers` and `text_heads` are its sizes.

    `resolution` is in pixels; `caption_dropout` is the probability of an empty caption. The share `detailed_share` of
    the captions describes the people, too, if the data has such captions. `wide_data` is a folder of images 1.5 times
    as wide, which make up the share `wide_share` of the batches.

    Timesteps are uniform, or follow a logit-normal distribution of `timestep_mean` and `timestep_std` (Esser et al.
    2403.03206, Eq. 19). `snr_gamma` is min-SNR's gamma (Hang et al. 2303.09556, Eq. 8); with v-prediction the weights
    are those of SNR + 1.

    `prediction` is "noise" (epsilon) or "velocity" (v). A small model should predict v: at high noise levels it cannot
    predict epsilon precisely enough for an image to remain, while v is nearly the image there.

    The loss in people's heads has the weight `face_loss_weight` relative to the rest. With `cached_samples`, only the
    first so many images of each folder are used, and their latents are computed once.
    """

    vae: str
    text: str = ""
    text_width: int = 128
    text_layers: int = 3
    text_heads: int = 4
    resolution: int = 128
    model_channels: int = 32
    channel_mult: tuple[int, ...] = (1, 2, 2, 3)
    num_res_blocks: int = 2
    transformer_depth: tuple[int, ...] = (1, 1, 1, 0)
    num_heads: int = 8
    caption_dropout: float = 0.1
    detailed_share: float = 0.0
    wide_data: str = ""
    wide_share: float = 0.0
    timestep_mean: float = 0.0
    timestep_std: float = 0.0
    snr_gamma: float = 5.0
    prediction: str = "noise"
    face_loss_weight: float = 1.0
    cached_samples: int = 0
    gradient_checkpointing: bool = False

    def __post_init__(self) -> None:
        if len(self.channel_mult) != len(self.transformer_depth):
            raise ValueError(
                f"got {len(self.channel_mult)} channel_mult and {len(self.transformer_depth)} transformer_depth in "
                "[task]; expected one of each per level"
            )
        if self.prediction not in PREDICTION_TYPES:
            raise ValueError(
                f"got prediction = {self.prediction!r} in [task]; expected {' or '.join(PREDICTION_TYPES)}"
            )


class ImagePool:
    """The images of one aspect ratio that a batch is drawn from, and their cached latents."""

    def __init__(
        self, source: ImageSource, settings: UNetConfig, autoencoder: nn.Module, aspect_ratio: float = 1.0
    ) -> None:
        self.source, self.settings, self.aspect_ratio = source, settings, aspect_ratio
        self.latent_shape = settings.resolution // 8, round(settings.resolution * aspect_ratio) // 8
        self.cached_latents: Tensor | None = None
        if settings.cached_samples:
            count = settings.cached_samples
            if isinstance(source, ShardSource):
                count = min(count, len(source))  # beyond them the images start over
            self.cached_latents = latents.cache_latents(
                source, Path(settings.vae), autoencoder, settings.resolution, count, aspect_ratio
            )
        self.make_loss_weights = make_weight_reader(
            source, settings.resolution, settings.face_loss_weight, aspect_ratio
        )

    def sample_inputs(self, generator: Generator, batch_size: int) -> tuple[list[int], Batch]:
        """Random image numbers, and the images or their latents with the weights of their losses."""
        resolution, cached = self.settings.resolution, self.cached_latents
        numbers = random_indices(generator, batch_size, MAX_IMAGES if cached is None else len(cached))
        inputs = (
            {"images": load_images(self.source, numbers, resolution, self.aspect_ratio)}
            if cached is None
            else {"latents": cached[numbers].float()}
        )
        return numbers, {**inputs, **self.make_loss_weights(numbers)}


class TextToImage(Task):
    """Loss: the mean squared error of the predicted noise."""

    def __init__(self, settings: UNetConfig, source: ImageSource, seed: int) -> None:
        super().__init__()
        self.settings, self.source = settings, source
        self.tokenizer = clip_pair.SDTokenizer()
        sources = {1.0: source} | ({WIDE_ASPECT: open_source(settings.wide_data)} if settings.wide_share else {})
        self.text: Any = None if settings.text else self._build_text_encoder([*sources.values()], seed)
        text_encoder = self.text or clip_pair.load_text_encoder(Path(settings.text))
        self.frozen = FrozenStack(text_encoder, load_vae(Path(settings.vae)))
        self.pools = [
            ImagePool(images, settings, self.frozen.autoencoder, aspect_ratio)
            for aspect_ratio, images in sources.items()
        ]
        context_dim = text_encoder.transformer.get_input_embeddings().weight.shape[1]
        channels = native_vae.count_latent_channels(self.frozen.autoencoder)
        self.unet_config = build_unet_config(settings, context_dim, channels)
        self.model: Any = build_base_model(self.unet_config, settings.prediction)
        init_weights(self.model.diffusion_model, seed, zero_init=ZERO_INIT_WEIGHTS)

    def _build_text_encoder(self, sources: Sequence[ImageSource], seed: int) -> Any:
        """A new text encoder for the words of all captions. Its projection is not trained: images do not use it."""
        words = [source.caption_words for source in sources]
        known_words = None if None in words else sorted({word for some in words for word in some or ()})
        known_tokens = clip_pair.list_known_tokens(self.tokenizer, known_words)
        text_encoder = native_models.build_text_encoder(self._text_config, known_tokens)
        init_weights(text_encoder, seed + 1)
        text_encoder.requires_grad_(False).transformer.text_model.requires_grad_(True)
        clip_pair.clone_norm_inputs(text_encoder)
        return text_encoder

    @property
    def _text_config(self) -> dict[str, Any]:
        settings = self.settings
        return clip_pair.build_text_config(settings.text_width, settings.text_layers, settings.text_heads)

    def make_batch(self, generator: Generator, batch_size: int) -> Batch:
        is_wide = torch.rand((), generator=generator).item() < self.settings.wide_share
        pool = self.pools[int(is_wide)]
        numbers, inputs = pool.sample_inputs(generator, batch_size)
        captions = [self._load_caption(pool.source, number, generator) for number in numbers]
        channels = self.unet_config["in_channels"]
        return {
            **inputs, "tokens": clip_pair.tokenize_texts(self.tokenizer, captions),
            "noise": torch.randn(batch_size, channels, *pool.latent_shape, generator=generator),
            "timesteps": self._sample_timesteps(batch_size, generator),
        }  # fmt: skip

    def _load_caption(self, source: ImageSource, number: int, generator: Generator) -> str:
        drop, describe, choice = torch.rand(3, generator=generator).tolist()
        if drop < self.settings.caption_dropout:
            return ""
        detailed = source.load_detailed_captions(number) if describe < self.settings.detailed_share else ()
        return detailed[int(choice * len(detailed))] if detailed else source.load_caption(number)

    def _sample_timesteps(self, count: int, generator: Generator) -> Tensor:
        total, settings = self.model.model_sampling.num_timesteps, self.settings
        if not settings.timestep_std:
            return torch.randint(total, (count,), generator=generator)
        normal = torch.randn(count, generator=generator) * settings.timestep_std + settings.timestep_mean
        return (normal.sigmoid() * total).long().clamp(max=total - 1)  # a sigmoid may round to 1

    def forward(self, batch: Batch) -> dict[str, Tensor]:
        if "latents" not in batch:
            with torch.no_grad():
                batch = {**batch, "latents": latents.encode_latents(self.frozen.autoencoder, batch["images"])}
        text = self.frozen.encode_tokens(batch["tokens"], batch["noise"].device)
        noised = NoisedLatents.from_batch(self.model, batch)
        loss = denoising_loss(
            self.model, noised, self.settings.snr_gamma, loss_weights=batch.get("loss_weights"), c_crossattn=text
        )
        return {"noise": loss}

    def make_samples(self, generator: Generator) -> dict[str, Tensor]:
        """Images of some captions, made with ComfyUI's sampler; below them, images of the same as described."""
        rows = sample_captions(self.source, generator, NUM_SHOWN_IMAGES)
        captions = [*rows]
        described = [next(iter(self.source.load_detailed_captions(number)), "") for number in rows.values()]
        if self.settings.detailed_share and all(described):
            captions += described
        device = next(self.model.parameters()).device
        positive, negative = (
            [[self.frozen.encode_tokens(clip_pair.tokenize_texts(self.tokenizer, texts), device), {}]]
            for texts in (captions, [""])
        )
        shape = self.unet_config["in_channels"], *self.pools[0].latent_shape
        noise = torch.randn(len(rows), *shape, generator=generator).repeat(len(captions) // len(rows), 1, 1, 1)
        sampled = sample_latents(ModelPatcher(self.model, device, device), noise, positive, negative)
        images = latents.decode_latents(self.frozen.autoencoder, sampled.to(device))
        return {"images": make_image_grid(*images.split(len(rows)))}

    def save_model(self, folder: Path, notes: Mapping[str, Any]) -> None:
        weights = self.model.diffusion_model.state_dict()
        tensors = {UNET_PREFIX + key: value.half().contiguous() for key, value in weights.items()}
        settings = {**asdict(self.settings), "config": self.unet_config}
        metadata = native_metadata.make_native_metadata("unet", "SD1.5", notes, settings=settings)
        save_file(tensors, folder / UNET_FILE, metadata)
        if self.text is not None:
            settings = {**asdict(self.settings), "config": self._text_config}
            clip_pair.save_text_encoder(self.text, folder, notes, settings)


@dataclass(frozen=True)
class NoisedLatents:
    """A batch at its noise levels: noise [n, c, h, w], sigma [n], and the latents with that noise."""

    noise: Tensor
    sigma: Tensor
    noisy_latents: Tensor

    @classmethod
    def from_batch(cls, model: BaseModel, batch: Batch) -> NoisedLatents:
        """Add `noise` to the VAE's `latents` at `timesteps` [n] of the model's schedule."""
        sampling: Any = model.model_sampling
        sigma = sampling.sigma(batch["timesteps"])
        clean = model.process_latent_in(batch["latents"])
        return cls(batch["noise"], sigma, sampling.noise_scaling(sigma, batch["noise"], clean))


def denoising_loss(
    model: BaseModel, noised: NoisedLatents, snr_gamma: float, loss_weights: Tensor | None = None, **model_kwargs: Any
) -> Tensor:
    """The mean squared error of the predicted noise with min-SNR weights (UNetConfig).

    `model_kwargs` are the model's other inputs, such as text; `loss_weights` [n, h, w] weight the latent grid.
    """
    predicted = predict_noise(model, noised.noisy_latents, noised.sigma, **model_kwargs)
    errors = mse_loss(predicted, noised.noise, reduction="none").mean(1)
    errors = (errors if loss_weights is None else errors * loss_weights).mean((1, 2))
    variance = noised.sigma.square()
    limit = 1 + variance if model.model_type == ModelType.V_PREDICTION else torch.ones_like(variance)
    return (errors * (snr_gamma * variance).minimum(limit)).mean()


def compute_loss_weights(annotated: AnnotatedImage, face_loss_weight: float) -> Tensor:
    """Loss weights on an image's latent grid, [H / 8, W / 8], with mean 1.

    Cells in heads have `face_loss_weight` times the weight of the others.
    """
    height, width = (length // 8 for length in annotated.image.shape[:2])
    centers_x, centers_y = torch.arange(width) * 8 + 3.5, torch.arange(height) * 8 + 3.5
    weights = torch.ones(height, width)
    for low, high in [annotated.box.view(2, 2).unbind(), *(face[:2].unbind() for face in annotated.other_faces)]:
        margin = HEAD_MARGIN * (high - low)
        x, y = (
            (centers > a) & (centers < b)
            for centers, a, b in zip((centers_x, centers_y), low - margin, high + margin, strict=True)
        )
        weights[y[:, None] & x] = face_loss_weight
    return weights / weights.mean()


def make_weight_reader(
    source: ImageSource, resolution: int, face_loss_weight: float, aspect_ratio: float = 1.0
) -> Callable[[Sequence[int]], Batch]:
    """A function from image numbers to their `loss_weights` in a batch; to an empty batch if all weights are 1."""
    if face_loss_weight == 1:
        return lambda numbers: {}

    @functools.cache
    def compute(number: int) -> Tensor:
        return compute_loss_weights(source.load_annotated_image(number, resolution, aspect_ratio), face_loss_weight)

    return lambda numbers: {"loss_weights": torch.stack([compute(number) for number in numbers])}


def predict_noise(model: BaseModel, noisy_latents: Tensor, sigma: Tensor, **model_kwargs: Any) -> Tensor:
    """The noise that the model predicts in latents [n, c, h, w] at the noise levels sigma [n]."""
    denoised = model.apply_model(noisy_latents, sigma, **model_kwargs)
    # ComfyUI's model returns the denoised latents, whatever the network predicts.
    return ((noisy_latents - denoised) / sigma[:, None, None, None]).float()


def sample_latents(model: ModelPatcher, noise: Tensor, positive: list[Any], negative: list[Any]) -> Tensor:
    """Latents that ComfyUI's sampler makes from noise [n, c, h, w]."""
    return comfy.sample.sample(
        model, noise, positive=positive, negative=negative, latent_image=torch.zeros_like(noise), disable_pbar=True,
        seed=0, **SAMPLING_OPTIONS,
    )  # fmt: skip


class FrozenStack:
    """Text encoder and VAE. Not a submodule, so that neither checkpoints nor process groups contain the frozen ones."""

    def __init__(self, text_encoder: nn.Module, autoencoder: nn.Module) -> None:
        self.text_encoder, self.autoencoder = text_encoder, autoencoder

    def encode_tokens(self, tokens: clip_pair.TokenRows, device: torch.device) -> Tensor:
        """The text encoder's hidden states [n, 77, width]."""
        return self.text_encoder.to(device)(tokens)[0]


def build_unet_config(settings: UNetConfig, context_dim: int, channels: int) -> dict[str, Any]:
    """ComfyUI's config of the UNet; `context_dim` is the width of the text encoder, `channels` are the VAE's."""
    input_depth = [depth for depth in settings.transformer_depth for _ in range(settings.num_res_blocks)]
    output_depth = [depth for depth in settings.transformer_depth for _ in range(settings.num_res_blocks + 1)]
    return {
        "image_size": settings.resolution // 8, "in_channels": channels, "out_channels": channels,
        "model_channels": settings.model_channels,
        "num_res_blocks": [settings.num_res_blocks] * len(settings.channel_mult),
        "channel_mult": list(settings.channel_mult),
        "transformer_depth": input_depth, "transformer_depth_output": output_depth,
        "transformer_depth_middle": 1, "context_dim": context_dim, "num_heads": settings.num_heads,
        "use_spatial_transformer": True, "legacy": False, "use_checkpoint": settings.gradient_checkpointing,
    }  # fmt: skip
