"""Composition distillation of the prompt inverter (AdaFace, Sec. 2.3 and 2.4): the rest of the prompt keeps its effect.

Four prompts per face see the same noise: the person alone and in a composition, a class word alone and in the same
composition. The paper does not say how the tokens of both are aligned; here the class word is padded with commas, so
that all other tokens have the same positions.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Generator, Tensor
from torch.nn.functional import adaptive_avg_pool2d

from ...likeness.methods import prompt_placeholders
from ..base_models import unet
from ..data.clusters import crop_and_resize
from ..data.image_source import ImageSource, random_indices
from ..task import Batch
from . import losses, prompt_tokens
from .attention_features import CrossAttentionRecord, record_cross_attentions
from .face_distillation import PERSON_PLACEHOLDER, FaceDistillationConfig, FaceDistillationTask
from .face_task import FaceTask


@dataclass(frozen=True, kw_only=True)
class CompositionDistillationConfig(FaceDistillationConfig):
    """`delta_weight`, `preserving_weight` and `distillation_weight` weigh Eq. 4, Eq. 8 and Eq. 2.

    Eq. 2 preserves the identity; a `distillation_weight` of 0 skips its computation.
    """

    delta_weight: float = 1.0
    preserving_weight: float = 1.0
    distillation_weight: float = 1.0


class CompositionDistillationTask(FaceDistillationTask[CompositionDistillationConfig]):
    """Losses: Eq. 4 for text states, attention maps and attention outputs; Eq. 8; Eq. 2."""

    def __init__(self, settings: CompositionDistillationConfig, source: ImageSource, seed: int) -> None:
        super().__init__(settings, source, seed)
        self.class_word_ids = prompt_tokens.tokenize_class_word(self.tokenizer, settings.class_words[0])
        self.class_prompt_ids = prompt_tokens.make_token_row(
            self.tokenizer, prompt_placeholders.split_prompt(settings.prompt, [PERSON_PLACEHOLDER]), self.class_word_ids
        )

    def make_batch(self, generator: Generator, batch_size: int) -> Batch:
        batch = super().make_batch(generator, batch_size)
        people = random_indices(generator, batch_size, len(self.clusters))
        choices = random_indices(generator, batch_size)
        indices = [
            self.clusters[person][choice % len(self.clusters[person])]
            for person, choice in zip(people, choices, strict=True)
        ]
        captions = [self.source.load_caption(index) for index in indices]
        return {
            **batch,
            "composed_rows": self.make_caption_rows(captions),
            "class_rows": self.make_caption_rows(captions, self.class_word_ids),
        }

    def _load_inputs(self, target_indices: Sequence[int], face_indices: Sequence[int]) -> Batch:
        targets = [self.source.load_original_image(index) for index in target_indices]
        masks = [crop_and_resize(target, self.settings.resolution).mask for target in targets]
        return {**super()._load_inputs(target_indices, face_indices), "masks": torch.stack(masks)}

    def forward(self, batch: Batch) -> dict[str, Tensor]:
        losses, weight = self.compute_composition_losses(batch), self.settings.distillation_weight
        return {**losses, "distillation": weight * self.compute_distillation_loss(batch)} if weight else losses

    def compute_composition_losses(self, batch: Batch) -> dict[str, Tensor]:
        """Eq. 4 and Eq. 8."""
        device = batch["noise"].device
        model = self.frozen.unet_patchers.get_patcher(device).model
        with torch.no_grad():
            encoded = FaceTask.encode_batch(self, batch)  # without random faces, which have no place in the image
            teacher_states = self.encode_teacher_prompt(encoded["face_features"])
            noised = unet.NoisedLatents.from_batch(model, {**encoded, "timesteps": batch["timesteps"][0]})
            class_rows = [self.class_prompt_ids] * len(teacher_states) + batch["class_rows"]
            class_text = self.frozen.encode_tokens(class_rows, device)
            class_layers = self.record_layers(noised, class_text)
        rows = [self.prompt_ids] * len(teacher_states) + batch["composed_rows"]
        text = self.encode_rows(rows, self.invert_prompt(teacher_states).repeat(2, 1, 1))
        layers = self.record_layers(noised, text)
        map_losses, output_losses = [], []
        for layer, class_layer in zip(layers, class_layers, strict=True):
            map_losses.append(pairwise_delta_loss(layer.attention_maps, class_layer.attention_maps))
            output_losses.append(pairwise_delta_loss(layer.outputs, class_layer.outputs))
        preserving = torch.stack([layer_preserving_loss(layer, batch["masks"]) for layer in layers]).mean()
        return {
            "prompts": self.settings.delta_weight * pairwise_delta_loss(text, class_text),
            "maps": self.settings.delta_weight * torch.stack(map_losses).mean(),
            "outputs": self.settings.delta_weight * torch.stack(output_losses).mean(),
            "preserved": self.settings.preserving_weight * preserving,
        }

    def record_layers(self, noised: unet.NoisedLatents, text: Tensor) -> list[CrossAttentionRecord]:
        """The cross-attentions for the noisy latents, repeated for two texts per row: `text` [2 n, 77, width]."""
        model: Any = self.frozen.model
        with record_cross_attentions(model.diffusion_model) as layers:
            model.apply_model(noised.noisy_latents.repeat(2, 1, 1, 1), noised.sigma.repeat(2), c_crossattn=text)
        return layers


def pairwise_delta_loss(person: Tensor, class_word: Tensor) -> Tensor:
    """Eq. 4 for features whose first half belongs to the single prompts, the second to the composed ones."""
    return losses.delta_loss(*person.chunk(2), *class_word.chunk(2))


def layer_preserving_loss(attention: CrossAttentionRecord, masks: Tensor) -> Tensor:
    """Eq. 8 in one layer. The single prompt is the target, and gets no gradient."""
    queries, composed_queries = attention.queries.chunk(2)
    single, composed = attention.outputs.chunk(2)
    grid_size = round(single.shape[1] ** 0.5)
    layer_masks = adaptive_avg_pool2d(masks.to(single), grid_size).flatten(1)
    matches = losses.match_queries(queries.detach(), composed_queries)
    return losses.face_preserving_loss(matches, composed, single.detach(), layer_masks)
