"""The template face at any pose, and its drawing."""

from __future__ import annotations

import pytest
import torch
from comfyui_likeness.likeness.faces import landmarks
from comfyui_likeness.likeness.faces.alignment import ARCFACE_TEMPLATE
from comfyui_likeness.nodes.measure import TemplateKeyPoints

LEFT, RIGHT, NOSE, MOUTH_LEFT, MOUTH_RIGHT = range(5)


def points(yaw: float = 0, pitch: float = 0, roll: float = 0) -> torch.Tensor:
    return landmarks.make_posed_keypoints(112, (0, 0), yaw, pitch, roll)


def test_frontal_pose_is_the_template() -> None:
    template = torch.tensor(ARCFACE_TEMPLATE)
    assert torch.allclose(points(), template - template.mean(0), atol=1e-4)
    large = landmarks.make_posed_keypoints(224, (100, 50), 0, 0, 0)
    assert torch.allclose(large.mean(0), torch.tensor([100.0, 50.0]), atol=1e-4)
    assert torch.allclose(large[RIGHT] - large[LEFT], 2 * (template[RIGHT] - template[LEFT]), atol=1e-4)


def nose(keypoints: torch.Tensor) -> torch.Tensor:
    """Position of the nose relative to the mean of the other points."""
    return keypoints[NOSE] - keypoints[[LEFT, RIGHT, MOUTH_LEFT, MOUTH_RIGHT]].mean(0)


def test_directions_of_yaw_pitch_and_roll() -> None:
    assert nose(points(yaw=30))[0] > 4 and nose(points(yaw=-30))[0] < -4
    assert nose(points(pitch=30))[1] < nose(points())[1] - 4 and nose(points(pitch=-30))[1] > nose(points())[1] + 4
    tilted = points(roll=20)
    assert tilted[RIGHT, 1] > tilted[LEFT, 1] + 5  # clockwise, y down
    assert torch.allclose(tilted.norm(dim=1), points().norm(dim=1), atol=1e-4)
    assert (points(yaw=60)[RIGHT] - points(yaw=60)[LEFT])[0] == pytest.approx(35.24 * 0.5, abs=0.1)


def test_template_keypoints_node_draws_the_points() -> None:
    values = {"size": 0.5, "x": 0.5, "y": 0.5, "yaw": 0.0, "pitch": 0.0, "roll": 0.0}
    image = TemplateKeyPoints.execute(256, 192, **values).args[0]
    assert image.shape == (1, 192, 256, 3) and image.max() == 1
    for x, y in landmarks.make_posed_keypoints(96, (128, 96), 0, 0, 0).round().int().tolist():
        assert image[0, y, x].max() == 1
    assert image[0, :20].max() == 0
