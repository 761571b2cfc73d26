# SPDX-License-Identifier: Apache-2.0
"""The Stein test of draws: its size and power, every source of draws, invariance, and what it refuses."""

import math

import arviz
import pyro
import pyro.distributions as dist
import pytest
import torch
from pyro.infer import MCMC, NUTS
from pyro.infer.autoguide import AutoDelta, AutoMultivariateNormal

from pyro_sm.diagnostics import draws_to_arviz, stein_goodness_of_fit, to_arviz
from pyro_sm.diagnostics.export import Provenance
from pyro_sm.diagnostics.goodness_of_fit import autocorrelation_time
from pyro_sm.diagnostics.guide_draws import draw_from_guide
from pyro_sm.guides import BatchAndMatch
from pyro_sm.model.density import ModelDensity
from pyro_sm.stein import IMQ

LOC = torch.tensor([0.5, -1.0], dtype=torch.float64)
TRIL = torch.tensor([[1.5, 0.0], [-0.9, 0.4]], dtype=torch.float64)


def gaussian():
    """Its posterior is its prior, N(LOC, TRIL TRILᵀ): exact draws are at hand."""
    x = pyro.sample("x", dist.MultivariateNormal(LOC, scale_tril=TRIL))
    pyro.sample("y", dist.Normal(0.0 * x.sum(-1), 1.0), obs=torch.tensor(0.0))


def positive(y):
    """A latent with a transform and one in a plate."""
    rate = pyro.sample("rate", dist.Gamma(3.0, 2.0))
    with pyro.plate("n", 2):
        x = pyro.sample("x", dist.Normal(rate, 1.0))
        pyro.sample("y", dist.Normal(x, 1.0), obs=y)


def exact(num_draws, chains=1):
    return {"x": LOC + torch.randn(chains, num_draws, 2) @ TRIL.T}


def markov(num_draws, memory, chains=1):
    """AR(1) chains whose stationary law is the target."""
    state, rows = torch.randn(chains, 2), []
    for _ in range(num_draws):
        state = memory * state + math.sqrt(1 - memory**2) * torch.randn(chains, 2)
        rows.append(LOC + state @ TRIL.T)
    return {"x": torch.stack(rows, 1)}


def p_values(make, repeats=60, **options):
    return torch.tensor(
        [stein_goodness_of_fit(gaussian, make(), num_bootstrap=150, **options).p_value for _ in range(repeats)]
    )


# ------------------------------------------------------------------------------------------------- size and power


def assert_size(p):
    """The share of rejections at 5 % and at 50 % is within five standard errors of what it should be at most."""
    n = len(p)
    assert float((p < 0.05).double().mean()) <= 0.05 + 5 * math.sqrt(0.05 * 0.95 / n)
    assert float((p < 0.5).double().mean()) <= 0.5 + 5 * math.sqrt(0.25 / n)


def test_the_size_with_independent_draws(float64):
    p = p_values(lambda: exact(200))
    assert_size(p)
    assert float(p.mean()) < 0.8, "nor does it never reject"


def test_the_size_with_a_markov_chain_and_without_its_memory(float64):
    def chains():
        return markov(250, 0.85, chains=4)

    assert_size(p_values(chains, repeats=40))
    with pytest.raises(AssertionError):  # the wrong variant takes the draws for independent
        assert_size(p_values(chains, repeats=20, flip=0.5))


@pytest.mark.parametrize("fault", ["shift", "narrow", "correlation"])
def test_bad_draws_are_rejected(float64, fault):
    u = torch.randn(1, 400, 2)
    if fault == "shift":
        u = u + torch.tensor([0.3, 0.0])
    elif fault == "narrow":
        u = 0.7 * u
    tril = TRIL * torch.tensor([[1.0, 1.0], [-1.0, 1.0]]) if fault == "correlation" else TRIL
    found = stein_goodness_of_fit(gaussian, {"x": LOC + u @ tril.T})
    assert found.p_value < 0.01
    assert found.u > 0
    assert "evidence that they do not come" in str(found)
    good = stein_goodness_of_fit(gaussian, exact(400))
    assert good.u < 0.3 * found.u
    assert good.v > 0


