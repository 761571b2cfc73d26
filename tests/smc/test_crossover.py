# SPDX-License-Identifier: Apache-2.0
"""Exchanging latents: what changes hands, what law stays as it is, when it ends, and what it is good for."""

import math

import pytest
import torch

from pyro_sm.density import FunctionDensity
from pyro_sm.gaussians.gaussian import GaussianDensity
from pyro_sm.objectives.importance_weighted.population import Particles, Population
from pyro_sm.smc import Crossover, TemperedSMC
from pyro_sm.smc.crossover import Chains
from pyro_sm.targets import ManyWell

DOUBLE = {"dtype": torch.float64}


def chains_of(density, z):
    return Chains(z, *density.log_prob_and_score(z))


def normal(tril):
    """``N(0, L Lᵀ)`` as a density with a count."""
    return FunctionDensity(GaussianDensity(torch.zeros(len(tril), **DOUBLE), tril).log_prob, len(tril))


def correlated(dim, rho):
    covariance = (1 - rho) * torch.eye(dim, **DOUBLE) + rho
    return torch.linalg.cholesky(covariance)


@pytest.mark.parametrize("count", [8, 9])
def test_pairs_exchange_values_and_keep_the_rest(count):
    """Independent latents: always accepted; every value is still there, and at most half of a particle's are new."""
    torch.manual_seed(0)
    density = normal(torch.eye(12, **DOUBLE))
    old = chains_of(density, torch.randn(count, 12, **DOUBLE))
    before = density.evaluations.values
    move = Crossover().apply(density.log_prob_and_score, old)
    assert density.evaluations.values - before == count
    assert torch.equal(move.chains.z.sort(0).values, old.z.sort(0).values)
    changed = (move.chains.z != old.z).sum(1)
    if count % 2:
        assert int((changed == 0).sum()) == 1  # the one left over
        assert int((~move.accepted).sum()) == 1
    else:
        assert bool(move.accepted.all())
    assert int(changed.max()) <= 6
    torch.testing.assert_close(move.chains.log_p, density.log_prob(move.chains.z))
    torch.testing.assert_close(move.chains.score, density.log_prob_and_score(move.chains.z)[1])


def test_both_or_none():
    torch.manual_seed(0)
    density = normal(correlated(12, 0.9))
    z = torch.randn(400, 12, **DOUBLE) @ correlated(12, 0.9).T
    move = Crossover().apply(density.log_prob_and_score, chains_of(density, z))
    changed = (move.chains.z != z).any(1)
    assert torch.equal(changed, move.accepted)
    assert 0.02 < float(move.accepted.double().mean()) < 0.6
    # What one has got, another has lost: a sum over all particles of every latent stays.
    torch.testing.assert_close(move.chains.z.sum(0), z.sum(0))
    # A pair has one acceptance between the two.
    values, counts = move.acceptance.unique(return_counts=True)
    assert bool((counts[values < 1] % 2 == 0).all())


def test_subsets_are_small_as_often_as_large():
    torch.manual_seed(0)
    density = normal(torch.eye(64, **DOUBLE))
    z = torch.randn(20_000, 64, **DOUBLE)
    move = Crossover().apply(density.log_prob_and_score, chains_of(density, z))
    size = (move.chains.z != z).sum(1)
    assert int(size.min()) == 1
    assert int(size.max()) == 32
    for k in (1, 5, 20, 31):
        expected = math.log((k + 1) / 1) / math.log(33)
        assert float((size <= k).double().mean()) == pytest.approx(expected, abs=0.015)


class Always(Crossover):
    """Wrong: takes whatever it has proposed."""

    def apply(self, evaluate, chains):
        def flat(z):
            log_p, score = evaluate(z)
            return torch.zeros_like(log_p), score

        return super().apply(flat, chains._replace(log_p=torch.zeros_like(chains.log_p)))


@pytest.mark.parametrize(("way", "right"), [(Crossover(), True), (Always(), False)])
def test_the_law_of_correlated_latents_stays(way, right):
    """Marginals stay whatever is done; the sum of all latents would not."""
    torch.manual_seed(0)
    tril = correlated(12, 0.8)
    density = normal(tril)
    chains = chains_of(density, torch.randn(20_000, 12, **DOUBLE) @ tril.T)
    for _ in range(10):
        chains = way.apply(density.log_prob_and_score, chains).chains
    found = float(chains.z.sum(1).var()) / float(tril.sum(0).square().sum())
    assert (abs(found - 1) < 0.05) is right


