"""Common base of teacher and prompt inverter: ArcFace embeddings as conditioning, and sampling."""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeVar

from comfy.model_patcher import ModelPatcher
from torch import Tensor
from torch.nn.functional import normalize

from ..adapters import adapter_task
from ..adapters.face_encoders import ArcFaceReader
from ..base_models import latents, unet
from ..data.image_source import ImageSource
from ..task import Batch


@dataclass(frozen=True, kw_only=True)
class FaceTaskConfig(adapter_task.PeopleTaskConfig):
    """`encoder` is the file of the recognizer that computes the embeddings of the face `pack`."""

    encoder: str
    pack: str = "demo"


FaceTaskConfigType = TypeVar("FaceTaskConfigType", bound=FaceTaskConfig)


class FaceTask(adapter_task.PeopleTask[FaceTaskConfigType]):
    """Conditions on normalized face embeddings alone."""

    def __init__(self, settings: FaceTaskConfigType, source: ImageSource) -> None:
        super().__init__(settings, source)
        self.face_reader = ArcFaceReader(Path(settings.encoder), settings.pack)
        self.cache_pool_faces(Path(settings.encoder))

    @property
    def reader(self) -> ArcFaceReader:
        return self.face_reader

    def encode_batch(self, batch: Batch) -> Batch:
        """Add `latents` if they are missing, and `face_features` [n, 512] as unit embeddings."""
        if "latents" not in batch:
            batch = {
                **batch,
                "latents": latents.encode_latents(self.frozen.autoencoder, batch["images"]),
                "face_features": self.reader.read_faces(batch["face_crops"], batch["noise"].device),
            }
        return {**batch, "face_features": normalize(batch["face_features"], dim=-1)}

    @abstractmethod
    def get_base_model(self) -> Any:
        """The model that generates the images."""

    @abstractmethod
    def encode_conditions(self, face_embeddings: Tensor, captions: Sequence[str]) -> tuple[Tensor, Tensor]:
        """Conditioning for unit face embeddings [n, 512] with one caption each, and for no face."""

    def generate_latents(self, face_features: Tensor, captions: Sequence[str], noise: Tensor) -> Tensor:
        positive, negative = self.encode_conditions(normalize(face_features, dim=-1), captions)
        device = face_features.device
        model = ModelPatcher(self.get_base_model().to(device), device, device)
        return unet.sample_latents(model, noise, [[positive, {}]], [[negative, {}]])
