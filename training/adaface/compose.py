"""The prompt inverter by composition distillation (AdaFace, Sec. 2.3 and 2.4): words around it keep their say.

Of each face four prompts see the same noise: the person alone and in a composition, a class word alone and in the same
composition. The paper does not say how words of both are told to be the same; here commas follow the class word, so
that every other word has the same place.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Generator, Tensor
from torch.nn.functional import adaptive_avg_pool2d

from ...likeness import prompts
from ..base import unet
from ..base.source import Source, some
from ..data import fit
from ..task import Batch
from . import losses, words
from .faces import FaceTask
from .features import Layer, watching
from .inverter import HERE, FaceDistillation
from .inverter import Settings as InverterSettings


@dataclass(frozen=True, kw_only=True)
class Settings(InverterSettings):
    """`delta`, `preserve` and `face` weigh Eq. 4, Eq. 8 and, so that the person is kept, Eq. 2; 0 leaves it out."""

    delta: float = 1.0
    preserve: float = 1.0
    face: float = 1.0


class CompositionDistillation(FaceDistillation[Settings]):
    """Losses: Eq. 4 for states of words, attention maps and outputs; Eq. 8; Eq. 2."""

    def __init__(self, settings: Settings, source: Source, seed: int) -> None:
        super().__init__(settings, source, seed)
        self.class_word = words.class_words(self.tokenizer, settings.class_words[0])
        self.class_asked = words.row(self.tokenizer, prompts.parts(settings.prompt, [HERE]), self.class_word)

    def batch(self, chance: Generator, size: int) -> Batch:
        found = super().batch(chance, size)
        turns = zip(some(chance, size, len(self.clusters)), some(chance, size), strict=True)
        numbers = [self.clusters[who][turn % len(self.clusters[who])] for who, turn in turns]
        captions = [self.source.caption(number) for number in numbers]
        return {**found, "composed": self.composed(captions), "classed": self.composed(captions, self.class_word)}

    def _shown(self, made: Sequence[int], seen: Sequence[int]) -> Batch:
        masks = [fit(self.source.view(number), self.settings.side).mask for number in made]
        return {**super()._shown(made, seen), "masks": torch.stack(masks)}

    def forward(self, batch: Batch) -> dict[str, Tensor]:
        made = self.composition(batch)
        return {**made, "face": self.settings.face * self.distilled(batch)} if self.settings.face else made

    def composition(self, batch: Batch) -> dict[str, Tensor]:
        """Eq. 4 and Eq. 8."""
        device = batch["noise"].device
        model = self.frozen.unet.on(device).model
        with torch.no_grad():
            found = FaceTask.looked(self, batch)  # of real people, whose faces have a place
            taught = self.taught(found["read"])
            given = unet.Noised.of(model, {**found, "times": batch["times"][0]})
            nobody = self.frozen.words([self.class_asked] * len(taught) + batch["classed"], device)
            class_layers = self.watched(given, nobody)
        rows = [self.asked] * len(taught) + batch["composed"]
        text = self.read(rows, self.vectors(taught).repeat(2, 1, 1))
        layers = self.watched(given, text)
        pairs = list(zip(layers, class_layers, strict=True))
        deltas = {
            "prompts": delta(text, nobody),
            "maps": torch.stack([delta(one.maps, other.maps) for one, other in pairs]).mean(),
            "outputs": torch.stack([delta(one.outputs, other.outputs) for one, other in pairs]).mean(),
        }
        kept = torch.stack([preserved(layer, batch["masks"]) for layer in layers]).mean()
        weighed = {name: self.settings.delta * value for name, value in deltas.items()}
        return {**weighed, "preserved": self.settings.preserve * kept}

    def watched(self, given: unet.Noised, text: Tensor) -> list[Layer]:
        """What the cross-attentions see of the same noise with two texts for each row, [2 n, 77, width]."""
        model: Any = self.frozen.model
        with watching(model.diffusion_model) as layers:
            model.apply_model(given.noisy.repeat(2, 1, 1, 1), given.sigma.repeat(2), c_crossattn=text)
        return layers


def delta(subject: Tensor, other: Tensor) -> Tensor:
    """Eq. 4 for features whose first half is of the single prompts, and whose second of the composed ones."""
    return losses.delta(*subject.chunk(2), *other.chunk(2))


def preserved(layer: Layer, masks: Tensor) -> Tensor:
    """Eq. 8 in one layer. The person alone is what the other picture has to follow, so no gradient goes there."""
    queries, composed_queries = layer.queries.chunk(2)
    single, composed = layer.outputs.chunk(2)
    side = round(single.shape[1] ** 0.5)
    places = adaptive_avg_pool2d(masks.to(single), side).flatten(1)
    match = losses.matching(queries.detach(), composed_queries)
    return losses.preserving(match, composed, single.detach(), places)
