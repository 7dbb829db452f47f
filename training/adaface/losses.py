"""Composition distillation and elastic face preserving (AdaFace, Eq. 3 to 8), as functions of features.

A feature is the last dimension of a tensor: a token's hidden state, the channels at a position, or a token's attention
over all positions.
"""

from __future__ import annotations

from torch import Tensor
from torch.nn.functional import cosine_similarity

MIN_DELTA_RATIO = 1e-3  # of a feature's norm; a shorter delta is rounding noise without a meaningful direction


def subtract_projection(x: Tensor, base: Tensor) -> Tensor:
    """Orthogonal subtraction (Eq. 5): x [..., D] minus its projection onto `base` [..., D].

    Eq. 6 prints the projection onto a base of norm 1. For deltas to be orthogonal to any base, it is divided by the
    squared norm.
    """
    scale = (x * base).sum(-1, keepdim=True) / base.square().sum(-1, keepdim=True).clamp(min=1e-12)
    return x - scale * base


def delta_loss(single: Tensor, composed: Tensor, class_single: Tensor, class_composed: Tensor) -> Tensor:
    """Eq. 4 for one kind of feature [..., D]: 1 minus the mean cosine of the deltas of person and class word.

    Features that the composition does not change, such as those of the tokens before it, are ignored.
    """
    delta, class_delta = subtract_projection(composed, single), subtract_projection(class_composed, class_single)
    changed = (delta.norm(dim=-1) > MIN_DELTA_RATIO * composed.norm(dim=-1)) & (
        class_delta.norm(dim=-1) > MIN_DELTA_RATIO * class_composed.norm(dim=-1)
    )
    # Ignored features are replaced with ones, so that their gradients are 0 instead of 0 times infinity.
    distance = 1 - cosine_similarity(
        delta.where(changed[..., None], 1), class_delta.where(changed[..., None], 1), dim=-1
    )
    return (distance * changed).sum() / changed.sum().clamp(min=1)


def compute_attention_maps(queries: Tensor, keys: Tensor, num_heads: int) -> Tensor:
    """Attention of positions [n, P, C] to tokens [n, T, C], by token: [n, heads, T, P]."""
    q, k = (x.unflatten(-1, (num_heads, -1)).transpose(1, 2) for x in (queries, keys))
    return (q @ k.mT * q.shape[-1] ** -0.5).softmax(-1).mT


def match_queries(single: Tensor, composed: Tensor) -> Tensor:
    """Eq. 7: unscaled attention [n, P, P] between the queries [n, P, C] of two images."""
    return (single @ composed.mT).softmax(-1)


def face_preserving_loss(matches: Tensor, composed: Tensor, single: Tensor, mask: Tensor) -> Tensor:
    """Eq. 8: 1 minus the mean cosine, within mask [n, P], of features [n, P, C] and the composed image's matches."""
    distance = 1 - cosine_similarity(matches @ composed, single, dim=-1)
    return (distance * mask).sum() / mask.sum().clamp(min=1e-6)