def test_when_it_begins_and_ends():
    crossover = Crossover()
    assert not crossover.begins(100, 10)
    assert crossover.begins(100, 11)
    assert not crossover.begins(1, 11)
    assert crossover.goes_on(torch.tensor(0.06))
    assert not crossover.goes_on(torch.tensor(0.04))
    assert not crossover.goes_on(torch.tensor(math.nan))
    with pytest.raises(ValueError, match="more_than >= 1"):
        Crossover(more_than=0)
    with pytest.raises(ValueError, match="least_acceptance"):
        Crossover(least_acceptance=1.5)


def test_where_the_density_is_not_finite_nothing_is_exchanged():
    torch.manual_seed(0)

    def bounded(z):
        return torch.where((z[:, 0] > 0) == (z[:, 1] > 0), 0.0, -math.inf) - 0.5 * z.square().sum(1)

    density = FunctionDensity(bounded, 12)
    z = torch.randn(2000, 12)
    z[:, 1] = z[:, 1].abs() * z[:, 0].sign()
    move = Crossover().apply(density.log_prob_and_score, chains_of(density, z))
    assert bool(torch.isfinite(move.chains.log_p).all())
    assert 0 < float(move.accepted.float().mean()) < 1


def combinations(z):
    """How many different sets of wells the particles are in, of the sixteen of Many-Well in 32 dimensions."""
    return len((z[:, ::2] > 0).unique(dim=0))


def test_a_tempered_sampler_keeps_its_combinations():
    target = ManyWell(32)
    density = FunctionDensity(target.log_prob, 32)
    start = GaussianDensity(target.start.loc, torch.diag(target.start.scale))
    found = {}
    for crossover in (None, Crossover()):
        torch.manual_seed(0)
        run = TemperedSMC(1024, num_moves=2, effective_share=0.7, crossover=crossover).run(density, start)
        found[crossover is not None] = combinations(run.z)
        again = density.log_prob(run.z)
        assert torch.allclose(again, run.log_p, atol=1e-3)
        assert abs(run.log_evidence - target.log_evidence) < 2
    exact = combinations(target.sample(1024, torch.Generator().manual_seed(0)))
    assert found[True] > 0.85 * exact
    assert found[False] < 0.7 * exact


def test_in_few_latents_it_changes_nothing():
    density = FunctionDensity(lambda z: -0.5 * z.square().sum(-1), 3)
    start = GaussianDensity(torch.zeros(3), 2 * torch.eye(3))
    runs = []
    for crossover in (None, Crossover()):
        torch.manual_seed(0)
        runs.append(TemperedSMC(64, num_moves=1, crossover=crossover).run(density, start).z)
    assert torch.equal(*runs)


def population(crossover):
    return Population(64, seeding=TemperedSMC(64, num_moves=1, crossover=crossover), modes=None)


@pytest.mark.parametrize("dim", [4, 12])
def test_a_population_goes_on_while_it_is_accepted(dim):
    torch.manual_seed(0)
    eye, narrow = torch.eye(dim, **DOUBLE), correlated(dim, 0.9999)
    settings = population(Crossover())
    for tril, expected in ((eye, dim > 10), (narrow, False)):
        density = normal(tril)
        chains = chains_of(density, torch.randn(64, dim, **DOUBLE) @ tril.T)
        crossing = torch.tensor(float(dim > 10), **DOUBLE)
        particles = Particles(*chains, torch.tensor(0.1, **DOUBLE), crossing)
        before = density.evaluations.values
        moved = settings.moved(particles, density)
        assert density.evaluations.values - before == settings.evaluations_of(particles)
        assert settings.evaluations_of(particles) == 64 * (2 if dim > 10 else 1)
        assert bool(moved.crossing) is expected
        assert torch.allclose(density.log_prob(moved.z), moved.log_p)
    assert population(None).evaluations_of(particles._replace(crossing=torch.tensor(0.0))) == 64
