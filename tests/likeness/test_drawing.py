"""Drawing: key points against InstantID's OpenCV code, labeled boxes, heat maps, and letterboxed batches."""

from __future__ import annotations

import math
from typing import Any

import numpy as np
import pytest
import torch
from comfyui_likeness.likeness.faces import drawing
from comfyui_likeness.likeness.spec import Face
from torch import Tensor

KPS = torch.tensor([[60.0, 80], [130, 70], [100, 120], [75, 160], [125, 155]])


def draw_official_keypoints(kps: Tensor, height: int, width: int) -> Any:
    """The drawing of InstantID's published pipeline, uint8 [H, W, 3]."""
    import cv2

    colors = [tuple(255 * value for value in color) for color in drawing.KEYPOINT_COLORS]
    out = np.zeros((height, width, 3))
    for outer, nose in drawing.KEYPOINT_LIMBS:
        (x0, y0), (x1, y1) = kps[outer].tolist(), kps[nose].tolist()
        angle = int(math.degrees(math.atan2(y0 - y1, x0 - x1)))
        center, axes = (int((x0 + x1) / 2), int((y0 + y1) / 2)), (int(math.dist((x0, y0), (x1, y1)) / 2), 4)
        out = cv2.fillConvexPoly(out.copy(), cv2.ellipse2Poly(center, axes, angle, 0, 360, 1), colors[outer])
    out = (out * 0.6).astype(np.uint8)
    for (x, y), color in zip(kps.tolist(), colors, strict=True):
        out = cv2.circle(out.copy(), (int(x), int(y)), 10, color, -1)
    return out


def test_keypoints_match_instantid() -> None:
    expected = torch.from_numpy(draw_official_keypoints(KPS, 200, 220)).float() / 255
    got = drawing.draw_keypoints([KPS], 200, 220)
    wrong = ((got - expected).abs() > 0.01).any(-1)
    drawn = (expected > 0).any(-1)
    assert got.shape == (200, 220, 3)
    assert wrong.sum() < 0.12 * drawn.sum()  # edge pixels, where OpenCV rounds differently
    near = torch.nn.functional.max_pool2d(drawn[None].float(), 3, 1, 1)[0] > 0
    assert not ((got > 0).any(-1) & ~near).any()


def test_keypoint_colors() -> None:
    got = drawing.draw_keypoints([KPS], 200, 220)
    for (x, y), color in zip(KPS.int().tolist(), drawing.KEYPOINT_COLORS, strict=True):
        assert got[y, x].tolist() == pytest.approx(color)
    center = (KPS[0] + KPS[2]) / 2
    assert got[int(center[1]), int(center[0])].tolist() == pytest.approx([0.6, 0, 0])


def test_keypoints_outside_the_image_and_without_extent() -> None:
    assert drawing.draw_keypoints([KPS + 1000], 64, 64).max() == 0
    assert drawing.draw_keypoints([torch.full((5, 2), 32.0)], 64, 64).amax(-1).sum() > 300
    assert torch.equal(drawing.draw_keypoints([], 8, 8), torch.zeros(8, 8, 3))


def test_face_box_keypoints_and_label() -> None:
    image = torch.full((300, 400, 3), 0.5)
    original = image.clone()
    face = Face(torch.tensor([100.0, 100, 220, 250]), KPS + torch.tensor([50.0, 60.0]), 0.9)
    out = drawing.draw_face(image, face, "12", drawing.SELECTED_COLOR)
    ink = (out == torch.tensor(drawing.SELECTED_COLOR)).all(-1)
    assert torch.equal(image, original)
    assert ink[98:100, 98:222].all() and ink[250:252, 98:222].all() and ink[100:250, 98:100].all()
    assert ink[100:250, 220:222].all()
    assert all(ink[y, x] for x, y in face.kps.int().tolist())
    outside = out.clone()
    outside[71:252, 98:222] = 0.5
    assert torch.equal(outside, original)
    label = drawing.render_text_mask("12", 3)
    assert torch.equal(ink[74 : 74 + label.shape[0], 103 : 103 + label.shape[1]], label == 1) and (label == 1).any()


