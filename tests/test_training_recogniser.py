"""Recognisers: ArcFace's margin, people kept apart, and the file as insightface runs it."""

from __future__ import annotations

import math
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from analyzers import folder as folder
from analyzers import models as models
from analyzers import packs as packs
from comfyui_likeness.nodes.loaders import face_analyzer
from comfyui_likeness.training.base import recogniser
from comfyui_likeness.training.task import chance
from torch import Tensor, nn
from trainings import DISCS, Discs, fit

SMALL_FACES = recogniser.Settings(width=16, depth=3, people=6, disturb=0.0)


@pytest.mark.parametrize("network", list(recogniser.NETWORKS))
def test_insightface_runs_the_recogniser(network: str, tmp_path: Path, models: Path) -> None:
    made: list[recogniser.Recogniser] = []

    def make() -> recogniser.Recogniser:
        made.append(recogniser.Recogniser(replace(SMALL_FACES, network=network), DISCS, 0))
        return made[0]

    trained, losses = fit(make, tmp_path, steps=20, batch=8, warmup=0, ema=0.0)
    assert sum(losses[-5:]) < 0.8 * sum(losses[:5])
    (trained / "recogniser.onnx").rename(models / "buffalo_l" / "w600k_r50.onnx")
    found, report = face_analyzer.load("buffalo_l", "cpu")
    assert found.recogniser.input_mean == found.recogniser.input_std == 127.5 and "recogniser" in report
    face = DISCS.face(2, 7)
    with torch.no_grad():
        expected = made[0].eval().network(recogniser.read([face]))[0]
    seen = torch.from_numpy(found.recogniser.get_feat(face.flip(-1).contiguous().numpy()))[0]
    assert seen.shape == (512,) and (seen - expected).norm() < 0.01 * expected.norm()
    weights = sum(value.numel() for value in made[0].network.parameters())
    assert Path(found.recogniser.model_file).stat().st_size < 2.2 * weights + 20000


def test_disturbed_faces_are_moved_blurred_and_lit() -> None:
    faces = recogniser.read([DISCS.face(person, 3) for person in range(32)])
    assert recogniser.disturbed(faces, chance(1), 0.0) is faces
    seen = recogniser.disturbed(faces, chance(1), 1.0)
    assert torch.equal(seen, recogniser.disturbed(faces, chance(1), 1.0))
    away = (seen - faces).square().mean((1, 2, 3)).sqrt()
    assert (away > 0.01).all() and (away < 1).all() and len({round(float(value), 5) for value in away}) == 32
    edges = seen.diff(dim=-1).abs().amax((1, 2, 3)) / faces.diff(dim=-1).abs().amax((1, 2, 3))
    assert 4 < (edges < 0.7).sum() < 28  # about half of them are blurred
    little = recogniser.disturbed(faces, chance(1), 1e-6)
    sharp = (little - faces).abs().amax((1, 2, 3)) < 1e-2
    assert 4 < sharp.sum() < 28


def test_more_people_than_there_are_are_refused() -> None:
    with pytest.raises(ValueError, match="expected at most 968"):
        recogniser.Recogniser(replace(SMALL_FACES, people=1000), DISCS, 0)


def test_the_margin_is_arcfaces() -> None:
    cosines = torch.tensor([[0.6, 0.2, -0.5]])
    logits = 32 * torch.tensor([[math.cos(math.acos(0.6) + 0.4), 0.2, -0.5]])
    expected = nn.functional.cross_entropy(logits, torch.tensor([0]))
    assert recogniser.margin_loss(cosines, torch.tensor([0]), 32.0, 0.4).item() == pytest.approx(
        expected.item(), rel=1e-4
    )
    backward = torch.tensor([[-0.999, 0.2]], requires_grad=True)
    recogniser.margin_loss(backward, torch.tensor([0]), 32.0, 0.4).backward()
    assert bool(backward.grad.isfinite().all())


def test_the_checks_people_are_not_those_of_the_training() -> None:
    asked: list[int] = []

    class Listening(Discs):
        def face(self, person: int, number: int) -> Tensor:
            asked.append(person)
            return super().face(person, number)

    task = recogniser.Recogniser(SMALL_FACES, Listening(), 0).eval()
    task.batch(chance(1), 20)
    assert max(asked) < SMALL_FACES.people
    asked.clear()
    assert {"same", "other", "found", "faces"} == set(task.draw(chance(1)))
    assert min(asked) >= SMALL_FACES.people
