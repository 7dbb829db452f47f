"""The face detector: anchors, losses, augmentation, and the file as insightface runs it."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from comfyui_likeness.likeness.faces.detection import find_faces
from comfyui_likeness.nodes.loaders import face_analyzer
from comfyui_likeness.training.base_models import face_detector, scrfd
from comfyui_likeness.training.task import make_generator
from support.toy_tasks import DISC_WORLD, train_few_steps
from torch import Tensor
from torch.nn.functional import interpolate

ANCHORS = scrfd.make_anchors(face_detector.INPUT_SIZE)
SMALL = face_detector.DetectorConfig(width=4)
LOW_THRESHOLD = 0.1  # for a network that is hardly trained


def make_face(x: float, y: float, size: float, tall: float = 1.0) -> Tensor:
    """A face [7, 2] with its center at (x, y), `tall` times as high as wide."""
    half = torch.tensor([size / tall**0.5, size * tall**0.5]) / 2
    points = torch.tensor([[-1, -1], [1, 1], [-0.4, -0.4], [0.4, -0.4], [0, 0], [-0.3, 0.5], [0.3, 0.5]])
    return torch.tensor([x, y]) + half * points


def make_predictions(faces: Tensor) -> scrfd.AnchorPredictions:
    """Perfect predictions of the faces [n, a, 7, 2] of each anchor; those of size 0 have a low score."""
    offsets = (faces - ANCHORS.centers[:, None]) / ANCHORS.strides[:, None, None]
    boxes = torch.cat((-offsets[..., 0, :], offsets[..., 1, :]), -1)
    scores = torch.where(face_detector.measure_face_sizes(faces) > 0, 20.0, -20.0)
    return scrfd.AnchorPredictions(scores, boxes, offsets[..., 2:, :].flatten(-2))


def test_insightface_runs_the_detector(tmp_path: Path, models: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(face_detector, "NUM_CHECK_IMAGES", 8)
    monkeypatch.setattr(scrfd, "SCORE_THRESHOLD", LOW_THRESHOLD)
    made: list[face_detector.FaceDetector] = []

    def make() -> face_detector.FaceDetector:
        made.append(face_detector.FaceDetector(SMALL, DISC_WORLD, 0))
        return made[0]

    trained, losses = train_few_steps(
        make, tmp_path, steps=25, batch_size=8, learning_rate=1e-2, warmup_steps=0, ema_decay=0.0
    )
    assert sum(losses[-5:]) < 0.85 * sum(losses[:5])
    assert len(list((tmp_path / "samples").glob("faces-*.png"))) == 1
    (models / "buffalo_l" / "det_10g.onnx").unlink()
    (trained / face_detector.DETECTOR_FILE).rename(models / "buffalo_l" / face_detector.DETECTOR_FILE)
    analyzer, report = face_analyzer.load_face_analyzer("buffalo_l", "cpu")
    assert face_detector.DETECTOR_FILE in report
    analyzer.detector.model.det_thresh = LOW_THRESHOLD
    view = DISC_WORLD.load_annotated_image(3, face_detector.INPUT_SIZE)
    with torch.no_grad():
        expected = made[0].eval().find_faces(face_detector.normalize_images([view]))[0][0]
    for size in (640, 128):  # its input size is fixed
        best = analyzer.detect(view.image, size)[0]
        assert (best.box - expected[:2].flatten()).abs().max() < 0.2
        assert (best.kps - expected[2:]).abs().max() < 0.2
    large = interpolate(view.image.movedim(-1, 0)[None].float() / 255, scale_factor=4.0)[0].movedim(0, -1)
    search = find_faces(large, analyzer.detect)
    assert search.attempts == ("640",)
    assert min(float((face.box / 4 - expected[:2].flatten()).abs().max()) for face in search.faces) < 2
    weights = sum(value.numel() for value in made[0].parameters())
    assert Path(analyzer.detector.model.model_file).stat().st_size < 2.2 * weights + 40000


def test_the_shipped_width_is_small() -> None:
    assert sum(value.numel() for value in scrfd.SCRFD(face_detector.DetectorConfig().width).parameters()) < 350_000


def test_every_face_has_anchors_of_similar_center_and_size() -> None:
    centers = 14 + torch.rand(200, 2, generator=make_generator(0)) * 100
    sizes = 14 * 7 ** torch.rand(200, generator=make_generator(1))
    tall = 0.75 + 0.8 * torch.rand(200, generator=make_generator(2))
    faces = torch.stack([make_face(*map(float, row)) for row in torch.column_stack((centers, sizes, tall))])[:, None]
    which = face_detector.assign_anchors(faces, ANCHORS)
    assert (which >= 0).any(1).all() and set(which.unique().tolist()) == {-1, 0}
    row, anchor = (which >= 0).nonzero(as_tuple=True)
    middles, boxes = ANCHORS.centers[anchor], faces[row, 0, :2]
    assert (middles > boxes[:, 0]).all() and (middles < boxes[:, 1]).all()
    large = (sizes[row] / ANCHORS.sizes[anchor]).log2().abs()
    assert large.max() < 0.7  # half an octave, and faces beyond the smallest and largest anchor


def test_an_anchor_gets_the_nearer_of_two_faces_and_no_padding() -> None:
    faces = torch.stack((make_face(40, 64, 60), make_face(60, 64, 60), torch.zeros(7, 2)))[None]
    which = face_detector.assign_anchors(faces, ANCHORS)[0]
    assigned = {(float(x), int(index)) for (x, _), index in zip(ANCHORS.centers, which, strict=True) if index >= 0}
    assert {index for _, index in assigned} == {0, 1}
    assert all((x < 50) == (index == 0) for x, index in assigned)
    assert (face_detector.assign_anchors(torch.zeros(1, 2, 7, 2), ANCHORS) == -1).all()


def test_perfect_predictions_are_decoded_and_have_no_loss() -> None:
    faces = torch.stack((make_face(40, 60, 50), make_face(95, 70, 24)))[None]
    which = face_detector.assign_anchors(faces, ANCHORS)
    targets = torch.where((which >= 0)[..., None, None], faces[0][which], 0)
    perfect = make_predictions(targets)
    assert torch.allclose(scrfd.decode_faces(perfect.boxes, perfect.points, ANCHORS), targets, atol=1e-4)
    ((found, scores),) = scrfd.select_faces(perfect, ANCHORS)
    assert torch.allclose(found[found[:, 0, 0].argsort()], faces[0], atol=1e-4) and (scores > 0.99).all()
    assert sum(face_detector.compute_detection_losses(perfect, faces, ANCHORS).values()) < 1e-4
    wrong = perfect._replace(scores=-perfect.scores)
    assert face_detector.compute_detection_losses(wrong, faces, ANCHORS)["scores"] > 10
    shifted = make_predictions(torch.where(targets != 0, targets + 3, targets))
    assert all(
        face_detector.compute_detection_losses(shifted, faces, ANCHORS)[name] > 0.05 for name in ("boxes", "points")
    )


def test_images_without_faces_have_gradients() -> None:
    network = scrfd.SCRFD(4)
    losses = face_detector.compute_detection_losses(
        network(torch.zeros(2, 3, 128, 128)), torch.zeros(2, 4, 7, 2), ANCHORS
    )
    sum(losses.values()).backward()
    assert losses["boxes"] == losses["points"] == 0 < losses["scores"]
    assert all(value.grad.isfinite().all() for value in network.parameters() if value.grad is not None)


def test_faces_move_with_their_images() -> None:
    """Each of the seven points has its own color, which is found where the point moves to."""
    face = make_face(60, 60, 60).round()
    colors = torch.linspace(-0.9, 0.9, 7)
    image = torch.zeros(3, 128, 128)
    for (x, y), color in zip(face.int().tolist(), colors, strict=True):
        image[:, y - 4 : y + 5, x - 4 : x + 5] = color
    faces = torch.stack((face, torch.zeros(7, 2))).expand(64, -1, -1, -1)
    zoomed, moved = face_detector.zoom_and_mirror(image.expand(64, -1, -1, -1), faces, make_generator(3))
    assert (moved[:, 1] == 0).all()
    straight, still = 0, 0
    for result, (found, _) in zip(zoomed, moved, strict=True):
        mirrored = not has_colors(result, found, colors, range(7))
        order = (None, None, *face_detector.MIRRORED_POINT_ORDER[2:]) if mirrored else range(7)
        assert has_colors(result, found, colors, order)
        straight += not mirrored
        still += any((result - original).abs().max() < 0.05 for original in (image, image.flip(-1)))
    assert 20 < straight < 44 and 4 < still < 30
    sizes = face_detector.measure_face_sizes(moved[:, 0])
    assert (moved[:, 0, 1] > moved[:, 0, 0]).all() and sizes.min() < 30 and sizes.max() > 85


def has_colors(image: Tensor, found: Tensor, colors: Tensor, order: object) -> bool:
    """Whether the points inside the image have the colors of this order."""
    for (x, y), number in zip(found.round().int().tolist(), order, strict=True):  # type: ignore[call-overload]
        inside = number is not None and 2 < x < 125 and 2 < y < 125
        if inside and (image[0, y, x] - colors[number]).abs() > 0.1:
            return False
    return True


def test_mirroring_twice_changes_nothing() -> None:
    face = make_face(40, 50, 30)
    mirrored = torch.cat((127 - face[:, :1], face[:, 1:]), 1)
    flipped = face_detector.mirror_faces(mirrored)
    assert torch.equal(flipped, make_face(87, 50, 30))
    back = face_detector.mirror_faces(torch.cat((127 - flipped[:, :1], flipped[:, 1:]), 1))
    assert torch.equal(back, face)


def test_metrics() -> None:
    targets = [torch.stack((make_face(30, 40, 30), make_face(90, 40, 30))), make_face(64, 64, 50)[None]]
    off = make_face(30, 40, 30)
    off[2:, 0] += 1.2
    found = [torch.stack((off, make_face(60, 100, 30))), torch.zeros(0, 7, 2)]
    metrics = face_detector.measure_detections(found, targets)
    eyes = float(targets[0][0, 3, 0] - targets[0][0, 2, 0])
    assert metrics["found"].item() == pytest.approx(1 / 3) and metrics["false"].item() == pytest.approx(0.5)
    assert metrics["error"].item() == pytest.approx(1.2 / eyes, rel=1e-4)
