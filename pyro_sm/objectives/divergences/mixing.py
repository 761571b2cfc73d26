# SPDX-License-Identifier: Apache-2.0
r"""Mixing densities of the mixture Fisher divergence: normal laws that cover wherever the posterior may have modes.

``m = N(loc, L Lᵀ)`` in unconstrained space. What it does not cover the divergence does not see: the responsibility of
the target at a latent is ``βp / (βp + (1−β)m)``, and no latent is drawn where both the guide and m have nothing.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import NamedTuple, Protocol

import torch
from torch import Tensor

from pyro_sm.gaussians.gaussian import gaussian_log_prob, given_gaussian
from pyro_sm.model.density import ModelDensity


class MixingDensity(NamedTuple):
    """``m = N(loc, L Lᵀ)``. ``loc``: (D,); ``scale_tril``: (D, D) lower triangular."""

    loc: Tensor
    scale_tril: Tensor

    def log_prob(self, z: Tensor) -> Tensor:
        """``log m`` (N,) of latents (N, D), nats."""
        return gaussian_log_prob(z, self.loc, self.scale_tril)

    def draw(self, noise: Tensor) -> Tensor:
        """``loc + L u`` (N, D) for standard normal ``noise`` (N, D)."""
        return self.loc + noise @ self.scale_tril.T


class Mixing(Protocol):
    """How the mixing density is found; once for every model and data."""

    def fit(self, density: ModelDensity) -> MixingDensity:
        """The mixing density for this model."""
        ...


@dataclass(frozen=True)
class PriorMixing:
    """A Gaussian with the mean and covariance of prior draws, which covers whatever the prior covers.

    Draws further from the median than ten robust standard deviations are drawn in to there first: a Cauchy prior has
    no moments of its own.

    Args:
        inflate: factor on its standard deviations.
        num_draws: prior draws; one in each direction at least.

    Raises:
        ValueError: on :meth:`fit`, if the prior is improper and says nothing about where the posterior is.
    """

    inflate: float = 1.0
    num_draws: int = 2048

    def fit(self, density: ModelDensity) -> MixingDensity:
        """Moments of prior draws, in unconstrained space."""
        if density.improper:
            raise ValueError(
                f"the prior of {', '.join(density.improper)} is improper, so there is no mixing density to be had "
                "from it: pass mixing=GivenMixing(loc, scale) that covers every mode"
            )
        z = density.prior_draws(self.num_draws).double()
        z = z[torch.isfinite(z).all(1)]
        low, middle, high = torch.quantile(z, torch.tensor([0.25, 0.5, 0.75]).to(z), dim=0)
        # 1.349 is the distance of the quartiles of N(0, 1). Beyond ten standard deviations a normal law has 1e-23.
        reach = 10 * (high - low) / 1.349
        z = torch.minimum(torch.maximum(z, middle - reach), middle + reach)
        covariance = torch.atleast_2d(torch.cov(z.T))
        # Latents that are one another's multiples leave the covariance singular, in float64 to 1e-16 of its entries.
        jitter = 1e-6 * covariance.diagonal().mean() * torch.eye(density.dim, dtype=z.dtype, device=z.device)
        tril = torch.linalg.cholesky(covariance + jitter) * self.inflate
        return MixingDensity(z.mean(0).to(density.dtype), tril.to(density.dtype))


@dataclass(frozen=True)
class GivenMixing:
    """A Gaussian chosen by the user, in unconstrained space.

    Args:
        loc: (D,) or a number for all latents.
        scale: a number, (D,) standard deviations, or (D, D) lower-triangular.

    Raises:
        ValueError: on :meth:`fit`, if a shape does not match the model or the diagonal is not positive.
    """

    loc: Tensor | float
    scale: Tensor | float

    def fit(self, density: ModelDensity) -> MixingDensity:
        """Check the shapes against the model."""
        return MixingDensity(*given_gaussian(self.loc, self.scale, density))
