# SPDX-License-Identifier: Apache-2.0
"""Mixtures to anneal from: normalised densities with their scores, exact draws, and what a guide's draws make."""

from __future__ import annotations

import math

import pytest
import torch
from torch.distributions import MultivariateNormal

from pyro_sm.base import Draws
from pyro_sm.density import FunctionDensity, value_and_score
from pyro_sm.gaussians.gaussian import GaussianDensity
from pyro_sm.smc import TemperedSMC
from pyro_sm.smc.mixture_start import (
    MixtureStart,
    NormalLaws,
    around_draws,
    damped_covariance,
    moments,
    widened,
)
from pyro_sm.weights import damping, effective_sample_size

TRIL = torch.tensor([[[0.5, 0.0], [0.3, 0.4]], [[1.5, 0.0], [-0.8, 0.6]]], dtype=torch.float64)
LOC = torch.tensor([[-3.0, 1.0], [4.0, -2.0]], dtype=torch.float64)
WEIGHT = torch.tensor([0.3, 0.7], dtype=torch.float64)


def wide(dim=2, scale=6.0, dtype=torch.float64):
    return GaussianDensity(torch.zeros(dim, dtype=dtype), scale * torch.eye(dim, dtype=dtype))


def mixture(share=0.25):
    return MixtureStart(wide(), NormalLaws(LOC, TRIL, WEIGHT.log()), share)


def log_prob(z):
    """Two correlated normal laws with weights .3 and .7, and ``log Z = 2``."""
    parts = [
        MultivariateNormal(m, scale_tril=t).log_prob(z) + w.log() for m, t, w in zip(LOC, TRIL, WEIGHT, strict=True)
    ]
    return torch.logsumexp(torch.stack(parts), 0) + 2


# ---------------------------------------------------------------------------------------- the mixture


def test_the_start_is_the_mixture_written_out():
    torch.manual_seed(0)
    z = 5 * torch.randn(50, 2, dtype=torch.float64)

    def direct(x):
        start = MultivariateNormal(x.new_zeros(2), scale_tril=6 * torch.eye(2).double())
        return torch.logaddexp(start.log_prob(x) + math.log(0.25), log_prob(x) - 2 + math.log(0.75))

    value, score = mixture().log_prob_and_score(z)
    expected, expected_score = value_and_score(direct, z)
    torch.testing.assert_close(value, expected, rtol=1e-10, atol=1e-10)
    torch.testing.assert_close(score, expected_score, rtol=1e-9, atol=1e-10)


@pytest.mark.parametrize(("share", "right"), [(0.25, True), (0.6, False)])
def test_draws_follow_the_density(share, right):
    """``E[q/b']`` is 1 under ``b'`` for a normalised q, here b' with ρ = .25; under another ρ moments are off."""
    torch.manual_seed(1)
    n = 20_000
    z = mixture(share).sample(n)
    exact = 0.75 * (WEIGHT[:, None] * LOC).sum(0)
    error = (z.mean(0) - exact).abs() / (z.std(0) / math.sqrt(n))
    assert (float(error.max()) < 5) is right
    second = 0.25 * 36 + 0.75 * (WEIGHT[:, None] * (LOC.square() + TRIL.square().sum(-1))).sum(0)
    error = (z.square().mean(0) - second).abs() / (z.square().std(0) / math.sqrt(n))
    assert (float(error.max()) < 5) is right


def test_parts_have_their_shares_of_the_draws():
    torch.manual_seed(2)
    shares = [int((mixture().sample(100)[:, 0] > 1.5).sum()) for _ in range(20)]
    assert max(shares) - min(shares) < 20  # the normal laws' 52 or 53, and what the wide part happens to add
    assert len({len(mixture(0.001).sample(10)) for _ in range(20)}) == 1


def test_each_latent_belongs_to_the_mode_it_most_likely_comes_from():
    modes = NormalLaws(LOC, TRIL, WEIGHT.log())
    z = 4 * torch.randn(200, 2, dtype=torch.float64)
    laws = [MultivariateNormal(loc, scale_tril=tril) for loc, tril in zip(LOC, TRIL, strict=True)]
    expected = torch.stack([w.log() + law.log_prob(z) for w, law in zip(WEIGHT, laws, strict=True)]).argmax(0)
    assert torch.equal(modes.nearest(z), expected)
    assert not torch.equal(torch.cdist(z, LOC).argmin(1), expected)


def test_the_widened_start_is_what_it_says(float64):
    loc, tril = torch.tensor([1.0, -2.0]), torch.tensor([[1.0, 0.0], [0.7, 0.5]])
    start = widened(loc, tril)
    wide = [MultivariateNormal(loc, scale_tril=w * tril) for w in (1.0, 3.0, 10.0)]
    z = start.sample(20_000)
    exact = torch.logsumexp(torch.stack([law.log_prob(z) for law in wide]), 0) - math.log(3)
    assert torch.allclose(start.log_prob_and_score(z)[0], exact, rtol=1e-10)
    variance = (1 + 9 + 100) / 3
    assert float(z[:, 0].var()) == pytest.approx(variance, rel=0.15)


