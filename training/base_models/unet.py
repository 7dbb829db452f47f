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
from comfy.taesd.taesd import TAESD
from safetensors.torch import save_file
from torch import Generator, Tensor, nn
from torch.nn.functional import mse_loss

from ...likeness.checkpoints import native_metadata
from ...nodes.loaders.native_models import PREDICTION_TYPES, UNET_PREFIX, build_base_model, load_unet, load_vae
from ..data.clusters import AnnotatedImage
from ..data.image_source import MAX_IMAGES, ImageSource, load_images, make_image_grid, random_indices, sample_captions
from ..task import Batch, Task, init_weights
from . import clip_pair, latents, net2net

UNET_FILE = "unet.safetensors"
ZERO_INIT_WEIGHTS = ("out_layers.3.weight", "proj_out.weight", "to_out.0.weight", "out.2.weight")
NUM_SHOWN_IMAGES = 6
HEAD_MARGIN = 0.35  # around the face box on each side, as a fraction of its size: covers hair and ears
SAMPLING_OPTIONS: dict[str, Any] = {"steps": 20, "cfg": 4.0, "sampler_name": "euler", "scheduler": "karras"}


@dataclass(frozen=True)
class UNetConfig:
    """`vae` and `text` are files of earlier runs; `resolution` is in pixels; `caption_dropout` is the probability of an
    empty caption.

    `snr_gamma` is min-SNR's gamma (Hang et al. 2303.09556, Eq. 8); with v-prediction the weights are those of SNR + 1.
    `prediction` is "noise" (epsilon) or "velocity" (v). A small model should predict v: at high noise levels it cannot
    predict epsilon precisely enough for an image to remain, while v is nearly the image there.

    The loss in people's heads has the weight `face_loss_weight` relative to the rest. With `cached_samples`, only the
    first so many images are used, and their latents are computed once. `init_from` is the file of another run to start
    from, with the same channels or with half of them at some levels.
    """

    vae: str
    text: str
    resolution: int = 128
    model_channels: int = 32
    channel_mult: tuple[int, ...] = (1, 2, 2, 3)
    num_res_blocks: int = 2
    transformer_depth: tuple[int, ...] = (1, 1, 1, 0)
    num_heads: int = 8
    caption_dropout: float = 0.1
    snr_gamma: float = 5.0
    prediction: str = "noise"
    face_loss_weight: float = 1.0
    cached_samples: int = 0
    gradient_checkpointing: bool = False
    init_from: str = ""

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


