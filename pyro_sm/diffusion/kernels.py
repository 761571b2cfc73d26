# SPDX-License-Identifier: Apache-2.0
r"""Reverse Gaussian kernels, and the log weight of a whole path.

Whitened space, rescaled variable ``y_k = u + r_k ε`` at levels ``0 = r_0 < r_1 < … < r_K``; ``y_0 = u``.

* forward kernel  ``F(y_k | y_{k−1}) = N(y_{k−1}, (r_k² − r_{k−1}²) I)``;
* reverse kernel  ``B(y_{k−1} | y_k) = N(y_k + c_k (D − y_k), r_{k−1}² c_k + c_k² f_k V)``, diagonal, with
  ``c_k = 1 − r_{k−1}²/r_k²``, the denoiser's moments ``D, V`` at ``(y_k, r_k)`` and fitted factors ``f_k`` near 1.
  The term with ``V = Var(u | y_k)`` is what naive samplers leave out; without it the weights are ruined when steps
  are few;
* start           ``N_T = N(m_T, diag s_T²)``.

The path's log ratio ``R = Σ_k log F − log N_T − Σ_k log B`` makes ``E[exp(log p̃(u) + R)] = Z`` exactly, however
bad the denoiser: the kernels are normalised, and F integrates out. ``f_k``, ``m_T`` and ``s_T`` are fitted by
moments of weighted draws, which is the forward-KL optimum for this mean.

Source: "Importance Weighted Score Matching for Diffusion Samplers" https://arxiv.org/abs/2505.19431 ;
"Analytic-DPM: an Analytic Estimate of the Optimal Reverse Variance" https://arxiv.org/abs/2201.06503 .
"""

from __future__ import annotations

import math
from typing import NamedTuple

import torch
from torch import Tensor

from pyro_sm.diffusion.denoiser import Denoiser
from pyro_sm.diffusion.tails import HeavyTails


class Kernels(NamedTuple):
    """What is fitted by moments and not by gradient.

    ``ratios``: (K+1,) the levels ``r_k``. ``variance_factor``: (K, D) the ``f_k``, k = 1..K.
    ``start_loc``: (D,) ``m_T``. ``start_scale``: (D,) ``s_T``.
    """

    ratios: Tensor
    variance_factor: Tensor
    start_loc: Tensor
    start_scale: Tensor


def gaussian_kernels(ratios: Tensor, dim: int) -> Kernels:
    """The exact kernels for ``u ~ N(0, I)``: ``f = 1``, ``s_T² = 1 + r_K²``."""
    ones = torch.ones(dim, dtype=ratios.dtype, device=ratios.device)
    return Kernels(
        ratios,
        ones.repeat(ratios.shape[0] - 1, 1),
        torch.zeros_like(ones),
        torch.sqrt(1 + ratios[-1].square()) * ones,
    )


def reverse_kernel(denoiser: Denoiser, kernels: Kernels, y: Tensor, k: int) -> tuple[Tensor, Tensor]:
    """Mean and variance (B, D) of ``B(y_{k−1} | y_k = y)``."""
    low, high = kernels.ratios[k - 1].square(), kernels.ratios[k].square()
    shrink = 1 - low / high
    mean, variance = denoiser.moments(y, kernels.ratios[k])
    variance = torch.addcmul(low * shrink, shrink.square() * kernels.variance_factor[k - 1], variance)
    return torch.addcmul(y, shrink, mean - y), variance


def _forward_variances(kernels: Kernels) -> Tensor:
    """``r_k² − r_{k−1}²``, (K,)."""
    return kernels.ratios[1:].square() - kernels.ratios[:-1].square()


def _start_constant(kernels: Kernels) -> Tensor:
    """Terms of ``2 R`` (D,), one latent at a time, that no point enters: the start's scale, and 2π."""
    return 2 * kernels.start_scale.log() + math.log(2 * math.pi)


