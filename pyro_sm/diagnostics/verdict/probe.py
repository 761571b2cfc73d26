# SPDX-License-Identifier: Apache-2.0
r"""A probe that looks elsewhere: particles that never saw the guide, and what the guide knows of them.

The weights of a guide cannot tell that a mode is missing, for no draw lies there. So M particles ``z_j`` come to the
posterior another way: a search for modes and tempered sequential Monte Carlo, from the prior, or from a widened base.
At each the guide is asked for the log weight it would have given, ``log w_j = log p̃(z_j) − log q(z_j)`` (for a
diffusion that of a path noised forward from ``z_j``, in the same mixture with the covering component as in the pool).

*Is the mass known?* Let c be three times the tenth largest weight of the pool of N draws. Of places with ``w > c``
the pool has fewer than ten draws, and the posterior mass that rests on so few is the *unknown share*

    ``u = P_p(w > c) ≈ (1/M) Σ_j 1{w_j > c}``.

It is about ``10/N`` for bounded weights, whatever the guide's shares of the modes, and the mass of a lost mode if one
is lost. (The pool's own estimate, ``Σ_i w_i 1{w_i > c} / Σ_i w_i``, sees it only if a draw of the covering component
has chanced upon it.) Below c nothing is compared: after resampling the particles' shares of the modes are noisy, and
a guide that has them wrong but knows all places is put right by its weights.

*Error.* Particles of one line of descent are counted as one: ``1/M_eff = s² + 1/M`` with ``s`` the genealogical
standard error of ``Ẑ``; then ``var(u) ≈ (u (1−u) + 1/M_eff) / M_eff``, not zero for ``u = 0``.

*Evidence.* ``log Ẑ`` of the probe against the pool's: mass that was not found is missing in the one or the other.

Sources: "Sequential Monte Carlo samplers" https://doi.org/10.1111/j.1467-9868.2006.00553.x ; "Variance estimation in
the particle filter" https://arxiv.org/abs/1509.00394 .
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass, field, replace
from typing import NamedTuple

import torch
from torch import Tensor

from pyro_sm.base import Density, Evaluations, HasPrior
from pyro_sm.smc import ModeSearch, PriorStart, TemperedSMC
from pyro_sm.smc.mixture_start import widened
from pyro_sm.smc.path import Start

_RANK = 10
"""The pool's weight of this rank is the last of which it can be said that there are some like it."""
_MARGIN = math.log(3.0)
"""Nats beyond it: particles that are not quite at rest have weights a little above those of exact draws."""


class ProbeResult(NamedTuple):
    """What the probe found, whatever the guide: for use with every guide on the same model and data.

    ``z`` (M, D) and ``log_p`` (M,), nats; ``log_evidence`` and ``log_evidence_se``, nats; ``failure``: why there are
    no particles, or empty; ``evaluations``: what it took.
    """

    z: Tensor
    log_p: Tensor
    log_evidence: float
    log_evidence_se: float
    failure: str
    evaluations: Evaluations


@dataclass(frozen=True)
class Probe:
    """Settings of the probe.

    Args:
        smc: the tempered sampler. Two thousand particles, of which a few hundred lines survive, see a
            share of 2 %.
        modes: the search that adds modes to its start, or None to go without it.
        max_dim: with more latents than these it does not begin: it would take longer than anyone waits.
        num_repeats: how often it is run again, each time with twice as many particles and moves, where it has found
            less than the guide, or its particles descend from too few lines.
    """

    smc: TemperedSMC = field(
        default_factory=lambda: TemperedSMC(
            num_particles=2048, num_moves=5, effective_share=0.6, max_temperatures=200
        )
    )
    modes: ModeSearch | None = field(default_factory=lambda: ModeSearch(num_ascents=256, max_steps=40))
    max_dim: int = 300
    num_repeats: int = 1

    @property
    def stronger(self) -> Probe:
        """With twice as many particles and twice as many moves, and one repeat less."""
        smc = replace(self.smc, num_particles=2 * self.smc.num_particles, num_moves=2 * self.smc.num_moves)
        return replace(self, smc=smc, num_repeats=self.num_repeats - 1)

    @torch.no_grad()
    def run(self, density: Density, start: Start, *, progress: Callable[[float], None] | None = None) -> ProbeResult:
        """Look for the posterior from ``start``; a failure is reported in the result, not raised.

        Draws come from torch's global generator.

        Args:
            density: the posterior; its own count of evaluations goes up.
            start: where to begin, such as :func:`start_for`.
            progress: told of every β reached, and of 0 while modes are sought; it may raise to stop.
        """
        if density.dim > self.max_dim:
            why = f"{density.dim} latents are more than the {self.max_dim} it is made for (Probe(max_dim=...))"
            return _nothing(density, why, Evaluations())
        before = replace(density.evaluations)

        def tell(beta: float) -> None:
            if progress is not None:
                progress(beta)

        try:
            if self.modes is not None:
                start = self.modes.run(density, start, progress=lambda: tell(0.0))
            found = self.smc.run(density, start, progress=lambda temperature: tell(temperature.beta))
        except (ValueError, torch.linalg.LinAlgError) as error:  # a density that is not finite, or β = 1 not reached
            return _nothing(density, str(error), density.evaluations - before)
        spent = density.evaluations - before
        return ProbeResult(found.z, found.log_p, found.log_evidence, found.log_evidence_se, "", spent)


def _nothing(density: Density, failure: str, spent: Evaluations) -> ProbeResult:
    nothing = torch.empty(0, density.dim, dtype=density.dtype, device=density.device)
    return ProbeResult(nothing, nothing[:, 0], math.nan, math.inf, failure, spent)


def start_for(density: Density, base: Callable[[], tuple[Tensor, Tensor]]) -> Start:
    """The prior, or, if it cannot be drawn from and evaluated, the :func:`widened` ``base()``."""
    if isinstance(density, HasPrior) and density.has_prior:
        return PriorStart(density)
    return widened(*base())


def effective_particles(probed: ProbeResult) -> float:
    """``M_eff``, the particles counted by lines of descent."""
    return 1 / min(probed.log_evidence_se**2 + 1 / max(len(probed.z), 1), 1.0)


class Unknown(NamedTuple):
    """The share of the posterior mass that rests on next to no draws of the guide, and its standard error."""

    share: float
    se: float


def unknown_share(pool: Tensor, probed: ProbeResult, log_weight: Tensor) -> Unknown:
    """The unknown share, as at the head of this file.

    Args:
        pool: log weights (N,) of the guide's draws, nats, at least ten.
        probed: the particles.
        log_weight: (M,) the log weights that the guide gives them.
    """
    cut = torch.topk(pool.double(), min(_RANK, len(pool))).values[-1] + _MARGIN
    # A guide that is zero where the posterior is not gives +inf, or NaN after its own arithmetic.
    share = float((torch.nan_to_num(log_weight.double(), nan=math.inf) > cut).double().mean())
    m = effective_particles(probed)
    return Unknown(share, math.sqrt((share * (1 - share) + 1 / m) / m))
