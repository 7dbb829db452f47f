"""Means and medians of embeddings on the unit sphere. Directions and lengths are averaged separately.

The spherical mean follows Karcher (1977). The geometric median follows Weiszfeld with the correction of Vardi and Zhang
(PNAS 97(4), 2000), in the tangent space as in Fletcher et al. (NeuroImage 45, 2009).
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

MAX_ITERATIONS = 500
EPSILON = 1e-12
OPPOSITE_DIRECTIONS_ERROR = (
    "got faces whose embeddings point in opposite directions and cancel out; expected faces that have something in "
    "common; change the weights or leave one out"
)


@dataclass(frozen=True)
class Manifold:
    """`log_map(x, m)` [n, d] are the tangent vectors at m [d] towards the rows of x; `exp_map(v, m)` is its inverse."""

    log_map: Callable[[Tensor, Tensor], Tensor]
    exp_map: Callable[[Tensor, Tensor], Tensor]


def normalize_rows(rows: Tensor) -> Tensor:
    """Scale rows [..., d] to length 1; zero rows stay 0."""
    return rows / rows.norm(dim=-1, keepdim=True).clamp(min=torch.finfo(rows.dtype).tiny)


def _sphere_log_map(x: Tensor, m: Tensor) -> Tensor:
    cos = x @ m
    across = x - cos[:, None] * m
    sin = across.norm(dim=1)
    return across * (torch.atan2(sin, cos) / sin.clamp(min=EPSILON))[:, None]


def _sphere_exp_map(v: Tensor, m: Tensor) -> Tensor:
    angle = v.norm()
    return normalize_rows(m * angle.cos() + v * torch.sinc(angle / torch.pi))


EUCLIDEAN = Manifold(lambda x, m: x - m, lambda v, m: m + v)
UNIT_SPHERE = Manifold(_sphere_log_map, _sphere_exp_map)


def slerp_embeddings(a: Tensor, b: Tensor, t: float) -> Tensor:
    """Spherical linear interpolation from a [d] (t = 0) to b [d] (t = 1); lengths are interpolated linearly.

    Raises ValueError if a and b point in opposite directions, where slerp is not defined.
    """
    rows = torch.stack([a.double(), b.double()])
    return _average_direction_and_length(
        rows, rows.new_tensor([1 - t, t]), lambda x, w: _slerp_directions(x[0], x[1], w[1])
    ).to(torch.promote_types(a.dtype, b.dtype))


def _slerp_directions(a: Tensor, b: Tensor, t: Tensor) -> Tensor:
    angle = 2 * torch.atan2((a - b).norm(), (a + b).norm())
    if angle > torch.pi - 1e-7:
        raise ValueError(OPPOSITE_DIRECTIONS_ERROR)
    if angle < 1e-7:
        return normalize_rows(a + (b - a) * t)
    return normalize_rows(a * ((1 - t) * angle).sin() + b * (t * angle).sin())


def compute_spherical_mean(rows: Tensor, weight: Tensor) -> Tensor:
    """The weighted sum of the unit vectors, scaled to the weighted mean length: [n, d], [n] -> [d].

    Zero rows have no direction and only lower the mean length. Raises ValueError if the directions cancel out.
    """
    return _average_direction_and_length(rows, weight, _mean_direction)


def compute_karcher_mean(rows: Tensor, weight: Tensor) -> Tensor:
    """The unit vector that minimizes the weighted sum of squared angles, scaled to the weighted mean length.

    [n, d], [n] -> [d]. For two rows this is slerp. Gradient descent from the spherical mean: each step is the mean of
    the log maps. Raises ValueError if the directions cancel out.
    """

    def descend(x: Tensor, w: Tensor) -> Tensor:
        m = _mean_direction(x, w)
        for _ in range(MAX_ITERATIONS):
            step = w @ UNIT_SPHERE.log_map(x, m)
            m = UNIT_SPHERE.exp_map(step, m)
            if step.norm() < EPSILON:
                break
        return m

    return _average_direction_and_length(rows, weight, descend)


def compute_spherical_median(rows: Tensor, weight: Tensor) -> Tensor:
    """The unit vector that minimizes the weighted sum of angles, scaled to the weighted median length.

    [n, d], [n] -> [d]. Raises ValueError if the directions cancel out.
    """
    return _average_direction_and_length(
        rows, weight, lambda x, w: compute_geometric_median(x, w, UNIT_SPHERE, _mean_direction(x, w)), _weighted_median
    )


def compute_geometric_median(x: Tensor, weight: Tensor, manifold: Manifold, start: Tensor) -> Tensor:
    """The point that minimizes the weighted sum of distances to the rows of x, iterated from `start`: [n, d] -> [d]."""
    m = start
    scale = float(manifold.log_map(x, m).norm(dim=1).max())
    for _ in range(MAX_ITERATIONS):
        tangents = manifold.log_map(x, m)
        distance = tangents.norm(dim=1)
        away = distance > EPSILON * scale
        if not away.any():
            break
        pull = (weight / distance.clamp(min=EPSILON * scale)).where(away, weight.new_zeros(()))
        force = pull @ tangents
        # Vardi and Zhang: a row that coincides with m damps the step by its weight.
        damping = float(weight[~away].sum() / force.norm().clamp(min=torch.finfo(x.dtype).tiny))
        if damping >= 1:
            break
        step = force / pull.sum() * (1 - damping)
        m = manifold.exp_map(step, m)
        if step.norm() < EPSILON * scale:
            break
    return m


def _mean_direction(x: Tensor, weight: Tensor) -> Tensor:
    total = weight @ x
    if total.norm() < 1e-7 * weight.sum():
        raise ValueError(OPPOSITE_DIRECTIONS_ERROR)
    return normalize_rows(total)


def _weighted_mean(lengths: Tensor, weight: Tensor) -> Tensor:
    return weight @ lengths


def _weighted_median(lengths: Tensor, weight: Tensor) -> Tensor:
    """The weighted median, with weights that sum to 1; the midpoint of two lengths if it falls between them."""
    ordered, order = lengths.sort()
    cumulative = weight[order].cumsum(0)
    last = len(lengths) - 1
    low, high = (min(int((cumulative < half).sum()), last) for half in (0.5 - 1e-9, 0.5 + 1e-9))
    return (ordered[low] + ordered[high]) / 2


def _average_direction_and_length(
    rows: Tensor,
    weight: Tensor,
    average_direction: Callable[[Tensor, Tensor], Tensor],
    average_length: Callable[[Tensor, Tensor], Tensor] = _weighted_mean,
) -> Tensor:
    """Average the directions and the lengths of the rows separately; both functions get weights that sum to 1."""
    lengths = rows.norm(dim=1)
    weight = weight / weight.sum()
    nonzero = lengths > 0
    if not nonzero.any():
        return torch.zeros_like(rows[0])
    if nonzero.sum() == 1:
        direction = normalize_rows(rows[nonzero])[0]
    else:
        direction = average_direction(normalize_rows(rows[nonzero]), weight[nonzero] / weight[nonzero].sum())
    return direction * average_length(lengths, weight)