def sample_paths(
    denoiser: Denoiser, kernels: Kernels, noise: Tensor, heavy: HeavyTails | None = None
) -> tuple[Tensor, Tensor]:
    """Run the reverse kernels on given noise.

    Args:
        denoiser: the denoiser.
        kernels: the kernels.
        noise: (K+1, N, D) standard normal; ``noise[K]`` starts the paths, ``noise[k−1]`` makes ``y_{k−1}``.
        heavy: the tails that the noise was drawn with, for the log ratio; None for Gaussian kernels.

    Returns:
        ``u`` (N, D), and the path log ratio ``R`` (N,) in nats. Differentiable in the network and the kernels.
    """
    num_steps = kernels.ratios.shape[0] - 1
    gaps = _forward_variances(kernels)
    y = torch.addcmul(kernels.start_loc, noise[num_steps], kernels.start_scale)
    # 2 R, one latent at a time: the sum over latents is taken once, at the end. Logarithms of the two kernels'
    # variances are large and of nearly one size: they are subtracted before anything is added up.
    twice = noise[num_steps].square() + _start_constant(kernels)
    for k in range(num_steps, 0, -1):
        mean, variance = reverse_kernel(denoiser, kernels, y, k)
        new = torch.addcmul(mean, noise[k - 1], torch.sqrt(variance))
        forward = (y - new).square() / gaps[k - 1]
        twice = twice + (noise[k - 1].square() - forward + torch.log(variance / gaps[k - 1]))
        y = new
    log_ratio = 0.5 * twice.sum(-1)
    if heavy is not None:
        log_ratio = log_ratio - heavy.log_factor(heavy.log_sum(noise.square()), noise.shape[-1])
    return y, log_ratio


def path_log_ratio(
    denoiser: Denoiser, kernels: Kernels, u: Tensor, noise: Tensor, heavy: HeavyTails | None = None
) -> Tensor:
    """Log ratio ``R`` (N,) of forward-noised paths that start in given clean points.

    The other half of multiple importance sampling: what weight would the guide give to a path that ends in ``u``?

    Args:
        denoiser: the denoiser.
        kernels: the kernels.
        u: (N, D) clean points in whitened space, from any source.
        noise: (K, N, D) standard normal.
        heavy: the tails of the reverse kernels; None for Gaussian ones.
    """
    gaps = _forward_variances(kernels)
    scales = torch.sqrt(gaps)
    y, twice = u, _start_constant(kernels)
    log_sums = []
    for k in range(1, kernels.ratios.shape[0]):
        new = torch.addcmul(y, scales[k - 1], noise[k - 1])
        mean, variance = reverse_kernel(denoiser, kernels, new, k)
        square = (y - mean).square() / variance
        if heavy is not None:
            log_sums.append(heavy.log_sum(square))
        twice = twice + (square - noise[k - 1].square() + torch.log(variance / gaps[k - 1]))
        y = new
    square = ((y - kernels.start_loc) / kernels.start_scale).square()
    log_ratio = 0.5 * (twice + square).sum(-1)
    if heavy is not None:
        log_ratio = log_ratio - heavy.log_factor(torch.stack([*log_sums, heavy.log_sum(square)]), u.shape[-1])
    return log_ratio


def fit_kernels(
    denoiser: Denoiser, kernels: Kernels, u: Tensor, noise: Tensor, *, isotropic: bool = False
) -> Kernels:
    """Fit ``f_k``, ``m_T`` and ``s_T`` by moments.

    Args:
        denoiser: the denoiser, as trained so far.
        kernels: for the levels.
        u: (N, D) equally weighted draws of what the sampler shall produce, whitened.
        noise: (N, D) standard normal, shared by all levels.
        isotropic: whether they, and the network, are the same in all directions, and centred: then ``m_T = 0``, and
            the other moments are means over all latents.
    """
    factors = []
    for r in kernels.ratios[1:]:
        mean, variance = denoiser.moments(u + r * noise, r)
        factor = ((u - mean).square() / variance).mean(0)
        factors.append((factor.mean().expand_as(factor) if isotropic else factor).clamp(1e-3, 1e3))
    loc = torch.zeros_like(u[0]) if isotropic else u.mean(0)
    variance = u.square().mean().expand_as(loc) if isotropic else u.var(0, correction=0)
    start_scale = torch.sqrt(variance + kernels.ratios[-1].square())
    return Kernels(kernels.ratios, torch.stack(factors), loc, start_scale)
