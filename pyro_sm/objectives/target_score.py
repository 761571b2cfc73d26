# SPDX-License-Identifier: Apache-2.0
r"""The target's score as a control variate of denoising.

With ``y = u + r ε`` and ``s = ∇ log p`` the score of the law of ``u``, the score of ``y`` can be written in two ways,
``∇ log p_r(y) = E[−ε/r | y] = E[s(u) | y]``. So ``r ε + r² s(u)`` has mean zero given ``y``, and with any matrix
``A`` that depends on ``r`` alone

    ``u + A (r ε + r² s(u))``   has the conditional mean ``E[u | y]``

that the denoiser shall learn. Integration by parts gives, for every law, ``Cov(u − E[u|y], r ε + r² s) = −r² 1`` and
``Cov(r ε + r² s) = r² (1 + r² 𝓘)`` with the Fisher information ``𝓘 = E[s sᵀ]``: the variance around the mean is
least at

    ``A = (1 + r² 𝓘)⁻¹``,

and for a Gaussian, however correlated, it is zero. At high noise A vanishes and the clean point is the target, as
ever; at low noise the target's score takes over.

Source: "Target Score Matching" https://arxiv.org/abs/2402.08667 (the identity; there with a scalar weight).
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor


class ScoreBlend(NamedTuple):
    """``𝓘`` by its eigenvalues (D,) and eigenvectors (D, D), in columns; whitened space."""

    values: Tensor
    vectors: Tensor

    def shift(self, score: Tensor, r: Tensor, noise: Tensor) -> Tensor:
        """``A (r ε + r² s)`` (B, D), what is added to the clean points.

        Args:
            score: (B, D) ``s`` at the clean points; rows that are not finite get a shift of zero.
            r: (B,) noise ratios.
            noise: (B, D) ``ε``.
        """
        known = torch.isfinite(score).all(-1, keepdim=True)
        ratio = r[:, None]
        difference = ratio * noise + ratio.square() * torch.where(known, score, 0.0)
        along = difference @ self.vectors / (1 + ratio.square() * self.values)
        return torch.where(known, along @ self.vectors.T, 0.0)


def fit_blend(score: Tensor, weight: Tensor) -> ScoreBlend | None:
    """Estimate ``𝓘`` by weighted draws; None if no draw has both a weight and a finite score.

    Args:
        score: (M, D), whitened; rows that are not finite do not count.
        weight: (M,) not negative.
    """
    known = torch.isfinite(score).all(-1) & (weight > 0)
    if not bool(known.any()):
        return None
    score, weight = score[known], weight[known]
    values, vectors = torch.linalg.eigh((score * (weight / weight.sum())[:, None]).T @ score)
    if not bool(torch.isfinite(values).all()):  # scores so large that their squares overflow
        return None
    return ScoreBlend(values.clamp(min=0), vectors)
