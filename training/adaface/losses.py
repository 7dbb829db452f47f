"""Composition distillation and elastic face preserving (AdaFace, Eq. 3 to 8), as functions of features.

A feature is the last dimension of a tensor: a word's state, a place's channels, or a word's attention over places.
"""

from __future__ import annotations

from torch import Tensor
from torch.nn.functional import cosine_similarity

LEAST = 1e-3  # of a feature's length; a shorter delta is rounding, and has no direction to agree on


def orthogonal(x: Tensor, base: Tensor) -> Tensor:
    """Orthogonal subtraction (Eq. 5): x [..., D] less its projection on `base` [..., D].

    Eq. 6 prints the projection on a base of length 1; as deltas are to be orthogonal, others are divided by its square.
    """
    share = (x * base).sum(-1, keepdim=True) / base.square().sum(-1, keepdim=True).clamp(min=1e-12)
    return x - share * base


def delta(single: Tensor, composed: Tensor, class_single: Tensor, class_composed: Tensor) -> Tensor:
    """Eq. 4 for one kind of feature [..., D]: 1 less the mean cosine of what the composition does to both.

    Features that it leaves alone, as those of the words ahead of it, do not count.
    """
    subject, other = orthogonal(composed, single), orthogonal(class_composed, class_single)
    told = (subject.norm(dim=-1) > LEAST * composed.norm(dim=-1)) & (
        other.norm(dim=-1) > LEAST * class_composed.norm(dim=-1)
    )
    # Ones in place of the others: their gradients must be 0, and not 0 times infinity.
    wrong = 1 - cosine_similarity(subject.where(told[..., None], 1), other.where(told[..., None], 1), dim=-1)
    return (wrong * told).sum() / told.sum().clamp(min=1)


def attention_maps(queries: Tensor, keys: Tensor, heads: int) -> Tensor:
    """How places [n, P, C] attend to words [n, W, C], by word: [n, heads, W, P]."""
    q, k = (x.unflatten(-1, (heads, -1)).transpose(1, 2) for x in (queries, keys))
    return (q @ k.mT * q.shape[-1] ** -0.5).softmax(-1).mT


def matching(single: Tensor, composed: Tensor) -> Tensor:
    """Eq. 7: how queries [n, P, C] of one picture match those of another, unscaled: [n, P, P]."""
    return (single @ composed.mT).softmax(-1)


def preserving(match: Tensor, composed: Tensor, single: Tensor, mask: Tensor) -> Tensor:
    """Eq. 8: 1 less the mean cosine, within mask [n, P], of features [n, P, C] and those that match them."""
    wrong = 1 - cosine_similarity(match @ composed, single, dim=-1)
    return (wrong * mask).sum() / mask.sum().clamp(min=1e-6)
