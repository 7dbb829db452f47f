"""Measure Likeness and Face Key Points on photos of real faces."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from comfyui_likeness.likeness.faces import detection, drawing
from comfyui_likeness.likeness.spec import Identity
from comfyui_likeness.nodes.encode import EncodeIdentity
from comfyui_likeness.nodes.loaders import face_analyzer
from comfyui_likeness.nodes.loaders.face_analyzer import FaceAnalyzer
from comfyui_likeness.nodes.measure import FaceKeyPoints, MeasureLikeness
from support.photos import COLLINS_FACE, load_portrait, make_couple_photo, make_empty_photo, make_stranger_photo


@pytest.fixture
def eileen(analyzer: FaceAnalyzer) -> Identity:
    return EncodeIdentity.execute({"photo_0": load_portrait()[None]}, "Eileen", "largest", "stop", analyzer).args[0]


def test_similarity_to_the_same_person_is_1(analyzer: FaceAnalyzer, eileen: Identity) -> None:
    same, annotated, report = MeasureLikeness.execute(load_portrait()[None], eileen, analyzer).args
    other = MeasureLikeness.execute(make_stranger_photo()[None], eileen, analyzer).args[0]
    assert same == pytest.approx(1, abs=1e-4) and other < 0.9
    assert annotated.shape == (1, 512, 512, 3) and (annotated[0] == torch.tensor(drawing.SELECTED_COLOR)).all(-1).any()
    assert report == "image 1: 1.000"


def test_highest_similarity_of_all_images_is_returned(analyzer: FaceAnalyzer, eileen: Identity) -> None:
    images = torch.stack((make_stranger_photo(), make_couple_photo(), torch.full((512, 512, 3), 0.5)))
    best, annotated, report = MeasureLikeness.execute(images, eileen, analyzer).args
    first, second, third = report.splitlines()
    scores = [float(score) for score in second.removeprefix("image 2: ").split(", ")]
    assert len(scores) == 2 and scores[0] > scores[1] and best == pytest.approx(scores[0], abs=1e-3)
    assert first.startswith("image 1: ") and third == "image 3: no face found"
    assert torch.equal(annotated[2], images[2])
    best_box = (annotated[1] == torch.tensor(drawing.SELECTED_COLOR)).all(-1).nonzero()
    assert best_box[:, 1].max() < 256  # she is on the left


def test_similarity_without_a_face_is_0(analyzer: FaceAnalyzer, eileen: Identity) -> None:
    assert MeasureLikeness.execute(make_empty_photo()[None], eileen, analyzer).args[0] == 0.0


def test_another_network_is_an_error_and_another_file_a_warning(analyzer: FaceAnalyzer, eileen: Identity) -> None:
    antelope = face_analyzer.load_face_analyzer("antelopev2", "cpu")[0]
    with pytest.raises(
        ValueError, match="identity 'Eileen' with arcface.buffalo_l.*expected an identity with arcface.antel"
    ):
        MeasureLikeness.execute(load_portrait()[None], eileen, antelope)
    (key,) = eileen.embeddings
    renamed = replace(eileen, embeddings={key[:-8] + "0" * 8: eileen.embeddings[key]})
    same, _, report = MeasureLikeness.execute(load_portrait()[None], renamed, analyzer).args
    assert same == pytest.approx(1, abs=1e-4) and report.startswith("Warning: Eileen was encoded with another file")


@pytest.mark.parametrize(("width", "height"), [(512, 512), (1024, 768), (320, 640)])
def test_key_points_keep_their_position(analyzer: FaceAnalyzer, width: int, height: int) -> None:
    (image,) = FaceKeyPoints.execute(load_portrait()[None], analyzer, width, height, "largest").args
    assert image.shape == (1, height, width, 3)
    scale = min(width, height) / 512
    for point, color in zip(COLLINS_FACE.kps, drawing.KEYPOINT_COLORS, strict=True):
        x, y = (point * scale).tolist()
        x, y = x + (width - 512 * scale) / 2, y + (height - 512 * scale) / 2
        near = image[0, round(y) - 3 : round(y) + 4, round(x) - 3 : round(x) + 4]
        assert (near == torch.tensor(color)).all(-1).any(), color


def test_the_face_is_picked_in_every_image(analyzer: FaceAnalyzer) -> None:
    images = torch.stack((make_couple_photo(), make_couple_photo().flip(1)))
    left, right = (
        FaceKeyPoints.execute(images, analyzer, 512, 512, *pick).args[0] for pick in (("leftmost",), ("nth", 2))
    )
    assert left.shape == right.shape == (2, 512, 512, 3)
    assert left[..., 256:, :].max() == 0 and right[..., :256, :].max() == 0


def test_missing_face_error_lists_the_sizes(analyzer: FaceAnalyzer) -> None:
    with pytest.raises(ValueError, match="got no face in photo 1 .detector sizes tried: 640"):
        FaceKeyPoints.execute(make_empty_photo()[None], analyzer, 512, 512, "largest")
    assert detection.PICK_NTH in FaceKeyPoints.INPUT_TYPES()["required"]["pick"][1]["options"]
