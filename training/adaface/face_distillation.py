"""Face distillation of the prompt inverter (AdaFace, Sec. 2.1 and 2.2): faces as token embeddings for the base model.

Only the inverter is trained. Teacher and base model predict the noise of the same latents at several consecutive steps;
from one step to the next the teacher denoises (Eq. 2).
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeVar

import torch
from accelerate.utils import send_to_device
from safetensors.torch import load_file, save_file
from torch import Generator, Tensor, nn
from torch.nn.functional import mse_loss, normalize

from ...likeness.checkpoints import key_maps
from ...likeness.encoders.clip_text import EXPANDED_PROJECTIONS
from ...likeness.methods import adaface, arc2face, prompt_placeholders
from ...likeness.spec import AdaFaceSpec
from ...nodes.loaders import native_models
from ...nodes.loaders.adaface_loader import load_arc2face_encoder
from ..base_models import clip_pair, unet
from ..base_models.face_recognizer import EMBEDDING_SIZE
from ..data.image_source import ImageSource
from ..task import Batch
from . import prompt_tokens
from .face_task import FaceTask, FaceTaskConfig
from .model_expansion import expand_text_model

PERSON_PLACEHOLDER = "@"  # the person in the config's prompt
LAYER_WEIGHTS_NAME = "hidden_state_layer_weights"
NUM_CHECK_FACES = 16  # faces in the batch that measures progress


@dataclass(frozen=True, kw_only=True)
class FaceDistillationConfig(FaceTaskConfig):
    """`teacher` and `teacher_unet` are the files of an arc2face run.

    A fraction `random_face_fraction` of the faces are Gaussian embeddings with noise as images. Each batch takes 1 to
    `max_denoising_steps` steps. `prompt` marks the person with @; captions do with any of `class_words`, of which the
    first is also the class word. `hidden_layer_weights` are the initial weights of the inverter's last layers.

    `init_from` is a file of another run to start from. `copies_per_layer` expands each layer to so many values per
    token, and to as many "keys" or "queries", as `expanded_projection` says; the added copies are perturbed with noise
    of `expansion_noise` times the weights' standard deviation.
    """

    teacher: str
    teacher_unet: str
    random_face_fraction: float = 0.4
    max_denoising_steps: int = 3
    prompt: str = "a photo of @"
    class_words: tuple[str, ...] = ("person",)
    hidden_layer_weights: tuple[float, ...] = (1.0, 2.0, 4.0)
    init_from: str = ""
    copies_per_layer: tuple[int, ...] = ()
    expanded_projection: str = "keys"
    expansion_noise: float = 0.1

    def __post_init__(self) -> None:
        if self.expanded_projection not in EXPANDED_PROJECTIONS:
            raise ValueError(
                f"got expanded_projection = {self.expanded_projection!r} in [task]; "
                f"expected {' or '.join(EXPANDED_PROJECTIONS)}"
            )
        if PERSON_PLACEHOLDER not in self.prompt or self.max_denoising_steps < 1 or not self.class_words:
            raise ValueError(
                f"got prompt = {self.prompt!r}, max_denoising_steps = {self.max_denoising_steps} and "
                f"{len(self.class_words)} class_words in [task]; expected {PERSON_PLACEHOLDER} in the prompt, "
                "max_denoising_steps >= 1 and at least one class word"
            )


FaceDistillationConfigType = TypeVar("FaceDistillationConfigType", bound=FaceDistillationConfig)


class FrozenTeacher:
    """The frozen Arc2Face teacher, not registered as a submodule."""

    def __init__(self, settings: FaceDistillationConfig) -> None:
        text_encoder, self.spec = load_arc2face_encoder(Path(settings.teacher))
        self.text_encoder = text_encoder.float().eval().requires_grad_(False)
        self.model: Any = native_models.load_unet(Path(settings.teacher_unet)).eval().requires_grad_(False)

    def to_device(self, device: torch.device) -> FrozenTeacher:
        self.text_encoder.to(device)
        self.model.to(device)
        return self


class FaceDistillationTask(FaceTask[FaceDistillationConfigType]):
    """Loss: the mean squared error between the noise predicted by base model and teacher, summed over the steps."""

    def __init__(self, settings: FaceDistillationConfigType, source: ImageSource, seed: int) -> None:
        super().__init__(settings, source)
        clip_pair.clone_norm_inputs(self.frozen.text_encoder)
        self.teacher = FrozenTeacher(settings)
        self.inverter = init_prompt_inverter(self.frozen.text_encoder, settings, seed)
        self.prompt_ids = prompt_tokens.make_token_row(
            self.tokenizer,
            prompt_placeholders.split_prompt(settings.prompt, [PERSON_PLACEHOLDER]),
            [prompt_tokens.PERSON_TOKEN] * adaface.NUM_FACE_VECTORS,
        )
        self._previous_loss: Tensor | None = None

    def make_batch(self, generator: Generator, batch_size: int) -> Batch:
        batch = super().make_batch(generator, batch_size)
        num_steps = int(torch.randint(1, self.settings.max_denoising_steps + 1, (), generator=generator))
        num_timesteps = self.frozen.model.model_sampling.num_timesteps
        batch |= {
            "is_random": torch.rand(batch_size, generator=generator) < self.settings.random_face_fraction,
            "random_embeddings": torch.randn(batch_size, EMBEDDING_SIZE, generator=generator),
            "random_latents": torch.randn(batch["noise"].shape, generator=generator),
        }
        timesteps = torch.randint(num_timesteps, (num_steps, batch_size), generator=generator)
        return {**batch, "timesteps": timesteps.sort(0, descending=True).values}

    def encode_batch(self, batch: Batch) -> Batch:
        """Replace the rows with `is_random` by random embeddings and latents of noise."""
        encoded, is_random = super().encode_batch(batch), batch["is_random"]
        embeddings = normalize(batch["random_embeddings"], dim=-1)
        random_latents = batch["random_latents"] / self.frozen.model.latent_format.scale_factor
        return {
            **encoded,
            "face_features": torch.where(is_random[:, None], embeddings, encoded["face_features"]),
            "latents": torch.where(is_random[:, None, None, None], random_latents, encoded["latents"]),
        }

    def forward(self, batch: Batch) -> dict[str, Tensor]:
        return {"distillation": self.compute_distillation_loss(batch)}

    def compute_distillation_loss(self, batch: Batch) -> Tensor:
        """Eq. 2."""
        model = self.frozen.unet_patchers.get_patcher(batch["noise"].device).model
        with torch.no_grad():
            batch = self.encode_batch(batch)
            teacher_states = self.encode_teacher_prompt(batch["face_features"])
            first_step = {**batch, "timesteps": batch["timesteps"][0]}
            noisy = unet.NoisedLatents.from_batch(model, first_step).noisy_latents
        text = self.encode_rows([self.prompt_ids] * len(teacher_states), self.invert_prompt(teacher_states))
        teacher = self.teacher.to_device(noisy.device).model
        sigmas = [model.model_sampling.sigma(timesteps) for timesteps in batch["timesteps"]]
        loss = noisy.new_zeros(())
        for sigma, next_sigma in zip(sigmas, [*sigmas[1:], sigmas[-1]], strict=True):
            with torch.no_grad():
                noise = unet.predict_noise(teacher, noisy, sigma, c_crossattn=teacher_states)
            loss = loss + mse_loss(unet.predict_noise(model, noisy, sigma, c_crossattn=text), noise)
            noisy = noisy - (sigma - next_sigma)[:, None, None, None] * noise
        return loss

    def encode_teacher_prompt(self, face_embeddings: Tensor) -> Tensor:
        """The teacher's conditioning [n, 77, width] for unit face embeddings [n, 512]."""
        text_encoder = self.teacher.to_device(face_embeddings.device).text_encoder
        return arc2face.encode_face_prompt(text_encoder, face_embeddings)

    def invert_prompt(self, teacher_states: Tensor) -> Tensor:
        """Token embeddings [n, K, width] for the teacher's conditioning [n, 77, width]."""
        first = arc2face.FACE_TOKEN_INDEX
        return self.inverter.invert_tokens(teacher_states[:, first : first + adaface.NUM_FACE_VECTORS])

    def encode_rows(self, token_rows: Sequence[Sequence[int]], vectors: Tensor) -> Tensor:
        """The base model's conditioning [n, 77, width] for token rows with the person's vectors inserted."""
        return prompt_tokens.encode_token_rows(self.frozen.text_encoder.to(vectors.device), token_rows, vectors)

    def make_caption_rows(self, captions: Sequence[str], person_ids: Sequence[int] | None = None) -> list[list[int]]:
        """Token rows of captions with `person_ids` in place of each class word, or at the start if there is none.

        `person_ids` defaults to placeholders for the person's vectors.
        """
        person_ids = [prompt_tokens.PERSON_TOKEN] * adaface.NUM_FACE_VECTORS if person_ids is None else person_ids
        prompts = [prompt_placeholders.split_prompt(caption, self.settings.class_words) for caption in captions]
        return [prompt_tokens.make_token_row(self.tokenizer, parts, person_ids) for parts in prompts]

    def get_base_model(self) -> Any:
        return self.frozen.model

    def encode_conditions(self, face_embeddings: Tensor, captions: Sequence[str]) -> tuple[Tensor, Tensor]:
        vectors = self.invert_prompt(self.encode_teacher_prompt(face_embeddings))
        empty = clip_pair.tokenize_texts(self.tokenizer, [""])
        return (
            self.encode_rows(self.make_caption_rows(captions), vectors),
            self.frozen.encode_tokens(empty, face_embeddings.device),
        )

    def make_samples(self, generator: Generator) -> dict[str, Tensor]:
        return {**self.measure_progress(generator), **super().make_samples(generator)}

    def measure_progress(self, generator: Generator) -> dict[str, Tensor]:
        """The losses of a fixed batch, and `gain`, the relative decrease of their sum since the last call.

        When `gain` stays near 0, start a run with a larger `copies_per_layer`.
        """
        device = next(self.parameters()).device
        losses = self(send_to_device(self.make_batch(generator, NUM_CHECK_FACES), device))
        loss = torch.stack([*losses.values()]).sum()
        gain = {} if self._previous_loss is None else {"gain": 1 - loss / self._previous_loss}
        self._previous_loss = loss
        return {**{f"check_{name}": value for name, value in losses.items()}, **gain}

    def save_model(self, folder: Path, notes: Mapping[str, Any]) -> None:
        text, layer_weights = self.inverter.text, self.inverter.hidden_state_layer_weights
        num_heads = text.layers[0].self_attn.num_heads
        spec = AdaFaceSpec(prompt_tokens.detect_base_family(text), {"l": text.sizes["width"]}, num_heads, notes)
        tensors = prompt_tokens.collect_text_tensors(text, adaface.TEXT_MODEL_PREFIX)
        if layer_weights is not None:
            tensors = {**tensors, LAYER_WEIGHTS_NAME: layer_weights.detach().contiguous()}
        save_file(tensors, folder / f"{self.settings.file}.safetensors", adaface.make_adaface_metadata(spec))


