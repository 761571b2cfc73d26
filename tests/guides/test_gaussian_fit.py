# SPDX-License-Identifier: Apache-2.0
"""Pyro's Gaussian guides fitted by Batch-and-Match: exact posteriors, and what Pyro does with them then."""

import pyro
import pyro.distributions as dist
import pytest
import torch
from pyro.infer import SVI, Predictive, Trace_ELBO
from pyro.infer.autoguide import (
    AutoDiagonalNormal,
    AutoIAFNormal,
    AutoLowRankMultivariateNormal,
    AutoMultivariateNormal,
    AutoNormal,
)
from pyro.optim import Adam

from pyro_sm.diagnostics import to_arviz
from pyro_sm.guides import BatchAndMatch
from pyro_sm.objectives import FisherDivergence

MATRIX = torch.tensor([[1.0, 0.5, -0.3], [0.0, 2.0, 1.0], [0.7, -0.4, 0.2]], dtype=torch.float64)
DATA = torch.tensor([2.0, -3.0, 1.0], dtype=torch.float64)
GUIDES = [
    AutoMultivariateNormal,
    lambda model, **options: AutoLowRankMultivariateNormal(model, rank=3, **options),
]
guides = pytest.mark.parametrize("make", GUIDES, ids=["full", "low rank"])


def linear(y):
    """Two sites, four latents, a Gaussian posterior."""
    x = pyro.sample("x", dist.Normal(torch.zeros(3), torch.tensor([1.0, 2.0, 0.5])).to_event(1))
    shift = pyro.sample("shift", dist.Normal(1.0, 1.5))
    mean = (MATRIX @ x.unsqueeze(-1)).squeeze(-1) + shift.unsqueeze(-1)
    pyro.sample("y", dist.Normal(mean, 0.7).to_event(1), obs=y)


def posterior():
    design = torch.cat([MATRIX, torch.ones(3, 1)], 1)
    prior = torch.tensor([1.0, 4.0, 0.25, 2.25]).reciprocal().diag()
    covariance = torch.linalg.inv(prior + design.T @ design / 0.49)
    return covariance @ (design.T @ DATA / 0.49 + prior @ torch.tensor([0.0, 0, 0, 1])), covariance


def log_evidence():
    design = torch.cat([MATRIX, torch.ones(3, 1)], 1)
    prior = torch.tensor([1.0, 4.0, 0.25, 2.25]).diag()
    law = dist.MultivariateNormal(torch.ones(3), 0.49 * torch.eye(3) + design @ prior @ design.T)
    return float(law.log_prob(DATA))


def assert_fitted(guide, *, tolerance=1e-4):
    loc, covariance = posterior()
    law = guide.get_posterior(DATA)
    torch.testing.assert_close(law.mean, loc, rtol=tolerance, atol=tolerance)
    torch.testing.assert_close(law.covariance_matrix, covariance, rtol=tolerance, atol=tolerance)


@guides
def test_the_posterior_is_found_and_counted(float64, make):
    guide = make(linear)
    guide(DATA)
    with pytest.raises(AssertionError):
        assert_fitted(guide)  # the test can tell
    result = BatchAndMatch(num_batches=60, search_mode=False).fit(guide, DATA)
    assert_fitted(guide)
    assert result.evaluations.scores == 60 * 32
    assert result.skipped == 0
    assert result.fisher.shape == result.elbo.shape == (60,)
    assert float(result.fisher[0]) > 1 > 1e-6 > float(result.fisher[-1])
    assert float(result.elbo[-1]) == pytest.approx(log_evidence(), abs=1e-4)


@guides
def test_what_pyro_does_afterwards(float64, make):
    guide = make(linear)
    BatchAndMatch(num_batches=60).fit(guide, DATA)
    loc, covariance = posterior()
    scale = covariance.diagonal().sqrt()
    quantiles = guide.quantiles([0.25, 0.5, 0.75], DATA)
    torch.testing.assert_close(quantiles["x"][1], loc[:3], rtol=1e-3, atol=1e-3)
    torch.testing.assert_close(quantiles["x"][2] - loc[:3], 0.6744898 * scale[:3], rtol=1e-3, atol=1e-3)
    torch.testing.assert_close(guide.median(DATA)["shift"], loc[3], rtol=1e-3, atol=1e-3)
    draws = Predictive(linear, guide=guide, num_samples=4000, parallel=True, return_sites=["x"])(DATA)["x"]
    assert bool(((draws.reshape(-1, 3).mean(0) - loc[:3]).abs() < 5 * scale[:3] / 4000**0.5).all())
    drawn = torch.stack([guide(DATA)["shift"] for _ in range(400)])
    assert abs(drawn.mean() - loc[3]) < 5 * scale[3] / 20
    idata = to_arviz(linear, guide, DATA, num_samples=400)
    assert idata["posterior"].attrs["pareto_khat"] < 0.5


