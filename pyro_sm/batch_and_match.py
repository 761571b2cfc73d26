# SPDX-License-Identifier: Apache-2.0
r"""Batch-and-Match: a full-covariance Gaussian fitted by matching scores, without an optimiser or a Hessian.

From ``q_t = N(μ_t, Σ_t)`` take B draws with mean ``z̄`` and covariance ``C`` (1/B), and target scores with mean
``ḡ`` and covariance ``Γ``. With learning rate λ,

    ``U = λΓ + λ/(1+λ) ḡḡᵀ``,   ``V = Σ_t + λC + λ/(1+λ)(μ_t−z̄)(μ_t−z̄)ᵀ``,
    ``Σ_{t+1} = 2V(I + (I + 4UV)^{1/2})⁻¹``,   ``μ_{t+1} = μ_t/(1+λ) + λ/(1+λ)(Σ_{t+1}ḡ + z̄)``.

With ``V = LLᵀ`` and ``M = LᵀUL`` this is ``Σ_{t+1} = 2 L (I + (I + 4M)^{1/2})⁻¹ Lᵀ``: symmetric and positive
definite by construction. A Gaussian target is a fixed point, whatever the batch.

Source: "Batch and match: black-box variational inference with a score-based divergence"
https://arxiv.org/abs/2402.14758 .
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from pyro_sm.base import Density


class Gaussian(NamedTuple):
    """Mean ``loc`` (D,) and covariance ``covariance`` (D, D)."""

    loc: Tensor
    covariance: Tensor


def batch_and_match_update(gaussian: Gaussian, z: Tensor, score: Tensor, learning_rate: float) -> Gaussian:
    """One update from draws ``z`` (B, D) of ``gaussian`` and the target's scores there (B, D)."""
    blend = learning_rate / (1 + learning_rate)
    z_mean, g_mean = z.mean(0), score.mean(0)
    z_centred, g_centred = z - z_mean, score - g_mean
    batch = z.shape[0]
    u = learning_rate * g_centred.T @ g_centred / batch + blend * torch.outer(g_mean, g_mean)
    gap = gaussian.loc - z_mean
    v = gaussian.covariance + learning_rate * z_centred.T @ z_centred / batch + blend * torch.outer(gap, gap)
    tril = torch.linalg.cholesky((v + v.T) / 2)
    m = tril.T @ u @ tril
    eigenvalue, eigenvector = torch.linalg.eigh((m + m.T) / 2)
    shrunk = eigenvector * (2 / (1 + torch.sqrt(1 + 4 * eigenvalue.clamp(min=0))))
    covariance = tril @ (shrunk @ eigenvector.T) @ tril.T
    loc = gaussian.loc / (1 + learning_rate) + blend * (covariance @ g_mean + z_mean)
    return Gaussian(loc, (covariance + covariance.T) / 2)


def batch_and_match(density: Density, start: Gaussian, *, num_batches: int = 100, batch_size: int = 32) -> Gaussian:
    """Fit a Gaussian to ``density`` from ``start``, with ``λ_t = batch_size · D / (t + 1)``.

    Draws where the density or its score is not finite are left out; an update from fewer than two draws, or one
    that is not positive definite, is skipped. Arithmetic runs in float64 whatever the density's dtype.

    Raises:
        ValueError: every update had to be skipped: the density is not finite near ``start``.
    """
    gaussian = Gaussian(start.loc.double(), start.covariance.double())
    dim = gaussian.loc.shape[0]
    taken = 0
    for t in range(num_batches):
        tril = torch.linalg.cholesky(gaussian.covariance)
        noise = torch.randn(batch_size, dim, dtype=torch.float64, device=gaussian.loc.device)
        z = gaussian.loc + noise @ tril.T
        log_p, score = density.log_prob_and_score(z.to(density.dtype))
        good = torch.isfinite(log_p) & torch.isfinite(score).all(-1)
        if int(good.sum()) < 2:
            continue
        try:
            new = batch_and_match_update(gaussian, z[good], score[good].double(), batch_size * dim / (t + 1))
            torch.linalg.cholesky(new.covariance)
        except torch.linalg.LinAlgError:
            continue
        if bool(torch.isfinite(new.covariance).all()) and bool(torch.isfinite(new.loc).all()):
            gaussian, taken = new, taken + 1
    if taken == 0:
        raise ValueError(
            f"Batch-and-Match took none of {num_batches} updates: the density or its score is not finite near the "
            "start; give another start, or use PriorBase()"
        )
    return gaussian
