"""What the teacher and the inverter have in common: faces as directions, and pictures of strangers to show."""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeVar

from comfy.model_patcher import ModelPatcher
from torch import Tensor
from torch.nn.functional import normalize

from ..adapters import stack
from ..adapters.readers import ArcFace
from ..base import latents, unet
from ..base.source import Source
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

    def painted(self, read: Tensor, captions: Sequence[str], noise: Tensor) -> Tensor:
        given, nobody = self.prompts(normalize(read, dim=-1), captions)
        model = ModelPatcher(self.painter().to(read.device), read.device, read.device)
        return unet.sample(model, noise, [[given, {}]], [[nobody, {}]])
