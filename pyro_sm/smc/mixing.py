# SPDX-License-Identifier: Apache-2.0
r"""Have chains mixed? Split-R̂ and the effective number of draws of C chains of S draws, (C, S, ...).

With every chain cut in halves, ``W`` the mean variance within and ``B/S`` the variance of the means,

    ``R̂ = √((W (S−1)/S + B/S) / W)``,   ``ESS = C S / (1 + 2 Σ_k ρ_k)``,

``ρ_k`` the autocorrelation at lag k from all chains together, summed in pairs while the pairs are positive and made
to decrease (Geyer). A quantity that is constant has neither: NaN.

Source: "Rank-normalization, folding, and localization: an improved R̂ for assessing convergence of MCMC"
https://arxiv.org/abs/1903.08008 (here without the ranks).
"""

from __future__ import annotations

import torch
from torch import Tensor


def _halves(x: Tensor) -> Tensor:
    """Chains (C, S, ...) cut in two, float64: (2C, S//2, ...); of an odd length the middle draw is left out."""
    if x.ndim < 2 or x.shape[0] < 1 or x.shape[1] < 8:
        raise ValueError(f"expected chains (C, S, ...) of at least 8 draws, found {tuple(x.shape)}")
    half = x.shape[1] // 2
    return torch.cat([x[:, :half], x[:, -half:]]).double()


def _pooled_variance(x: Tensor) -> tuple[Tensor, Tensor]:
    """``W`` and ``W (S−1)/S + B/S`` (...) of chains (C, S, ...)."""
    within = x.var(1).mean(0)
    return within, within * (1 - 1 / x.shape[1]) + x.mean(1).var(0)


def split_rhat(x: Tensor) -> Tensor:
    """R̂ (...) of chains (C, S, ...); near 1 if they agree.

    Raises:
        ValueError: fewer than two axes, or fewer than 8 draws.
    """
    within, pooled = _pooled_variance(_halves(x))
    return (pooled / within).sqrt()


def effective_draws(x: Tensor) -> Tensor:
    """ESS (...) of the mean over chains (C, S, ...).

    Raises:
        ValueError: fewer than two axes, or fewer than 8 draws.
    """
    x = _halves(x)
    chains, size = x.shape[:2]
    within, pooled = _pooled_variance(x)
    spectrum = torch.fft.rfft(x - x.mean(1, keepdim=True), 2 * size, dim=1).abs().square()
    covariance = torch.fft.irfft(spectrum, 2 * size, dim=1)[:, :size].mean(0) / size
    rho = 1 - (within - covariance) / pooled
    rho[0] = 1
    pairs = rho[: size // 2 * 2].unflatten(0, (-1, 2)).sum(1)
    positive = (pairs > 0).long().cumprod(0)
    time = 2 * (pairs.cummin(0).values * positive).sum(0) - 1
    ess = chains * size / time.clamp(min=1 / torch.tensor(float(chains * size)).log10())
    return torch.where(within > 0, ess, torch.nan)
