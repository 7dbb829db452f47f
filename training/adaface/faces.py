"""What the teacher and the inverter have in common: faces as directions, and pictures of strangers to show."""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeVar

import torch
from comfy.model_patcher import ModelPatcher
from torch import Generator, Tensor
from torch.nn.functional import normalize

from ..adapters import stack
from ..adapters.readers import ArcFace
from ..base import latents, unet
from ..base.source import Source, sheet, some
from ..task import Batch


@dataclass(frozen=True, kw_only=True)
class Settings(stack.Settings):
    """Faces are read by the recogniser in the file `encoder`, of the face `pack`."""

    encoder: str
    pack: str = "demo"


Told = TypeVar("Told", bound=Settings)


class FaceTask(stack.PeopleTask[Told]):
    """People by the directions of their faces alone."""

    def __init__(self, settings: Told, source: Source) -> None:
        super().__init__(settings, source)
        self.eye = ArcFace(Path(settings.encoder), settings.pack)
        self.read_pool(Path(settings.encoder))

    @property
    def reader(self) -> ArcFace:
        return self.eye

    def looked(self, batch: Batch) -> Batch:
        """A batch with the latents of its pictures, and the directions `read` [n, 512] of its faces."""
        device = batch["noise"].device
        if "latents" not in batch:
            made = latents.encode(self.frozen.autoencoder, batch["pictures"])
            batch = {**batch, "latents": made, "read": self.reader.read(batch["cuts"], device)}
        return {**batch, "read": normalize(batch["read"], dim=-1)}

    @abstractmethod
    def painter(self) -> Any:
        """The host's model that paints."""

    @abstractmethod
    def prompts(self, faces: Tensor, captions: Sequence[str]) -> tuple[Tensor, Tensor]:
        """What the painter reads of directions [n, 512], each in a picture with a caption, and of nobody."""

    def draw(self, chance: Generator) -> dict[str, Tensor]:
        """Photos of people who are no part of the training, above pictures of them by the host's own sampler."""
        album, side = self._strangers(), self.settings.side
        who = [some(chance, 1, len(album))[0] for _ in range(stack.SHOWN)]
        views = [[album.view(one, number % album.pictures(one)) for number in some(chance, 2)] for one in who]
        device = next(self.parameters()).device
        faces = normalize(self.look([view for view, _ in views]).to(device), dim=-1)
        given, nobody = self.prompts(faces, [other.caption for _, other in views])
        noise = torch.randn(stack.SHOWN, 4, side // 8, side // 8, generator=chance)
        model = ModelPatcher(self.painter().to(device), device, device)
        made = latents.decode(
            self.frozen.autoencoder, unet.sample(model, noise, [[given, {}]], [[nobody, {}]]).to(device)
        )
        photos = torch.stack([view.picture for view, _ in views]).to(device).movedim(-1, 1).float() / 255
        return {"pictures": sheet(photos, made)}
