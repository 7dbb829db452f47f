"""Detector and recognizer of an insightface model pack."""

from __future__ import annotations

import glob
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from ...likeness.spec import Face


@dataclass(frozen=True, eq=False)
class InsightfaceDetector:
    """insightface's SCRFD or RetinaFace."""

    model: Any

    @property
    def name(self) -> str:
        return Path(self.model.model_file).name

    @property
    def session(self) -> Any:
        return self.model.session

    def detect(self, photo: Tensor, size: int) -> list[Face]:
        """The faces of a photo, uint8 RGB [H, W, 3], with a detector input of `size` pixels."""
        boxes, points = self.model.detect(_to_bgr(photo), input_size=(size, size))
        if points is None:
            raise ValueError(
                "got a detector without key points; expected five per face; choose buffalo_l or antelopev2"
            )
        return [
            Face(torch.from_numpy(box[:4].copy()).float(), torch.from_numpy(kps.copy()).float(), float(box[4]))
            for box, kps in zip(boxes, points, strict=True)
        ]


@dataclass(frozen=True, eq=False)
class InsightfaceRecognizer:
    """insightface's ArcFace network, with insightface's own alignment."""

    model: Any

    @property
    def path(self) -> Path:
        return Path(self.model.model_file)

    @property
    def session(self) -> Any:
        return self.model.session

    def embed(self, photo: Tensor, face: Face) -> Tensor:
        """The raw vector [512] of a face in a photo, uint8 RGB [H, W, 3]."""
        from insightface.utils import face_align

        crop = face_align.norm_crop(_to_bgr(photo), face.kps.numpy(), self.model.input_size[0])
        return torch.from_numpy(self.model.get_feat(crop).flatten().copy()).float()


def _to_bgr(photo: Tensor) -> Any:
    return photo.flip(-1).contiguous().numpy()


def load_insightface_networks(
    folder: Path, providers: Sequence[str]
) -> tuple[InsightfaceDetector, InsightfaceRecognizer]:
    """The networks of a model pack on these onnxruntime providers, as insightface finds them."""
    from insightface.app import FaceAnalysis

    if glob.escape(str(folder)) != str(folder):
        raise ValueError(f"rename the folder {folder}: insightface finds no files where a path holds [, * or ?")
    app = FaceAnalysis(str(folder), allowed_modules=["detection", "recognition"], providers=list(providers))
    app.prepare(ctx_id=0, det_size=(640, 640))
    if "recognition" not in app.models:
        raise ValueError("no recognizer among them")
    return InsightfaceDetector(app.models["detection"]), InsightfaceRecognizer(app.models["recognition"])
