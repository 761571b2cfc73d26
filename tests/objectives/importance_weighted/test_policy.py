# SPDX-License-Identifier: Apache-2.0
"""Policies of the objective with a population: which rounds join the training data, and how many are kept."""

import math

import pyro
import pyro.distributions as dist
import pytest
from pyro.infer import SVI
from pyro.optim import Adam

from pyro_sm import AutoDiffusion, ImportanceWeightedScoreMatching, Population
from pyro_sm.nn.mlp import MLP
from pyro_sm.objectives.importance_weighted import buffer
from pyro_sm.smc.tempered import TemperedSMC


def model():
    x = pyro.sample("x", dist.Normal(0.0, 1.0))
    pyro.sample("y", dist.Normal(x, 0.5), obs=x.new_tensor(0.7))


def trained(rounds, **options):
    """An objective after so many rounds, each of one step, with a population from the start."""
    population = Population(num_particles=32, seeding=TemperedSMC(32, num_moves=1), modes=None, min_khat=-math.inf)
    objective = ImportanceWeightedScoreMatching(32, batch_size=8, steps_per_round=1, population=population, **options)
    guide = AutoDiffusion(model, num_steps=2, architecture=MLP(width=8, depth=1))
    svi = SVI(model, guide, Adam({"lr": 1e-3}), objective)
    for _ in range(rounds):
        svi.step()
    return objective


@pytest.mark.parametrize(("gamma", "joins"), [(0.6, False), (0.69, False), (0.71, True), (0.8, True), (1.0, True)])
def test_rounds_that_were_damped_below_seven_tenths_do_not_teach(monkeypatch, gamma, joins):
    monkeypatch.setattr(buffer, "damping", lambda log_w, share: gamma)
    own, particles = trained(1).state.buffer.rounds
    assert own.gamma == gamma
    assert float(own.weight.sum()) == pytest.approx(1.0 if joins else 0.0)
    assert float(particles.weight.sum()) == pytest.approx(1.0)


@pytest.mark.parametrize("buffer_rounds", [1, 3])
def test_a_population_is_kept_for_as_many_rounds_as_the_draws(buffer_rounds):
    rounds = trained(2 * buffer_rounds + 1, buffer_rounds=buffer_rounds).state.buffer.rounds
    assert [one.num_guide > 0 for one in rounds] == [True, False] * buffer_rounds
