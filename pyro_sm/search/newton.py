# SPDX-License-Identifier: Apache-2.0
r"""Newton's ascents to the very top, several at once, and the curvature there.

Limited-memory BFGS stops half-way where widths differ by thousands (regressions in raw units: from a dozen of such
ends a dozen "modes"). From there Newton arrives in a few steps. With ``s`` the widths of an end, ``P`` minus the
Hessian in these units and ``P = V diag(e) Vᵀ``, the steps tried are

    ``δ_λ = s · V diag(1/(|e| + λ)) Vᵀ g``,   λ = 0, 10⁻³, 10⁻², …, 10³,

all in one batch; the highest is taken. ``|e|`` makes a direction of positive curvature one to climb, not to descend.
``P`` is had by central differences of 2D scores with steps of a hundredth of a width: ``s_i = P_ii^{−½}`` of the
last curvature, so that the differences are as good in a latent of width 10³ as in one of 10⁻³. ``½ gᵀ P⁻¹ g`` is the
gain still to be had, nats.

Source: "Numerical Optimization", chapter 3.4 https://doi.org/10.1007/978-0-387-40065-5 .
"""

from __future__ import annotations

import math
from typing import NamedTuple

import torch
from torch import Tensor

from pyro_sm.base import Density

_STEP = 0.01  # widths: the third derivatives err by 10⁻⁴, float64 scores by 10⁻¹⁴, float32 ones by 10⁻⁵
_DAMPINGS = (0.0, 1e-3, 1e-2, 0.1, 1.0, 10.0, 100.0, 1e3)
_ARRIVED = 1e-3  # nats to be gained: √(2 · 1e-3) = .04 widths from the mode
_SETTLED = 3.0  # by which a width may change and its differences still be believed
_WIDEST = 1e3  # by which a width changes at once at the most
_MISSES = 3  # passes with scores that are not finite, each ten times closer: nearer to an edge there is no peak
_FLAT = 1e-8  # least curvature, in units of the widths: a direction without one is 10⁴ widths wide


class Peaks(NamedTuple):
    """Where ascents ended, float64 but for ``loc``.

    ``loc`` (K, D); ``log_p`` (K,), nats; ``scale_tril`` (K, D, D) of minus the inverse Hessian; ``gain`` (K,), nats
    still to be had, ``inf`` where no curvature could be computed.
    """

    loc: Tensor
    log_p: Tensor
    scale_tril: Tensor
    gain: Tensor


class _Curvature(NamedTuple):
    """``P`` and the slope at K points, in units of the widths ``fresh`` (K, D) that ``P`` itself suggests.

    ``value`` (K, D) and ``vector`` (K, D, D) of ``P``; ``slope`` (K, D) in the basis of ``vector``; ``width`` (K, D)
    the units of the differences; ``usable`` (K,): all scores were finite.
    """

    value: Tensor
    vector: Tensor
    slope: Tensor
    width: Tensor
    fresh: Tensor
    usable: Tensor

    def gain(self) -> Tensor:
        return 0.5 * (self.slope.square() / self.value.abs().clamp(min=_FLAT)).sum(-1)


def _curvature(density: Density, z: Tensor, width: Tensor) -> _Curvature:
    """At ``z`` (K, D) in units of ``width`` (K, D), float64; 2KD scores."""
    count, dim = z.shape
    offset = torch.diag_embed((_STEP * width).to(z))
    both = torch.stack([z[:, None] + offset, z[:, None] - offset], 1)
    value, score = density.log_prob_and_score(both.reshape(-1, dim))
    usable = (torch.isfinite(value) & torch.isfinite(score).all(-1)).reshape(count, -1).all(1)
    score = torch.nan_to_num(score.double(), nan=0.0, posinf=0.0, neginf=0.0).reshape(count, 2, dim, dim)
    # The steps as they were rounded, not as they were meant.
    step = (both[:, 0] - both[:, 1]).diagonal(dim1=1, dim2=2).double()
    usable = usable & (step > _STEP * width).all(1)
    rows = -(score[:, 0] - score[:, 1]) / step.clamp(min=1e-300)[..., None]
    precision = 0.5 * (rows + rows.mT)
    diagonal = precision.diagonal(dim1=1, dim2=2)
    fresh = torch.where(diagonal > 0, diagonal.clamp(min=1e-300).rsqrt(), width)
    fresh = torch.maximum(torch.minimum(fresh, width * _WIDEST), width / _WIDEST)
    scaled = precision * fresh[:, :, None] * fresh[:, None, :]
    usable = usable & torch.isfinite(scaled).all(-1).all(-1)
    e, vector = torch.linalg.eigh(torch.where(usable[:, None, None], scaled, torch.eye(dim).to(scaled)))
    slope = ((score.mean((1, 2)) * fresh)[:, None] @ vector)[:, 0]
    return _Curvature(e, vector, slope, width, fresh, usable)


