"""Drawing: the key points against InstantID's own way with OpenCV, numbered boxes, and batches of unlike pictures."""

from __future__ import annotations

import math
from typing import Any

import numpy as np
import pytest
import torch
from comfyui_likeness.likeness import draw
from comfyui_likeness.likeness.spec import Face
from torch import Tensor

KPS = torch.tensor([[60.0, 80], [130, 70], [100, 120], [75, 160], [125, 155]])


def official(kps: Tensor, height: int, width: int) -> Any:
    """What InstantID's published pipeline draws, step by step, uint8 [H, W, 3]."""
    import cv2

    colours = [tuple(255 * value for value in colour) for colour in draw.KPS_COLOURS]
    out = np.zeros((height, width, 3))
    for outer, nose in draw.LIMBS:
        (x0, y0), (x1, y1) = kps[outer].tolist(), kps[nose].tolist()
        angle = int(math.degrees(math.atan2(y0 - y1, x0 - x1)))
        middle, axes = (int((x0 + x1) / 2), int((y0 + y1) / 2)), (int(math.dist((x0, y0), (x1, y1)) / 2), 4)
        out = cv2.fillConvexPoly(out.copy(), cv2.ellipse2Poly(middle, axes, angle, 0, 360, 1), colours[outer])
    out = (out * 0.6).astype(np.uint8)
    for (x, y), colour in zip(kps.tolist(), colours, strict=True):
        out = cv2.circle(out.copy(), (int(x), int(y)), 10, colour, -1)
    return out


def test_key_points_are_instantids() -> None:
    expected = torch.from_numpy(official(KPS, 200, 220)).float() / 255
    got = draw.key_points([KPS], 200, 220)
    wrong = ((got - expected).abs() > 0.01).any(-1)
    drawn = (expected > 0).any(-1)
    assert got.shape == (200, 220, 3)
    assert wrong.sum() < 0.12 * drawn.sum()  # the outermost pixels, as OpenCV rounds
    near = torch.nn.functional.max_pool2d(drawn[None].float(), 3, 1, 1)[0] > 0
    assert not ((got > 0).any(-1) & ~near).any()


def test_key_points_have_their_colours() -> None:
    got = draw.key_points([KPS], 200, 220)
    for (x, y), colour in zip(KPS.int().tolist(), draw.KPS_COLOURS, strict=True):
        assert got[y, x].tolist() == pytest.approx(colour)
    middle = (KPS[0] + KPS[2]) / 2
    assert got[int(middle[1]), int(middle[0])].tolist() == pytest.approx([0.6, 0, 0])


def test_faces_outside_and_faces_without_size_are_drawn_as_far_as_they_go() -> None:
    assert draw.key_points([KPS + 1000], 64, 64).max() == 0
    assert draw.key_points([torch.full((5, 2), 32.0)], 64, 64).amax(-1).sum() > 300
    assert torch.equal(draw.key_points([], 8, 8), torch.zeros(8, 8, 3))


def test_a_box_is_drawn_around_the_face_with_its_number_and_nothing_else() -> None:
    picture = torch.full((300, 400, 3), 0.5)
    kept = picture.clone()
    face = Face(torch.tensor([100.0, 100, 220, 250]), KPS + torch.tensor([50.0, 60.0]), 0.9)
    out = draw.mark(picture, face, "12", draw.CHOSEN)
    ink = (out == torch.tensor(draw.CHOSEN)).all(-1)
    assert torch.equal(picture, kept)
    assert ink[98:100, 98:222].all() and ink[250:252, 98:222].all() and ink[100:250, 98:100].all()
    assert ink[100:250, 220:222].all()
    assert all(ink[y, x] for x, y in face.kps.int().tolist())
    outside = out.clone()
    outside[71:252, 98:222] = 0.5
    assert torch.equal(outside, kept)
    sign = draw.text_mask("12", 3)
    assert torch.equal(ink[74 : 74 + sign.shape[0], 103 : 103 + sign.shape[1]], sign)


