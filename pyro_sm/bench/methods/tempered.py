# SPDX-License-Identifier: Apache-2.0
"""Tempered SMC on a target, from its covering Gaussian."""

from __future__ import annotations

from dataclasses import dataclass

import torch

from pyro_sm.bench.methods import start
from pyro_sm.bench.methods.fit import Budget, Fit, Meter, begin
from pyro_sm.gaussians.gaussian import GaussianDensity
from pyro_sm.model.density import ModelDensity
from pyro_sm.smc import Crossover, HamiltonianMove
from pyro_sm.smc.tempered import TemperedParticles, TemperedSMC
from pyro_sm.targets import Target
from pyro_sm.weights import Evidence

_PILOT_EVALUATIONS = 500  # of a pilot's particle with one leapfrog step: 50 temperatures with 10 moves each
_FEWEST_PARTICLES = 32  # of a pilot: with fewer the temperatures are chosen by noise


@dataclass(frozen=True)
class Tempered:
    """:class:`~pyro_sm.smc.tempered.TemperedSMC` from the start, with crossover; longer moves for clusters.

    A pilot with few particles finds the number of temperatures; the run then has as many particles as the rest of the
    budget pays for. If it pays for no more than the pilot had, the pilot is the result: what was spent is counted.

    Args:
        name: of the method.
        pilot_share: of the budget, if there were 50 temperatures with 10 moves.
    """

    name: str = "smc"
    pilot_share: float = 0.1

    def fit(self, target: Target, seed: int, budget: Budget) -> Fit:
        """Pilot and run. The particles are the samples: there are no more to be had without another run."""
        begin(seed)
        meter = Meter()
        density = ModelDensity(start.model(target), ())
        covering = GaussianDensity(target.start.loc, torch.diag(target.start.scale))
        move = HamiltonianMove(start.LEAPFROG if start.are_many_particles(target) else 1)
        per_pilot = _PILOT_EVALUATIONS * move.num_leapfrog
        num_pilot = max(int(self.pilot_share * budget.evaluations / per_pilot), _FEWEST_PARTICLES)
        pilot = TemperedSMC(num_pilot, move=move, crossover=Crossover())
        found: TemperedParticles = pilot.run(density, covering)
        spent = density.evaluations.values
        # Between room for one temperature more and none: a schedule that adapts has not always the same length.
        per_particle = spent / pilot.num_particles * (1 + 0.5 / len(found.history))
        num_particles = int((budget.evaluations - spent) / per_particle)
        if num_particles > pilot.num_particles:
            found = TemperedSMC(num_particles, move=move, crossover=Crossover()).run(density, covering)
        training = meter.look(density.evaluations)
        return Fit(
            {"x": found.z},
            training,
            meter.look(density.evaluations),
            evidence=Evidence(found.log_evidence, found.log_evidence_se),
            note=f"{found.z.shape[0]} particles, {len(found.history)} temperatures",
        )
