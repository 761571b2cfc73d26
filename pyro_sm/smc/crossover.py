# SPDX-License-Identifier: Apache-2.0
r"""Crossover: pairs of particles exchange some of their latents.

Local moves leave every particle in its mode, and resampling makes copies: where there are 2^{D/2} modes, the copies
of a few thousand particles soon know a few dozen combinations, and whoever learns from them learns that there are no
others. But where latents have little to do with each other, what one particle knows of some of them, it can give to
another. For a pair ``z, z'`` and a random subset S of the latents,

    ``y = (z'_S, z_{∖S})``,   ``y' = (z_S, z'_{∖S})``,   accepted with ``min(1, p̃(y) p̃(y') / (p̃(z) p̃(z')))``,

both or none. The subset does not depend on the particles, and the exchange is its own inverse: the product of the
particles' laws stays as it is. Values only change hands, so that the shares of every single latent's modes stay those
of the particles. Subsets are of all sizes up to half of the latents, small ones as likely as large ones: the small
are accepted where latents depend on each other, the large mix faster where they do not.

Source: "Real-Parameter Evolutionary Monte Carlo with Applications to Bayesian Mixture Models"
https://doi.org/10.1198/016214501753168325 .
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from torch import Tensor

from pyro_sm.smc.moves import Chains, Evaluate, Move


@dataclass(frozen=True)
class Crossover:
    """When to exchange latents; each exchange costs one density and one gradient evaluation per particle.

    Args:
        more_than: latents; with as few as these or fewer, modes differ in most of them, and halves of two modes lie
            in none. (Ten lies in a gap of the benchmark that it was chosen on: to be replaced by whether exchanges
            are accepted.)
        least_acceptance: an exchange that is accepted less often is the last: latents depend on each other. With one
            in twenty accepted an exchange costs twenty evaluations a particle moved, more than moves that make as
            much of a difference.

    Raises:
        ValueError: ``more_than`` < 1, as a single latent is all there is of a particle, or ``least_acceptance``
            outside [0, 1].
    """

    more_than: int = 10
    least_acceptance: float = 0.05

    def __post_init__(self) -> None:
        if self.more_than < 1:
            raise ValueError(f"expected more_than >= 1, found {self.more_than}")
        if not 0 <= self.least_acceptance <= 1:
            raise ValueError(f"expected least_acceptance in [0, 1], found {self.least_acceptance}")

    def begins(self, num_particles: int, dim: int) -> bool:
        """Whether so many particles with ``dim`` latents should try."""
        return num_particles > 1 and dim > self.more_than

    def goes_on(self, acceptance: Tensor) -> bool:
        """Whether they should go on, after an exchange with this mean acceptance."""
        return bool(acceptance >= self.least_acceptance)

    def apply(self, evaluate: Evaluate, chains: Chains) -> Move:
        """One exchange of all chains, in random pairs; of an odd number one is left over.

        Args:
            evaluate: log density and score.
            chains: N of them, with finite ``log_p``.
        """
        count, dim = chains.z.shape
        device = chains.z.device
        pairs = count // 2
        first, second = torch.randperm(count, device=device)[: 2 * pairs].split(pairs)
        largest = max(dim // 2, 1)
        size = torch.exp(torch.rand(pairs, device=device) * math.log(largest + 1)).long().clamp(1, largest)
        rank = torch.rand(pairs, dim, device=device).argsort(-1)
        swapped = rank < size[:, None]
        one, other = chains.z[first], chains.z[second]
        proposed = chains.z.clone()
        proposed[first] = torch.where(swapped, other, one)
        proposed[second] = torch.where(swapped, one, other)
        log_p, score = evaluate(proposed)
        gain = torch.where(torch.isfinite(log_p), log_p - chains.log_p, -math.inf)
        log_accept = torch.full_like(gain, -math.inf)
        log_accept[first] = log_accept[second] = (gain[first] + gain[second]).clamp(max=0)
        uniform = torch.ones_like(gain)
        uniform[first] = uniform[second] = torch.rand_like(gain[first])
        accepted = uniform.log() < log_accept
        keep = accepted[:, None]
        new = Chains(
            torch.where(keep, proposed, chains.z),
            torch.where(accepted, log_p, chains.log_p),
            torch.where(keep, score, chains.score),
        )
        return Move(new, accepted, log_accept.exp())
