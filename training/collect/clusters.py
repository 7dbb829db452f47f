"""Whose face is whose, and which are worth keeping.

FlashFace (arXiv 2403.17008, Sec. 3.1): of a person's photos the largest k-means cluster of ArcFace vectors, and of it
what is like its centre. Omni-ID (arXiv 2412.09694, Sec. 3.4 and Appendix A): faces clustered by pose, no two alike.
"""

from __future__ import annotations

import math
import warnings
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from ..metrics import cosines, direction

WORST = 0.2  # the part of a person's faces that is left out for its quality
POSES = 16  # clusters of poses, of which each gives one view at most
APART = 15.0  # degrees that two views differ by, yaw, pitch and roll together


def k_means(rows: Tensor, k: int) -> Tensor:
    """The number of each row's cluster, [n, d] -> [n]; now and then there are fewer than k."""
    from scipy.cluster.vq import kmeans2

    chance: dict[str, Any] = {"seed": 0}  # SciPy calls it rng from 1.15 on, and takes both
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", "One of the clusters is empty")
        return torch.from_numpy(kmeans2(rows.double().numpy(), k, minit="++", **chance)[1])


def groups(units: Tensor, similarity: float) -> list[Tensor]:
    """Directions [n, d] as groups of row numbers, the largest first.

    The paper does not say how many clusters there are. Here a group is halved for as long as any of its rows is less
    like its centre than `similarity`; then groups whose centres are that much alike, halves of one person, are one.
    """
    waiting, whole = [torch.arange(len(units))], []
    while waiting:
        some = waiting.pop()
        half = k_means(units[some], 2) if _loose(units[some], similarity) else torch.zeros(len(some))
        if half.any() and not half.all():
            waiting += [some[half == 1], some[half == 0]]
        else:
            whole.append(some)
    return sorted(_joined(units, whole, similarity), key=len, reverse=True)


def _loose(units: Tensor, similarity: float) -> bool:
    """Whether rows [n, d] are more than one person's.

    A few rows' mean is too much like each: strangers in a pair are 0.71 from theirs. The mean cosine of two rows, the
    square of that to the true centre, is not.
    """
    count = len(units)
    if count == 1:
        return False
    pairs = (float(units.double().sum(0).square().sum()) / count - 1) / (count - 1)
    return pairs < similarity**2 or float(cosines(units, direction(units)).min()) < similarity


def _joined(units: Tensor, whole: list[Tensor], similarity: float) -> list[Tensor]:
    out: list[Tensor] = []
    centres = units.new_zeros(len(whole), units.shape[1], dtype=torch.float64)
    for some in sorted(whole, key=len, reverse=True):
        centre = direction(units[some])
        alike = centres[: len(out)] @ centre
        if len(out) and float(alike.max()) >= similarity:
            best = int(alike.argmax())
            out[best] = torch.cat((out[best], some))
        else:
            centres[len(out)] = centre
            out.append(some)
    return out


def near(units: Tensor, some: Tensor, similarity: float) -> Tensor:
    """Of a group the rows like its centre, the likest first."""
    alike = cosines(units[some], direction(units[some]))
    order = alike.argsort(descending=True, stable=True)
    return some[order][alike[order] >= similarity]


def person(units: Tensor, similarity: float) -> Tensor:
    """The one person that most of the directions [n, d] show: row numbers, the likest first."""
    return near(units, groups(units, similarity)[0], similarity)


def people(units: Tensor, similarity: float, least: int) -> list[Tensor]:
    """Everybody whom at least so many of the directions show. Those left over are grouped again until nobody is."""
    found: list[Tensor] = []
    rest = torch.arange(len(units))
    while len(rest) >= least:
        kept = [rest[near(units[rest], some, similarity)] for some in groups(units[rest], similarity)]
        kept = [some for some in kept if len(some) >= least]
        if not kept:
            break
        found += kept
        rest = rest[~torch.isin(rest, torch.cat(kept))]
    return found


def views(poses: Tensor, quality: Sequence[float], count: int) -> list[int]:
    """Up to `count` faces of one person, the best first; poses [n, 3] in degrees: yaw, pitch, roll.

    The worst of all are left out. Of each cluster of poses one is taken at most, and none near another in pose.
    """
    order = sorted(range(len(poses)), key=lambda i: -quality[i])[: math.ceil(len(poses) * (1 - WORST))]
    cluster = dict(zip(order, k_means(poses[order], min(POSES, len(order))).tolist(), strict=True))
    taken: list[int] = []
    for i in order:
        new = cluster[i] not in {cluster[other] for other in taken}
        if new and all(float((poses[i] - poses[other]).abs().sum()) > APART for other in taken):
            taken.append(i)
    return taken[:count]
