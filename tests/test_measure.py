"""Measure Likeness and Face Key Points."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from comfyui_likeness.likeness import draw, faces
from comfyui_likeness.likeness.spec import Identity
from comfyui_likeness.nodes.encode import EncodeIdentity
from comfyui_likeness.nodes.loaders import face_analyzer
from comfyui_likeness.nodes.loaders.face_analyzer import FaceAnalyzer
from comfyui_likeness.nodes.measure import FaceKeyPoints, MeasureLikeness
from portraits import COLLINS, couple, empty, portrait, stranger

pytest_plugins = ["analyzers"]


@pytest.fixture
def eileen(analyzer: FaceAnalyzer) -> Identity:
    return EncodeIdentity.execute({"photo_0": portrait()[None]}, "Eileen", "largest", "stop", analyzer).args[0]


def test_she_is_most_like_herself(analyzer: FaceAnalyzer, eileen: Identity) -> None:
    same, annotated, report = MeasureLikeness.execute(portrait()[None], eileen, analyzer).args
    other = MeasureLikeness.execute(stranger()[None], eileen, analyzer).args[0]
    assert same == pytest.approx(1, abs=1e-4) and other < 0.9
    assert annotated.shape == (1, 512, 512, 3) and (annotated[0] == torch.tensor(draw.CHOSEN)).all(-1).any()
    assert report == "picture 1: 1.000"


def test_the_best_face_of_all_pictures_counts(analyzer: FaceAnalyzer, eileen: Identity) -> None:
    pictures = torch.stack((stranger(), couple(), torch.full((512, 512, 3), 0.5)))
    best, annotated, report = MeasureLikeness.execute(pictures, eileen, analyzer).args
    first, second, third = report.splitlines()
    scores = [float(score) for score in second.removeprefix("picture 2: ").split(", ")]
    assert len(scores) == 2 and scores[0] > scores[1] and best == pytest.approx(scores[0], abs=1e-3)
    assert first.startswith("picture 1: ") and third == "picture 3: no face found"
    assert torch.equal(annotated[2], pictures[2])
    chosen = (annotated[1] == torch.tensor(draw.CHOSEN)).all(-1).nonzero()
    assert chosen[:, 1].max() < 256  # she is on the left


def test_no_face_anywhere_is_no_likeness(analyzer: FaceAnalyzer, eileen: Identity) -> None:
    assert MeasureLikeness.execute(empty()[None], eileen, analyzer).args[0] == 0.0


def test_another_network_is_an_error_and_another_file_a_warning(analyzer: FaceAnalyzer, eileen: Identity) -> None:
    antelope = face_analyzer.load("antelopev2", "cpu")[0]
    with pytest.raises(ValueError, match="identity 'Eileen' with arcface.buffalo_l.*expected one with arcface.antel"):
        MeasureLikeness.execute(portrait()[None], eileen, antelope)
    (key,) = eileen.embeddings
    renamed = replace(eileen, embeddings={key[:-8] + "0" * 8: eileen.embeddings[key]})
    same, _, report = MeasureLikeness.execute(portrait()[None], renamed, analyzer).args
    assert same == pytest.approx(1, abs=1e-4) and report.startswith("Warning: Eileen was encoded with another file")


@pytest.mark.parametrize(("width", "height"), [(512, 512), (1024, 768), (320, 640)])
def test_key_points_lie_where_the_face_does(analyzer: FaceAnalyzer, width: int, height: int) -> None:
    (drawing,) = FaceKeyPoints.execute(portrait()[None], analyzer, width, height, "largest").args
    assert drawing.shape == (1, height, width, 3)
    scale = min(width, height) / 512
    for point, colour in zip(COLLINS.kps, draw.KPS_COLOURS, strict=True):
        x, y = (point * scale).tolist()
        x, y = x + (width - 512 * scale) / 2, y + (height - 512 * scale) / 2
        near = drawing[0, round(y) - 3 : round(y) + 4, round(x) - 3 : round(x) + 4]
        assert (near == torch.tensor(colour)).all(-1).any(), colour


def test_every_picture_gets_the_picked_face(analyzer: FaceAnalyzer) -> None:
    pictures = torch.stack((couple(), couple().flip(1)))
    left, right = (
        FaceKeyPoints.execute(pictures, analyzer, 512, 512, *pick).args[0] for pick in (("leftmost",), ("nth", 2))
    )
    assert left.shape == right.shape == (2, 512, 512, 3)
    assert left[..., 256:, :].max() == 0 and right[..., :256, :].max() == 0


def test_no_face_stops_with_the_sizes(analyzer: FaceAnalyzer) -> None:
    with pytest.raises(ValueError, match="got no face in photo 1 .detector sizes tried: 640"):
        FaceKeyPoints.execute(empty()[None], analyzer, 512, 512, "largest")
    assert faces.NTH in FaceKeyPoints.INPUT_TYPES()["required"]["pick"][1]["options"]