@pytest.mark.parametrize(
    "box", [[-50.0, -50, 40, 40], [80.0, 80, 400, 400], [-9.0, -9, 200, 200], [500.0, 500, 600, 600]]
)
def test_boxes_across_the_edge_of_the_image(box: list[float]) -> None:
    out = drawing.draw_face(torch.zeros(100, 100, 3), Face(torch.tensor(box), KPS, 0.5), "0.97", drawing.DETECTED_COLOR)
    assert out.shape == (100, 100, 3) and (out > 0).any()


def test_labels_are_clipped_to_the_image() -> None:
    out = drawing.draw_face(
        torch.zeros(9, 9, 3), Face(torch.tensor([1.0, 1, 8, 8]), KPS, 0.5), "-0.97", drawing.DETECTED_COLOR
    )
    assert out.shape == (9, 9, 3)


def test_all_digits_and_signs_differ() -> None:
    masks = {sign: drawing.render_text_mask(sign, 1) for sign in "0123456789.-"}
    assert all(mask.shape[0] == 7 and mask.max() > 0.5 for mask in masks.values())
    assert len({tuple(mask.flatten().tolist()) for mask in masks.values()}) == len(masks)


def test_heatmap_over_gray() -> None:
    images, heat = torch.rand(2, 64, 48, 3), torch.zeros(2, 4, 3)
    heat[0, 1, 2], heat[1, 3, 0] = 0.02, 0.005
    out = drawing.overlay_heatmap(images, heat)
    gray = images.mean(-1, keepdim=True).expand_as(images)
    assert out.shape == images.shape and torch.equal(out[0, 48:, :16], gray[0, 48:, :16])
    # The center of the patch with the maximum has the last color at full opacity.
    maximum = torch.lerp(gray[0, 24, 40], torch.tensor(drawing.HEATMAP_COLORS[-1]), drawing.HEATMAP_OPACITY)
    assert (out[0, 24, 40] - maximum).abs().max() < 0.1 and out[0, 24, 40, 0] > out[0, 24, 40, 2] + 0.3
    quarter = torch.lerp(gray[1, 56, 4], torch.tensor(drawing.HEATMAP_COLORS[1]), drawing.HEATMAP_OPACITY * 0.5)
    assert (out[1, 56, 4] - quarter).abs().max() < 0.02
    assert torch.equal(drawing.overlay_heatmap(images, torch.zeros(2, 4, 3)), gray)


def test_label_in_the_corner() -> None:
    image = torch.full((112, 112, 3), 0.5)
    out = drawing.draw_label(image, "42")
    label = drawing.render_text_mask("42", 1)
    expected = torch.lerp(torch.tensor(0.5 * drawing.LABEL_BACKGROUND_BRIGHTNESS), torch.tensor(1.0), label)
    assert torch.equal(out[1:8, 1 : 1 + label.shape[1]], expected[..., None].expand(-1, -1, 3)) and label.max() > 0.9
    assert torch.equal(out[9:], image[9:])
    assert torch.equal(image, torch.full((112, 112, 3), 0.5))
    assert drawing.draw_label(torch.zeros(5, 6, 3), "255").shape == (5, 6, 3)


def test_large_images_are_downscaled_and_small_ones_kept() -> None:
    small = torch.rand(30, 40, 3)
    assert drawing.downscale_image(small) == (small, 1.0)
    downscaled, scale = drawing.downscale_image(torch.rand(500, 2048, 3))
    assert downscaled.shape == (250, 1024, 3) and scale == 0.5


def test_images_of_different_sizes_become_one_batch() -> None:
    wide, tall = torch.ones(20, 60, 3), torch.ones(40, 30, 3)
    batch = drawing.letterbox_images([wide, tall])
    assert batch.shape == (2, 40, 60, 3)
    assert batch[0, 10:30].min() == 1 and batch[0, :10].max() == 0 and batch[0, 30:].max() == 0
    assert batch[1, :, 15:45].min() == 1 and batch[1, :, :15].max() == 0
