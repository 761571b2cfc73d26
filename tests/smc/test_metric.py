# SPDX-License-Identifier: Apache-2.0
"""The metric: coordinates and scores by another route, the law that moves in it leave, and what makes it."""

import math

import pytest
import torch
from torch.distributions import MultivariateNormal

from pyro_sm.density import FunctionDensity
from pyro_sm.gaussians.gaussian import GaussianDensity
from pyro_sm.smc import HamiltonianMove
from pyro_sm.smc.metric import Metric, fisher_metric
from pyro_sm.smc.mixing import effective_draws
from pyro_sm.smc.moves import Chains

pytestmark = pytest.mark.usefixtures("float64")

exact = {"rtol": 1e-10, "atol": 1e-10}
FACTOR = torch.tensor([[1.5, 0.0, 0.0], [-0.8, 0.6, 0.0], [0.3, 2.0, 4.0]], dtype=torch.float64)
LOC = torch.tensor([1.0, -2.0, 0.5], dtype=torch.float64)
TRIL = torch.tensor([[1.0, 0.0, 0.0], [0.6, 0.5, 0.0], [-0.3, 0.2, 0.3]], dtype=torch.float64)


def law():
    return GaussianDensity(LOC, TRIL)


def chains_of(density, z):
    return Chains(z, *density.log_prob_and_score(z))


class Transposed(Metric):
    """A known wrong variant: momentum and score in coordinates of the transpose."""

    def white_score(self, score):
        return torch.linalg.solve_triangular(self.factor.T, score.T, upper=True).T


class Forgotten(Metric):
    """A known wrong variant: positions are made white, and not put back the same way."""

    def to_latent(self, u):
        return torch.linalg.solve_triangular(self.factor, u.T, upper=False).T


# ---------------------------------------------------------------------------------------------- exact


def test_there_and_back():
    metric, z = Metric(FACTOR), 3 * torch.randn(7, 3)
    torch.testing.assert_close(metric.to_latent(metric.to_white(z)), z, **exact)
    torch.testing.assert_close(metric.to_white(z), torch.stack([FACTOR.T @ row for row in z]), **exact)
    assert not torch.allclose(Forgotten(FACTOR).to_latent(metric.to_white(z)), z)


def test_the_white_score_is_that_of_the_density_in_white_coordinates():
    metric, density = Metric(FACTOR), law()
    u = torch.randn(5, 3).requires_grad_()
    (expected,) = torch.autograd.grad(density.log_prob(metric.to_latent(u)).sum(), u)
    _, score = density.log_prob_and_score(metric.to_latent(u.detach()))
    torch.testing.assert_close(metric.white_score(score), expected, **exact)
    assert not torch.allclose(Transposed(FACTOR).white_score(score), expected)


def test_distance_is_that_of_the_information():
    metric, step = Metric(FACTOR), torch.randn(6, 3)
    information = FACTOR @ FACTOR.T
    torch.testing.assert_close(metric.to_white(step).square().sum(1), ((step @ information) * step).sum(1), **exact)


@pytest.mark.parametrize("num_leapfrog", [1, 4])
def test_a_move_is_one_of_the_whitened_density(num_leapfrog):
    """The same noise, once through the metric and once on a density that was written in white coordinates."""
    metric, density = Metric(FACTOR), law()
    white = FunctionDensity(lambda u: density.log_prob(metric.to_latent(u)), 3, dtype=torch.float64)
    z = density.sample(200)
    move, step = HamiltonianMove(num_leapfrog), torch.tensor(0.5)
    torch.manual_seed(1)
    found = metric.moved(move, density.log_prob_and_score, chains_of(density, z), step)
    torch.manual_seed(1)
    expected = move.apply(
        white.log_prob_and_score, chains_of(white, metric.to_white(z)), step, torch.ones(3, dtype=torch.float64)
    )
    assert 0.1 < float(found.accepted.double().mean()) < 0.995
    assert torch.equal(found.accepted, expected.accepted)
    torch.testing.assert_close(found.acceptance, expected.acceptance, **exact)
    torch.testing.assert_close(found.chains.z, metric.to_latent(expected.chains.z), **exact)
    for have, want in zip(found.chains[1:], chains_of(density, found.chains.z)[1:], strict=True):
        torch.testing.assert_close(have, want, **exact)


