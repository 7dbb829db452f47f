"""Omni-ID's second stage (arXiv 2412.09694, Sec. 3.3, App. A.2): E, and what reads its tokens in a frozen generator V.

    L_2 = |V(x~, t, y, l) - (eps - x_r)|^2,   l = E(X_s),   x~ = (1 - t) x_r + t eps                       (Eq. 6, 7)

y is the text "photo of a person". That is for a V that is a flow model, as the paper's FLUX is. SD1.5's kind is none:
here V's own objective takes the place of Eq. 6 and its own schedule that of Eq. 7, and V says the noise eps. On a base
that is a flow model it is Eq. 6 as it stands. V reads l by decoupled attention, which is trained with E. Its values
begin at 0, and a small E should learn more slowly than they do: before they tell people apart, all that V asks of the
tokens is what helps any picture, which makes everybody's alike.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from torch import Generator, Tensor, nn

from ...likeness.decoupled import DecoupledAdapter
from ..adapters import decoupled
from ..adapters.readers import Omni
from ..base import clip, latents
from ..base.source import Source
from ..task import Batch
from . import encoder, views

TEXT = "photo of a person"


@dataclass(frozen=True, kw_only=True)
class Settings(decoupled.Settings):
    """`encoder` is the first stage's file, and `made` the name of what becomes of it. Of each person `least` to `most`
    pictures are read and `targets` made, of `each` in the shards; a batch counts people. E learns at the part `slower`
    of the rate. `checkpointing` of the trunk saves memory.
    """

    reads: str = "omni"
    made: str = encoder.FILE.removesuffix(".safetensors")
    each: int = 8
    least: int = 1
    most: int = 3
    targets: int = 8
    slower: float = 1.0
    checkpointing: bool = False

    def __post_init__(self) -> None:
        super().__post_init__()
        views.check(self.least, self.most, self.targets, self.each)
        if self.reads != "omni":
            raise ValueError(f"got reads = {self.reads!r} in [task]; expected omni, whose encoder is trained")


class Flow(decoupled.Decoupled):
    """No condition is dropped: the negative prompt sees no tokens, and is the generator's own."""

    def __init__(self, settings: Settings, source: Source, seed: int) -> None:
        shards = views.shards(source, settings.each)
        super().__init__(settings, shards, seed)
        self.stage, self.spec = settings, replace(self.spec, unconditional="none")
        self.clusters = views.people(shards, settings.pool, settings.people, settings.each)
        self.trained = encoder.trainable(self.eye.module)
        trunk: Any = self.trained.trunk
        trunk.set_grad_checkpointing(settings.checkpointing)

    @torch.no_grad()
    def first(self, adapter: DecoupledAdapter, net: nn.Module) -> None:
        super().first(adapter, net)
        for layer in adapter.layers.values():
            own: Any = layer
            own.v.weight.zero_()

    def share(self, name: str) -> float:
        return self.stage.slower if name.startswith("trained.") else 1.0

    @property
    def eye(self) -> Omni:
        assert isinstance(self.encoder, Omni)
        return self.encoder

    def read_pool(self, file: Path) -> None:
        """Faces are cut once, and read at every step."""
        if self.settings.pool:
            self.frozen.faces = views.pool(self.source, self.clusters, self.eye.module.spec.image_size)

    def batch(self, chance: Generator, size: int) -> Batch:
        told, latent = self.stage, self.stage.side // 8
        few, many = views.few_to_many(chance, self.clusters, size, (told.least, told.most), told.targets)
        seen, made = ([number for row in rows for number in row] for rows in (few, many))
        shown, rows = self._shown(made, seen), len(made)
        cuts = shown.pop("read" if "read" in shown else "cuts")
        return {
            **shown, "cuts": cuts, "faceless": torch.zeros(rows, dtype=torch.bool),
            "tokens": clip.tokenize(self.tokenizer, [TEXT] * rows),
            "noise": torch.randn(rows, 4, latent, latent, generator=chance),
            "times": torch.randint(self.frozen.model.model_sampling.num_timesteps, (rows,), generator=chance),
        }  # fmt: skip

    def forward(self, batch: Batch) -> dict[str, Tensor]:
        if "latents" not in batch:
            with torch.no_grad():
                batch = {**batch, "latents": latents.encode(self.frozen.autoencoder, batch["pictures"])}
        return super().forward(batch)

    def faces(self, batch: Batch) -> Tensor:
        if "read" in batch:  # of a drawing, where each row is somebody else
            return super().faces(batch)
        people = len(batch["faceless"]) // self.stage.targets
        tokens = self.eye.joined(self.eye.read(batch["cuts"], batch["noise"].device), people)
        return tokens.repeat_interleave(self.stage.targets, 0)

    def save(self, folder: Path, notes: Mapping[str, Any]) -> None:
        super().save(folder, notes)
        encoder.save(self.trained, folder, notes, f"{self.stage.made}.safetensors")
