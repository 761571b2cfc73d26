# SPDX-License-Identifier: Apache-2.0
r"""Noise schedules: ``t -> (α, σ)`` on [0, 1], and nothing else.

A clean point ``u`` becomes ``x_t = α(t) u + σ(t) ε`` with ``ε ~ N(0, I)``. All that a solver wants follows:

* noise-to-signal ratio ``r = σ/α``; log signal-to-noise ratio ``−2 log r``;
* the SDE ``dx = f x dt + g dW`` with ``f = d log α/dt`` and ``g² = dσ²/dt − 2 f σ²``.

Variance exploding (VE) has α = 1; variance preserving (VP) has α² + σ² = 1. Both run through the same ratios
``r(t) = r_min (r_max/r_min)^t``, so that ``x_t/α`` of the one is ``x_t`` of the other: reverse kernels may be
written once, in the rescaled variable ``y = x/α = u + r ε``.

Source: "Score-Based Generative Modeling through Stochastic Differential Equations"
https://arxiv.org/abs/2011.13456 ; "Variational Diffusion Models" https://arxiv.org/abs/2107.00630 .
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Protocol

import torch
from torch import Tensor


class Noise(Protocol):
    """A schedule; ``t`` and both results have the same shape. Unitless: noise is measured in whitened space."""

    def __call__(self, t: Tensor) -> tuple[Tensor, Tensor]:
        """``(α(t), σ(t))``."""
        ...


def _geometric(t: Tensor, low: float, high: float) -> Tensor:
    return low * (high / low) ** t


def _check_range(low: float, high: float) -> None:
    if not 0 < low < high:
        raise ValueError(f"expected 0 < ratio_min < ratio_max, found {low} and {high}")


@dataclass(frozen=True)
class VE:
    """Variance exploding: ``α = 1``, ``σ = r_min (r_max/r_min)^t``.

    Raises:
        ValueError: unless ``0 < ratio_min < ratio_max``.
    """

    ratio_min: float = 0.002
    ratio_max: float = 8.0

    def __post_init__(self) -> None:
        _check_range(self.ratio_min, self.ratio_max)

    def __call__(self, t: Tensor) -> tuple[Tensor, Tensor]:
        """``(α(t), σ(t))``."""
        return torch.ones_like(t), _geometric(t, self.ratio_min, self.ratio_max)


@dataclass(frozen=True)
class VP:
    """Variance preserving: ``α = 1/√(1+r²)``, ``σ = r/√(1+r²)``, with the same ratios ``r(t)`` as :class:`VE`.

    Raises:
        ValueError: unless ``0 < ratio_min < ratio_max``.
    """

    ratio_min: float = 0.002
    ratio_max: float = 8.0

    def __post_init__(self) -> None:
        _check_range(self.ratio_min, self.ratio_max)

    def __call__(self, t: Tensor) -> tuple[Tensor, Tensor]:
        """``(α(t), σ(t))``."""
        r = _geometric(t, self.ratio_min, self.ratio_max)
        norm = torch.sqrt(1 + r * r)
        return 1 / norm, r / norm


def ratio(noise: Noise, t: Tensor) -> Tensor:
    """``r = σ/α``, same shape as ``t``."""
    alpha, sigma = noise(t)
    return sigma / alpha


def drift_and_diffusion(noise: Noise, t: Tensor) -> tuple[Tensor, Tensor]:
    """Coefficients ``f(t)`` and ``g(t)²`` of the forward SDE, same shape as ``t``."""
    value, slope = torch.func.jvp(noise, (t,), (torch.ones_like(t),))[:2]
    (alpha, sigma), (d_alpha, d_sigma) = value, slope
    f = d_alpha / alpha
    return f, 2 * sigma * d_sigma - 2 * f * sigma * sigma


def ratio_levels(noise: Noise, num_steps: int, *, dtype: torch.dtype, device: torch.device) -> Tensor:
    """Ratios ``0 = r_0 < r_1 < … < r_K`` at which the reverse kernels stand, (K+1,); ``r_0`` is the clean point.

    Raises:
        ValueError: fewer than two steps.
    """
    if num_steps < 2:
        raise ValueError(f"expected at least 2 steps, found {num_steps}")
    t = torch.linspace(0, 1, num_steps, dtype=dtype, device=device)
    return torch.cat([torch.zeros(1, dtype=dtype, device=device), ratio(noise, t)])
