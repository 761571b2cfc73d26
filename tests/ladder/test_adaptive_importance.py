# SPDX-License-Identifier: Apache-2.0
"""Adaptive importance sampling: the deterministic mixture is what makes old draws count; bent laws are reached."""

from __future__ import annotations

import math
from dataclasses import replace

import pytest
import torch

from pyro_sm.base import Draws, Evaluations
from pyro_sm.density import FunctionDensity
from pyro_sm.gaussians.student_mixture import StudentMixture
from pyro_sm.ladder import AdaptiveImportanceSampling, ModeMixture, WeightedMixture, adaptive_importance
from pyro_sm.ladder.adaptive_importance import (
    components_for,
    damped,
    defended_fit,
    deterministic_mixture_log_prob,
    first_proposal,
)
from pyro_sm.search.multistart import MultiStartSearch
from pyro_sm.search.starts import gaussian_start
from pyro_sm.weights import effective_sample_size, evidence

pytestmark = pytest.mark.usefixtures("float64")


def single(loc, scale):
    loc = torch.tensor([loc])
    return StudentMixture(torch.zeros(1), loc, scale * torch.eye(loc.shape[1])[None])


def banana(z):
    """A normal law bent by ``z_1²``, ``log Z = 0``; the mean of ``z_2`` is 1."""
    normal = torch.distributions.Normal(0.0, 1.0)
    return normal.log_prob(z[:, 0]) + normal.log_prob(2 * (z[:, 1] - z[:, 0].square())) + math.log(2)


def test_the_deterministic_mixture_and_what_is_wrong_without_it():
    """Two proposals, each on one of two modes: together they are good, each draw by its own proposal is not."""
    proposals = [single([-50.0, 0.0], 1.0), single([50.0, 0.0], 1.0)]

    def log_prob(z):
        return torch.logsumexp(torch.stack([q.log_prob(z) for q in proposals]), 0) - math.log(2)

    draws = [q.sample(2000) for q in proposals]
    z = torch.cat(draws)
    log_weight = log_prob(z) - deterministic_mixture_log_prob(proposals, z)
    torch.testing.assert_close(log_weight, torch.zeros(4000), rtol=0, atol=1e-10)
    wrong = torch.cat([log_prob(x) - q.log_prob(x) for x, q in zip(draws, proposals, strict=True)])
    assert evidence(wrong).log_evidence < -5 * evidence(wrong).log_evidence_se - 0.3


def test_the_deterministic_mixture_round_by_round_is_that_at_once():
    proposals = [single([-1.0, 0.0], 1.0), single([2.0, 1.0], 0.5), single([0.0, 0.0], 3.0)]
    z = torch.randn(50, 2)
    step = None
    for r, q in enumerate(proposals):
        step = deterministic_mixture_log_prob([q], z, step, r)
    torch.testing.assert_close(step, deterministic_mixture_log_prob(proposals, z), rtol=1e-12, atol=1e-12)


def test_a_bent_law_is_reached_from_a_poor_proposal():
    density = FunctionDensity(banana, 2)
    poor = single([0.0, 0.0], 1.0)
    before = AdaptiveImportanceSampling(max_rounds=1).run(density, poor)
    found = AdaptiveImportanceSampling().run(FunctionDensity(banana, 2), poor)
    assert before.ess < 0.2
    assert found.ess > 0.4
    assert found.khat < 0.7
    assert found.log_evidence == pytest.approx(0, abs=5 * found.log_evidence_se)
    assert found.log_evidence_se < 0.1
    mean = torch.softmax(found.draws.log_weight, 0) @ found.draws.z
    assert float(mean[1]) == pytest.approx(1, abs=0.15)


def test_after_the_modes():
    start = gaussian_start(torch.zeros(2), torch.ones(2))
    density = FunctionDensity(banana, 2)
    modes = ModeMixture(MultiStartSearch(num_starts=64)).run(density, start)
    assert modes.ess < 0.4
    found = AdaptiveImportanceSampling().run(density, first_proposal(modes, start))
    assert found.ess > 0.4
    assert found.log_evidence == pytest.approx(0, abs=5 * found.log_evidence_se)
    assert found.log_evidence_se < 0.1
    assert modes.evaluations + found.evaluations == density.evaluations


