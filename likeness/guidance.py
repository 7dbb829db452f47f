"""Guidance beyond the host's own: pushes towards further predictions (FlashFace, arXiv 2403.17008, Eq. 3), rescale."""

from __future__ import annotations

from collections.abc import Sequence

from torch import Tensor


def guide(x: Tensor, sigma: Tensor, denoised: Tensor, positive: Tensor, pushes: Sequence[Tensor], phi: float) -> Tensor:
    """Add the reference guidance to a guided prediction of the clean picture, and rescale it (Eq. 3).

    All are [B, C, H, W] with x = clean + sigma * noise; `pushes` are f * (prediction with references - `positive`).
    phi 0 leaves the contrast alone, 1 gives the noise prediction the deviation of the positive prompt's.
    """
    for push in pushes:
        denoised = denoised + push
    if not phi:
        return denoised
    sigma = sigma.view(-1, *(1 for _ in x.shape[1:])).to(x)
    noise, plain = (x - denoised) / sigma, (x - positive) / sigma
    axes = tuple(range(1, x.ndim))
    ratio = plain.std(axes, keepdim=True) / noise.std(axes, keepdim=True)
    return x - sigma * noise * (phi * ratio + 1 - phi)
