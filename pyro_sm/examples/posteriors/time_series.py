# SPDX-License-Identifier: Apache-2.0
r"""Two time series: an autoregression with K lags, and a GARCH(1,1).

    AR(K):       ``y_t ~ N(α + Σ_{k≤K} β_k y_{t−k}, σ)`` for t > K;  α, β_k ~ N(0, 10), σ ~ C⁺(2.5).
    GARCH(1,1):  ``y_t ~ N(μ, σ_t)``, ``σ_t² = α₀ + α₁(y_{t−1} − μ)² + β₁σ_{t−1}²``, σ₁ given; flat priors on μ,
                 α₀ > 0 and the triangle ``α₁ > 0, β₁ > 0, α₁ + β₁ < 1``.

The support of β₁ depends on α₁, which neither a fixed bijection nor ``ModelDensity`` takes. So the second latent is
the share ``s = β₁ / (1 − α₁)``, uniform on (0, 1), β₁ is a deterministic site, and the factor ``1 − α₁ = ∂β₁/∂s``
makes the prior flat in (α₁, β₁).
"""

from __future__ import annotations

import pyro
import pyro.distributions as dist
import torch
from torch import Tensor
from torch.distributions import constraints

from pyro_sm.examples.posteriors.flat import flat_scalar

LAGS = 5


def autoregression(y: Tensor) -> None:
    """AR(5) on ``y`` (T,), conditional on its first five values."""
    ten = y.new_tensor(10.0)
    alpha = pyro.sample("alpha", dist.Normal(0 * ten, ten))
    beta = pyro.sample("beta", dist.Normal(0 * ten, ten).expand([LAGS]).to_event(1))
    sigma = pyro.sample("sigma", dist.HalfCauchy(y.new_tensor(2.5)))
    past = y.unfold(0, LAGS, 1)[:-1].flip(1)
    with pyro.plate("time", y.shape[0] - LAGS):
        pyro.sample("y", dist.Normal(alpha + (past * beta).sum(-1), sigma), obs=y[LAGS:])


def discounted_sums(x: Tensor, discount: Tensor) -> Tensor:
    """``s_t = Σ_{j≤t} b^{t−j} x_j`` along the last dimension of ``x`` (..., T), for ``discount`` b (..., 1) or ().

    In ``⌈log₂ T⌉`` vectorised steps rather than T: after a step of width w, the sums reach back 2w terms.
    """
    length, width = x.shape[-1], 1
    while width < length:
        shifted = torch.nn.functional.pad(x, (width, 0))[..., :length]
        x = x + discount**width * shifted
        width *= 2
    return x


def garch(y: Tensor, first_scale: Tensor) -> None:
    """GARCH(1,1) on ``y`` (T,), with ``σ₁`` (), see the head of this file."""
    zero, one = y.new_zeros(()), y.new_ones(())
    mu = flat_scalar("mu")
    alpha0 = flat_scalar("alpha0", constraints.positive)
    alpha1 = pyro.sample("alpha1", dist.Uniform(zero, one))
    share = pyro.sample("beta1_share", dist.Uniform(zero, one))
    beta1 = pyro.deterministic("beta1", share * (1 - alpha1))
    pyro.factor("flat_in_beta1", torch.log1p(-alpha1))
    shock = alpha0 + alpha1 * (y[:-1] - mu) ** 2
    first = (first_scale**2).expand(*shock.shape[:-1], 1)
    variance = discounted_sums(torch.cat([first, shock], -1), beta1)
    with pyro.plate("time", y.shape[0]):
        pyro.sample("y", dist.Normal(mu, variance.sqrt()), obs=y)
