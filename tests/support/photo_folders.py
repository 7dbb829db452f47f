"""Photos of drawn people, and a face analyzer that knows where their faces are."""

from __future__ import annotations

from collections.abc import Sequence
from functools import cached_property
from pathlib import Path

import torch
from comfyui_likeness.likeness.faces import alignment
from comfyui_likeness.likeness.spec import Face, Feature
from comfyui_likeness.nodes.loaders.files import hash_file
from comfyui_likeness.portrait_world import world
from comfyui_likeness.training.adapters.face_encoders import ArcFaceReader
from PIL import Image
from torch import Tensor

ROOT = Path(__file__).resolve().parents[2]
RECOGNIZER_FILE = ROOT / "weights" / "insightface" / "models" / "demo" / "recogniser.onnx"
PHOTO_SIZE = 128  # pixels


class DrawnFaceAnalyzer:
    """A FaceAnalyzerProtocol: key points as drawn, embeddings by the recognizer in weights/."""

    feature, sha256 = Feature("arcface.demo", "raw", "face112"), hash_file(RECOGNIZER_FILE)

    def __init__(self) -> None:
        self.faces_by_photo: dict[bytes, list[Face]] = {}
        self.detect_calls = 0

    @cached_property
    def recognizer(self) -> ArcFaceReader:
        return ArcFaceReader(RECOGNIZER_FILE, "demo")

    def detect(self, photo: Tensor, size: int) -> list[Face]:
        self.detect_calls += 1
        return self.faces_by_photo.get(photo.numpy().tobytes(), [])

    def embed(self, photo: Tensor, face: Face) -> Tensor:
        crop = alignment.convert_to_uint8(alignment.align_face(photo.double() / 255, face.kps, 112))
        return self.recognizer.read_faces(crop[None], torch.device("cpu"))[0]

    def draw_photo(self, path: Path, people: Sequence[int], scene_number: int) -> None:
        """Write a photo of one or two people, whose faces the analyzer knows from then on."""
        scene = world.make_scene(scene_number, len(people))
        painted = world.paint_scene([world.make_person(person, "test") for person in people], scene, PHOTO_SIZE)
        path.parent.mkdir(parents=True, exist_ok=True)
        Image.fromarray(painted.image).save(path)
        self.faces_by_photo[painted.image.tobytes()] = [
            Face(torch.from_numpy(box).float(), torch.from_numpy(kps).float(), 0.9)
            for box, kps in zip(painted.boxes, painted.key_points, strict=True)
        ]
