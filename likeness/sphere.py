"""Means and medians of directions on the unit sphere; those of their lengths are taken apart from them.

The weighted mean under the sphere's own distance follows Karcher (1977); the geometric median follows Weiszfeld with
the correction of Vardi and Zhang (PNAS 97(4), 2000), in the tangent plane as in Fletcher et al. (NeuroImage 45, 2009).
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

STEPS = 500
TINY = 1e-12


@dataclass(frozen=True)
class Space:
    """`log(x, m)` [n, d] are the ways from m [d] to the rows of x; `exp(v, m)` is where the way v ends."""

    log: Callable[[Tensor, Tensor], Tensor]
    exp: Callable[[Tensor, Tensor], Tensor]


def units(rows: Tensor) -> Tensor:
    """Rows of length 1; zero rows stay 0."""
    return rows / rows.norm(dim=-1, keepdim=True).clamp(min=torch.finfo(rows.dtype).tiny)


def _log(x: Tensor, m: Tensor) -> Tensor:
    cos = x @ m
    across = x - cos[:, None] * m
    sin = across.norm(dim=1)
    return across * (torch.atan2(sin, cos) / sin.clamp(min=TINY))[:, None]


def _exp(v: Tensor, m: Tensor) -> Tensor:
    angle = v.norm()
    return units(m * angle.cos() + v * torch.sinc(angle / torch.pi))


FLAT = Space(lambda x, m: x - m, lambda v, m: m + v)
SPHERE = Space(_log, _exp)


def slerp(a: Tensor, b: Tensor, t: float) -> Tensor:
    """The way from direction a (t = 0) to b (t = 1) at constant speed, [d]; lengths are interpolated linearly.

    Raises ValueError where a and b are opposite, as then no way is the shortest.
    """
    rows = torch.stack([a.double(), b.double()])
    return _scaled(rows, rows.new_tensor([1 - t, t]), lambda x, w: _slerp(x[0], x[1], w[1])).to(
        torch.promote_types(a.dtype, b.dtype)
    )


def _slerp(a: Tensor, b: Tensor, t: Tensor) -> Tensor:
    angle = 2 * torch.atan2((a - b).norm(), (a + b).norm())
    if angle > torch.pi - 1e-7:
        raise ValueError(OPPOSITE)
    if angle < 1e-7:
        return units(a + (b - a) * t)
    return units(a * ((1 - t) * angle).sin() + b * (t * angle).sin())


def mean(rows: Tensor, weight: Tensor) -> Tensor:
    """The direction of the weighted sum of directions, at the weighted mean length: [n, d], [n] -> [d].

    Raises ValueError where the directions cancel out. Zero rows have no direction and only shorten the result.
    """
    return _scaled(rows, weight, _mean)


def karcher(rows: Tensor, weight: Tensor) -> Tensor:
    """The direction of least weighted sum of squared angles, at the weighted mean length: [n, d], [n] -> [d].

    Slerp is its case of two. Found by steps along the mean of the ways to all rows, from their plain mean. Raises
    ValueError where the directions cancel out.
    """

    def climb(x: Tensor, w: Tensor) -> Tensor:
        m = _mean(x, w)
        for _ in range(STEPS):
            step = w @ SPHERE.log(x, m)
            m = SPHERE.exp(step, m)
            if step.norm() < TINY:
                break
        return m

    return _scaled(rows, weight, climb)


def median(rows: Tensor, weight: Tensor) -> Tensor:
    """The direction of least weighted sum of angles, at the weighted median length: [n, d], [n] -> [d].

    Raises ValueError where the directions cancel out.
    """
    return _scaled(rows, weight, lambda x, w: weiszfeld(x, w, SPHERE, _mean(x, w)), _middle)


def weiszfeld(x: Tensor, weight: Tensor, space: Space, start: Tensor) -> Tensor:
    """The point of least weighted sum of distances to the rows of x, [n, d], [n] -> [d], from `start`."""
    m = start
    scale = float(space.log(x, m).norm(dim=1).max())
    for _ in range(STEPS):
        ways = space.log(x, m)
        distance = ways.norm(dim=1)
        away = distance > TINY * scale
        if not away.any():
            break
        pull = (weight / distance.clamp(min=TINY * scale)).where(away, weight.new_zeros(()))
        force = pull @ ways
        # A row at m itself holds it back with its whole weight.
        held = float(weight[~away].sum() / force.norm().clamp(min=torch.finfo(x.dtype).tiny))
        if held >= 1:
            break
        step = force / pull.sum() * (1 - held)
        m = space.exp(step, m)
        if step.norm() < TINY * scale:
            break
    return m


OPPOSITE = (
    "got faces whose directions are opposite and cancel out; expected faces that have something in common; "
    "change the weights or leave one out"
)


def _mean(x: Tensor, weight: Tensor) -> Tensor:
    total = weight @ x
    if total.norm() < 1e-7 * weight.sum():
        raise ValueError(OPPOSITE)
    return units(total)


def _average(lengths: Tensor, share: Tensor) -> Tensor:
    return share @ lengths


def _middle(lengths: Tensor, share: Tensor) -> Tensor:
    """The weighted median; half way between two lengths where it falls between them."""
    ordered, order = lengths.sort()
    below = share[order].cumsum(0)
    last = len(lengths) - 1
    low, high = (min(int((below < half).sum()), last) for half in (0.5 - 1e-9, 0.5 + 1e-9))
    return (ordered[low] + ordered[high]) / 2


def _scaled(
    rows: Tensor,
    weight: Tensor,
    centre: Callable[[Tensor, Tensor], Tensor],
    length: Callable[[Tensor, Tensor], Tensor] = _average,
) -> Tensor:
    """`centre` of the directions of the rows, made as long as `length` of theirs; shares sum to 1."""
    lengths = rows.norm(dim=1)
    share = weight / weight.sum()
    there = lengths > 0
    if not there.any():
        return torch.zeros_like(rows[0])
    if there.sum() == 1:
        direction = units(rows[there])[0]
    else:
        direction = centre(units(rows[there]), share[there] / share[there].sum())
    return direction * length(lengths, share)