def test_where_nothing_counts_half_of_it_begins_at_the_start():
    start = gaussian_start(torch.tensor([1.0, 2.0]), torch.tensor([3.0, 4.0]))
    nothing = FunctionDensity(lambda z: z.sum(1) * 0 - math.inf, 2)
    modes = ModeMixture(MultiStartSearch(num_starts=8)).run(nothing, start)
    modes = replace(modes, mixture=single([7.0, 8.0], 0.1))
    proposal = first_proposal(modes, start)
    assert proposal.loc.tolist() == [[7, 8], [1, 2]]
    torch.testing.assert_close(proposal.log_weight.exp(), torch.tensor([0.5, 0.5]))
    torch.testing.assert_close(proposal.scale_tril[1], torch.diag(start.scale))
    density = FunctionDensity(lambda z: z.sum(1) * 0 - math.inf, 2)
    found = AdaptiveImportanceSampling().run(density, proposal)
    assert found.ess == 0
    assert found.evaluations.values == 6000  # one round and the pool


@pytest.mark.parametrize(("share", "fits"), [(0.015, False), (0.03, True)])
def test_below_one_in_fifty_nothing_counts(share, fits):
    law, count = single([0.0, 0.0], 1.0), round(2000 * share)
    log_weight = torch.where(torch.arange(2000) < count, 0.0, -math.inf)
    pool = WeightedMixture(law, Draws(law.sample(2000), log_weight, log_weight), Evaluations(), None, "given")
    proposal = first_proposal(pool, gaussian_start(torch.zeros(2), 9 * torch.ones(2)))
    assert (proposal.num_components > 2) == fits


def test_a_tenth_of_a_fit_is_as_wide_as_all_of_it():
    z = torch.cat([single([-9.0, 0.0], 1.0).sample(500), single([9.0, 0.0], 1.0).sample(500)])
    law = defended_fit(z, torch.zeros(1000), 2)
    assert law.num_components == 3
    assert float(law.log_weight.exp().sum()) == pytest.approx(1)
    assert float(law.log_weight[2].exp()) == pytest.approx(0.1)
    assert float(law.scale_tril[:2, 0, 0].max()) < 2
    assert float(law.scale_tril[2, 0, 0]) > 6


def test_a_round_of_luck_is_not_the_end(monkeypatch):
    """Rounds that look good, and pools that do not: it goes on to the last."""
    density = FunctionDensity(banana, 2)
    monkeypatch.setattr(adaptive_importance, "_GOAL", (False, -1.0))
    monkeypatch.setattr(adaptive_importance, "_TRUSTED", -10.0)
    found = AdaptiveImportanceSampling(max_rounds=3, round_size=200, num_draws=500).run(
        density, single([0.0, 0.0], 1.0)
    )
    assert found.evaluations.values == 3 * 700 + 500
    monkeypatch.setattr(adaptive_importance, "_TRUSTED", 10.0)
    early = AdaptiveImportanceSampling(max_rounds=3, round_size=200, num_draws=500).run(
        density, single([0.0, 0.0], 1.0)
    )
    assert early.evaluations.values == 700
    assert early.method == "adaptive importance sampling, 1 round"


def test_damping_leaves_a_tenth_or_five_for_each_latent():
    log_weight = 5 * torch.randn(2000)
    assert effective_sample_size(damped(log_weight, 3)) == pytest.approx(200, rel=1e-3)
    assert effective_sample_size(damped(log_weight, 100)) == pytest.approx(500, rel=1e-3)


def test_components():
    assert [components_for(k) for k in (1, 3, 7, 40)] == [4, 5, 9, 12]


def test_errors():
    for name, least in (("num_components", 1), ("max_rounds", 1), ("round_size", 1), ("num_draws", 2)):
        with pytest.raises(ValueError, match=f"expected {name} >= {least}, found 0"):
            AdaptiveImportanceSampling(**{name: 0})
