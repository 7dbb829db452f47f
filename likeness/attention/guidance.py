"""Guidance beyond classifier-free guidance: FlashFace's reference guidance (arXiv 2403.17008, Eq. 3), and rescale."""

from __future__ import annotations

from collections.abc import Sequence

from torch import Tensor


def apply_reference_guidance(
    x: Tensor, sigma: Tensor, denoised: Tensor, positive: Tensor, guidance_terms: Sequence[Tensor], rescale: float
) -> Tensor:
    """Add reference guidance to a guided denoised prediction, and rescale it (Eq. 3).

    All are [B, C, H, W] with x = clean + sigma * noise; `guidance_terms` are f * (denoised with references -
    `positive`). `rescale` 0 changes nothing; 1 gives the noise prediction the standard deviation of `positive`'s.
    """
    for term in guidance_terms:
        denoised = denoised + term
    if not rescale:
        return denoised
    sigma = sigma.view(-1, *(1 for _ in x.shape[1:])).to(x)
    noise, positive_noise = (x - denoised) / sigma, (x - positive) / sigma
    axes = tuple(range(1, x.ndim))
    ratio = positive_noise.std(axes, keepdim=True) / noise.std(axes, keepdim=True)
    return x - sigma * noise * (rescale * ratio + 1 - rescale)
