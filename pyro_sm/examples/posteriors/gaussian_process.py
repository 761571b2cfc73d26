# SPDX-License-Identifier: Apache-2.0
r"""Gaussian-process regression with a squared-exponential kernel, the function integrated out.

``y ~ N(0, K)``, ``K_ij = α² exp(−(x_i − x_j)²/(2ρ²)) + σ δ_ij``; ρ ~ Gamma(25, 4), α ~ N⁺(2), σ ~ N⁺(1). As in the
Stan program, σ is a variance here.
"""

from __future__ import annotations

import pyro
import pyro.distributions as dist
import torch
from torch import Tensor


def gaussian_process(x: Tensor, y: Tensor) -> None:
    """The regression of ``y`` (N,) on ``x`` (N,), with latents ``rho``, ``alpha`` and ``sigma``."""
    rho = pyro.sample("rho", dist.Gamma(y.new_tensor(25.0), y.new_tensor(4.0)))
    alpha = pyro.sample("alpha", dist.HalfNormal(y.new_tensor(2.0)))
    sigma = pyro.sample("sigma", dist.HalfNormal(y.new_tensor(1.0)))
    distance = (x[:, None] - x) / rho[..., None, None]
    kernel = (alpha**2)[..., None, None] * torch.exp(-0.5 * distance**2)
    kernel = kernel + sigma[..., None, None] * torch.eye(len(x), dtype=x.dtype, device=x.device)
    pyro.sample("y", dist.MultivariateNormal(torch.zeros_like(y), scale_tril=torch.linalg.cholesky(kernel)), obs=y)
