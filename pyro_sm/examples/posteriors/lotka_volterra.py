# SPDX-License-Identifier: Apache-2.0
r"""Lynx and hare: predators v and prey u of the Hudson's Bay Company's pelts, in thousands, 1900-1920.

    ``u' = (α − βv) u``,  ``v' = (−γ + δu) v``,  ``(u, v)(0) = z₀``,

θ = (α, β, γ, δ); α, γ ~ N⁺(1, ½), β, δ ~ N⁺(.05, .05), z₀ ~ LogN(log 10, 1), σ ~ LogN(−1, 1); counts
``y ~ LogN(log z, σ)``.

Solved by the classical Runge-Kutta method of order 4 in the logarithms, ``(log u)' = α − βv``, with a fixed step, so
that a batch of parameters takes the same steps. Its relative error at draws of the posterior is below 1e-5, the
tolerance asked of Stan's adaptive solver.

Source: "Predator-Prey Population Dynamics: the Lotka-Volterra model in Stan"
https://mc-stan.org/users/documentation/case-studies/lotka-volterra-predator-prey.html .
"""

from __future__ import annotations

import math

import pyro
import pyro.distributions as dist
import torch
from torch import Tensor

from pyro_sm.examples.posteriors.positive_normal import PositiveNormal

STEPS_PER_YEAR = 10


def log_populations(theta: Tensor, z_init: Tensor, num_years: int, steps_per_year: int = STEPS_PER_YEAR) -> Tensor:
    """``log (u, v)`` after 1, 2, … ``num_years`` years.

    ``theta``: (..., 4); ``z_init``: (..., 2); returns (..., num_years, 2).
    """
    growth = torch.stack([theta[..., 0], -theta[..., 2]], -1)
    contact = torch.stack([-theta[..., 1], theta[..., 3]], -1)

    def rate(w: Tensor) -> Tensor:
        return torch.addcmul(growth, contact, w.exp().flip(-1))

    w, h, years = z_init.log(), 1 / steps_per_year, []
    for _ in range(num_years):
        for _ in range(steps_per_year):
            k1 = rate(w)
            k2 = rate(w + h / 2 * k1)
            k3 = rate(w + h / 2 * k2)
            k4 = rate(w + h * k3)
            w = w + h / 6 * (k1 + 2 * (k2 + k3) + k4)
        years.append(w)
    return torch.stack(years, -2)


def lotka_volterra(y_init: Tensor, y: Tensor) -> None:
    """``y_init``: (2,) counts of hare and lynx in year 0; ``y``: (T, 2) in years 1 to T."""
    theta_prior = PositiveNormal(y.new_tensor([1.0, 0.05, 1.0, 0.05]), y.new_tensor([0.5, 0.05, 0.5, 0.05]))
    theta = pyro.sample("theta", theta_prior.to_event(1))
    one = y.new_ones(2)
    z_init = pyro.sample("z_init", dist.LogNormal(math.log(10) * one, one).to_event(1))
    sigma = pyro.sample("sigma", dist.LogNormal(-one, one).to_event(1))
    pyro.sample("y_init", dist.LogNormal(z_init.log(), sigma).to_event(1), obs=y_init)
    log_z = log_populations(theta, z_init, y.shape[0])
    pyro.sample("y", dist.LogNormal(log_z, sigma[..., None, :]).to_event(2), obs=y)