def test_who_is_refused_stays_to_the_last_bit():
    density, z = law(), law().sample(50)
    old = chains_of(density, z)
    found = Metric(FACTOR).moved(HamiltonianMove(), density.log_prob_and_score, old, torch.tensor(0.6))
    stayed = ~found.accepted
    assert 5 < int(stayed.sum()) < 50
    for have, want in zip(found.chains, old, strict=True):
        assert torch.equal(have[stayed], want[stayed])
        assert not bool((have[found.accepted] == want[found.accepted]).any())


# --------------------------------------------------------------------------------- the Fisher metric


def test_of_a_gaussian_it_is_the_precision():
    density, n = law(), 400_000
    _, score = density.log_prob_and_score(density.sample(n))
    factor = fisher_metric(score).factor
    precision = torch.linalg.inv(TRIL @ TRIL.T)
    scale = (precision.diagonal().outer(precision.diagonal()) + precision.square()).sqrt()  # Wishart
    assert float(((factor @ factor.T - precision).abs() / scale).max()) < 5 / math.sqrt(n)
    assert torch.equal(factor, factor.tril())
    covariance = TRIL @ TRIL.T
    assert float(((factor @ factor.T - covariance).abs() / scale).max()) > 50 / math.sqrt(n)


def test_shrinkage_written_out():
    score = torch.tensor([[1.0, 2.0], [-3.0, 0.5], [0.2, -1.0]], dtype=torch.float64)
    information = score.T @ score / 3
    n, dim = 3, 2
    expected = (n * information + dim * information.diagonal().diag()) / (n + dim)
    factor = fisher_metric(score).factor
    torch.testing.assert_close(factor @ factor.T, expected, **exact)


def test_one_score_leaves_a_metric_that_can_be_used():
    factor = fisher_metric(torch.tensor([[2.0, -4.0]])).factor
    torch.testing.assert_close(factor @ factor.T, torch.tensor([[4.0, -8.0 / 3], [-8.0 / 3, 16.0]]), **exact)


def test_weights_are_repetitions():
    """Scores with weights .5 and .25 twice are those with one of them taken twice, but for the count."""
    score = torch.randn(3, 2)
    weight = torch.tensor([2.0, 1.0, 1.0]) / 4
    information = (score.T * weight) @ score
    effective = 1 / float(weight.square().sum())
    expected = (effective * information + 2 * information.diagonal().diag()) / (effective + 2)
    for scale in (1.0, 1e-8, 40.0):  # which need not sum to 1
        factor = fisher_metric(score, scale * weight).factor
        torch.testing.assert_close(factor @ factor.T, expected, **exact)


@pytest.mark.parametrize("bad", [math.nan, math.inf, -math.inf])
def test_rows_that_do_not_count(bad):
    score = torch.randn(6, 2)
    spoilt = torch.cat([score, torch.tensor([[bad, 1.0], [5.0, 7.0]])])
    weight = torch.tensor([1.0] * 6 + [1.0, 0.0])
    torch.testing.assert_close(fisher_metric(spoilt, weight).factor, fisher_metric(score).factor, **exact)
    weight[6:] = math.nan
    torch.testing.assert_close(fisher_metric(spoilt, weight).factor, fisher_metric(score).factor, **exact)
    torch.testing.assert_close(fisher_metric(spoilt[:7]).factor, fisher_metric(score).factor, **exact)


@pytest.mark.parametrize("score", [torch.zeros(5, 3), torch.full((5, 3), math.nan), torch.zeros(0, 3)])
def test_without_information_all_widths_are_one(score):
    assert torch.equal(fisher_metric(score).factor, torch.eye(3))
    assert torch.equal(fisher_metric(score, torch.zeros(len(score))).factor, torch.eye(3))


def test_a_coordinate_without_information_has_width_one():
    score = torch.randn(50, 3)
    score[:, 1] = 0
    factor = fisher_metric(score).factor
    information = factor @ factor.T
    assert information[1].tolist() == [0.0, 1.0, 0.0]
    assert fisher_metric(score[:, [0, 2]]).factor.shape == (2, 2)
    torch.testing.assert_close(information[[0, 2]][:, [0, 2]].diagonal(), score[:, [0, 2]].square().mean(0), **exact)


