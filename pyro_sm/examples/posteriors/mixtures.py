# SPDX-License-Identifier: Apache-2.0
r"""A mixture of two normals, its labels summed out and its components told apart by the order of their means.

``y_n ~ θ N(μ₁, σ₁) + (1 − θ) N(μ₂, σ₂)``; μ₁ < μ₂ with the density of independent N(0, 2) on the ordered set (not
normalised there, so this is half of the symmetric posterior), σ_k ~ N⁺(2), θ ~ Beta(5, 5).
"""

from __future__ import annotations

import pyro
import pyro.distributions as dist
import torch
from pyro.distributions import constraints
from torch import Tensor

from pyro_sm.examples.posteriors.flat import flat_vector


def ordered_mixture(y: Tensor) -> None:
    """A mixture of two normal laws with ordered means, for data ``y`` (N,); labels are summed out by torch."""
    two, five = y.new_full((2,), 2.0), y.new_tensor(5.0)
    mu = flat_vector("mu", 2, constraints.ordered_vector)
    pyro.factor("mu_prior", dist.Normal(0 * two, two).to_event(1).log_prob(mu))
    sigma = pyro.sample("sigma", dist.HalfNormal(two).to_event(1))
    theta = pyro.sample("theta", dist.Beta(five, five))
    weights = dist.Categorical(torch.stack([theta, 1 - theta], -1))
    with pyro.plate("data", y.shape[0]):
        pyro.sample("y", dist.MixtureSameFamily(weights, dist.Normal(mu, sigma)), obs=y)
