# SPDX-License-Identifier: Apache-2.0
"""A small hierarchy with a known evidence, samplers of it that train in a second, and what must be equal of two."""

import itertools
import math

import pyro
import pyro.distributions as dist
import torch

from pyro_sm import AutoDiffusion, DiffusionSampler, ImportanceWeightedScoreMatching, StoppingRule
from pyro_sm.nn.mlp import MLP

DATA = torch.tensor([1.0, -0.5, 2.0])
LOG_EVIDENCE = dist.MultivariateNormal(torch.zeros(3), torch.full((3, 3), 4.0) + 2 * torch.eye(3)).log_prob(DATA)


def hierarchy(y):
    mu = pyro.sample("mu", dist.Normal(y.new_zeros(()), 2.0))
    with pyro.plate("n", len(y)):
        t = pyro.sample("t", dist.Normal(mu, 1.0))
        pyro.sample("y", dist.Normal(t, 1.0), obs=y)
    pyro.deterministic("twice", 2 * mu)


def make(model=hierarchy, budget=640, guide=None, objective=None, **options):
    """Ten rounds of 64 draws and 5 steps, unless told otherwise."""
    guide = guide or {}
    options.setdefault("stopping", StoppingRule(max_evaluations=budget))
    return DiffusionSampler(
        model,
        guide=AutoDiffusion(
            model, **{"num_steps": 8, "architecture": MLP(width=16, depth=1), "name": name(), **guide}
        ),
        objective=ImportanceWeightedScoreMatching(
            **{"num_particles": 64, "batch_size": 64, "steps_per_round": 5, **(objective or {})}
        ),
        **{"disable_progbar": True, **options},
    )


def name(counter=itertools.count()):  # noqa: B008 (one counter for all)
    return f"guide{next(counter)}"


def trained(*args, **options):
    sampler = make(**options)
    sampler.run(*(args or (DATA,)))
    return sampler


def books(sampler):
    """The history without the seconds; NaN compares equal as text."""
    return [repr(info._replace(seconds=0.0)) for info in sampler.history]


def assert_equal(one, other):
    """Bit for bit: history, parameters, and draws."""
    assert books(one) == books(other)
    mine, theirs = one.guide.state_dict(), other.guide.state_dict()
    assert mine.keys() == theirs.keys()
    assert [key for key in mine if not torch.equal(mine[key], theirs[key])] == []
    mine, theirs = one.get_samples(50), other.get_samples(50)
    assert all(torch.equal(mine[site], theirs[site]) for site in mine)
    assert one.log_evidence == other.log_evidence


def bimodal():
    """Two narrow modes in the plane, with weights .7 and .3."""
    x = pyro.sample("x", dist.Normal(torch.zeros(2), 4.0).to_event(1))
    parts = [dist.Normal(torch.tensor(c), 0.5).log_prob(x).sum(-1) for c in ([3.0, 3.0], [-3.0, 3.0])]
    pyro.factor("likelihood", torch.logaddexp(parts[0] + math.log(0.7), parts[1] + math.log(0.3)))
