"""Gates: quick measurements that say whether it is worth to go on. Each prints its figures beside what is required."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor

from ...nodes.loaders import native_models
from ...training.adapters.face_encoders import ArcFaceReader, CLIPVisionReader, FaceReader, OmniIDReader
from ...training.base_models import clip_pair, latents, unet
from ...training.data.clusters import AnnotatedImage
from ...training.omni_id import encoder
from ..evaluation.metrics import compute_cosines
from .held_out import HeldOutPeople

NUM_PEOPLE = 64
SIGMAS = (0.5, 1.0, 2.0, 4.0)
LATENT_NOISES = (0.0, 0.3, 0.6)
IMAGES_PER_CALL = 32
MIN_BASE_SHARE = 0.9  # of what another drawing of the person has
MIN_ENCODER_COSINE = 0.8
NUM_REGRESSION_PEOPLE, RIDGE_PENALTY = 3000, 0.003
CPU = torch.device("cpu")
ENCODERS: Mapping[str, Callable[[Path], FaceReader]] = {
    "recogniser": lambda runs: ArcFaceReader(runs / "recogniser" / "model" / "recogniser.onnx", "demo"),
    "vision": lambda runs: CLIPVisionReader(runs / "clip" / "model" / clip_pair.VISION_FILE),
    "omni_id": lambda runs: OmniIDReader(runs / "omni_flow" / "model" / encoder.ENCODER_FILE),
}

Figures = dict[str, float]


@dataclass(frozen=True)
class Gate:
    """A measurement of the files in a folder of runs, and the least value of each figure that is required."""

    measure: Callable[[Path], Figures]
    minimums: Mapping[str, float]

    def require(self, figures: Figures) -> None:
        """Raises ValueError if a figure is too low."""
        low = [
            f"{name} {figures[name]:.3f}, expected at least {minimum:g}"
            for name, minimum in self.minimums.items()
            if figures[name] < minimum
        ]
        if low:
            raise ValueError(f"got {'; '.join(low)}; train for longer, or find out why")


class BaseModels:
    """The trained VAE, text encoder and UNet, as modules."""

    def __init__(self, runs: Path) -> None:
        self.vae = native_models.load_vae(runs / "vae" / "model" / "vae.safetensors")
        folder = runs / "unet" / "model"
        self.text_encoder = native_models.load_text_encoder(folder / clip_pair.TEXT_FILE)
        self.model = native_models.load_unet(folder / unet.UNET_FILE).eval().requires_grad_(False)
        self._tokenizer = clip_pair.SDTokenizer()

    def encode_texts(self, texts: list[str]) -> Tensor:
        return self.text_encoder(clip_pair.tokenize_texts(self._tokenizer, texts))[0]

    def denoise(self, noisy: Tensor, sigma: float, states: Tensor) -> Tensor:
        """One prediction of the clean latents."""
        parts = zip(noisy.split(IMAGES_PER_CALL), states.split(IMAGES_PER_CALL), strict=True)
        return torch.cat(
            [self.model.apply_model(x, torch.full((len(x),), sigma), c_crossattn=text) for x, text in parts]
        )

    def sample_images(self, captions: list[str], seed: int) -> Tensor:
        """Images [n, H, W, 3] of captions, from ComfyUI's sampler."""
        shape = self.model.latent_format.latent_channels, 16, 16
        noise = torch.randn(len(captions), *shape, generator=torch.Generator().manual_seed(seed))
        patcher = unet.ModelPatcher(self.model, CPU, CPU)
        positive, negative = ([[self.encode_texts(texts), {}]] for texts in (captions, [""]))
        return decode_images(self.vae, unet.sample_latents(patcher, noise, positive, negative))


def decode_images(vae: torch.nn.Module, encoded: Tensor) -> Tensor:
    """Images [n, H, W, 3] from 0 to 1."""
    parts = [latents.decode_latents(vae, part) for part in encoded.split(IMAGES_PER_CALL)]
    return torch.cat(parts).movedim(1, -1)


def encode_images(vae: torch.nn.Module, images: Tensor) -> Tensor:
    """The latents of images uint8 [n, H, W, 3]."""
    parts = [part.movedim(-1, 1).float() / 255 for part in images.split(IMAGES_PER_CALL)]
    return torch.cat([latents.encode_latents(vae, part) for part in parts])


def make_noise(like: Tensor) -> Tensor:
    return torch.randn(like.shape, generator=torch.Generator().manual_seed(1))


