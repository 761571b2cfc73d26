# SPDX-License-Identifier: Apache-2.0
r"""Reverse kernels with heavy tails, for targets whose narrow or far parts the sampler does not reach by itself.

A Gaussian kernel fitted to what has been found hardly ever goes beyond it. Here a share ``ρ`` of all paths has one of
its ``(K+1) D`` standard noises, chosen at random, ``s`` times as large. On path space that is the mixture

    ``B' = (1−ρ) B + ρ/((K+1) D) Σ_{k,d} B_{kd}``,   ``B_{kd}/B = exp(½ e²_{kd} (1 − s⁻²))/s``,

``e_{kd}`` the noises of the path: all the terms come from one run of the network, whichever of them made the path,
so that ``log B' − log B`` costs next to nothing, and the weights stay exact. It is never less than ``log(1−ρ)``: no
weight is more than ``1/(1−ρ)`` times what it was. One push in one direction, at a level where that direction is
decided, moves a path out of what is known; the levels below make the rest of it fit, as well as the network can tell.

Source: "Safe and Effective Importance Sampling" https://doi.org/10.2307/2669533 (defensive mixtures).
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from torch import Tensor


@dataclass(frozen=True)
class HeavyTails:
    """See the head of the file.

    Args:
        share: ρ in (0, 1); with .2, the other paths lose a factor of .8 in density, log 1.25 = .22 nats of a weight.
        scale: s > 1; noise three times as wide reaches what a kernel of a third of the right width misses.

    Raises:
        ValueError: an argument out of its range.
    """

    share: float = 0.2
    scale: float = 3.0

    def __post_init__(self) -> None:
        if not 0 < self.share < 1:
            raise ValueError(f"expected a share in (0, 1), found {self.share}")
        if not 1 < self.scale < math.inf:
            raise ValueError(f"expected a finite scale above 1, found {self.scale}")

    def inflated(self, noise: Tensor) -> Tensor:
        """Standard noise (K+1, N, D), one number of each chosen path scaled; chosen with probability ρ."""
        levels, count, dim = noise.shape
        chosen = (torch.rand(count, device=noise.device) < self.share).nonzero()[:, 0]
        level = torch.randint(levels, chosen.shape, device=noise.device)
        latent = torch.randint(dim, chosen.shape, device=noise.device)
        inflated = noise.clone()
        inflated[level, chosen, latent] *= self.scale
        return inflated

    def log_sum(self, square: Tensor) -> Tensor:
        """``log Σ_d exp(½ e²_d (1 − s⁻²))/s`` (N,) of the squared noises (N, D) of one level."""
        return torch.logsumexp(0.5 * (1 - self.scale**-2) * square, -1) - math.log(self.scale)

    def log_factor(self, log_sums: Tensor, dim: int) -> Tensor:
        """``log B' − log B`` (N,) of the sums (K+1, N) over all levels, of D latents each."""
        inflated = torch.logsumexp(log_sums, 0) - math.log(log_sums.shape[0] * dim)
        return torch.logaddexp(math.log(self.share) + inflated, torch.full_like(inflated, math.log1p(-self.share)))
