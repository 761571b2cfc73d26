# SPDX-License-Identifier: Apache-2.0
r"""A covering component beside the sampler's own paths: draws whose weights cannot hide what the sampler has lost.

N draws mix a share ``1 − ρ`` of the sampler's paths with a share ``ρ`` from a *covering* component ``b`` (the model's
prior, or the base, scaled), noised forward along the same kernels. On path space this is one proposal,
``(1−ρ) N_T Π B + ρ b(x_0) Π F``, and every draw gets the balance-heuristic weight

    ``w = p̃(z) / [(1−ρ) exp(−R) + ρ b(z)]``,   ``E[w] = Z``,   ``w ≤ p̃(z)/(ρ b(z))``,

so that no point the covering component can reach has an unbounded weight, and a mode or a tail that the sampler has
lost shows up in the weights (it can be seen, and taught).

Source: "Importance Weighted Score Matching for Diffusion Samplers" https://arxiv.org/abs/2505.19431 (the covering
component); "Safe and Effective Importance Sampling" https://doi.org/10.2307/2669533 (defensive mixtures).
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Protocol

import torch
from torch import Tensor

from pyro_sm.base import Density, DiffusionProcess, Draws, HasPrior


class Covering(Protocol):
    """A component ``b`` that looks elsewhere, and its share of the draws."""

    @property
    def share(self) -> float:
        """ρ in [0, 1)."""
        ...

    def draw(self, process: DiffusionProcess, density: Density, num_draws: int) -> tuple[Tensor, Tensor]:
        """Latents (N, D) from ``b``, and ``log b`` (N,) of them in nats."""
        ...

    def log_prob(self, process: DiffusionProcess, density: Density, z: Tensor) -> Tensor:
        """``log b(z)`` (B,) in nats, normalised, for latents ``z`` (B, D)."""
        ...


def _check_share(share: float) -> None:
    if not 0 <= share < 1:
        raise ValueError(f"expected a share in [0, 1), found {share}")


@dataclass(frozen=True)
class PriorCovering:
    """``b`` = the model's own prior: then ``w ≤ p(data | z)/ρ``, bounded wherever the likelihood is.

    The prior has the geometry of the model (the neck of a hierarchical funnel, the tails of a scale), which no
    Gaussian has; its draws cost one density evaluation each, like all others.

    Args:
        share: ρ in [0, 1): a tenth of the draws buys weights of at most ten times the likelihood, for log(1/.9) = .1
            nats where the guide is right.

    Raises:
        ValueError: a share outside [0, 1).
        TypeError: at the first draw, if the density has no prior that can be drawn from and evaluated.
    """

    share: float = 0.1

    def __post_init__(self) -> None:
        _check_share(self.share)

    def _prior(self, density: Density) -> HasPrior:
        if not isinstance(density, HasPrior) or not density.has_prior:
            raise TypeError(
                "PriorCovering needs a model whose prior can be drawn from and evaluated (none improper, none that "
                "depends on a discrete latent): use WideCovering()"
            )
        return density

    def draw(self, process: DiffusionProcess, density: Density, num_draws: int) -> tuple[Tensor, Tensor]:
        """Prior draws, and their prior log density."""
        z = self._prior(density).prior_draws(num_draws)
        return z, self.log_prob(process, density, z)

    def log_prob(self, process: DiffusionProcess, density: Density, z: Tensor) -> Tensor:
        """Log density (B,) of the prior in nats at ``z`` (B, D), normalised; the process does not matter."""
        return self._prior(density).log_prior(z)


@dataclass(frozen=True)
class WideCovering:
    """``b = N(m, (scale·L)(scale·L)ᵀ)`` around the guide's base, bent as it is, and its share ρ of the draws.

    Args:
        share: ρ in [0, 1): a tenth, as of the prior's.
        scale: width in units of the base. A target with tails of sd σ bases has bounded weights for σ < scale; half
            as wide again costs a factor of 1.5^D in the density of draws amid the base.

    Raises:
        ValueError: a share outside [0, 1) or a scale that is not positive.
    """

    share: float = 0.1
    scale: float = 1.5

    def __post_init__(self) -> None:
        _check_share(self.share)
        if not self.scale > 0:
            raise ValueError(f"expected a positive scale, found {self.scale}")

    def log_prob_white(self, u: Tensor, extra_variance: Tensor | float = 0.0) -> Tensor:
        """``log N(u; 0, scale² + extra_variance)`` (B,) in whitened space; ``extra_variance``: () or (B,)."""
        variance = torch.as_tensor(self.scale**2 + extra_variance, dtype=u.dtype, device=u.device)
        return -0.5 * (u.square().sum(-1) / variance + u.shape[-1] * torch.log(2 * math.pi * variance))

    def draw(self, process: DiffusionProcess, density: Density, num_draws: int) -> tuple[Tensor, Tensor]:
        """Draws of the widened base, and their log density there.

        Of the point itself: a coupling can bend it to where its way back is lost in rounding, and a density that is
        far too small would make its weight the largest of all.
        """
        like = process.ratios
        u = self.scale * torch.randn(num_draws, process.dim, dtype=like.dtype, device=like.device)
        return process.to_latent(u), self.log_prob_white(u) - process.log_det(u)

    def log_prob(self, process: DiffusionProcess, density: Density, z: Tensor) -> Tensor:
        """Log density of the widened base."""
        u = process.to_white(z)
        return self.log_prob_white(u) - process.log_det(u)


def default_covering(density: Density) -> Covering:
    """The prior where the model has one, else the widened base; a tenth of the draws."""
    return PriorCovering() if isinstance(density, HasPrior) and density.has_prior else WideCovering()


def mixture_log_weight(log_p: Tensor, log_ratio: Tensor, log_covering: Tensor, share: float) -> Tensor:
    """``log w`` (N,) of the balance heuristic; ``log_ratio`` is ``R``, ``log_wide`` is ``log b(z)``, in nats."""
    if share == 0:
        return log_p + log_ratio
    return log_p - torch.logaddexp(math.log1p(-share) - log_ratio, math.log(share) + log_covering)


def _finite(process: DiffusionProcess, z: Tensor, log_ratio: Tensor) -> tuple[Tensor, Tensor]:
    """Paths that overflowed, as those of a network in its first steps may, put to the base with ``log R = −∞``.

    They end where a normalisable density is zero: so is their weight.
    """
    lost = ~torch.isfinite(z).all(-1) | torch.isnan(log_ratio)
    if not bool(lost.any()):
        return z, log_ratio
    middle = process.to_latent(torch.zeros_like(z[:1]))
    return torch.where(lost[:, None], middle, z), torch.where(lost, -math.inf, log_ratio)


def draw_with_covering(
    process: DiffusionProcess, density: Density, covering: Covering, num_draws: int, *, with_score: bool = False
) -> tuple[Draws, int]:
    """Draw the mixture, at the cost of ``num_draws`` density evaluations, and as many gradients ``with_score``.

    Returns:
        The draws, the sampler's own first, and how many of them are the sampler's own.
    """
    num_covering = min(round(covering.share * num_draws), num_draws - 1)
    z, log_ratio = _finite(process, *process.draw(num_draws - num_covering))
    own = z
    if num_covering:
        outer, log_outer = covering.draw(process, density, num_covering)
        z = torch.cat([own, outer])
        log_ratio = torch.cat([log_ratio, process.path_log_ratio(outer)])
    log_p, score = density.log_prob_and_score(z) if with_score else (density.log_prob(z), None)
    if not num_covering:  # a share that rounds to no draws must not enter the weights
        return Draws(z, log_p, log_p + log_ratio, score), num_draws
    log_covering = torch.cat([covering.log_prob(process, density, own), log_outer])
    log_weight = mixture_log_weight(log_p, log_ratio, log_covering, num_covering / num_draws)
    return Draws(z, log_p, log_weight, score), num_draws - num_covering


@torch.no_grad()
def process_log_weight(
    process: DiffusionProcess, density: Density, covering: Covering | None, z: Tensor, log_p: Tensor
) -> Tensor:
    """``log w`` (M,) that a diffusion with this component gives to latents ``z`` (M, D) with ``log_p`` (M,)."""
    log_ratio = process.path_log_ratio(z)
    if covering is None or covering.share == 0:
        return log_p + log_ratio
    return mixture_log_weight(log_p, log_ratio, covering.log_prob(process, density, z), covering.share)
