# SPDX-License-Identifier: Apache-2.0
r"""Linear regressions ``y_n ~ N(x_n·β, σ)`` under four priors.

Argument ``x``: (N, K) design; ``y``: (N,). The sites ``beta`` (K,) and ``sigma`` have the names of the posterior
database; a line of the straight one is ``alpha + beta x``. Every line broadcasts over a plate on the left.

Source: "Data Analysis Using Regression and Multilevel/Hierarchical Models" https://doi.org/10.1017/CBO9780511790942
(kidiq, earnings, mesquite).
"""

from __future__ import annotations

import pyro
import pyro.distributions as dist
import torch
from torch import Tensor
from torch.distributions import constraints

from pyro_sm.examples.posteriors.flat import flat_scalar, flat_vector


def _observe(mean: Tensor, sigma: Tensor, y: Tensor) -> None:
    with pyro.plate("data", y.shape[0]):
        pyro.sample("y", dist.Normal(mean, sigma), obs=y)


def flat_regression(x: Tensor, y: Tensor) -> None:
    """β flat on R^K, σ flat on the positive axis."""
    beta = flat_vector("beta", x.shape[1])
    sigma = flat_scalar("sigma", constraints.positive)
    _observe((x * beta).sum(-1), sigma, y)


def half_cauchy_regression(x: Tensor, y: Tensor) -> None:
    """β flat on R^K, ``σ ~ C⁺(2.5)``."""
    beta = flat_vector("beta", x.shape[1])
    sigma = pyro.sample("sigma", dist.HalfCauchy(y.new_tensor(2.5)))
    _observe((x * beta).sum(-1), sigma, y)


def normal_regression(x: Tensor, y: Tensor) -> None:
    """``β_k ~ N(0, 10)``, ``σ ~ N⁺(10)``."""
    ten = y.new_tensor(10.0)
    beta = pyro.sample("beta", dist.Normal(0 * ten, ten).expand([x.shape[1]]).to_event(1))
    sigma = pyro.sample("sigma", dist.HalfNormal(ten))
    _observe((x * beta).sum(-1), sigma, y)


def straight_line(x: Tensor, y: Tensor, prior_loc: Tensor, prior_scale: Tensor) -> None:
    """``y ~ N(α + β x, σ)`` with ``α ~ N(l₁, s₁)``, ``β ~ N(l₂, s₂)``, σ flat on the positive axis.

    ``x`` (N,) is used as it is: uncentred, it makes α and β all but collinear. ``prior_loc``, ``prior_scale``: (2,).
    """
    alpha = pyro.sample("alpha", dist.Normal(prior_loc[0], prior_scale[0]))
    beta = pyro.sample("beta", dist.Normal(prior_loc[1], prior_scale[1]))
    sigma = flat_scalar("sigma", constraints.positive)
    _observe(alpha + beta * x, sigma, y)


def with_intercept(*columns: Tensor) -> Tensor:
    """The design (N, 1 + K) of a column of ones and the given columns (N,)."""
    return torch.stack([torch.ones_like(columns[0]), *columns], 1)