@guides
def test_training_goes_on_from_there(float64, make):
    """In the store of an SVI that had begun: the fit wins, and the next step starts from it."""
    guide = make(linear)
    svi = SVI(linear, guide, Adam({"lr": 1e-3}), Trace_ELBO(num_particles=8, vectorize_particles=True))
    for _ in range(3):
        svi.step(DATA)
    BatchAndMatch(num_batches=60).fit(guide, DATA)
    assert_fitted(guide)
    prefix = type(guide).__name__
    torch.testing.assert_close(pyro.param(f"{prefix}.loc").detach(), posterior()[0], rtol=1e-4, atol=1e-4)
    svi.step(DATA)
    assert_fitted(guide, tolerance=2e-2)
    with pytest.raises(AssertionError):
        assert_fitted(guide, tolerance=1e-6)  # the step moved it
    assert FisherDivergence(num_particles=64).loss(linear, guide, DATA) < 1e-2


def test_a_guide_restored_from_the_store_is_fitted_in_the_store(float64):
    first = AutoMultivariateNormal(linear)
    first(DATA)
    saved = pyro.get_param_store().get_state()
    pyro.clear_param_store()
    pyro.get_param_store().set_state(saved)
    second = AutoMultivariateNormal(linear)
    second(DATA)
    BatchAndMatch(num_batches=60).fit(second, DATA)
    assert_fitted(second)
    torch.testing.assert_close(
        pyro.param("AutoMultivariateNormal.loc").detach(), posterior()[0], rtol=1e-4, atol=1e-4
    )


def test_it_starts_from_the_guide(float64):
    guide = AutoMultivariateNormal(linear, init_scale=0.37)
    guide(DATA)
    state = torch.get_rng_state()
    result = BatchAndMatch(num_batches=1, batch_size=8, search_mode=False).fit(guide, DATA)
    torch.set_rng_state(state)
    wide = AutoMultivariateNormal(linear, init_scale=1.0)
    wide(DATA)
    other = BatchAndMatch(num_batches=1, batch_size=8, search_mode=False).fit(wide, DATA)
    assert float(result.fisher[0]) != pytest.approx(float(other.fisher[0]), rel=1e-2)


def test_the_search_for_the_mode_is_counted(float64):
    guide = AutoMultivariateNormal(linear)
    result = BatchAndMatch(num_batches=5).fit(guide, DATA)
    assert 5 * 32 < result.evaluations.scores < 5 * 32 + 400
    assert float(result.fisher[0]) < 1e-3  # Laplace's approximation of a Gaussian is exact


def test_a_low_rank_search_in_a_full_guide(float64):
    guide = AutoMultivariateNormal(linear)
    BatchAndMatch(num_batches=80, rank=4).fit(guide, DATA)
    assert_fitted(guide, tolerance=1e-3)


def test_single_precision():
    def model(y):
        x = pyro.sample("x", dist.Normal(torch.zeros(3), 2.0).to_event(1))
        pyro.sample("y", dist.Normal(x * torch.tensor([1.0, 2.0, -1.0]), 0.5).to_event(1), obs=y)

    guide = AutoMultivariateNormal(model)
    BatchAndMatch().fit(guide, DATA.float())
    law = guide.get_posterior()
    assert law.mean.dtype == torch.float32
    precision = 0.25 + 4 * torch.tensor([1.0, 4.0, 1.0])
    torch.testing.assert_close(law.covariance_matrix, precision.reciprocal().diag(), rtol=1e-2, atol=1e-3)


@pytest.mark.parametrize("make", [AutoNormal, AutoDiagonalNormal, AutoIAFNormal])
def test_other_guides_are_refused(make):
    with pytest.raises(TypeError, match="AutoMultivariateNormal or AutoLowRankMultivariateNormal, found Auto"):
        BatchAndMatch().fit(make(linear), DATA)


@pytest.mark.parametrize(
    ("arguments", "words"),
    [({"num_batches": 0}, "num_batches >= 1"), ({"batch_size": 1}, "batch_size >= 2"), ({"rank": 0}, "rank >= 1")],
)
def test_arguments_are_checked(arguments, words):
    with pytest.raises(ValueError, match=words):
        BatchAndMatch(**arguments)


def test_a_rank_must_be_the_guides_own(float64):
    guide = AutoLowRankMultivariateNormal(linear, rank=2)
    with pytest.raises(ValueError, match="expected rank=2"):
        BatchAndMatch(rank=3).fit(guide, DATA)
    BatchAndMatch(rank=2, num_batches=2).fit(guide, DATA)


def test_a_guide_of_other_latents_is_refused(float64):
    def model(n):
        x = pyro.sample("x", dist.Normal(torch.zeros(n), 1.0).to_event(1))
        pyro.sample("y", dist.Normal(x.sum(-1), 1.0), obs=torch.tensor(0.5))

    guide = AutoMultivariateNormal(model)
    guide(2)
    with pytest.raises(ValueError, match=r"covers the latent sites \{'x': 2\} .* the model has \{'x': 3\}"):
        BatchAndMatch().fit(guide, 3)
