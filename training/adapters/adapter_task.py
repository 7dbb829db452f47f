"""Common base of the identity tasks: a frozen base model, and images of people grouped by person.

The face comes from another image of the same person than the one to predict, so that an adapter learns identity
instead of copying pixels.
"""

from __future__ import annotations

import hashlib
from abc import abstractmethod
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Generic, TypeVar

import torch
from comfy.model_patcher import ModelPatcher
from safetensors.torch import load_file, save_file
from torch import Generator, Tensor, nn

from ...nodes.attention.injection import Injection
from ...nodes.attention.patch import attach_injection, training_options
from ...nodes.loaders import native_models
from ..base_models import clip_pair, latents, sdxl, unet
from ..data import shard_source
from ..data.clusters import Album, AnnotatedImage
from ..data.image_source import ImageSource, load_images, make_image_grid, open_album, random_indices
from ..task import Batch, Task
from .face_encoders import FaceReader

NUM_SHOWN_IMAGES = 6

PeopleTaskConfigType = TypeVar("PeopleTaskConfigType", bound="PeopleTaskConfig")


@dataclass(frozen=True, kw_only=True)
class PeopleTaskConfig:
    """`vae`, `text` and `unet` are files of earlier runs, or all three the same SDXL checkpoint. `resolution` is in
    pixels, `file` the name of the output file without its extension.

    Training uses up to `max_people` people with at least two images, up to `images_per_person` of each. With
    `cached_samples`, only the first so many images of the shards are used, and their latents and faces are computed
    once; 0 uses all images and computes both at every step. With `face_from_other_image` the face comes from another
    image of the person. `caption_dropout` is the probability of an empty caption. `snr_gamma` and `face_loss_weight`
    are those of UNetConfig. Samples show people of `validation_data`: a folder of shards, or the path of a
    function that returns an album (image_source.open_album). `init_from` is the file of another run to start from.
    """

    vae: str
    text: str
    unet: str
    file: str
    resolution: int = 128
    cached_samples: int = 0
    max_people: int = 1 << 30
    images_per_person: int = 6
    face_from_other_image: bool = True
    caption_dropout: float = 0.1
    snr_gamma: float = 5.0
    face_loss_weight: float = 1.0
    validation_data: str = "portrait_world.world_album:open_validation_album"
    init_from: str = ""


class DevicePatchers:
    """One module with a ModelPatcher for each device it is used on."""

    def __init__(self, module: nn.Module) -> None:
        self.module = module
        self._patchers: dict[torch.device, ModelPatcher] = {}

    def get_patcher(self, device: torch.device) -> ModelPatcher:
        if device not in self._patchers:
            self._patchers[device] = ModelPatcher(self.module, device, device)
        self.module.to(device)
        return self._patchers[device]


class BaseModelStack(unet.FrozenStack):
    """The frozen base model (VAE, text encoder, UNet), and cached latents and faces by image index."""

    def __init__(self, settings: PeopleTaskConfig) -> None:
        parts: tuple[Any, Any, Any]
        if settings.vae == settings.text == settings.unet:
            parts = sdxl.load_sdxl(Path(settings.unet))
        else:
            parts = (
                clip_pair.load_text_encoder(Path(settings.text)),
                native_models.load_vae(Path(settings.vae)),
                native_models.load_unet(Path(settings.unet)),
            )
        text, autoencoder, model = (part.eval().requires_grad_(False) for part in parts)
        super().__init__(text, autoencoder)
        self.model = model
        self.unet_patchers = DevicePatchers(self.model)
        self.cached_latents: Tensor | None = None
        self.cached_faces: dict[int, Tensor] = {}

    @property
    def latent_channels(self) -> int:
        return self.model.latent_format.latent_channels

    def make_model_kwargs(
        self, tokens: clip_pair.TokenRows, resolution: int, device: torch.device
    ) -> dict[str, Tensor]:
        """The UNet's conditioning besides the text: for SDXL, the pooled text embedding and the image size."""
        if not self.model.adm_channels:
            return {}
        pooled = self.text_encoder.to(device)(tokens)[1]
        return {"y": self.model.encode_adm(pooled_output=pooled, width=resolution, height=resolution).to(device)}


