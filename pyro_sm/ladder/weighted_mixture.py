# SPDX-License-Identifier: Apache-2.0
r"""What an approximation by a mixture leaves: the mixture, a pool of fresh weighted draws of it, and what these say.

``z_i ~ q`` independently of how ``q`` was found, ``log w_i = log p̃(z_i) − log q(z_i)``: ``E[w] = Z`` exactly,
whatever ``q`` is. The error of ``log Ẑ`` counts what a heavy tail has above the largest weight seen.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from torch import Tensor

from pyro_sm.base import Density, Draws, Evaluations
from pyro_sm.gaussians.student_mixture import StudentMixture
from pyro_sm.search.completeness import Completeness
from pyro_sm.weights import effective_sample_size, evidence_with_tail, pareto_smooth


@dataclass(frozen=True)
class WeightedMixture:
    """A mixture with a pool of its draws.

    Args:
        mixture: float64.
        draws: ``z`` (N, D) in the density's dtype, ``log_p`` and ``log_weight`` (N,), nats, float64.
        evaluations: all that it took.
        search: how complete the search for modes was; None where none was made.
        method: what made it, in words.
    """

    mixture: StudentMixture
    draws: Draws
    evaluations: Evaluations
    search: Completeness | None
    method: str

    @property
    def log_evidence(self) -> float:
        """``log Ẑ``, nats; ``-inf`` if no draw has a weight."""
        return evidence_with_tail(self.draws.log_weight).log_evidence

    @property
    def log_evidence_se(self) -> float:
        """Its standard error with that of a heavy tail, nats."""
        return evidence_with_tail(self.draws.log_weight).log_evidence_se

    @property
    def khat(self) -> float:
        """Pareto shape of the weights; above 0.7 do not trust them."""
        return float(pareto_smooth(self.draws.log_weight).khat)

    @property
    def ess(self) -> float:
        """Effective share of the draws, in [0, 1]."""
        return effective_sample_size(self.draws.log_weight) / len(self.draws.z)


def density_at(density: Density, z: Tensor) -> Tensor:
    """``log p̃`` (N,) at ``z`` (N, D), float64, ``-inf`` where it is not finite."""
    log_p = density.log_prob(z.to(density.dtype)).double()
    return torch.where(torch.isfinite(log_p), log_p, -math.inf)


def weighted_draws(density: Density, mixture: StudentMixture, num_draws: int) -> Draws:
    """Fresh draws of the mixture with their weights; one value of the density each.

    The draw that is weighted is the one in the density's dtype, as it is handed out.
    """
    z = mixture.sample(num_draws).to(density.dtype)
    log_p = density_at(density, z)
    return Draws(z, log_p, log_p - mixture.log_prob(z.double()))