def _highest(density: Density, z: Tensor, log_p: Tensor, c: _Curvature) -> tuple[Tensor, Tensor]:
    """The best of the damped steps from ``z`` (K, D), or ``z`` itself; and its ``log p̃`` (K,)."""
    damping = torch.tensor(_DAMPINGS, dtype=torch.float64, device=z.device)
    white = c.slope[:, None] / (c.value.abs().clamp(min=_FLAT)[:, None] + damping[:, None])
    trial = z[:, None] + (c.fresh[:, None] * (white @ c.vector.mT)).to(z)
    value = density.log_prob(trial.reshape(-1, z.shape[1])).reshape(trial.shape[:2]).double()
    value = torch.where(torch.isfinite(value), value, -math.inf)
    best, which = value.max(1)
    better = best > log_p
    rows = torch.arange(len(z), device=z.device)
    return torch.where(better[:, None], trial[rows, which], z), torch.where(better, best, log_p)


def climbed(density: Density, z: Tensor, width: Tensor, num_steps: int = 40) -> Peaks:
    """Newton's ascents from ``z`` (K, D).

    Args:
        density: to be climbed; a step costs 2D scores and eight values for each row that has not arrived.
        z: where to begin, of finite density.
        width: (D,) the first guess at the widths.
        num_steps: at most so many.
    """
    count, dim = z.shape
    z, scale = z.clone(), width.double().expand(count, dim).clone()
    log_p = density.log_prob(z).double()
    gain = torch.full((count,), math.inf, dtype=torch.float64, device=z.device)
    tril = torch.diag_embed(scale)
    left, misses = torch.arange(count, device=z.device), torch.zeros(count, device=z.device)
    for _ in range(num_steps):
        c = _curvature(density, z[left], scale[left])
        misses[left] += ~c.usable
        scale[left] = torch.where(c.usable[:, None], c.fresh, 0.1 * c.width)  # closer, where it left the support
        settled = ((c.fresh / c.width).log().abs() < math.log(_SETTLED)).all(1) & c.usable
        gain[left] = torch.where(settled, c.gain(), math.inf)
        tril[left] = torch.where(settled[:, None, None], _factor(c), tril[left])
        arrived = settled & (gain[left] < _ARRIVED) & (c.value.min(1).values > 0)
        old = log_p[left]
        new, value = _highest(density, z[left], old, c)
        move = settled & ~arrived
        z[left], log_p[left] = torch.where(move[:, None], new, z[left]), torch.where(move, value, old)
        stuck = move & ~(log_p[left] > old + 1e-9)
        left = left[~(arrived | stuck | (misses[left] > _MISSES))]
        if len(left) == 0:
            break
    return Peaks(z, log_p, tril, gain)


def _factor(c: _Curvature) -> Tensor:
    """The lower Cholesky factors (K, D, D) of ``s V diag(1/e) Vᵀ s``."""
    root = c.fresh[:, :, None] * c.vector / c.value.clamp(min=_FLAT).sqrt()[:, None]
    triangle = torch.linalg.qr(root.mT).R.mT
    return triangle * torch.where(triangle.diagonal(dim1=1, dim2=2) < 0, -1.0, 1.0)[:, None]