class PeopleTask(Task, Generic[PeopleTaskConfigType]):
    """Makes batches of pairs: an image to predict, and a face of the same person.

    Subclasses hold the trained weights. The base model is not registered as a submodule.
    """

    def __init__(self, settings: PeopleTaskConfigType, source: ImageSource) -> None:
        super().__init__()
        self.settings, self.source = settings, shard_source.require_shards(source)
        self.tokenizer = clip_pair.SDTokenizer()
        self.frozen = BaseModelStack(settings)
        self.make_loss_weights = unet.make_weight_reader(self.source, settings.resolution, settings.face_loss_weight)
        num_images = settings.cached_samples or len(self.source)
        self.clusters = self.source.list_clusters(num_images, settings.max_people, settings.images_per_person)
        if not self.clusters:
            raise ValueError(
                f"got no person with two images among the first {num_images}; expected at least one; "
                "raise cached_samples or add shards"
            )
        if settings.cached_samples:
            autoencoder = self.frozen.autoencoder
            self.frozen.cached_latents = latents.cache_latents(
                self.source, Path(settings.vae), autoencoder, settings.resolution, settings.cached_samples
            )

    @property
    @abstractmethod
    def reader(self) -> FaceReader:
        """Crops and encodes the faces."""

    @property
    def dropout_rates(self) -> tuple[float, float, float]:
        """Probabilities of dropping the caption alone, the face alone, and both."""
        return self.settings.caption_dropout, 0.0, 0.0

    def cache_pool_faces(self, reader_file: Path) -> None:
        """Encode the faces of the cached images once, in a folder next to the reader's file."""
        if not self.settings.cached_samples:
            return
        order = [index for cluster in self.clusters for index in cluster]
        first = self.source.load_original_image(order[0]).image.numpy().tobytes()
        digest = hashlib.sha256(f"{self.reader.hash} {order}".encode() + first).hexdigest()[:8]

        def encode(positions: range) -> Tensor:
            return self.read_sample_faces(
                [self.source.load_original_image(order[position % len(order)]) for position in positions]
            )

        features = latents.cache_tensors(reader_file.parent / f"faces-{digest}", len(order), encode)
        self.frozen.cached_faces = dict(zip(order, features, strict=True))

    def read_sample_faces(self, samples: Sequence[AnnotatedImage]) -> Tensor:
        """The face features [n, ...] of annotated images."""
        device = torch.accelerator.current_accelerator(check_available=True) or torch.device("cpu")
        return self.reader.read_faces(torch.stack([self.reader.crop_face(sample) for sample in samples]), device)

    def make_batch(self, generator: Generator, batch_size: int) -> Batch:
        latent_shape = self.frozen.latent_channels, *[self.settings.resolution // 8] * 2
        num_faces = self.choose_face_count(generator)
        people = random_indices(generator, batch_size, len(self.clusters))
        firsts, seconds = random_indices(generator, batch_size), random_indices(generator, batch_size)
        rows = [
            self._select_images(self.clusters[person], first, second, num_faces)
            for person, first, second in zip(people, firsts, seconds, strict=True)
        ]
        targets, faces = [row[0] for row in rows], [index for row in rows for index in row[1:]]
        caption_end, face_end, both_end = torch.tensor(self.dropout_rates).cumsum(0).tolist()
        rolls = torch.rand(batch_size, generator=generator)
        drop_face = (rolls >= caption_end) & (rolls < both_end)
        drop_caption = ((rolls < caption_end) | ((rolls >= face_end) & (rolls < both_end))).tolist()
        captions = [
            "" if drop else self.source.load_caption(index) for index, drop in zip(targets, drop_caption, strict=True)
        ]
        num_timesteps = self.frozen.model.model_sampling.num_timesteps
        return {
            **self._load_inputs(targets, faces), "target_indices": targets, "drop_face": drop_face,
            "tokens": clip_pair.tokenize_texts(self.tokenizer, captions),
            "noise": torch.randn(batch_size, *latent_shape, generator=generator),
            "timesteps": torch.randint(num_timesteps, (batch_size,), generator=generator),
        }  # fmt: skip

    def _load_inputs(self, target_indices: Sequence[int], face_indices: Sequence[int]) -> Batch:
        """Target images and face crops, or their cached latents and features; and the loss weights."""
        weights = self.make_loss_weights(target_indices)
        if self.frozen.cached_latents is None:
            crops = [self.reader.crop_face(self.source.load_original_image(index)) for index in face_indices]
            images = load_images(self.source, target_indices, self.settings.resolution)
            return {"images": images, "face_crops": torch.stack(crops), **weights}
        features = torch.stack([self.frozen.cached_faces[index] for index in face_indices])
        return {
            "latents": self.frozen.cached_latents[list(target_indices)].float(),
            "face_features": features.float(),
            **weights,
        }

    def choose_face_count(self, generator: Generator) -> int:
        """The number of faces for each row of a batch."""
        return 1

    def _select_images(self, indices: Sequence[int], first: int, second: int, num_faces: int) -> list[int]:
        """The target image, followed by the face images; an image repeats only after all others were used."""
        target = first % len(indices)
        others = [*indices[target + 1 :], *indices[:target]]
        if not self.settings.face_from_other_image:
            others = [indices[target]]
        row, remaining = [indices[target]], list[int]()
        for _ in range(num_faces):
            remaining = remaining or [*others]
            second, position = divmod(second, len(remaining))
            row.append(remaining.pop(position))
        return row

    def make_samples(self, generator: Generator) -> dict[str, Tensor]:
        """Photos of people outside the training data, above images of them from ComfyUI's sampler."""
        album, resolution = self._open_validation_album(), self.settings.resolution
        people = [random_indices(generator, 1, len(album))[0] for _ in range(NUM_SHOWN_IMAGES)]
        pairs = [
            [
                album.load_annotated_image(person, number % album.count_images(person))
                for number in random_indices(generator, 2)
            ]
            for person in people
        ]
        photos, others = zip(*pairs, strict=True)
        noise = torch.randn(
            NUM_SHOWN_IMAGES, self.frozen.latent_channels, resolution // 8, resolution // 8, generator=generator
        )
        device = next(self.parameters()).device
        features = self.read_sample_faces(photos).to(device)
        generated = self.generate_latents(features, [other.caption for other in others], noise)
        images = latents.decode_latents(self.frozen.autoencoder, generated.to(device))
        photo_row = torch.stack([photo.image for photo in photos]).to(device).movedim(-1, 1).float() / 255
        return {"images": make_image_grid(photo_row, images)}

    @abstractmethod
    def generate_latents(self, face_features: Tensor, captions: Sequence[str], noise: Tensor) -> Tensor:
        """Sample latents from noise [n, c, h, w] for face features [n, ...] and n captions."""

    def _open_validation_album(self) -> Album:
        return open_album(self.settings.validation_data, self.settings.resolution)


class AdapterTask(PeopleTask[PeopleTaskConfigType]):
    """Loss: the mean squared error of the noise that the base model predicts with the adapter attached."""

    @abstractmethod
    def make_file_contents(self, notes: Mapping[str, Any]) -> tuple[dict[str, Tensor], dict[str, str]]:
        """The file's tensors by name, uncopied, and its metadata."""

    @torch.no_grad()
    def load_initial_weights(self) -> None:
        """Load the weights of another run. Raises ValueError if a trained tensor is missing or has another shape."""
        if not self.settings.init_from:
            return
        with native_models.report_file_errors(Path(self.settings.init_from), "an adapter file of another run"):
            loaded = load_file(self.settings.init_from)
        trained = {value.data_ptr() for value in self.parameters() if value.requires_grad}
        for key, value in self.make_file_contents({})[0].items():
            if value.data_ptr() not in trained:
                continue
            if key not in loaded or loaded[key].shape != value.shape:
                found = f"has the shape {[*loaded[key].shape]}" if key in loaded else "is missing"
                raise ValueError(
                    f"got {self.settings.init_from}, in which {key} {found}; expected the shape {[*value.shape]}; "
                    "set init_from to a file of the same method and sizes"
                )
            value.copy_(loaded[key])

    def save_model(self, folder: Path, notes: Mapping[str, Any]) -> None:
        tensors, metadata = self.make_file_contents(notes)
        half_tensors = {key: value.half().contiguous() for key, value in tensors.items()}
        save_file(half_tensors, folder / f"{self.settings.file}.safetensors", metadata)

    @abstractmethod
    def make_injection(self, model: ModelPatcher, face_features: Tensor) -> Injection:
        """The adapter bound to face features [n, ...], face i for row i."""

    def forward(self, batch: Batch) -> dict[str, Tensor]:
        device = batch["noise"].device
        with torch.no_grad():
            if "latents" not in batch:
                batch = {
                    **batch,
                    "latents": latents.encode_latents(self.frozen.autoencoder, batch["images"]),
                    "face_features": self.reader.read_faces(batch["face_crops"], device),
                }
            text = self.frozen.encode_tokens(batch["tokens"], device)
            patcher = self.get_base_patcher(device)
            noised = unet.NoisedLatents.from_batch(patcher.model, batch)
        patched = attach_injection(patcher, self.make_batch_injection(patcher, batch))
        model_kwargs = {
            "c_crossattn": text,
            **self.make_model_kwargs(batch),
            **training_options(patched, float(noised.sigma.max())),
        }
        loss = unet.denoising_loss(
            patcher.model, noised, self.settings.snr_gamma, batch.get("loss_weights"), **model_kwargs
        )
        return {"noise": loss}

    def get_base_patcher(self, device: torch.device) -> ModelPatcher:
        """The base model without a face."""
        return self.frozen.unet_patchers.get_patcher(device)

    def make_model_kwargs(self, batch: Batch) -> dict[str, Tensor]:
        """The base model's conditioning besides the text."""
        return self.frozen.make_model_kwargs(batch["tokens"], self.settings.resolution, batch["noise"].device)

    def make_batch_injection(self, model: ModelPatcher, batch: Batch) -> Injection:
        """The adapter bound to the faces of a batch."""
        return self.make_injection(model, self.get_face_features(batch))

    def get_face_features(self, batch: Batch) -> Tensor:
        """The face features of a batch, unconditional ones in rows with `drop_face`."""
        return batch["face_features"]

    def apply_adapter(self, model: ModelPatcher, face_features: Tensor) -> ModelPatcher:
        """The model with the adapter attached for sampling, face i for row i."""
        return attach_injection(model, self.make_injection(model, face_features))

    def generate_latents(self, face_features: Tensor, captions: Sequence[str], noise: Tensor) -> Tensor:
        model = self.get_base_patcher(face_features.device)
        prompts = [self._encode_conditioning(texts, face_features.device) for texts in (captions, [""])]
        no_dropout = torch.zeros(len(noise), dtype=torch.bool)
        features = self.get_face_features({"face_features": face_features, "drop_face": no_dropout})
        return unet.sample_latents(self.apply_adapter(model, features), noise, *prompts)

    def _encode_conditioning(self, texts: Sequence[str], device: torch.device) -> list[Any]:
        """Texts as ComfyUI's CONDITIONING."""
        embeddings, pooled = self.frozen.text_encoder.to(device)(clip_pair.tokenize_texts(self.tokenizer, texts))[:2]
        return [[embeddings, {"pooled_output": pooled}]]