def test_where_the_start_is_zero_the_laws_remain():
    """A bounded prior: -inf and a score that is no number there."""

    class Bounded:
        def sample(self, n):
            return torch.rand(n, 2, dtype=torch.float64)

        def log_prob_and_score(self, z):
            inside = ((z > 0) & (z < 1)).all(1)
            nothing = torch.where(inside, 0.0, -math.inf).double()
            return nothing, torch.where(inside[:, None], 0.0, math.nan).expand(-1, 2).double()

    start = MixtureStart(Bounded(), NormalLaws(LOC, TRIL, WEIGHT.log()), 0.25)
    value, score = start.log_prob_and_score(LOC)
    expected, expected_score = value_and_score(lambda z: log_prob(z) - 2 + math.log(0.75), LOC)
    torch.testing.assert_close(value, expected, rtol=1e-10, atol=1e-10)
    torch.testing.assert_close(score, expected_score, rtol=1e-9, atol=1e-10)


# ------------------------------------------------------------------------------------ moments of draws


def test_moments_of_draws():
    loc, scale = moments(torch.tensor([[0.0, 1.0], [2.0, 1.0]]))
    assert loc.tolist() == [1.0, 1.0]
    assert scale.diag().tolist() == [pytest.approx(2**0.5), 1.0]


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("value", [0.0, 0.1, -3.3e5, 7.7e-9])
def test_a_latent_that_does_not_vary_has_width_one(value, dtype):
    """Rounding gives such a latent a spread of its own: 3.3 has no mean of exactly 3.3."""
    z = torch.stack([torch.full((999,), value, dtype=dtype), torch.randn(999, dtype=dtype)], 1)
    assert moments(z)[1][0, 0] == 1
    draws = Draws(z, torch.zeros(999), torch.randn(999, dtype=dtype))
    _, covariance = damped_covariance(draws, 0.1)
    assert float(covariance[0, 0]) == pytest.approx(1, abs=1e-3)
    start = around_draws(draws)
    value, score = start.log_prob_and_score(start.sample(500))
    assert bool(torch.isfinite(value).all())
    assert bool(torch.isfinite(score).all())


def uneven(n=400, dim=3, dtype=torch.float64):
    """Correlated draws with weights too uneven to be used."""
    tril = torch.tensor([[1.0, 0, 0], [0.8, 0.3, 0], [-0.5, 0.2, 2.0]], dtype=dtype)[:dim, :dim]
    z = torch.randn(n, dim, dtype=dtype) @ tril.T + 5
    return Draws(z, torch.zeros(n, dtype=dtype), 8 * torch.randn(n, dtype=dtype))


def test_the_covariance_is_that_of_the_damped_weights():
    draws = uneven()
    log_weight, covariance = damped_covariance(draws, 0.2)
    gamma = damping(draws.log_weight, 0.2)
    assert 0.01 < gamma < 0.5
    torch.testing.assert_close(log_weight, gamma * draws.log_weight)
    assert effective_sample_size(log_weight) == pytest.approx(80, rel=1e-3)
    expected = draws.z.T.cov(correction=0, aweights=torch.softmax(log_weight, 0))
    torch.testing.assert_close(covariance, expected + 1e-6 * expected.diagonal().diag(), rtol=1e-10, atol=1e-10)
    undamped = draws.z.T.cov(correction=0, aweights=torch.softmax(draws.log_weight, 0))
    assert float((covariance - undamped).abs().max()) > 0.2


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_it_can_be_factorised_in_the_dtype_of_the_draws(dtype):
    """Sixty latents that are all the same but for rounding; fewer draws than latents; units far apart."""
    same = torch.randn(1000, 1, dtype=dtype).expand(-1, 60) + 100
    few = torch.randn(20, 60, dtype=dtype) * torch.logspace(-10, 10, 60, dtype=dtype)
    for z in (same, few):
        draws = Draws(z, torch.zeros(len(z)), torch.zeros(len(z), dtype=dtype))
        _, covariance = damped_covariance(draws, 0.5)
        assert covariance.dtype == torch.float64
        assert bool(torch.isfinite(torch.linalg.cholesky(covariance.to(dtype))).all())


# ------------------------------------------------------------------------------------ around draws


