# SPDX-License-Identifier: Apache-2.0
r"""Adaptive importance sampling with mixtures of t laws, for what has no good normal law at its modes.

Round r draws n points from ``q_r``. All points so far come from the *deterministic mixture* of all proposals,
whichever each of them came from,

    ``log w_i = log p̃(z_i) − log (1/r) Σ_s q_s(z_i)``,

so that a point in the tail of its own proposal, and in the middle of another, has no large weight. ``q_{r+1}`` is the
mixture that weighted EM fits to all of them, with weights damped to ``w^γ`` so that a tenth of them count (and five
for each latent): while the proposals are poor the fit is to something between them and the posterior. A tenth of
every fit is one t law with the moments of all of them, so that what lies between and around the components is drawn,
too, before its weight is large (a *defensive* mixture). It ends when half of a round's own draws count and their k̂ is
below .5, and a fresh pool from the same proposal bears that out; else with a pool from the best proposal. The weights
of a pool do not know how its proposal was found.

Sources: "Adaptive multiple importance sampling" https://arxiv.org/abs/0907.1254 ; "Adaptive importance sampling in
general mixture classes" https://arxiv.org/abs/0710.4242 ; "Safe and effective importance sampling"
https://doi.org/10.1080/01621459.2000.10473909 .
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from pyro_sm.base import Density, Draws, Evaluations
from pyro_sm.gaussians.student_mixture import StudentMixture, fitted, moment_law
from pyro_sm.ladder.weighted_mixture import WeightedMixture, weighted_draws
from pyro_sm.search.starts import SearchStart
from pyro_sm.weights import damping, effective_sample_size, pareto_smooth

_LEFT = 0.1  # of the draws, by the damped weights that are fitted to
_LEFT_PER_LATENT = 5  # effective draws: fewer have no covariance
_KHAT = 0.5  # above it the weights have no variance, and the share that counts is luck
_GOAL = (True, 0.5)  # half of a round's draws count: another round would hardly be better
_TRUSTED = 0.7  # k̂ of the pool, above which its averages are not to be trusted, and the rounds go on
_DEFENCE = 0.1  # share of the wide law: no weight within its reach is above ten times p/q of that law alone
_NOTHING = 0.02  # of the draws count: what was found is no place to begin
_FEWEST, _MOST = 4, 12  # components: four bend round a corner, and twelve have 150 draws each


def deterministic_mixture_log_prob(
    proposals: Sequence[StudentMixture], z: Tensor, log_before: Tensor | None = None, num_before: int = 0
) -> Tensor:
    """``log (1/r) Σ_s q_s(z)`` (N,) at ``z`` (N, D), nats: of proposals with equally many draws.

    ``log_before`` (N,): the same at ``z`` for the ``num_before`` proposals before these.
    """
    parts = [q.log_prob(z) for q in proposals]
    if log_before is not None and num_before:
        parts.append(log_before + math.log(num_before))
    return torch.logsumexp(torch.stack(parts), 0) - math.log(len(proposals) + num_before)


def damped(log_weight: Tensor, dim: int) -> Tensor:
    """``γ log w`` (N,): a tenth of the draws counts, and at least five for each of the ``dim`` latents."""
    finite = int(torch.isfinite(log_weight).sum())
    share = min(max(_LEFT, _LEFT_PER_LATENT * dim / max(finite, 1)), 0.9)
    return damping(log_weight, share) * log_weight


def defended_fit(z: Tensor, log_weight: Tensor, num_components: int) -> StudentMixture:
    """The mixture fitted to draws (N, D) with log weights (N,), nine tenths, and one law with their moments."""
    return joined(fitted(z, log_weight, num_components), moment_law(z, log_weight), _DEFENCE)


def components_for(num_modes: int) -> int:
    """Of a fit to a posterior with so many modes: two more, four to twelve."""
    return max(_FEWEST, min(num_modes + 2, _MOST))


def joined(mixture: StudentMixture, other: StudentMixture, share: float) -> StudentMixture:
    """``(1 − share)`` of the one and ``share``, in (0, 1), of the other."""
    log_weight = torch.cat([mixture.log_weight + math.log1p(-share), other.log_weight + math.log(share)])
    loc, tril = torch.cat([mixture.loc, other.loc]), torch.cat([mixture.scale_tril, other.scale_tril])
    return StudentMixture(log_weight, loc, tril)


def as_wide_as(start: SearchStart) -> StudentMixture:
    """One t law with the centre and the widths of a start."""
    tril = torch.diag(start.scale.double())
    return StudentMixture(tril.new_zeros(1), start.loc.double()[None], tril[None])


def first_proposal(found: WeightedMixture, start: SearchStart) -> StudentMixture:
    """Where adaptation begins after :class:`~pyro_sm.ladder.mode_mixture.ModeMixture`.

    A fit to the draws there are. Where none of them counts, half of what was found, whose places may be right and
    whose widths are not, and half a t law as wide as the start.
    """
    if found.ess < _NOTHING:
        return joined(found.mixture, as_wide_as(start), 0.5)
    z, log_weight = found.draws.z.double(), found.draws.log_weight
    return defended_fit(z, damped(log_weight, z.shape[1]), components_for(found.mixture.num_components))


@dataclass(frozen=True)
class AdaptiveImportanceSampling:
    """Settings of the method at the head of this file; :meth:`run` it on a density and a first proposal.

    Args:
        num_components: of each mixture; as many as the first proposal has, but four to twelve, if None.
        max_rounds: eight are enough where it comes to anything.
        round_size: draws a round, n.
        num_draws: of the pool.

    Raises:
        ValueError: a count below one, or a pool of fewer than two draws.
    """

    num_components: int | None = None
    max_rounds: int = 8
    round_size: int = 2000
    num_draws: int = 4000

    def __post_init__(self) -> None:
        for name, least in (("num_components", 1), ("max_rounds", 1), ("round_size", 1), ("num_draws", 2)):
            value = getattr(self, name)
            if value is not None and value < least:
                raise ValueError(f"expected {name} >= {least}, found {value}")

    @torch.no_grad()
    def run(self, density: Density, proposal: StudentMixture) -> WeightedMixture:
        """The best proposal with a fresh pool; random numbers come from torch's global generator."""
        before = replace(density.evaluations)
        count = self.num_components or max(_FEWEST, min(proposal.num_components, _MOST))
        proposals: list[StudentMixture] = []
        z, log_p, log_q = proposal.loc[:0], proposal.log_weight[:0], proposal.log_weight[:0]
        best, best_rank = proposal, (False, -1.0)
        for last in [False] * (self.max_rounds - 1) + [True]:
            drawn = weighted_draws(density, proposal, self.round_size)
            log_q = deterministic_mixture_log_prob([proposal], z, log_q, len(proposals))
            proposals.append(proposal)
            log_q = torch.cat([log_q, deterministic_mixture_log_prob(proposals, drawn.z.double())])
            z, log_p = torch.cat([z, drawn.z.double()]), torch.cat([log_p, drawn.log_p])
            rank = _rank(drawn)
            if rank > best_rank:
                best, best_rank = proposal, rank
            if rank > _GOAL:
                pool = weighted_draws(density, proposal, self.num_draws)
                if pareto_smooth(pool.log_weight).khat < _TRUSTED:
                    return self._result(density, before, proposal, pool, len(proposals))
                best, best_rank = proposal, _rank(pool)  # the round was luck
            if last or not bool(torch.isfinite(log_p).any()):
                break
            proposal = defended_fit(z, damped(log_p - log_q, density.dim), count)
        pool = weighted_draws(density, best, self.num_draws)
        return self._result(density, before, best, pool, len(proposals))

    def _result(
        self, density: Density, before: Evaluations, mixture: StudentMixture, pool: Draws, rounds: int
    ) -> WeightedMixture:
        method = f"adaptive importance sampling, {rounds} round{'s' * (rounds > 1)}"
        return WeightedMixture(mixture, pool, density.evaluations - before, None, method)


def _rank(draws: Draws) -> tuple[bool, float]:
    """Of a proposal by its own draws: whether their k̂ allows their effective share to be believed, and the share."""
    reliable = pareto_smooth(draws.log_weight).khat < _KHAT
    return reliable, effective_sample_size(draws.log_weight) / len(draws.z)