@torch.no_grad()
def measure_reconstruction(runs: Path) -> Figures:
    """The VAE: decibels, and the judge's cosine under noise on the latents."""
    people, vae = HeldOutPeople(NUM_PEOPLE, runs), native_models.load_vae(runs / "vae" / "model" / "vae.safetensors")
    encoded = encode_images(vae, people.images)
    decoded = {noise: decode_images(vae, encoded + noise * make_noise(encoded)) for noise in LATENT_NOISES}
    psnr = -10 * (decoded[0.0] - people.images / 255).square().mean().log10()
    return {"psnr": float(psnr)} | {
        f"noise {noise:g}": people.judge_images(images).cosine for noise, images in decoded.items()
    }


@torch.no_grad()
def measure_one_step(runs: Path) -> Figures:
    """The UNet: the judge's cosine of single predictions, with the looks in the captions and without."""
    people, base = HeldOutPeople(NUM_PEOPLE, runs), BaseModels(runs)
    clean = encode_images(base.vae, people.images)
    states = {"": base.encode_texts(people.full_captions), " plain": base.encode_texts(people.plain_captions)}
    figures: Figures = {}
    for sigma in SIGMAS:
        for name, text in states.items():
            predicted = base.denoise(clean + sigma * make_noise(clean), sigma, text)
            figures[f"sigma {sigma:g}{name}"] = people.judge_images(decode_images(base.vae, predicted)).cosine
    return figures


@torch.no_grad()
def measure_base(runs: Path) -> Figures:
    """The base alone: images from full captions against the painter's of the same, as a share of what can be had."""
    people, base = HeldOutPeople(NUM_PEOPLE, runs), BaseModels(runs)
    limit, drawn = people.judge_other_images(), people.judge_images(base.sample_images(people.full_captions, 3))
    return {
        "share": drawn.cosine / limit.cosine, "cosine": drawn.cosine, "identified": drawn.identified,
        "another drawing": limit.cosine, "another identified": limit.identified,
    }  # fmt: skip


@torch.no_grad()
def measure_encoders(runs: Path) -> Figures:
    """What adapters read: the judge's vector of unseen people by ridge regression from each encoder's features."""
    people = HeldOutPeople(NUM_PEOPLE, runs)
    known = people.judge_train_people(NUM_REGRESSION_PEOPLE)
    figures: Figures = {}
    for name, make_reader in ENCODERS.items():
        reader = make_reader(runs)
        features = [read_features(reader, samples) for samples in (known.samples, people.other_samples)]
        predicted = regress_ridge(features[0], known.embeddings, features[1])
        truth = people.embed_faces(people.other_images / 255, people.other_key_points)
        figures[name] = float(compute_cosines(predicted, truth).mean())
    return figures


def read_features(reader: FaceReader, samples: Sequence[AnnotatedImage]) -> Tensor:
    """An encoder's features of annotated images, one row each."""
    crops = torch.stack([reader.crop_face(sample) for sample in samples])
    return torch.cat([reader.read_faces(part, CPU).float() for part in crops.split(IMAGES_PER_CALL)]).flatten(1)


def regress_ridge(known: Tensor, targets: Tensor, unseen: Tensor) -> Tensor:
    """Ridge regression in its dual form, since features are many: the targets of `unseen` rows.

    The penalty is a share of the features' mean squared norm.
    """
    mean, target_mean = known.mean(0), targets.mean(0)
    rows, others = (known - mean).double(), (unseen - mean).double()
    gram = rows @ rows.T
    penalty = RIDGE_PENALTY * gram.diagonal().mean() * torch.eye(len(gram), dtype=torch.float64)
    weights = torch.linalg.solve(gram + penalty, (targets - target_mean).double())
    return (others @ rows.T @ weights + target_mean).float()


GATES: Mapping[str, Gate] = {
    "reconstruction": Gate(measure_reconstruction, {"psnr": 28.0, "noise 0": 0.985, "noise 0.6": 0.88}),
    "one_step": Gate(measure_one_step, {"sigma 0.5": 0.88, "sigma 1": 0.76, "sigma 2": 0.66, "sigma 4": 0.55}),
    "base": Gate(measure_base, {"share": MIN_BASE_SHARE}),
    "encoders": Gate(measure_encoders, dict.fromkeys(ENCODERS, MIN_ENCODER_COSINE)),
}
