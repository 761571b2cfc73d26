# SPDX-License-Identifier: Apache-2.0
r"""A probe that looks elsewhere: particles that never saw the guide.

The weights of a guide cannot tell that a mode is missing, for no draw lies there. So M particles ``z_j`` come to the
posterior another way: a search for modes and tempered sequential Monte Carlo, from the prior, or from a widened base.
What they say of a guide is in ``probe_findings.py``: here nothing is known of one, so that the particles serve every
guide on the same model and data.

Source: "Sequential Monte Carlo samplers" https://doi.org/10.1111/j.1467-9868.2006.00553.x .
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


def _probing() -> TemperedSMC:
    """The tempered sampler of a probe: what it takes to tell a share of 2 % from zero.

    Of two thousand particles a few hundred lines survive. With M_eff = 300 a share of 2 % is 2.3 of its errors from
    zero, with 700 it is 3.7 (see ``probe_findings.py``). An effective share of .6, not .5, makes smaller steps of
    temperature, which cost evaluations and spare lines; five moves each let repeated particles part. Two hundred
    temperatures end a run that gets nowhere, after two million moves.
    """
    return TemperedSMC(num_particles=2048, num_moves=5, effective_share=0.6, max_temperatures=200)


def _searching() -> ModeSearch:
    """The search of a probe: of 256 ascents none begins in a basin with 1.2 % of the starts once in twenty times.

    Forty steps at the most, so that it costs ten thousand gradients, as many as the first temperature's moves.
    """
    return ModeSearch(num_ascents=256, max_steps=40)


@dataclass(frozen=True)
class Probe:
    """Settings of the probe.

    Args:
        smc: the tempered sampler.
        modes: the search that adds modes to its start, or None to go without it.
        max_dim: with more latents than these it does not begin.
        num_repeats: how often it is run again, each time with twice as many particles and moves, where it has found
            less than the guide, or its particles descend from too few lines.
    """

    smc: TemperedSMC = field(default_factory=_probing)
    modes: ModeSearch | None = field(default_factory=_searching)

    # It would take longer than anyone waits, and hardly find more: temperatures go with √D, each of them costs more
    # in a larger model, and the search for modes stops at two hundred latents already.
    max_dim: int = 300

    # A second run has four times the price of the first, a third would have sixteen times.
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
