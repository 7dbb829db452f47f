"""What is measured of pictures, from vectors and key points alone: likeness as FlashFace has it (arXiv 2403.17008,
Sec. 4.1), CLIP's cosines, the error of pose.

A vector of zeros stands for a picture without a face: it is like nobody, its cosines are 0. All sums run in float64.
"""

from __future__ import annotations

import torch
from torch import Tensor

from .faces import pose
from .spec import Face
from .sphere import units


def cosines(seen: Tensor, wanted: Tensor) -> Tensor:
    """Of each picture [p, d] to one direction [d], or to one of its own [p, d]: [p]."""
    return (units(seen.double()) * units(wanted.double())).sum(-1)


def direction(vectors: Tensor) -> Tensor:
    """Where the vectors [n, d] of one person point: the mean of their directions, [d]. Their lengths do not count."""
    return units(units(vectors.double()).mean(0))


def nearest(seen: Tensor, references: Tensor) -> Tensor:
    """Sim_ref: of each picture [p, d] the largest cosine to any reference [n, d], [p]; 0 where there is no face."""
    made = units(seen.double())
    return (made @ units(references.double()).T).amax(1) * made.any(1)


def paste(ref: Tensor, target: Tensor) -> Tensor:
    """Paste = Sim_ref - Sim_target: how far a face is a copy of a reference rather than the person as asked for."""
    return ref - target


def lost(seen: Tensor) -> Tensor:
    """1 for each picture [p, d] without a face, [p]."""
    return (~seen.any(-1)).double()


def pose_error(one: Face, other: Face) -> float:
    """Degrees, 0 to 180, between two faces' poses: the mean of the differences in yaw, pitch and roll.

    Rough, as poses read off five key points are: the nose tells turns up to about 45 degrees.
    """
    apart = torch.tensor(pose(one)).double() - torch.tensor(pose(other)).double()
    return float(((apart + 180) % 360 - 180).abs().mean())
