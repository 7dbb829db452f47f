"""Face recognizers: ArcFace's margin, augmentation, validation people, and the file as insightface runs it."""

from __future__ import annotations

import math
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from comfyui_likeness.nodes.loaders import face_analyzer
from comfyui_likeness.training.base_models import face_recognizer
from comfyui_likeness.training.task import make_generator
from support.toy_tasks import DISC_WORLD, DiscWorld, train_few_steps
from torch import Tensor, nn

SMALL_FACES = face_recognizer.RecognizerConfig(width=16, depth=3, num_people=6, augmentation_strength=0.0)


@pytest.mark.parametrize("network", list(face_recognizer.NETWORKS))
def test_insightface_runs_the_recognizer(network: str, tmp_path: Path, models: Path) -> None:
    made: list[face_recognizer.FaceRecognizer] = []

    def make() -> face_recognizer.FaceRecognizer:
        made.append(face_recognizer.FaceRecognizer(replace(SMALL_FACES, network=network), DISC_WORLD, 0))
        return made[0]

    trained, losses = train_few_steps(make, tmp_path, steps=20, batch_size=8, warmup_steps=0, ema_decay=0.0)
    assert sum(losses[-5:]) < 0.8 * sum(losses[:5])
    (trained / "recogniser.onnx").rename(models / "buffalo_l" / "w600k_r50.onnx")
    found, report = face_analyzer.load_face_analyzer("buffalo_l", "cpu")
    assert found.recognizer.model.input_mean == found.recognizer.model.input_std == 127.5 and "recognizer" in report
    face = DISC_WORLD.load_aligned_face(2, 7)
    with torch.no_grad():
        expected = made[0].eval().network(face_recognizer.normalize_faces([face]))[0]
    seen = torch.from_numpy(found.recognizer.model.get_feat(face.flip(-1).contiguous().numpy()))[0]
    assert seen.shape == (512,) and (seen - expected).norm() < 0.01 * expected.norm()
    weights = sum(value.numel() for value in made[0].network.parameters())
    assert Path(found.recognizer.model.model_file).stat().st_size < 2.2 * weights + 20000


def test_augmented_faces_are_warped_blurred_and_jittered() -> None:
    faces = face_recognizer.normalize_faces([DISC_WORLD.load_aligned_face(person, 3) for person in range(32)])
    assert face_recognizer.augment_faces(faces, make_generator(1), 0.0) is faces
    augmented = face_recognizer.augment_faces(faces, make_generator(1), 1.0)
    assert torch.equal(augmented, face_recognizer.augment_faces(faces, make_generator(1), 1.0))
    change = (augmented - faces).square().mean((1, 2, 3)).sqrt()
    assert (change > 0.01).all() and (change < 1).all() and len({round(float(value), 5) for value in change}) == 32
    edges = augmented.diff(dim=-1).abs().amax((1, 2, 3)) / faces.diff(dim=-1).abs().amax((1, 2, 3))
    assert 4 < (edges < 0.7).sum() < 28  # about half of them are blurred
    slight = face_recognizer.augment_faces(faces, make_generator(1), 1e-6)
    sharp = (slight - faces).abs().amax((1, 2, 3)) < 1e-2
    assert 4 < sharp.sum() < 28


def test_too_many_people_are_rejected() -> None:
    with pytest.raises(ValueError, match="expected at most 968"):
        face_recognizer.FaceRecognizer(replace(SMALL_FACES, num_people=1000), DISC_WORLD, 0)


def test_the_margin_is_that_of_arcface() -> None:
    cosines = torch.tensor([[0.6, 0.2, -0.5]])
    logits = 32 * torch.tensor([[math.cos(math.acos(0.6) + 0.4), 0.2, -0.5]])
    expected = nn.functional.cross_entropy(logits, torch.tensor([0]))
    assert face_recognizer.margin_loss(cosines, torch.tensor([0]), 32.0, 0.4).item() == pytest.approx(
        expected.item(), rel=1e-4
    )
    backward = torch.tensor([[-0.999, 0.2]], requires_grad=True)
    face_recognizer.margin_loss(backward, torch.tensor([0]), 32.0, 0.4).backward()
    assert bool(backward.grad.isfinite().all())


def test_validation_people_are_not_trained_on() -> None:
    loaded: list[int] = []

    class RecordingSource(DiscWorld):
        def load_aligned_face(self, person: int, number: int) -> Tensor:
            loaded.append(person)
            return super().load_aligned_face(person, number)

    task = face_recognizer.FaceRecognizer(SMALL_FACES, RecordingSource(), 0).eval()
    task.make_batch(make_generator(1), 20)
    assert max(loaded) < SMALL_FACES.num_people
    loaded.clear()
    assert {"same", "other", "found", "faces"} == set(task.make_samples(make_generator(1)))
    assert min(loaded) >= SMALL_FACES.num_people
