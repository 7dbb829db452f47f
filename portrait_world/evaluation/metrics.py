"""The metrics of training and of the report; those of nodes are in nodes/evaluate.py and likeness/identity/metrics.py.

An all-zero embedding stands for an image without a face; its cosines are 0. All sums are in float64.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from ...likeness.identity.averaging import normalize_rows
from ...likeness.identity.metrics import (
    compute_cosines,
    compute_mean_unit_embedding,
    compute_paste_score,
    compute_reference_similarity,
    flag_missing_faces,
)
from ...nodes.evaluate import compute_psnr, compute_ssim
from ...training.task import make_generator

__all__ = [
    "Assignment",
    "MeanInterval",
    "compute_bootstrap_interval",
    "compute_cosines",
    "compute_frechet_distance",
    "compute_mean_unit_embedding",
    "compute_paste_score",
    "compute_psnr",
    "compute_reference_similarity",
    "compute_ssim",
    "flag_missing_faces",
    "match_top_text",
    "measure_adherence",
    "measure_assignment",
]

BOOTSTRAP_SAMPLES, CONFIDENCE_LEVEL = 2000, 0.95


class MeanInterval(NamedTuple):
    """A mean and its confidence interval."""

    mean: float
    low: float
    high: float


def compute_frechet_distance(generated: Tensor, real: Tensor) -> float:
    """The Frechet distance of two feature sets [n, d] and [m, d] as normal distributions (FID, arXiv 1706.08500).

    FID uses Inception features. With features of another encoder, such as CLIP's image encoder, values can only be
    compared with each other. They are biased upwards unless n and m are much larger than d. The matrix square root is
    computed as in torchmetrics. Raises ValueError for fewer than two rows.
    """
    if min(len(generated), len(real)) < 2:
        raise ValueError(f"got {len(generated)} and {len(real)} images; expected two or more of each; use more images")
    means = [rows.double().mean(0) for rows in (generated, real)]
    a, b = (torch.atleast_2d(rows.double().T.cov()) for rows in (generated, real))
    root = torch.linalg.eigvals(a @ b).sqrt().real.sum()
    return float((means[0] - means[1]).square().sum() + a.trace() + b.trace() - 2 * root)


def measure_adherence(images: Tensor, texts: Tensor, prompt_indices: Tensor) -> tuple[Tensor, Tensor]:
    """The cosine of each image embedding [p, d] to its prompt, and whether no other text [q, d] is closer; [p] each.

    `prompt_indices` [p]: the index of each image's prompt in `texts`.
    """
    return compute_cosines(images, texts[prompt_indices]), match_top_text(images, texts, prompt_indices)


def match_top_text(images: Tensor, texts: Tensor, prompt_indices: Tensor) -> Tensor:
    """1 for each image embedding [p, d] whose prompt has the highest cosine of all texts [q, d], else 0; [p]."""
    cosines = normalize_rows(images.double()) @ normalize_rows(texts.double()).T
    return (cosines.argmax(1) == prompt_indices).double()


class Assignment(NamedTuple):
    """Metrics of images of two people, [p] each.

    `own` and `swapped`: mean cosine of both halves to the right and to the other person. `assigned`: 1 if both halves
    have a face and `own` exceeds `swapped`. `right`: 1 if that holds for each half alone. `lost`: the fraction of the
    halves without a face.
    """

    own: Tensor
    swapped: Tensor
    assigned: Tensor
    right: Tensor
    lost: Tensor


def measure_assignment(halves: Tensor, references: Tensor) -> Assignment:
    """Compare the face embeddings of both halves [p, 2, d] with the reference embeddings of the two people [2, d]."""
    cosines = normalize_rows(halves.double()) @ normalize_rows(references.double()).T  # [p, half, person]
    own, swapped = cosines.diagonal(dim1=1, dim2=2), cosines.flip(2).diagonal(dim1=1, dim2=2)
    right, missing = (own > swapped).all(1), flag_missing_faces(halves).mean(1)
    own, swapped = own.mean(1), swapped.mean(1)
    return Assignment(own, swapped, ((own > swapped) & (missing == 0)).double(), right.double(), missing)


def compute_bootstrap_interval(values: Tensor, seed: int = 0) -> MeanInterval:
    """The mean of one value per person [n] and its 95% percentile bootstrap interval, resampling people."""
    values = values.double()
    indices = torch.randint(len(values), (BOOTSTRAP_SAMPLES, len(values)), generator=make_generator(seed))
    levels = torch.tensor([(1 - CONFIDENCE_LEVEL) / 2, (1 + CONFIDENCE_LEVEL) / 2], dtype=torch.float64)
    return MeanInterval(float(values.mean()), *values[indices].mean(1).quantile(levels).tolist())
