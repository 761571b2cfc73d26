# SPDX-License-Identifier: Apache-2.0
r"""An affine coupling that straightens funnels: scales that follow other latents are divided out.

Of the latents ``z`` some *drive* the others: the log scale of a hierarchy, the variance of a funnel. With ``v`` the
straightened latents,

    ``z = c + C v + exp(B v) ⊙ v``,   ``v_H = (z − c)_H``,   ``v = (z − c − C v_H) ⊙ exp(−B v_H)``,

where rows of ``B`` and ``C`` (D, D) that belong to drivers ``H``, and columns that do not, are zero: then both ways
are closed forms, and ``log|det ∂z/∂v| = Σ_i (B v)_i``. Of a normal ``v`` it makes ``z_i | z_H`` normal, its mean and
log scale linear in ``z_H``: a non-centred parametrisation that the draws themselves ask for. A Gaussian in the place
of a funnel is far from it in every latent that is driven; after a coupling it need not be.

Drivers are found one at a time, by the mean log likelihood of draws that they explain (nats per draw),

    ``Σ_i ½ log mean(e_i²) − ½ log mean(e_i² exp(−2 B_i v_H))``,

``e_i`` the residuals of a linear regression on the drivers.

Source: "Density estimation using Real NVP" https://arxiv.org/abs/1605.08803 (affine coupling); "Automatic
Reparameterisation of Probabilistic Programs" https://arxiv.org/abs/1906.03028 (choosing a parametrisation);
heteroscedastic regression: "Modelling variance heterogeneity: residual maximum likelihood and diagnostics"
https://doi.org/10.1111/j.2517-6161.1996.tb02109.x .
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

_NEWTON_STEPS = 20
_ROUNDS = 5  # of mean and scale in turn


class Coupling(NamedTuple):
    """``centre`` (D,) ``c``, ``shift`` (D, D) ``C`` and ``log_scale`` (D, D) ``B``; see the head of the file."""

    centre: Tensor
    shift: Tensor
    log_scale: Tensor

    def bend(self, v: Tensor) -> Tensor:
        """``z`` (B, D) for straightened latents ``v`` (B, D)."""
        return self.centre + v @ self.shift.T + torch.exp(v @ self.log_scale.T) * v

    def straighten(self, z: Tensor) -> Tensor:
        """``v`` (B, D) for latents ``z`` (B, D)."""
        v = z - self.centre
        return (v - v @ self.shift.T) * torch.exp(-(v @ self.log_scale.T))

    def drivers(self) -> Tensor:
        """Which latents drive others, (D,), boolean."""
        return (self.log_scale != 0).any(0)

    def log_det(self, v: Tensor) -> Tensor:
        """``log|det ∂z/∂v|`` (B,) at ``v`` (B, D), nats."""
        return v @ self.log_scale.sum(0)

    def straight_score(self, v: Tensor, score: Tensor) -> Tensor:
        """``∇_v [log p(z(v)) + log|det|]`` (B, D) at ``v`` (B, D), from ``score = ∇_z log p`` (B, D)."""
        stretched = torch.exp(v @ self.log_scale.T) * score
        return score @ self.shift + stretched + (stretched * v) @ self.log_scale + self.log_scale.sum(0)


def _log_volume(x: Tensor) -> float:
    """``½ log det`` of the covariance of ``x`` (N, D)."""
    covariance = torch.atleast_2d(torch.cov(x.T, correction=0))
    tiny = 1e-12 * covariance.diagonal().clamp(min=1e-300)
    return 0.5 * float(torch.linalg.slogdet(covariance + torch.diag(tiny))[1])


def entropy(z: Tensor, coupling: Coupling | None) -> float:
    """Entropy (nats, less a constant) of the best normal law of straightened latents, for draws ``z`` (N, D).

    The lower, the better it fits: minus the mean log density of the draws under it.
    """
    if coupling is None:
        return _log_volume(z.double())
    coupling = Coupling(*(part.double() for part in coupling))
    v = coupling.straighten(z.double())
    return _log_volume(v) + float(coupling.log_det(v).mean())


def _residuals(x: Tensor, h: Tensor, weight: Tensor | None = None) -> tuple[Tensor, Tensor]:
    """Residuals (N, D) of linear regressions of ``x`` (N, D) on ``h`` (N, k) and 1, and coefficients (k + 1, D).

    ``weight``: (N, D), of each value; equal ones if None.
    """
    design = torch.cat([torch.ones_like(h[:, :1]), h], 1)
    if weight is None:
        found = torch.linalg.lstsq(design, x).solution
    else:
        gram = torch.einsum("na,nd,nb->dab", design, weight, design)
        ridge = 1e-9 * gram.diagonal(dim1=-2, dim2=-1).mean(-1)[:, None, None] * torch.eye(design.shape[1]).to(x)
        found = torch.linalg.solve(gram + ridge, torch.einsum("na,nd,nd->da", design, weight, x)).T
    return x - design @ found, found


def _log_scales(square: Tensor, h: Tensor) -> Tensor:
    """``B`` (D, k) that minimises ``½ log mean(e² exp(−2 B h))``, convex in every row; ``square``: ``e²`` (N, D).

    By Newton steps, halved where they overshoot, from the regression of ``½ log e²``, which is right already but for
    its noise.
    """
    log_square = (square + 1e-300).log()
    slope = 0.5 * _residuals(log_square, h)[1][1:].T
    eye = 1e-6 * torch.eye(h.shape[1], dtype=h.dtype, device=h.device)
    value = torch.logsumexp(log_square - 2 * h @ slope.T, 0)
    size = value.new_ones(len(slope))
    for _ in range(_NEWTON_STEPS):
        share = torch.softmax(log_square - 2 * h @ slope.T, 0)  # (N, D)
        mean = share.T @ h  # (D, k): minus half the gradient
        second = torch.einsum("nd,na,nb->dab", share, h, h) - mean[:, :, None] * mean[:, None, :]
        step = size[:, None] * torch.linalg.solve(2 * (second + eye), mean[..., None])[..., 0]
        tried = torch.logsumexp(log_square - 2 * h @ (slope + step).T, 0)
        better = tried <= value
        slope, value = torch.where(better[:, None], slope + step, slope), torch.where(better, tried, value)
        size = torch.where(better, (2 * size).clamp(max=1.0), size / 4)
    return slope


def _gains(x: Tensor) -> Tensor:
    """Nats per draw by which each latent alone, as a driver, explains the scale of each other: (drivers, D)."""
    dim = x.shape[1]
    found = x.new_zeros(dim, dim)
    for j in range(dim):
        h = x[:, j]
        residual, _ = _residuals(x, h[:, None])
        square = residual.square() + 1e-300
        slope = 0.5 * (square.log() * h[:, None]).mean(0)
        tilted = square * torch.exp(-2 * h[:, None] * slope)
        found[j] = 0.5 * (square.mean(0).log() - tilted.mean(0).log())
        found[j, j] = 0.0
    return found.clamp(min=0.0)


def _fitted(z: Tensor, drivers: Tensor) -> Coupling:
    """The coupling with these drivers (k,) for draws ``z`` (N, D), float64."""
    dim = z.shape[1]
    driven = torch.ones(dim, dtype=torch.bool, device=z.device)
    driven[drivers] = False
    centre = z.mean(0)
    h, x = (z - centre)[:, drivers], z[:, driven]
    residual, found = _residuals(x, h)
    slope = _log_scales(residual.square(), h)
    for _ in range(_ROUNDS):
        residual, found = _residuals(x, h, torch.exp(-2 * h @ slope.T))
        slope = _log_scales(residual.square(), h)
    centre = centre.masked_scatter(driven, found[0])
    shift, log_scale = z.new_zeros(dim, dim), z.new_zeros(dim, dim)
    rows = driven.nonzero()
    shift[rows, drivers] = found[1:].T
    log_scale[rows, drivers] = slope
    return Coupling(centre, shift, log_scale)


def fit_coupling(z: Tensor, *, min_gain: float = 1.0) -> Coupling | None:
    """The coupling that equally weighted draws ``z`` (N, D) ask for; None if there is none that is worth it.

    Args:
        z: draws.
        min_gain: entropy (nats per draw) that every driver must save.
    """
    wide = z.double()
    mean, sd = wide.mean(0), wide.std(0).clamp(min=1e-150)
    x = (wide - mean) / sd
    gains, best = _gains(x), None
    drivers: list[int] = []
    least = entropy(x, None)
    while len(drivers) < x.shape[1] - 1:
        gains[:, drivers] = 0.0  # a driver is not driven
        total = gains.sum(1)
        total[drivers] = -1.0
        if float(total.max()) < min_gain / 2:
            break
        drivers = [*drivers, int(total.argmax())]
        tried = _fitted(x, torch.tensor(drivers, device=z.device))
        found = entropy(x, tried)
        if not found < least - min_gain:
            break
        best, least = tried, found
    if best is None:
        return None
    made = Coupling(mean + sd * best.centre, sd[:, None] * best.shift / sd, best.log_scale / sd)
    return Coupling(*(part.to(z) for part in made))
