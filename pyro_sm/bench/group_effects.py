# SPDX-License-Identifier: Apache-2.0
r"""Centred group effects with hundreds of latents, as in the radon data, and their evidence.

``μ ~ N(0, 5²)``, ``σ_a ~ N⁺(0, 1)``, ``σ_y ~ N⁺(0, 2²)``; for J groups ``a_j ~ N(μ, σ_a²)``, and eight rows of each,
``y_{jk} ~ N(a_j, σ_y²)``: ``J + 3`` latents, centred. Effects and mean can be integrated by hand: with the means of
groups ``ȳ``,

    ``p(y | σ_a, σ_y) = N(ȳ; 0, (σ_a² + σ_y²/8) I + 25 11ᵀ) Π_j (2π σ_y²)^{−7/2} 8^{−½} exp(−SS_j/2σ_y²)``,

and the two scales on a grid.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import NamedTuple

import pyro
import pyro.distributions as dist
import torch
from torch import Tensor

_ROWS = 8
_GRID = 801  # points along each axis: the trapezoidal rule of a smooth law that ends in zeros is exact long before
_NEGLIGIBLE = 45.0  # nats below the highest: less than a float64's last digit of it
_COARSE = (-8.0, 3.0)  # log scales that the first grid covers: far beyond both ends of either prior's bulk
_GRIDS = 3  # a coarse one, one around what it found, and one more, by which the last digits hold


class Effects(NamedTuple):
    """``y`` (J, 8), and the ``model`` of it."""

    y: Tensor
    model: Callable[[], None]


def group_effects(num_groups: int) -> Effects:
    """Data drawn once and for all: ``μ = 1.2``, ``σ_a = .35``, ``σ_y = .75``."""
    generator = torch.Generator().manual_seed(0)
    effect = 1.2 + 0.35 * torch.randn(num_groups, 1, generator=generator)
    y = effect + 0.75 * torch.randn(num_groups, _ROWS, generator=generator)

    def model() -> None:
        mean = pyro.sample("mean", dist.Normal(0.0, 5.0))
        spread = pyro.sample("spread", dist.HalfNormal(1.0))
        noise = pyro.sample("noise", dist.HalfNormal(2.0))
        with pyro.plate("groups", num_groups, dim=-2):
            effects = pyro.sample("effects", dist.Normal(mean, spread))
            with pyro.plate("rows", _ROWS, dim=-1):
                pyro.sample("y", dist.Normal(effects, noise), obs=y)

    return Effects(y, model)


def _log_joint(y: Tensor, log_spread: Tensor, log_noise: Tensor) -> Tensor:
    """``log p(y, log σ_a, log σ_y)`` over a grid, (A, B), float64."""
    count, rows = y.shape
    y = y.double()
    means = y.mean(1)
    within = (y - means[:, None]).square().sum()
    noise, spread = torch.exp(log_noise)[None], torch.exp(log_spread)[:, None]
    own = spread.square() + noise.square() / rows  # variance of a group's mean
    between = (means - means.mean()).square().sum()
    total = own + 25 * count
    log_means = -0.5 * (
        count * math.log(2 * math.pi)
        + (count - 1) * own.log()
        + total.log()
        + between / own
        + count * means.mean().square() / total
    )
    log_rows = -0.5 * count * ((rows - 1) * torch.log(2 * math.pi * noise.square()) + math.log(rows))
    prior = dist.HalfNormal(1.0).log_prob(spread) + dist.HalfNormal(2.0).log_prob(noise)
    jacobian = log_spread[:, None] + log_noise[None]
    return log_means + log_rows - 0.5 * within / noise.square() + prior + jacobian


def log_evidence(y: Tensor) -> float:
    """``log p(y)``, nats, by the trapezoidal rule, on a grid that is drawn anew around what a coarse one finds."""
    low, high = (torch.tensor([end, end]).double() for end in _COARSE)
    found = 0.0
    for _ in range(_GRIDS):
        axes = [
            torch.linspace(float(a), float(b), _GRID, dtype=torch.float64) for a, b in zip(low, high, strict=True)
        ]
        log_p = _log_joint(y, *axes)
        cell = sum(math.log(float(axis[1] - axis[0])) for axis in axes)
        found = float(torch.logsumexp(log_p.flatten(), 0)) + cell
        inside = (log_p > log_p.max() - _NEGLIGIBLE).nonzero()
        first, last = (inside.min(0).values - 1).clamp(min=0), (inside.max(0).values + 1).clamp(max=_GRID - 1)
        low = torch.stack([axis[i] for axis, i in zip(axes, first, strict=True)])
        high = torch.stack([axis[i] for axis, i in zip(axes, last, strict=True)])
    return found
