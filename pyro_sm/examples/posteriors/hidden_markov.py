# SPDX-License-Identifier: Apache-2.0
r"""Two-state hidden Markov models, their states summed out.

With transition rows ``θ_i`` and emissions ``e_t(j) = log p(y_t | state j)``,

    ``p(y) = Σ_j [ exp e_1 · M_2 ⋯ M_T ]_j``,   ``M_t[i, j] = θ_ij exp e_t(j)``,

the start unweighted: a uniform start is this times ½. The ordered vectors have the density of independent normals on
the ordered set, not normalised there: as the Stan programs have it.

Source: "A tutorial on hidden Markov models and selected applications in speech recognition"
https://doi.org/10.1109/5.18626 .
"""

from __future__ import annotations

import pyro
import pyro.distributions as dist
import torch
from pyro.distributions import constraints
from torch import Tensor

from pyro_sm.examples.posteriors.flat import flat_vector


def log_product(matrices: Tensor) -> Tensor:
    """Log of the product along dimension -3 of matrices given by their logs: (..., T, K, K) to (..., K, K).

    By halves, in ``⌈log₂ T⌉`` vectorised steps: the product is associative.
    """
    while matrices.shape[-3] > 1:
        paired = matrices.shape[-3] // 2 * 2
        left, right = matrices[..., 0:paired:2, :, :], matrices[..., 1:paired:2, :, :]
        product = torch.logsumexp(left[..., :, :, None] + right[..., None, :, :], -2)
        matrices = torch.cat([product, matrices[..., paired:, :, :]], -3)
    return matrices[..., 0, :, :]


def hidden_markov_log_prob(transition: Tensor, emission: Tensor) -> Tensor:
    """``log p(y)`` (...), nats, of rows ``transition`` (..., K, K) and log densities ``emission`` (..., T, K)."""
    steps = transition.log()[..., None, :, :] + emission[..., 1:, None, :]
    return torch.logsumexp(emission[..., 0, :, None] + log_product(steps), (-2, -1))


def _ordered_normal(name: str, loc: Tensor) -> Tensor:
    """A positive ordered vector with the density ``Π_k N(x_k; loc_k, 1)``; ``loc``: (K,)."""
    x = flat_vector(name, loc.shape[0], constraints.positive_ordered_vector)
    pyro.factor(f"{name}_prior", dist.Normal(loc, torch.ones_like(loc)).to_event(1).log_prob(x))
    return x


def normal_emissions(y: Tensor) -> None:
    """``y`` (T,) ``~ N(μ_k, 1)``; μ₁ ~ N(3, 1), μ₂ ~ N(10, 1), positive and ordered; rows uniform on the simplex."""
    uniform = dist.Dirichlet(y.new_ones(2))
    transition = torch.stack([pyro.sample("theta1", uniform), pyro.sample("theta2", uniform)], -2)
    mu = _ordered_normal("mu", y.new_tensor([3.0, 10.0]))
    emission = dist.Normal(mu[..., None, :], y.new_ones(())).log_prob(y[:, None])
    pyro.factor("y", hidden_markov_log_prob(transition, emission))


def drive_to_the_basket(u: Tensor, v: Tensor, alpha: Tensor) -> None:
    """Is the player driving? ``u`` (T,) ``~ Exp(φ_k)`` is 1/speed, ``v`` (T,) ``~ Exp(λ_k)`` the way to the hoop.

    Rows ``θ_k ~ Dirichlet(alpha_k)``, ``alpha``: (2, 2); φ and λ positive and ordered, φ₁, λ₁ ~ N(0, 1),
    φ₂, λ₂ ~ N(3, 1).
    """
    rows = [pyro.sample(f"theta{k + 1}", dist.Dirichlet(alpha[k])) for k in range(2)]
    phi = _ordered_normal("phi", u.new_tensor([0.0, 3.0]))
    lam = _ordered_normal("lambda", u.new_tensor([0.0, 3.0]))
    emission = dist.Exponential(phi[..., None, :]).log_prob(u[:, None])
    emission = emission + dist.Exponential(lam[..., None, :]).log_prob(v[:, None])
    pyro.factor("movement", hidden_markov_log_prob(torch.stack(rows, -2), emission))