def test_the_weights_of_separated_modes_are_not_seen(float64):
    """All draws in the smaller of two modes: said in words, because the number cannot say it."""

    def model():
        x = pyro.sample("x", dist.Normal(0.0, 30.0))
        modes = torch.stack([math.log(0.1) - 0.5 * (x + 10) ** 2, math.log(0.9) - 0.5 * (x - 10) ** 2])
        pyro.factor("modes", torch.logsumexp(modes, 0))

    precision = 1 + 1 / 900
    found = stein_goodness_of_fit(model, {"x": -10 / precision + torch.randn(1, 500) / math.sqrt(precision)})
    assert found.p_value > 0.05
    assert "relative weight of separated modes" in str(found)


# ------------------------------------------------------------------------------------------------- invariance


def test_whitening_makes_it_affine_invariant(float64):
    matrix = torch.tensor([[20.0, 1.0], [0.0, 0.05]])
    draws = exact(150)["x"] * 1.2

    def moved():
        x = pyro.sample(
            "x",
            dist.MultivariateNormal(
                matrix @ LOC, scale_tril=torch.linalg.cholesky(matrix @ TRIL @ TRIL.T @ matrix.T)
            ),
        )
        pyro.sample("y", dist.Normal(0.0 * x.sum(-1), 1.0), obs=torch.tensor(0.0))

    one = stein_goodness_of_fit(gaussian, {"x": draws}, flip=0.5)
    other = stein_goodness_of_fit(moved, {"x": draws @ matrix.T}, flip=0.5)
    assert other.u == pytest.approx(one.u, rel=1e-6)
    plain = stein_goodness_of_fit(gaussian, {"x": draws}, flip=0.5, whiten=False)
    plain_other = stein_goodness_of_fit(moved, {"x": draws @ matrix.T}, flip=0.5, whiten=False)
    assert abs(plain.u - plain_other.u) > 0.1 * abs(plain.u)


def test_unwhitened_it_is_the_plain_test(float64):
    draws = exact(60)["x"]
    found = stein_goodness_of_fit(gaussian, {"x": draws}, whiten=False, flip=0.5, kernel=IMQ(1.3))
    z = draws[0]
    score = -torch.linalg.solve(TRIL @ TRIL.T, (z - LOC).T).T
    k = (1 + torch.cdist(z, z).square() / 1.69) ** -0.5
    gap = z[:, None] - z
    cross = ((score[:, None] - score) * gap).sum(-1)
    squared = gap.square().sum(-1)
    h = (score @ score.T) * k + (k**3 / 1.69) * cross + 2 * k**3 / 1.69 - 3 * squared * k**5 / 1.69**2
    assert found.v == pytest.approx(float(h.mean()), rel=1e-9)
    assert found.u == pytest.approx(float((h.sum() - h.diagonal().sum()) / (60 * 59)), rel=1e-9)


@pytest.mark.parametrize("memory", [0.0, 0.5, 0.9])
def test_autocorrelation_time_of_an_autoregression(float64, memory):
    chain = markov(4000, memory, chains=4)["x"] if memory else exact(4000, chains=4)["x"]
    assert autocorrelation_time(chain) == pytest.approx((1 + memory) / (1 - memory), rel=0.25)
    found = stein_goodness_of_fit(gaussian, {"x": chain[:, :400]}, num_draws=1600, num_bootstrap=1)
    assert 0.5 < found.num_draws * (1 + memory) / (1 - memory) / 1600 < 1.7
    assert 0.3 < found.flip <= 0.5


# ---------------------------------------------------------------------------------------------------- sources

Y = torch.tensor([0.4, 1.9])


