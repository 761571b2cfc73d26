# SPDX-License-Identifier: Apache-2.0
r"""A coupling that non-centres funnels: latents whose law follows other latents are standardised by it.

Of the latents ``z`` some *drive* the others: the log scale of a hierarchy, the variance of a funnel. Given drivers
``h``, each driven latent is taken to be normal, as in a hierarchy of normals: a prior whose mean and log scale are
linear in ``h``, times a likelihood of its own with precision ``κ`` about ``y`` (nothing, if ``κ = 0``),

    ``ℓ = c + C h``,   ``a = a_0 + B h``,   ``σ⁻² = e^{−2a} + κ``,   ``w = σ² e^{−2a}``,
    ``μ = w ℓ + (1 − w) y``,   ``z_i = μ_i(h) + σ_i(h) v_i``,   ``z_H = c_H + h``,   ``v_H = h``.

Then ``v`` is the non-centred latent: both ways are closed forms, and ``log|det ∂z/∂v| = Σ_i log σ_i``. It is a
non-centred parametrisation where there are few data, a centred one where there are many, and the draws themselves say
which. Matrices are (D, D): rows of drivers, and columns of the driven, are zero.

How drivers are found, and a coupling is fitted to draws: ``coupling_fit.py``.

Source: "Density estimation using Real NVP" https://arxiv.org/abs/1605.08803 (affine coupling); "Automatic
Reparameterisation of Probabilistic Programs" https://arxiv.org/abs/1906.03028 (choosing a parametrisation);
"A General Framework for the Parametrization of Hierarchical Models" https://doi.org/10.1214/088342307000000014 .
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor


class Law(NamedTuple):
    """Of driven latents given ``h``, each (B, D): ``mean``, ``log_sd``, ``w`` and ``gap``, ``ℓ − y``."""

    mean: Tensor
    log_sd: Tensor
    weight: Tensor
    gap: Tensor


def driven_law(loc: Tensor, log_scale: Tensor, data: Tensor, log_precision: Tensor) -> Law:
    """From ``ℓ`` and ``a`` (B, D), ``y`` and ``log κ`` (D,)."""
    log_total = torch.logaddexp(-2 * log_scale, log_precision.expand_as(log_scale))
    weight = torch.exp(-2 * log_scale - log_total)
    gap = loc - data
    return Law(data + weight * gap, -0.5 * log_total, weight, gap)


class Coupling(NamedTuple):
    """See the head of the file. ``driven`` (D,): 1 for driven latents, 0 for drivers.

    ``centre`` (D,) ``c``, ``shift`` (D, D) ``C``; ``log_scale`` (D,) ``a_0``, ``slope`` (D, D) ``B``; ``data`` (D,)
    ``y`` and ``log_precision`` (D,) ``log κ``. Where ``driven`` is 0, all but ``centre`` are without a meaning.
    """

    driven: Tensor
    centre: Tensor
    shift: Tensor
    log_scale: Tensor
    slope: Tensor
    data: Tensor
    log_precision: Tensor

    def _given(self, v: Tensor) -> Law:
        """The law of all latents given the drivers in ``v`` (B, D), or in ``z − c``: there they are the same."""
        loc, log_scale = self.centre + v @ self.shift.T, self.log_scale + v @ self.slope.T
        return driven_law(loc, log_scale, self.data, self.log_precision)

    def to_centred(self, v: Tensor) -> Tensor:
        """``z`` (B, D) for non-centred latents ``v`` (B, D)."""
        law = self._given(v)
        return torch.where(self.driven > 0, law.mean + torch.exp(law.log_sd) * v, self.centre + v)

    def to_noncentred(self, z: Tensor) -> Tensor:
        """``v`` (B, D) for latents ``z`` (B, D)."""
        law = self._given(z - self.centre)
        return torch.where(self.driven > 0, (z - law.mean) * torch.exp(-law.log_sd), z - self.centre)

    def drivers(self) -> Tensor:
        """Which latents drive others, (D,), boolean."""
        return (self.slope != 0).any(0)

    def log_det(self, v: Tensor) -> Tensor:
        """``log|det ∂z/∂v|`` (B,) at ``v`` (B, D), nats."""
        return (self._given(v).log_sd * self.driven).sum(-1)

    def noncentred_score(self, v: Tensor, score: Tensor) -> Tensor:
        """``∇_v [log p(z(v)) + log|det|]`` (B, D) at ``v`` (B, D), from ``score = ∇_z log p`` (B, D)."""
        law = self._given(v)
        sd, w, own = torch.exp(law.log_sd), law.weight * self.driven, score * self.driven
        by_log_scale = own * w * (sd * v - 2 * (1 - law.weight) * law.gap) + w
        direct = torch.where(self.driven > 0, sd * score, score)
        return direct + by_log_scale @ self.slope + (own * w) @ self.shift
