"""Metrics of generated images, from embeddings and key points: similarity as in FlashFace (arXiv 2403.17008, Sec. 4.1),
CLIP cosines, pose error.

A zero vector stands for an image without a face: all its cosines are 0. Everything is computed in float64.
"""

from __future__ import annotations

import torch
from torch import Tensor

from ..faces.quality import estimate_pose
from ..spec import Face
from .averaging import normalize_rows


def compute_cosines(embeddings: Tensor, targets: Tensor) -> Tensor:
    """Cosine of each embedding [p, d] and one target [d], or one target per row [p, d]: [p]."""
    return (normalize_rows(embeddings.double()) * normalize_rows(targets.double())).sum(-1)


def compute_mean_unit_embedding(embeddings: Tensor) -> Tensor:
    """The normalized mean [d] of the normalized embeddings [n, d] of one person."""
    return normalize_rows(normalize_rows(embeddings.double()).mean(0))


def compute_reference_similarity(embeddings: Tensor, references: Tensor) -> Tensor:
    """Sim_ref: the largest cosine of each image [p, d] with any reference [n, d]: [p]; 0 if an image has no face."""
    unit_embeddings = normalize_rows(embeddings.double())
    return (unit_embeddings @ normalize_rows(references.double()).T).amax(1) * unit_embeddings.any(1)


def compute_paste_score(reference_similarity: Tensor, target_similarity: Tensor) -> Tensor:
    """Paste = Sim_ref - Sim_target: how much a face copies one reference photo rather than following the prompt."""
    return reference_similarity - target_similarity


def flag_missing_faces(embeddings: Tensor) -> Tensor:
    """1 for each image [p, d] without a face, else 0: [p]."""
    return (~embeddings.any(-1)).double()


def compute_pose_error(face: Face, target: Face) -> float:
    """Mean absolute difference in yaw, pitch and roll, in degrees from 0 to 180.

    Approximate, since the pose is estimated from five key points, which resolve turns up to about 45 degrees.
    """
    difference = torch.tensor(estimate_pose(face)).double() - torch.tensor(estimate_pose(target)).double()
    return float(((difference + 180) % 360 - 180).abs().mean())