class TextToImage(Task):
    """Loss: the mean squared error of the predicted noise."""

    def __init__(self, settings: UNetConfig, source: ImageSource, seed: int) -> None:
        super().__init__()
        self.settings, self.source = settings, source
        vae_file, text_encoder = Path(settings.vae), clip_pair.load_text_encoder(Path(settings.text))
        self.tokenizer = clip_pair.SDTokenizer()
        self.frozen = FrozenStack(text_encoder, load_vae(vae_file))
        if settings.cached_samples:
            self.frozen.cached_latents = latents.cache_latents(
                source, vae_file, self.frozen.autoencoder, settings.resolution, settings.cached_samples
            )
        context_dim = text_encoder.transformer.get_input_embeddings().weight.shape[1]
        self.unet_config = build_unet_config(settings, context_dim)
        self.model: Any = build_base_model(self.unet_config, settings.prediction)
        init_weights(self.model.diffusion_model, seed, zero_init=ZERO_INIT_WEIGHTS)
        self.make_loss_weights = make_weight_reader(source, settings.resolution, settings.face_loss_weight)
        if settings.init_from:
            self._load_initial_weights(Path(settings.init_from), seed)

    def _load_initial_weights(self, file: Path, seed: int) -> None:
        old, new = (model.diffusion_model.state_dict() for model in (load_unet(file), self.model))
        same = {key: weight.shape for key, weight in old.items()} == {key: weight.shape for key, weight in new.items()}
        weights = old if same else net2net.widen_unet(old, new, Generator().manual_seed(seed))
        self.model.diffusion_model.load_state_dict(weights)

    def make_batch(self, generator: Generator, batch_size: int) -> Batch:
        resolution, cached = self.settings.resolution, self.frozen.cached_latents
        numbers = random_indices(generator, batch_size, MAX_IMAGES if cached is None else len(cached))
        inputs = (
            {"images": load_images(self.source, numbers, resolution)}
            if cached is None
            else {"latents": cached[numbers].float()}
        )
        drop_caption = (torch.rand(batch_size, generator=generator) < self.settings.caption_dropout).tolist()
        captions = [
            "" if drop else self.source.load_caption(number) for number, drop in zip(numbers, drop_caption, strict=True)
        ]
        return {
            **inputs, **self.make_loss_weights(numbers), "tokens": clip_pair.tokenize_texts(self.tokenizer, captions),
            "noise": torch.randn(batch_size, 4, resolution // 8, resolution // 8, generator=generator),
            "timesteps": torch.randint(self.model.model_sampling.num_timesteps, (batch_size,), generator=generator),
        }  # fmt: skip

    def forward(self, batch: Batch) -> dict[str, Tensor]:
        with torch.no_grad():
            if "latents" not in batch:
                batch = {**batch, "latents": latents.encode_latents(self.frozen.autoencoder, batch["images"])}
            text = self.frozen.encode_tokens(batch["tokens"], batch["noise"].device)
        noised = NoisedLatents.from_batch(self.model, batch)
        loss = denoising_loss(
            self.model, noised, self.settings.snr_gamma, loss_weights=batch.get("loss_weights"), c_crossattn=text
        )
        return {"noise": loss}

    def make_samples(self, generator: Generator) -> dict[str, Tensor]:
        """Images of some captions, made with ComfyUI's sampler."""
        captions = list(sample_captions(self.source, generator, NUM_SHOWN_IMAGES))
        device = next(self.model.parameters()).device
        positive, negative = (
            [[self.frozen.encode_tokens(clip_pair.tokenize_texts(self.tokenizer, texts), device), {}]]
            for texts in (captions, [""])
        )
        size = self.settings.resolution // 8
        noise = torch.randn(len(captions), 4, size, size, generator=generator)
        sampled = sample_latents(ModelPatcher(self.model, device, device), noise, positive, negative)
        return {"images": make_image_grid(latents.decode_latents(self.frozen.autoencoder, sampled.to(device)))}

    def save_model(self, folder: Path, notes: Mapping[str, Any]) -> None:
        weights = self.model.diffusion_model.state_dict()
        tensors = {UNET_PREFIX + key: value.half().contiguous() for key, value in weights.items()}
        settings = {**asdict(self.settings), "config": self.unet_config}
        metadata = native_metadata.make_native_metadata("unet", "SD1.5", notes, settings=settings)
        save_file(tensors, folder / UNET_FILE, metadata)


@dataclass(frozen=True)
class NoisedLatents:
    """A batch at its noise levels: noise [n, 4, h, w], sigma [n], and the latents with that noise."""

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


def compute_loss_weights(annotated: AnnotatedImage, resolution: int, face_loss_weight: float) -> Tensor:
    """Loss weights on an image's latent grid, [resolution / 8, resolution / 8], with mean 1.

    Cells in heads have `face_loss_weight` times the weight of the others.
    """
    centers = torch.arange(resolution // 8) * 8 + 3.5
    weights = torch.ones(resolution // 8, resolution // 8)
    for low, high in [annotated.box.view(2, 2).unbind(), *(face[:2].unbind() for face in annotated.other_faces)]:
        margin = HEAD_MARGIN * (high - low)
        x, y = ((centers > a) & (centers < b) for a, b in zip(low - margin, high + margin, strict=True))
        weights[y[:, None] & x] = face_loss_weight
    return weights / weights.mean()


def make_weight_reader(
    source: ImageSource, resolution: int, face_loss_weight: float
) -> Callable[[Sequence[int]], Batch]:
    """A function from image numbers to their `loss_weights` in a batch; to an empty batch if all weights are 1."""
    if face_loss_weight == 1:
        return lambda numbers: {}

    @functools.cache
    def compute(number: int) -> Tensor:
        return compute_loss_weights(source.load_annotated_image(number, resolution), resolution, face_loss_weight)

    return lambda numbers: {"loss_weights": torch.stack([compute(number) for number in numbers])}


def predict_noise(model: BaseModel, noisy_latents: Tensor, sigma: Tensor, **model_kwargs: Any) -> Tensor:
    """The noise that the model predicts in latents [n, 4, h, w] at the noise levels sigma [n]."""
    denoised = model.apply_model(noisy_latents, sigma, **model_kwargs)
    # ComfyUI's model returns the denoised latents, whatever the network predicts.
    return ((noisy_latents - denoised) / sigma[:, None, None, None]).float()


def sample_latents(model: ModelPatcher, noise: Tensor, positive: list[Any], negative: list[Any]) -> Tensor:
    """Latents that ComfyUI's sampler makes from noise [n, 4, h, w]."""
    return comfy.sample.sample(
        model, noise, positive=positive, negative=negative, latent_image=torch.zeros_like(noise), disable_pbar=True,
        seed=0, **SAMPLING_OPTIONS,
    )  # fmt: skip


class FrozenStack:
    """The frozen base models. Not a submodule, so that neither checkpoints nor process groups contain them."""

    def __init__(self, text_encoder: nn.Module, autoencoder: TAESD) -> None:
        self.text_encoder, self.autoencoder = text_encoder, autoencoder
        self.cached_latents: Tensor | None = None

    def encode_tokens(self, tokens: clip_pair.TokenRows, device: torch.device) -> Tensor:
        """The text encoder's hidden states [n, 77, width]."""
        return self.text_encoder.to(device)(tokens)[0]


def build_unet_config(settings: UNetConfig, context_dim: int) -> dict[str, Any]:
    """ComfyUI's config of the UNet; `context_dim` is the width of the text encoder."""
    input_depth = [depth for depth in settings.transformer_depth for _ in range(settings.num_res_blocks)]
    output_depth = [depth for depth in settings.transformer_depth for _ in range(settings.num_res_blocks + 1)]
    return {
        "image_size": settings.resolution // 8, "in_channels": 4, "out_channels": 4,
        "model_channels": settings.model_channels,
        "num_res_blocks": [settings.num_res_blocks] * len(settings.channel_mult),
        "channel_mult": list(settings.channel_mult),
        "transformer_depth": input_depth, "transformer_depth_output": output_depth,
        "transformer_depth_middle": 1, "context_dim": context_dim, "num_heads": settings.num_heads,
        "use_spatial_transformer": True, "legacy": False, "use_checkpoint": settings.gradient_checkpointing,
    }  # fmt: skip
