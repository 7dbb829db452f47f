"""A template face's key points, turned: where a face shall look, without a photo of one.

The five points of ArcFace's frontal template, with the depths of an average face, turned about their middle and seen
from far away.
"""

from __future__ import annotations

import torch
from torch import Tensor

from .faces import ARCFACE

SIDE = 112.0  # of the square that the template lies in
DEPTHS = (0.0, 0.0, 15.0, 3.0, 3.0)  # in units of the template: the nose stands out, the mouth a little


def key_points(side: float, middle: tuple[float, float], yaw: float, pitch: float, roll: float) -> Tensor:
    """Five key points [5, 2] in pixels of a face in a square of `side` pixels, their mean at `middle`, x and y.

    Angles in degrees, as the viewer sees it: yaw above 0 looks to the right, pitch up, roll tilts clockwise.
    """
    points = torch.cat((torch.tensor(ARCFACE), torch.tensor(DEPTHS)[:, None]), dim=1).double()
    points = points - points.mean(dim=0)
    turned = points @ _turn(0, 2, yaw).T @ _turn(2, 1, pitch).T @ _turn(0, 1, -roll).T
    placed = turned[:, :2] - turned[:, :2].mean(dim=0)
    return (placed * (side / SIDE) + torch.tensor(middle)).float()


def _turn(first: int, second: int, degrees: float) -> Tensor:
    """The rotation [3, 3] that carries the axis `second` towards `first`."""
    angle = torch.tensor(degrees, dtype=torch.float64).deg2rad()
    out = torch.eye(3, dtype=torch.float64)
    out[first, first] = out[second, second] = angle.cos()
    out[first, second], out[second, first] = angle.sin(), -angle.sin()
    return out
