# SPDX-License-Identifier: Apache-2.0
r"""Five small models written the way users write them, one per difficulty of batching.

Each function returns ``(model, args)``; data are drawn from a fixed seed and leave the global generator
alone.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pyro
import pyro.distributions as dist
import torch
from torch import Tensor

ModelAndArgs = tuple[Callable[..., None], tuple[Any, ...]]


def _noise(*shape: int, seed: int = 0) -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(*shape, generator=generator, dtype=torch.float64).to(torch.get_default_dtype())


def eight_schools() -> ModelAndArgs:
    """Rubin's eight schools, non-centred; D = 10. Everything broadcasts."""
    y = torch.tensor([28.0, 8, -3, 7, -1, 1, 18, 12])
    sigma = torch.tensor([15.0, 10, 16, 11, 9, 11, 10, 18])

    def model(y: Tensor, sigma: Tensor) -> None:
        mu = pyro.sample("mu", dist.Normal(0.0, 5.0))
        tau = pyro.sample("tau", dist.HalfCauchy(5.0))
        with pyro.plate("school", len(sigma)):
            eta = pyro.sample("eta", dist.Normal(0.0, 1.0))
            theta = pyro.deterministic("theta", mu + tau * eta, event_dim=0)
            pyro.sample("y", dist.Normal(theta, sigma), obs=y)

    return model, (y, sigma)


def hierarchical_logistic(rows: int = 200, groups: int = 19, columns: int = 9) -> ModelAndArgs:
    """Varying intercepts ``alpha[g]`` and ``X @ beta``; D = 30. Neither broadcasts on the left."""
    x = _noise(rows, columns)
    group = torch.arange(rows) % groups
    y = (x.sum(1) + _noise(rows, seed=1) > 0).to(x.dtype)

    def model(x: Tensor, group: Tensor, y: Tensor) -> None:
        mu = pyro.sample("mu", dist.Normal(0.0, 1.0))
        tau = pyro.sample("tau", dist.HalfNormal(1.0))
        beta = pyro.sample("beta", dist.Normal(torch.zeros(x.shape[1]), 1.0).to_event(1))
        with pyro.plate("group", groups):
            alpha = pyro.sample("alpha", dist.Normal(mu, tau))
        with pyro.plate("data", len(y)):
            pyro.sample("y", dist.Bernoulli(logits=x @ beta + alpha[group]), obs=y)

    return model, (x, group, y)


def mixture(rows: int = 80, components: int = 3) -> ModelAndArgs:
    """Gaussian mixture with its labels enumerated, ``locs[z]``; D = 8."""
    y = torch.cat([_noise(rows // 2) - 3, _noise(rows - rows // 2, seed=1) * 0.5 + 2])

    def model(y: Tensor) -> None:
        weights = pyro.sample("weights", dist.Dirichlet(torch.ones(components)))
        with pyro.plate("component", components):
            locs = pyro.sample("locs", dist.Normal(0.0, 5.0))
            scales = pyro.sample("scales", dist.LogNormal(0.0, 1.0))
        with pyro.plate("data", len(y)):
            z = pyro.sample("z", dist.Categorical(weights))
            pyro.sample("y", dist.Normal(locs[z], scales[z]), obs=y)

    return model, (y,)


def correlated(rows: int = 50, size: int = 4) -> ModelAndArgs:
    """Multivariate normal with an LKJ prior on the correlations; D = 14."""
    y = _noise(rows, size) @ (torch.eye(size) + 0.5 * torch.ones(size, size).tril(-1)).T

    def model(y: Tensor) -> None:
        loc = pyro.sample("loc", dist.Normal(torch.zeros(size), 2.0).to_event(1))
        scale = pyro.sample("scale", dist.LogNormal(torch.zeros(size), 1.0).to_event(1))
        chol = pyro.sample("chol", dist.LKJCholesky(size, 2.0))
        scale_tril = scale.unsqueeze(-1) * chol
        with pyro.plate("data", len(y)):
            pyro.sample("y", dist.MultivariateNormal(loc, scale_tril=scale_tril), obs=y)

    return model, (y,)


def state_space(steps: int = 40) -> ModelAndArgs:
    """Local level model in a Python loop of 40 steps; D = 43."""
    y = _noise(steps).cumsum(0) * 0.3 + _noise(steps, seed=1)

    def model(y: Tensor) -> None:
        drift = pyro.sample("drift", dist.Normal(0.0, 1.0))
        q = pyro.sample("q", dist.HalfNormal(1.0))
        r = pyro.sample("r", dist.HalfNormal(1.0))
        x = torch.zeros(())
        for t in pyro.markov(range(len(y))):
            x = pyro.sample(f"x_{t}", dist.Normal(x + 0.1 * drift, q + 0.01))
            pyro.sample(f"y_{t}", dist.Normal(x, r + 0.01), obs=y[t])

    return model, (y,)


PROBLEMS: dict[str, Callable[[], ModelAndArgs]] = {
    "eight schools": eight_schools,
    "hierarchical logistic": hierarchical_logistic,
    "enumerated mixture": mixture,
    "LKJ correlations": correlated,
    "state space, 40-step loop": state_space,
}
