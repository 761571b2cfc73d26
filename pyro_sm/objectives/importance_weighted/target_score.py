# SPDX-License-Identifier: Apache-2.0
r"""The target's score as a control variate of denoising.

With ``y = u + r ε`` and ``s = ∇ log p`` the score of the law of ``u``, the score of ``y`` can be written in two ways,
``∇ log p_r(y) = E[−ε/r | y] = E[s(u) | y]``. So ``r ε + r² s(u)`` has mean zero given ``y``, and with any weight
``a`` that depends on ``y`` and ``r`` alone

    ``u + a (r ε + r² s(u))``   has the conditional mean ``E[u | y]``

that the denoiser shall learn. Integration by parts gives, for every law, ``Cov(u − E[u|y], r ε + r² s) = −r²`` and
``Var(r ε + r² s) = r² (1 + r² 𝓘)`` with the Fisher information ``𝓘 = E[s²]``, one latent at a time: of all weights
that depend on r alone the best is ``1/(1 + r² 𝓘)``. Given ``y``, where the law is locally normal, the best is
``Var[u|y]/r²``. The weight is the smaller of the two,

    ``a = min{ 1/(1 + r² 𝓘),  Var[u|y]/r² }``,

the variance as the denoiser has learned it. The first keeps away from scores of other modes; the second is what the
neck of a funnel needs, where the law is narrower than it is on average. For independent normal latents both are
exact, and what is left of the variance is zero.

Source: "Target Score Matching" https://arxiv.org/abs/2402.08667 (the identity).
"""

from __future__ import annotations

import torch
from torch import Tensor


def fisher_information(score: Tensor, weight: Tensor) -> Tensor | None:
    """``𝓘`` (D,) by weighted draws; None if no draw has both a weight and a finite score, or it overflows.

    Args:
        score: (M, D), whitened; rows that are not finite do not count.
        weight: (M,) not negative.
    """
    known = torch.isfinite(score).all(-1) & (weight > 0)
    if not bool(known.any()):
        return None
    share = weight[known] / weight[known].sum()
    information = share @ score[known].square()
    return information if bool(torch.isfinite(information).all()) else None


def score_shift(score: Tensor, r: Tensor, noise: Tensor, information: Tensor, log_variance: Tensor) -> Tensor:
    """``a (r ε + r² s)`` (B, D), what is added to the clean points.

    Args:
        score: (B, D) ``s`` at the clean points; rows that are not finite get a shift of zero.
        r: (B,) noise ratios.
        noise: (B, D) ``ε``.
        information: (D,) ``𝓘``.
        log_variance: (B, D) the denoiser's ``h``, ``Var[u|y] = r²/(1 + r²) exp(h)``.
    """
    known = torch.isfinite(score).all(-1, keepdim=True)
    ratio = r[:, None]
    square = ratio.square()
    weight = torch.minimum(1 / (1 + square * information), torch.exp(log_variance) / (1 + square))
    return torch.where(known, weight * (ratio * noise + square * torch.where(known, score, 0.0)), 0.0)