def init_prompt_inverter(text_encoder: Any, settings: FaceDistillationConfig, seed: int) -> adaface.PromptInverter:
    """The initialized inverter: the base model's text encoder, or the file of another run, expanded."""
    tensors, layer_weights = None, torch.tensor(settings.hidden_layer_weights)[:, None]
    if settings.init_from:
        loaded = load_file(settings.init_from)
        layer_weights = loaded.get(LAYER_WEIGHTS_NAME, layer_weights[:0])
        tensors = key_maps.select_prefix(loaded, adaface.TEXT_MODEL_PREFIX)
        tensors.pop("embeddings.token_embedding.known", None)
    if settings.copies_per_layer:
        if tensors is None:
            tensors = key_maps.select_prefix(text_encoder.transformer.state_dict(), prompt_tokens.HOST_TEXT_PREFIX)
        tensors = expand_text_model(
            tensors, settings.copies_per_layer, settings.expansion_noise, seed, settings.expanded_projection
        )
    inverter = adaface.PromptInverter(prompt_tokens.build_trainable_text_model(text_encoder, tensors), {})
    if len(layer_weights):
        delattr(inverter, LAYER_WEIGHTS_NAME)
        inverter.register_parameter(LAYER_WEIGHTS_NAME, nn.Parameter(layer_weights.float()))
    return inverter