def test_equal_coordinates_can_be_factorised():
    """All scores along one line: without shrinkage, and with many scores, the information is singular."""
    score = torch.randn(10_000, 1) * torch.tensor([1.0, 1.0, -2.0])
    factor = fisher_metric(score).factor
    assert bool(torch.isfinite(factor).all())
    assert bool((factor.diagonal() > 0).all())
    back = Metric(factor).to_latent(Metric(factor).to_white(score))
    torch.testing.assert_close(back, score, rtol=1e-6, atol=1e-6)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_units_do_not_matter(dtype):
    """Scores in units 10¹⁵ apart, whose squares no float32 holds."""
    scale = torch.tensor([1e-12, 1.0, 1e12], dtype=dtype)
    score = torch.randn(40, 3).to(dtype)
    found = fisher_metric(score * scale**2).factor
    assert found.dtype == dtype
    torch.testing.assert_close(found / scale.unsqueeze(-1) ** 2, fisher_metric(score).factor, rtol=1e-4, atol=1e-4)


# ---------------------------------------------------------------------------------------- statistical


def moved_often(metric, density, z, num_moves=5):
    chains = chains_of(density, z)
    for _ in range(num_moves):
        chains = metric.moved(
            HamiltonianMove(2), density.log_prob_and_score, chains, torch.full((), 0.4, dtype=torch.float64)
        ).chains
    return chains.z


def worst_error(z):
    """Of means and second moments of the white latents, in standard errors; those of ``N(0, I)`` are known."""
    white = torch.linalg.solve_triangular(TRIL, (z - LOC).T, upper=False).T
    n = len(white)
    first = white.mean(0).abs().max() * math.sqrt(n)
    second = (white.T @ white / n - torch.eye(3)).abs().max() * math.sqrt(n / 2)
    return float(torch.maximum(first, second))


@pytest.mark.parametrize(
    ("kind", "right"),
    [(Metric, True), (Transposed, True), (Forgotten, False)],
    ids=lambda x: getattr(x, "__name__", x),
)
def test_a_correlated_gaussian_is_left_as_it_is(kind, right):
    """A wrong score is put right by the acceptance, a wrong way back is not."""
    density = law()
    metric = kind(torch.tensor([[1.0, 0.0, 0.0], [0.1, 1.5, 0.0], [-0.1, 0.15, 3.0]]))
    error = worst_error(moved_often(metric, density, density.sample(40_000)))
    assert (error < 5) if right else (error > 10)


@pytest.mark.parametrize("correlation", [0.999])
def test_on_a_ridge_it_mixes_and_the_diagonal_does_not(correlation):
    """Effective draws of 64 chains of 200, each metric with the step size that its own acceptance asks for."""
    covariance = torch.tensor([[1.0, correlation], [correlation, 1.0]])
    density = GaussianDensity(torch.zeros(2), torch.linalg.cholesky(covariance))
    z = density.sample(64)
    _, score = density.log_prob_and_score(density.sample(4000))
    white = fisher_metric(score)
    diagonal = Metric(white.factor.square().sum(1).sqrt().diag())
    found = []
    for metric in (white, diagonal):
        chains, step, path = chains_of(density, z), torch.ones(()), []
        move = HamiltonianMove(num_leapfrog=2)
        for t in range(300):
            made = metric.moved(move, density.log_prob_and_score, chains, step)
            chains = made.chains
            if t < 100:
                step = move.adapted(step, made.acceptance.mean())
            else:
                path.append(chains.z)
        # Along the ridge, where the two differ.
        found.append(float(effective_draws(torch.stack(path, 1).sum(-1))))
    assert found[0] > 3000
    assert found[1] < found[0] / 20


def test_normalisation_is_not_needed():
    """The log density in white coordinates is short of a constant; acceptances of two constants are the same."""
    metric, z = Metric(FACTOR), law().sample(30)
    found = []
    for constant in (0.0, 7.0):
        density = FunctionDensity(
            lambda x, c=constant: MultivariateNormal(LOC, scale_tril=TRIL).log_prob(x) + c, 3, dtype=torch.float64
        )
        torch.manual_seed(2)
        found.append(
            metric.moved(HamiltonianMove(), density.log_prob_and_score, chains_of(density, z), torch.tensor(0.5))
        )
    torch.testing.assert_close(found[0].acceptance, found[1].acceptance, rtol=1e-8, atol=1e-8)
