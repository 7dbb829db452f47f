"""The detector: which anchors tell which face, pictures moved with their faces, and the file as insightface runs it."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from analyzers import folder as folder
from analyzers import models as models
from analyzers import packs as packs
from comfyui_likeness.likeness.faces import find_faces
from comfyui_likeness.nodes.loaders import face_analyzer
from comfyui_likeness.training.base import detector, scrfd
from comfyui_likeness.training.task import chance
from torch import Tensor
from torch.nn.functional import interpolate
from trainings import DISCS, fit

AT = scrfd.anchors(detector.SIDE)
SMALL = detector.Settings(width=4)
UNSURE = 0.1  # the score of what a network finds that is hardly trained


def face(x: float, y: float, size: float, tall: float = 1.0) -> Tensor:
    """A face [7, 2] around a middle, `tall` times as high as wide."""
    half = torch.tensor([size / tall**0.5, size * tall**0.5]) / 2
    points = torch.tensor([[-1, -1], [1, 1], [-0.4, -0.4], [0.4, -0.4], [0, 0], [-0.3, 0.5], [0.3, 0.5]])
    return torch.tensor([x, y]) + half * points


def said(faces: Tensor) -> scrfd.Found:
    """What a perfect network says: of each anchor the face [n, a, 7, 2] and, where it has a size, that it is sure."""
    ways = (faces - AT.middles[:, None]) / AT.strides[:, None, None]
    boxes = torch.cat((-ways[..., 0, :], ways[..., 1, :]), -1)
    sure = torch.where(detector.sizes(faces) > 0, 20.0, -20.0)
    return scrfd.Found(sure, boxes, ways[..., 2:, :].flatten(-2))


def test_insightface_runs_the_detector(tmp_path: Path, models: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(detector, "TRIED", 8)
    monkeypatch.setattr(scrfd, "SCORE", UNSURE)
    made: list[detector.Detector] = []

    def make() -> detector.Detector:
        made.append(detector.Detector(SMALL, DISCS, 0))
        return made[0]

    trained, losses = fit(make, tmp_path, steps=25, batch=8, rate=1e-2, warmup=0, ema=0.0)
    assert sum(losses[-5:]) < 0.85 * sum(losses[:5])
    assert len(list((tmp_path / "drawn").glob("faces-*.png"))) == 1
    (models / "buffalo_l" / "det_10g.onnx").unlink()
    (trained / detector.FILE).rename(models / "buffalo_l" / detector.FILE)
    analyzer, report = face_analyzer.load("buffalo_l", "cpu")
    assert detector.FILE in report
    analyzer.detector.det_thresh = UNSURE
    view = DISCS.shown(3, detector.SIDE)
    with torch.no_grad():
        expected = made[0].eval().find(detector.read([view]))[0][0]
    for size in (640, 128):  # it has a size of its own
        surest = analyzer.detect(view.picture, size)[0]
        assert (surest.box - expected[:2].flatten()).abs().max() < 0.2
        assert (surest.kps - expected[2:]).abs().max() < 0.2
    large = interpolate(view.picture.movedim(-1, 0)[None].float() / 255, scale_factor=4.0)[0].movedim(0, -1)
    search = find_faces(large, analyzer.detect)
    assert search.tried == ("640",)
    assert min(float((face.box / 4 - expected[:2].flatten()).abs().max()) for face in search.faces) < 2
    weights = sum(value.numel() for value in made[0].parameters())
    assert Path(analyzer.detector.model_file).stat().st_size < 2.2 * weights + 40000


def test_the_shipped_width_is_small() -> None:
    assert sum(value.numel() for value in scrfd.Scrfd(detector.Settings().width).parameters()) < 350_000


def test_every_face_has_anchors_near_its_middle_of_about_its_size() -> None:
    places = 14 + torch.rand(200, 2, generator=chance(0)) * 100
    sizes = 14 * 7 ** torch.rand(200, generator=chance(1))
    tall = 0.75 + 0.8 * torch.rand(200, generator=chance(2))
    faces = torch.stack([face(*map(float, row)) for row in torch.column_stack((places, sizes, tall))])[:, None]
    which = detector.assign(faces, AT)
    assert (which >= 0).any(1).all() and set(which.unique().tolist()) == {-1, 0}
    row, anchor = (which >= 0).nonzero(as_tuple=True)
    middles, boxes = AT.middles[anchor], faces[row, 0, :2]
    assert (middles > boxes[:, 0]).all() and (middles < boxes[:, 1]).all()
    large = (sizes[row] / AT.sizes[anchor]).log2().abs()
    assert large.max() < 0.7  # half an octave, and what lies beyond the least and the largest anchor


def test_an_anchor_tells_the_nearer_of_two_faces_and_no_padding() -> None:
    faces = torch.stack((face(40, 64, 60), face(60, 64, 60), torch.zeros(7, 2)))[None]
    which = detector.assign(faces, AT)[0]
    told = {(float(x), int(face)) for (x, _), face in zip(AT.middles, which, strict=True) if face >= 0}
    assert {face for _, face in told} == {0, 1}
    assert all((x < 50) == (face == 0) for x, face in told)
    assert (detector.assign(torch.zeros(1, 2, 7, 2), AT) == -1).all()


def test_what_is_right_is_decoded_chosen_once_and_costs_nothing() -> None:
    faces = torch.stack((face(40, 60, 50), face(95, 70, 24)))[None]
    which = detector.assign(faces, AT)
    own = torch.where((which >= 0)[..., None, None], faces[0][which], 0)
    perfect = said(own)
    assert torch.allclose(scrfd.decode(perfect.boxes, perfect.points, AT), own, atol=1e-4)
    ((found, scores),) = scrfd.faces(perfect, AT)
    assert torch.allclose(found[found[:, 0, 0].argsort()], faces[0], atol=1e-4) and (scores > 0.99).all()
    assert sum(detector.losses(perfect, faces, AT).values()) < 1e-4
    wrong = perfect._replace(scores=-perfect.scores)
    assert detector.losses(wrong, faces, AT)["scores"] > 10
    aside = said(torch.where(own != 0, own + 3, own))
    assert all(detector.losses(aside, faces, AT)[name] > 0.05 for name in ("boxes", "points"))


def test_pictures_without_faces_can_be_learnt_from() -> None:
    network = scrfd.Scrfd(4)
    lost = detector.losses(network(torch.zeros(2, 3, 128, 128)), torch.zeros(2, 4, 7, 2), AT)
    sum(lost.values()).backward()
    assert lost["boxes"] == lost["points"] == 0 < lost["scores"]
    assert all(value.grad.isfinite().all() for value in network.parameters() if value.grad is not None)


def test_faces_go_with_their_pictures() -> None:
    """Each of the seven places has a colour of its own, which is found where the place comes to lie."""
    one = face(60, 60, 60).round()
    colours = torch.linspace(-0.9, 0.9, 7)
    picture = torch.zeros(3, 128, 128)
    for (x, y), colour in zip(one.int().tolist(), colours, strict=True):
        picture[:, y - 4 : y + 5, x - 4 : x + 5] = colour
    faces = torch.stack((one, torch.zeros(7, 2))).expand(64, -1, -1, -1)
    seen, put = detector.moved(picture.expand(64, -1, -1, -1), faces, chance(3))
    assert (put[:, 1] == 0).all()
    straight, still = 0, 0
    for image, (found, _) in zip(seen, put, strict=True):
        mirrored = not same(image, found, colours, range(7))
        order = (None, None, *detector.MIRRORED[2:]) if mirrored else range(7)
        assert same(image, found, colours, order)
        straight += not mirrored
        still += any((image - was).abs().max() < 0.05 for was in (picture, picture.flip(-1)))
    assert 20 < straight < 44 and 4 < still < 30
    sizes = detector.sizes(put[:, 0])
    assert (put[:, 0, 1] > put[:, 0, 0]).all() and sizes.min() < 30 and sizes.max() > 85


def same(image: Tensor, found: Tensor, colours: Tensor, order: object) -> bool:
    """Whether the places within a picture have the colours of this order."""
    for (x, y), number in zip(found.round().int().tolist(), order, strict=True):  # type: ignore[call-overload]
        inside = number is not None and 2 < x < 125 and 2 < y < 125
        if inside and (image[0, y, x] - colours[number]).abs() > 0.1:
            return False
    return True


def test_flipping_twice_changes_nothing() -> None:
    one = face(40, 50, 30)
    mirrored = torch.cat((127 - one[:, :1], one[:, 1:]), 1)
    flipped = detector.flipped(mirrored)
    assert torch.equal(flipped, face(87, 50, 30))
    back = detector.flipped(torch.cat((127 - flipped[:, :1], flipped[:, 1:]), 1))
    assert torch.equal(back, one)


def test_measured_are_faces_found_false_finds_and_points() -> None:
    true = [torch.stack((face(30, 40, 30), face(90, 40, 30))), face(64, 64, 50)[None]]
    off = face(30, 40, 30)
    off[2:, 0] += 1.2
    found = [torch.stack((off, face(60, 100, 30))), torch.zeros(0, 7, 2)]
    told = detector.measure(found, true)
    eyes = float(true[0][0, 3, 0] - true[0][0, 2, 0])
    assert told["found"].item() == pytest.approx(1 / 3) and told["false"].item() == pytest.approx(0.5)
    assert told["error"].item() == pytest.approx(1.2 / eyes, rel=1e-4)