@pytest.mark.parametrize(
    "box", [[-50.0, -50, 40, 40], [80.0, 80, 400, 400], [-9.0, -9, 200, 200], [500.0, 500, 600, 600]]
)
def test_boxes_over_the_edge_fit(box: list[float]) -> None:
    out = draw.mark(torch.zeros(100, 100, 3), Face(torch.tensor(box), KPS, 0.5), "0.97", draw.FOUND)
    assert out.shape == (100, 100, 3) and (out > 0).any()


def test_a_sign_larger_than_the_picture_is_cut() -> None:
    out = draw.mark(torch.zeros(9, 9, 3), Face(torch.tensor([1.0, 1, 8, 8]), KPS, 0.5), "-0.97", draw.FOUND)
    assert out.shape == (9, 9, 3)


def test_every_sign_is_five_by_seven_and_unlike_the_others() -> None:
    signs = {sign: draw.text_mask(sign, 1) for sign in draw.SIGNS}
    assert set(signs) >= set("0123456789.-") and all(mask.shape == (7, 6) for mask in signs.values())
    assert len({tuple(mask.flatten().tolist()) for mask in signs.values()}) == len(signs)


def test_what_is_looked_at_is_coloured_and_the_rest_grey() -> None:
    pictures, heat = torch.rand(2, 64, 48, 3), torch.zeros(2, 4, 3)
    heat[0, 1, 2], heat[1, 3, 0] = 0.02, 0.005
    out = draw.heated(pictures, heat)
    grey = pictures.mean(-1, keepdim=True).expand_as(pictures)
    assert out.shape == pictures.shape and torch.equal(out[0, 48:, :16], grey[0, 48:, :16])
    # In the middle of its patch the most looked at is the last colour, over what it does not hide.
    most = torch.lerp(grey[0, 24, 40], torch.tensor(draw.HEAT[-1]), draw.HEATED)
    assert (out[0, 24, 40] - most).abs().max() < 0.1 and out[0, 24, 40, 0] > out[0, 24, 40, 2] + 0.3
    quarter = torch.lerp(grey[1, 56, 4], torch.tensor(draw.HEAT[1]), draw.HEATED * 0.5)  # a quarter as much
    assert (out[1, 56, 4] - quarter).abs().max() < 0.02
    assert torch.equal(draw.heated(pictures, torch.zeros(2, 4, 3)), pictures.mean(-1, keepdim=True).expand_as(pictures))


def test_a_label_is_in_the_corner_and_cut_where_there_is_no_room() -> None:
    picture = torch.full((112, 112, 3), 0.5)
    out = draw.labelled(picture, "42")
    sign = draw.text_mask("42", 1)
    assert torch.equal((out == 1).all(-1)[1:8, 1 : 1 + sign.shape[1]], sign) and torch.equal(out[9:], picture[9:])
    assert torch.equal(picture, torch.full((112, 112, 3), 0.5))
    assert draw.labelled(torch.zeros(5, 6, 3), "255").shape == (5, 6, 3)


def test_large_pictures_are_shrunk_and_small_ones_kept() -> None:
    small = torch.rand(30, 40, 3)
    assert draw.shrink(small) == (small, 1.0)
    shrunk, scale = draw.shrink(torch.rand(500, 2048, 3))
    assert shrunk.shape == (250, 1024, 3) and scale == 0.5


def test_pictures_of_unlike_sizes_become_one_batch() -> None:
    wide, tall = torch.ones(20, 60, 3), torch.ones(40, 30, 3)
    batch = draw.letterbox([wide, tall])
    assert batch.shape == (2, 40, 60, 3)
    assert batch[0, 10:30].min() == 1 and batch[0, :10].max() == 0 and batch[0, 30:].max() == 0
    assert batch[1, :, 15:45].min() == 1 and batch[1, :, :15].max() == 0
