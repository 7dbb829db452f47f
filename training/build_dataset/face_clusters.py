"""Clusters faces by person, and selects which to keep.

FlashFace (arXiv 2403.17008, Sec. 3.1): of a person's photos the largest k-means cluster of ArcFace embeddings, and of
that the faces close to its center. Omni-ID (arXiv 2412.09694, Sec. 3.4 and Appendix A): faces clustered by pose.
"""

from __future__ import annotations

import math
import warnings
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from ...likeness.identity.metrics import compute_cosines, compute_mean_unit_embedding

DROPPED_FRACTION = 0.2  # of a person's faces, those of the lowest quality
NUM_POSE_CLUSTERS = 16  # each gives at most one view
MIN_POSE_DISTANCE = 15.0  # degrees between two views, yaw, pitch and roll added up


def run_k_means(rows: Tensor, k: int) -> Tensor:
    """The cluster of each row, [n, d] -> [n]; there may be fewer than k."""
    from scipy.cluster.vq import kmeans2

    seed: dict[str, Any] = {"seed": 0}  # called rng since SciPy 1.15, which accepts both
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", "One of the clusters is empty")
        return torch.from_numpy(kmeans2(rows.double().numpy(), k, minit="++", **seed)[1])


def group_embeddings(embeddings: Tensor, min_similarity: float) -> list[Tensor]:
    """Group unit embeddings [n, d] by person: row numbers, the largest group first.

    The paper does not say how many clusters there are. Here a group is split as long as one of its rows is less similar
    to its center than `min_similarity`; then groups with centers at least that similar, halves of a person, are merged.
    """
    waiting, groups = [torch.arange(len(embeddings))], []
    while waiting:
        rows = waiting.pop()
        if _is_several_people(embeddings[rows], min_similarity):
            half = run_k_means(embeddings[rows], 2)
        else:
            half = torch.zeros(len(rows))
        if half.any() and not half.all():
            waiting += [rows[half == 1], rows[half == 0]]
        else:
            groups.append(rows)
    return sorted(_merge_groups(embeddings, groups, min_similarity), key=len, reverse=True)


def _is_several_people(embeddings: Tensor, min_similarity: float) -> bool:
    """Whether rows [n, d] show more than one person.

    The mean of a few rows is too similar to each of them: two strangers are 0.71 from theirs. The mean cosine of pairs
    of rows, the square of the cosine to the true center, is not biased.
    """
    count = len(embeddings)
    if count == 1:
        return False
    pair_cosine = (float(embeddings.double().sum(0).square().sum()) / count - 1) / (count - 1)
    return (
        pair_cosine < min_similarity**2
        or float(compute_cosines(embeddings, compute_mean_unit_embedding(embeddings)).min()) < min_similarity
    )


def _merge_groups(embeddings: Tensor, groups: list[Tensor], min_similarity: float) -> list[Tensor]:
    merged: list[Tensor] = []
    centers = embeddings.new_zeros(len(groups), embeddings.shape[1], dtype=torch.float64)
    for rows in sorted(groups, key=len, reverse=True):
        center = compute_mean_unit_embedding(embeddings[rows])
        cosines = centers[: len(merged)] @ center
        if len(merged) and float(cosines.max()) >= min_similarity:
            best = int(cosines.argmax())
            merged[best] = torch.cat((merged[best], rows))
        else:
            centers[len(merged)] = center
            merged.append(rows)
    return merged


def select_near_center(embeddings: Tensor, rows: Tensor, min_similarity: float) -> Tensor:
    """The rows of a group that are similar to its center, the most similar first."""
    cosines = compute_cosines(embeddings[rows], compute_mean_unit_embedding(embeddings[rows]))
    order = cosines.argsort(descending=True, stable=True)
    return rows[order][cosines[order] >= min_similarity]


def find_main_person(embeddings: Tensor, min_similarity: float) -> Tensor:
    """The person shown by most of the unit embeddings [n, d]: row numbers, the most typical first."""
    return select_near_center(embeddings, group_embeddings(embeddings, min_similarity)[0], min_similarity)


def find_people(embeddings: Tensor, min_similarity: float, min_faces: int) -> list[Tensor]:
    """All people with at least `min_faces` faces. The remaining faces are grouped again until no one is found."""
    people: list[Tensor] = []
    rest = torch.arange(len(embeddings))
    while len(rest) >= min_faces:
        groups = [
            rest[select_near_center(embeddings[rest], rows, min_similarity)]
            for rows in group_embeddings(embeddings[rest], min_similarity)
        ]
        groups = [rows for rows in groups if len(rows) >= min_faces]
        if not groups:
            break
        people += groups
        rest = rest[~torch.isin(rest, torch.cat(groups))]
    return people


def select_views(poses: Tensor, quality: Sequence[float], count: int) -> list[int]:
    """Select up to `count` faces of one person in different poses, the best first; poses [n, 3]: yaw, pitch, roll.

    The worst faces are left out. Each cluster of poses gives at most one, and none close in pose to another.
    """
    order = sorted(range(len(poses)), key=lambda i: -quality[i])[: math.ceil(len(poses) * (1 - DROPPED_FRACTION))]
    cluster = dict(zip(order, run_k_means(poses[order], min(NUM_POSE_CLUSTERS, len(order))).tolist(), strict=True))
    selected: list[int] = []
    for i in order:
        is_new = cluster[i] not in {cluster[other] for other in selected}
        if is_new and all(float((poses[i] - poses[other]).abs().sum()) > MIN_POSE_DISTANCE for other in selected):
            selected.append(i)
    return selected[:count]
