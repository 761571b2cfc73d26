# SPDX-License-Identifier: Apache-2.0
"""NaN gradients are refused before they reach a parameter."""

from __future__ import annotations

import math

import pyro
import pyro.distributions as dist
import pytest
import torch
from pyro.infer import SVI
from pyro.infer.autoguide import AutoNormal
from pyro.optim import Adam
from torch.distributions import constraints

from pyro_sm.objectives import FisherDivergence, ImplicitScoreMatching, SteinDiscrepancy, no_guide


def two_modes(add):
    z = pyro.sample("z", dist.Normal(torch.zeros(()), 6.0))
    left, right = (math.log(0.5) + dist.Normal(at, 0.1).log_prob(z) for at in (-6.0, 6.0))
    pyro.factor("modes", add(left, right))


def with_logaddexp():
    two_modes(torch.logaddexp)


def with_logsumexp():
    two_modes(lambda a, b: torch.logsumexp(torch.stack([a, b]), 0))


@pytest.mark.parametrize("loss", [FisherDivergence(16), SteinDiscrepancy(num_draws=16)])
def test_nan_is_refused_and_the_parameters_survive(loss):
    guide = AutoNormal(with_logaddexp)
    svi = SVI(with_logaddexp, guide, Adam({"lr": 0.1}), loss)
    with pytest.raises(ValueError, match="logaddexp"):
        svi.step()
    for parameter in guide.parameters():
        assert bool(torch.isfinite(parameter).all())
        assert parameter.grad is None


def test_the_advice_works():
    svi = SVI(with_logsumexp, AutoNormal(with_logsumexp), Adam({"lr": 0.1}), FisherDivergence(16))
    assert all(math.isfinite(svi.step()) for _ in range(3))


def test_energies_are_looked_at_too():
    def energy():
        scale = pyro.param("scale", torch.tensor(0.1), constraint=constraints.positive)
        x = pyro.sample("x", dist.ImproperUniform(constraints.real_vector, (), (1,)))
        parts = [dist.Normal(at, scale).log_prob(x).sum(-1) for at in (-6.0, 6.0)]
        pyro.factor("f", torch.logaddexp(*parts))

    data = torch.cat([torch.randn(20, 1) - 6, torch.randn(20, 1) + 6])
    svi = SVI(energy, no_guide, Adam({"lr": 0.1}), ImplicitScoreMatching())
    with pytest.raises(ValueError, match="its gradient NaN"):
        svi.step(data)
    assert float(pyro.param("scale").detach()) == pytest.approx(0.1)