def test_chains_of_nuts():
    mcmc = MCMC(NUTS(positive), num_samples=150, warmup_steps=100, disable_progbar=True)
    mcmc.run(Y)
    found = stein_goodness_of_fit(positive, mcmc.get_samples(group_by_chain=True), Y)
    assert found.p_value > 0.01
    assert 10 < found.num_draws <= 150
    with pytest.raises(ValueError, match=r"site 'rate': expected draws of shape \(chains, draws"):
        stein_goodness_of_fit(positive, mcmc.get_samples(), Y)
    idata = arviz.from_pyro(mcmc, log_likelihood=False)
    again = stein_goodness_of_fit(positive, idata, Y)
    assert again.u == pytest.approx(found.u, rel=1e-4)


@pytest.mark.filterwarnings("ignore:Pareto")  # a Gaussian for a skewed posterior
@pytest.mark.parametrize("legacy", [True, False])
def test_both_lines_of_arviz(legacy):
    guide = AutoMultivariateNormal(positive)
    BatchAndMatch(num_batches=40).fit(guide, Y)
    density = ModelDensity(positive, (Y,))
    draws = draw_from_guide(guide, density, 800, (Y,))
    provenance = Provenance("test", None, 0, 0)
    idata = draws_to_arviz(density, draws, provenance=provenance, num_samples=200, predictive=False, legacy=legacy)
    found = stein_goodness_of_fit(positive, idata, Y)
    assert 100 <= found.num_draws <= 200
    posterior = idata["posterior"]
    by_hand = {name: torch.as_tensor(posterior[name].values.copy()) for name in ("rate", "x")}
    assert found.u == pytest.approx(stein_goodness_of_fit(positive, by_hand, Y).u, rel=1e-5)


def test_a_guide_is_drawn_from(float64):
    guide = AutoMultivariateNormal(gaussian, init_scale=0.2)
    guide()
    before = stein_goodness_of_fit(gaussian, guide, num_draws=300)
    assert before.p_value < 0.01
    BatchAndMatch(num_batches=40).fit(guide)
    found = stein_goodness_of_fit(gaussian, guide, num_draws=300)
    assert found.p_value > 0.01
    assert (found.num_draws, found.flip) == (300, 0.5)
    assert to_arviz(gaussian, guide, num_samples=40)["posterior"].sizes["draw"] > 0


def test_long_chains_are_thinned(float64):
    options = {"num_draws": 300, "num_bootstrap": 10, "flip": 0.5}
    assert stein_goodness_of_fit(gaussian, exact(900, chains=2), **options).num_draws == 300


# --------------------------------------------------------------------------------------------------- refusals


# Made when tests are collected, before any is seeded.
NORMAL = torch.randn(1, 20, 2, generator=torch.Generator().manual_seed(0))


@pytest.mark.parametrize(
    ("source", "options", "error", "words"),
    [
        ({}, {}, ValueError, "found none of x"),
        ({"x": torch.zeros(1, 50, 3)}, {}, ValueError, r"\*\(2,\)"),
        ({"x": torch.zeros(1, 5, 2)}, {}, ValueError, "at least ten draws, found"),
        ({"x": torch.full((1, 20, 2), math.nan)}, {}, ValueError, "finite draws"),
        ({"x": NORMAL}, {"flip": 0.7}, ValueError, "flip in"),
        ({"x": NORMAL}, {"num_bootstrap": 0}, ValueError, "num_bootstrap >= 1"),
        ({"x": NORMAL}, {"num_draws": 3}, ValueError, "num_draws >= 10"),
        (3.0, {}, TypeError, "found float"),
    ],
)
def test_what_is_refused(float64, source, options, error, words):
    with pytest.raises(error, match=words):
        stein_goodness_of_fit(gaussian, source, **options)


def test_chains_of_different_lengths_are_refused():
    with pytest.raises(ValueError, match="as many chains and draws of every site"):
        stein_goodness_of_fit(positive, {"rate": torch.ones(1, 20), "x": torch.zeros(1, 30, 2)}, Y)


def test_a_point_estimate_is_refused():
    guide = AutoDelta(positive)
    guide(Y)
    with pytest.raises(TypeError, match="point estimate"):
        stein_goodness_of_fit(positive, guide, Y)
