"""Key points of a template face at any pose, to control where a generated face looks without a photo.

The five points of ArcFace's frontal template get the depths of an average face, are rotated about their mean, and
projected orthographically.
"""

from __future__ import annotations

import torch
from torch import Tensor

from .alignment import ARCFACE_TEMPLATE

ARCFACE_TEMPLATE_SIZE = 112.0  # side of the template in pixels
KEYPOINT_DEPTHS = (0.0, 0.0, 15.0, 3.0, 3.0)  # in pixels of the template, towards the viewer


def make_posed_keypoints(size: float, center: tuple[float, float], yaw: float, pitch: float, roll: float) -> Tensor:
    """Five key points [5, 2] in pixels of a face in a square of side `size`; `center` (x, y) is their mean.

    Angles in degrees, as the viewer sees them: positive yaw turns to the right, pitch up, roll clockwise.
    """
    points = torch.cat((torch.tensor(ARCFACE_TEMPLATE), torch.tensor(KEYPOINT_DEPTHS)[:, None]), dim=1).double()
    points = points - points.mean(dim=0)
    rotated = points @ _rotation(0, 2, yaw).T @ _rotation(2, 1, pitch).T @ _rotation(0, 1, -roll).T
    projected = rotated[:, :2] - rotated[:, :2].mean(dim=0)
    return (projected * (size / ARCFACE_TEMPLATE_SIZE) + torch.tensor(center)).float()


def _rotation(first: int, second: int, degrees: float) -> Tensor:
    """The rotation matrix [3, 3] that turns axis `second` towards axis `first`."""
    angle = torch.tensor(degrees, dtype=torch.float64).deg2rad()
    out = torch.eye(3, dtype=torch.float64)
    out[first, first] = out[second, second] = angle.cos()
    out[first, second], out[second, first] = angle.sin(), -angle.sin()
    return out