def test_around_draws_written_out():
    """The parts, read off the start, are those that the head of the file names; so are density and score."""
    draws, num_laws, share = uneven(), 50, 0.3
    start = around_draws(draws, num_laws, share)
    laws, dim = start.laws, 3
    assert all(bool((draws.z == loc).all(1).any()) for loc in laws.loc)
    _, covariance = damped_covariance(draws, 0.1)
    bandwidth = (4 / ((dim + 2) * num_laws)) ** (1 / (dim + 4))
    torch.testing.assert_close(laws.scale_tril @ laws.scale_tril.mT, (bandwidth**2 * covariance).expand(50, 3, 3))
    torch.testing.assert_close(laws.log_weight.exp(), torch.full((50,), 0.02, dtype=torch.float64))

    def direct(z):
        loc, scale = moments(draws.z)
        base = torch.stack([MultivariateNormal(loc, scale_tril=w * scale).log_prob(z) for w in (1, 3, 10)])
        near = torch.stack(
            [MultivariateNormal(m, covariance_matrix=bandwidth**2 * covariance).log_prob(z) for m in laws.loc]
        )
        base, near = torch.logsumexp(base, 0) - math.log(3), torch.logsumexp(near, 0) - math.log(50)
        return torch.logaddexp(base + math.log(0.3), near + math.log(0.7))

    z = start.sample(60)
    value, score = start.log_prob_and_score(z)
    expected, expected_score = value_and_score(direct, z)
    torch.testing.assert_close(value, expected, rtol=1e-10, atol=1e-10)
    torch.testing.assert_close(score, expected_score, rtol=1e-9, atol=1e-9)


def test_its_density_integrates_to_one():
    draws = uneven(200, 1)
    grid = torch.linspace(-100, 110, 40_001, dtype=torch.float64)
    value = around_draws(draws, 20).log_prob_and_score(grid[:, None])[0].exp()
    assert float(torch.trapezoid(value, grid)) == pytest.approx(1, abs=1e-8)


def test_it_has_an_eye_on_its_surroundings():
    """A quarter of the draws are the widened Gaussian's, a third of these ten times as wide as the guide's."""
    draws = uneven(dim=1)
    z = around_draws(draws).sample(40_000)[:, 0]
    far = float(((z - draws.z.mean()).abs() > 5 * draws.z.std()).double().mean())
    normal = torch.distributions.Normal(0.0, 1.0)
    expected = 0.25 / 3 * sum(2 * float(normal.cdf(torch.tensor(-5 / w))) for w in (3, 10))
    assert abs(far - expected) < 5 * math.sqrt(expected / 40_000)


def test_one_heavy_weight_does_not_decide_where_to_look():
    draws = uneven(1000)
    draws.log_weight[17] = 500.0
    chosen = around_draws(draws).laws.loc
    distinct = len(chosen.unique(dim=0))
    assert distinct > 40
    assert int((chosen == draws.z[17]).all(1).sum()) < 50
    raw = torch.softmax(draws.log_weight, 0)
    assert float(raw.max()) > 0.999  # without damping every law would lie there


def test_weights_do_count():
    """Two equal groups, one with eight times the weight: it has about eight ninths of the laws."""
    group = torch.randperm(2000) % 2
    draws = Draws(torch.randn(2000, 2) + 10 * group[:, None], torch.zeros(2000), math.log(8) * group)
    share = float((around_draws(draws).laws.loc[:, 0] > 5).double().mean())
    assert share == pytest.approx(8 / 9, abs=0.05)


def test_draws_without_weight_are_never_chosen():
    draws = uneven(300)
    draws.log_weight[::3] = -math.inf
    chosen = around_draws(draws).laws.loc
    assert not bool(torch.isin(chosen[:, 0], draws.z[::3, 0]).any())


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_tempered_from_it_the_evidence_is_right(dtype):
    """Draws of the first mode alone, with weights that are worth nothing: shares and evidence all the same."""
    z = (LOC[0] + 1.5 * torch.randn(500, 2).double()).to(dtype)
    density = FunctionDensity(lambda x: log_prob(x.double()).to(dtype), 2, dtype=dtype)
    run = TemperedSMC(5000, 5).run(density, around_draws(Draws(z, torch.zeros(500), torch.zeros(500, dtype=dtype))))
    assert run.z.dtype == dtype
    assert run.log_evidence_se < 0.15
    assert abs(run.log_evidence - 2) < 5 * run.log_evidence_se
    error = math.sqrt(0.21 * (run.log_evidence_se**2 + 1 / 5000))
    assert (
        abs(float((run.z[:, 0] < 0).double().mean()) - 0.3) < 5 * error < 0.35
    )  # of the guide's draws all are there


@pytest.mark.parametrize(
    ("count", "arguments"),
    [(1, {"num_laws": 1}), (50, {}), (50, {"num_laws": 0}), (50, {"num_laws": 9, "share": 0.0}),
     (50, {"num_laws": 9, "share": 1.0})],
)  # fmt: skip
def test_bad_arguments(count, arguments):
    with pytest.raises(ValueError, match="expected 1 <= num_laws <= draws and 0 < share < 1"):
        around_draws(uneven(count), **arguments)


@pytest.mark.parametrize(("value", "words"), [(-math.inf, "at least one finite"), (math.nan, "found 3 NaN"),
                                              (math.inf, "found 3 NaN or .inf")])  # fmt: skip
def test_weights_that_are_no_weights(value, words):
    draws = uneven(200)
    draws.log_weight[: 200 if value == -math.inf else 3] = value
    with pytest.raises(ValueError, match=words):
        around_draws(draws)
