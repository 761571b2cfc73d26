# SPDX-License-Identifier: Apache-2.0
"""How findings are measured: how many rounds, draws, ranks and nats go into each, pinned from both sides."""

import math

import pyro
import pyro.distributions as dist
import pytest
import torch

from pyro_sm.base import Evaluations, RoundInfo
from pyro_sm.diagnostics import ChainFindings, EvidenceDifference, ProbeFindings, ProbeResult, Unknown, check_guide
from pyro_sm.diagnostics.verdict.chains import markov_ess, measure_chains
from pyro_sm.diagnostics.verdict.probe_findings import effective_particles, measure_probe, unknown_share
from pyro_sm.diagnostics.verdict.stein import measure_stein
from pyro_sm.diagnostics.verdict.training import measure_training
from pyro_sm.model.density import ModelDensity
from pyro_sm.weights import Evidence, evidence


def line():
    pyro.sample("x", dist.Normal(torch.zeros(2), 1.0).to_event(1))


def history(*log_evidence, se=0.1):
    return [RoundInfo(i, 1.0, 0.5, 0.3, value, se, 0.1, i, 0, 0.0) for i, value in enumerate(log_evidence)]


def particles(log_evidence=0.0, se=0.0, n=100, failure=""):
    z = torch.zeros(0 if failure else n, 1)
    return ProbeResult(z, z[:, 0], log_evidence, se, failure, Evaluations(7, 5, 1))


def test_differences_are_of_independent_estimates():
    found = EvidenceDifference.between(Evidence(-1.0, 0.3), Evidence(-1.5, 0.4))
    assert found == pytest.approx((0.5, 0.5))
    assert str(found) == "+0.500 ± 0.500 nats"


def test_the_last_three_rounds_count_and_no_earlier_one():
    pool = torch.zeros(1000)
    assert measure_training(pool, history(-9.0, -9.0, 0.0, 0.0, 0.0)).drift.gap == pytest.approx(0.0)
    third = measure_training(pool, history(-9.0, 0.0, -9.0, 0.0, 0.0)).drift
    assert third.gap == pytest.approx(-math.log((2 + math.exp(-9)) / 3))
    assert third.se == pytest.approx(0.1 * math.sqrt(2) / 2, rel=1e-3)


def test_chains_of_eight_draws_are_looked_at_and_shorter_ones_are_not():
    chains = torch.randn(2, 8)
    assert measure_chains([chains]).num_chains == 2
    assert measure_chains([chains[:, :7]]) is None
    assert (markov_ess([chains]) is None, markov_ess([chains[:, :7]]) is None) == (False, True)
    assert measure_chains([chains[:, :7], torch.zeros(2, 9)]) == ChainFindings(2)


@pytest.mark.parametrize(("ess", "tested"), [(399, 0), (400, 50), (1600, 200), (8000, 200)])
def test_as_many_draws_are_tested_as_an_eighth_of_the_weights_is_worth(ess, tested):
    density = ModelDensity(line, (), {})
    found = measure_stein(density, torch.randn(ess, 2), torch.zeros(ess), 200)
    assert (found is not None) == (tested > 0)
    assert density.evaluations.scores == tested


def test_fewer_draws_than_fifty_are_tested_if_no_more_are_asked_for():
    density = ModelDensity(line, (), {})
    assert measure_stein(density, torch.randn(160, 2), torch.zeros(160), 20) is not None
    assert measure_stein(density, torch.randn(152, 2), torch.zeros(152), 20) is None
    assert measure_stein(density, torch.randn(160, 2), torch.zeros(160), 0) is None
    assert density.evaluations.scores == 20


def test_three_times_the_tenth_largest_weight_is_known():
    pool = torch.full((1000,), -5.0)
    pool[:9], pool[9] = 7.0, 2.0
    for nats, share in ((1.05, 0.0), (1.15, 1.0)):  # log 3 = 1.0986
        assert unknown_share(pool, particles(), torch.full((100,), 2.0 + nats)).share == share
    pool[9] = 7.0
    assert unknown_share(pool, particles(), torch.full((100,), 7.9)).share == 0.0
    pool[8] = -5.0
    assert unknown_share(pool, particles(), torch.full((100,), 0.0)).share == 1.0


def test_the_error_of_the_unknown_share():
    own = torch.zeros(100)
    own[:20] = 50.0
    found = unknown_share(torch.zeros(1000), particles(se=0.1), own)
    m = 1 / (0.01 + 0.01)
    assert effective_particles(particles(se=0.1)) == pytest.approx(m)
    assert found == pytest.approx((0.2, math.sqrt((0.16 + 1 / m) / m)))


def test_what_the_probe_says_of_several_replicas_is_the_worst():
    pool = torch.cat([torch.zeros(500), torch.ones(500)])
    own = [torch.full((100,), 0.5), torch.full((100,), 0.5)]
    own[1][:30] = 9.0
    probed = particles(0.7, 0.2)
    found = measure_probe(pool, probed, own)
    assert found.unknown == unknown_share(pool[500:], probed, own[1])
    assert found.unknown.share == pytest.approx(0.3)
    assert found.gap == EvidenceDifference.between(Evidence(0.7, 0.2), evidence(pool))
    assert (found.particles, found.evaluations) == (effective_particles(probed), Evaluations(7, 5, 1))
    assert measure_probe(pool, probed, []).unknown is None
    failed = measure_probe(pool, particles(failure="why"), own)
    assert failed == ProbeFindings("why", Evaluations(7, 5, 1))


def test_what_is_there_almost_surely():
    assert Unknown(0.08, 0.03).at_least == pytest.approx(0.02)


def test_sixteen_thousand_draws_are_judged_by_default():
    found = check_guide(line, lambda: line(), probe=None, disable_progbar=True)
    assert found.findings.weights.num_draws == 16_000
