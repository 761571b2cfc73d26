# SPDX-License-Identifier: Apache-2.0
"""Mixtures of t laws: normalised, drawn as they are, with the right gradient; EM climbs, and finds what was drawn."""

from __future__ import annotations

import math

import pytest
import torch

from pyro_sm.gaussians import student_mixture
from pyro_sm.gaussians.student_mixture import (
    StudentMixture,
    em_step,
    first_guess,
    fitted,
    moment_law,
    penalised_log_likelihood,
)


def mixture():
    """Two correlated components of unequal share and width, in the plane."""
    log_weight = torch.tensor([0.3, 0.7], dtype=torch.float64).log()
    loc = torch.tensor([[-2.0, 1.0], [1.5, -0.5]], dtype=torch.float64)
    tril = torch.tensor([[[0.5, 0.0], [0.4, 0.3]], [[1.0, 0.0], [-0.6, 0.8]]], dtype=torch.float64)
    return StudentMixture(log_weight, loc, tril)


def single(dim):
    tril = torch.eye(dim, dtype=torch.float64) + 0.3 * torch.ones(dim, dim, dtype=torch.float64).tril(-1)
    loc = torch.arange(dim, dtype=torch.float64)[None]
    return StudentMixture(torch.zeros(1, dtype=torch.float64), loc, tril[None])


def grid(dim, half=400.0, count=4001):
    """Points and volumes of a sinh-spaced grid, fine near the origin and wide."""
    u = torch.linspace(-math.asinh(half), math.asinh(half), count if dim == 1 else 901, dtype=torch.float64)
    x, w = torch.sinh(u), torch.cosh(u) * (u[1] - u[0])
    if dim == 1:
        return x[:, None], w
    points = torch.stack(torch.meshgrid(x, x, indexing="ij"), -1).reshape(-1, 2)
    return points, (w[:, None] * w).reshape(-1)


@pytest.mark.parametrize("law", [single(1), single(2), mixture()], ids=["1-D", "2-D", "mixture"])
def test_density_integrates_to_one(law):
    z, volume = grid(law.loc.shape[1])
    assert float((volume * law.log_prob(z).exp()).sum()) == pytest.approx(1, abs=1e-5)


def test_a_forgotten_determinant_is_seen():
    law = mixture()
    z, volume = grid(2)
    log_det = law.scale_tril.diagonal(dim1=-2, dim2=-1).log().sum(-1)
    wrong = torch.logsumexp(law.joint_log_prob(z) + log_det[:, None], 0)
    assert abs(float((volume * wrong.exp()).sum()) - 1) > 0.1


def test_density_in_one_dimension_is_torchs():
    law = single(1)
    z = torch.linspace(-9, 9, 7, dtype=torch.float64)
    torch.testing.assert_close(law.log_prob(z[:, None]), torch.distributions.StudentT(law.nu).log_prob(z))


def test_score_is_the_gradient():
    law = mixture()
    z = 3 * torch.randn(20, 2, dtype=torch.float64)
    leaf = z.clone().requires_grad_()
    value = law.log_prob(leaf)
    (expected,) = torch.autograd.grad(value.sum(), leaf)
    found, score = law.log_prob_and_score(z)
    torch.testing.assert_close(found, value.detach(), rtol=1e-12, atol=1e-12)
    torch.testing.assert_close(score, expected, rtol=1e-10, atol=1e-12)


def test_draws_have_the_moments():
    law, count = mixture(), 40_000
    z = law.sample(count)
    covariance = law.covariance()
    error = (covariance.diagonal() / count).sqrt()
    assert bool(((z.mean(0) - law.mean()).abs() < 5 * error).all())
    products = (z - law.mean())[:, :, None] * (z - law.mean())[:, None]
    assert bool(((products.mean(0) - covariance).abs() < 5 * products.std(0) / math.sqrt(count)).all())
    # ν/(ν−2) forgotten is seen at this size
    wrong = law.scale_tril[1] @ law.scale_tril[1].T
    second = products[z[:, 0] > 1.5]
    assert float((second.mean(0) - wrong).abs().max()) > 5 * float(second.std(0).max()) / math.sqrt(len(second))


def test_shares_of_draws_are_systematic():
    z = mixture().sample(1000)
    assert len(z) == 1000
    far = StudentMixture(mixture().log_weight, 1e6 * mixture().loc, mixture().scale_tril)
    assert int((far.sample(1000)[:, 0] < 0).sum()) == 300


def test_em_climbs_and_a_wrong_step_does_not():
    z = mixture().sample(500)
    weight = torch.softmax(torch.randn(500, dtype=torch.float64), 0)
    law, prior = first_guess(z, weight, 3)
    values = [penalised_log_likelihood(law, z, weight, prior)]
    for _ in range(25):
        law = em_step(law, z, weight, prior)
        values.append(penalised_log_likelihood(law, z, weight, prior))
    gains = torch.tensor(values).diff()
    assert float(gains.min()) > -1e-9
    assert values[-1] > values[0] + 0.05
    # Covariances for scales: the factor ν/(ν−2) that a step by moments would bring
    wrong = law._replace(scale_tril=law.scale_tril * math.sqrt(law.nu / (law.nu - 2)))
    assert penalised_log_likelihood(wrong, z, weight, prior) < values[-1] - 1e-3


def test_em_finds_the_law_that_was_drawn_from():
    law = mixture()
    z = law.sample(20_000)
    found = fitted(z, torch.zeros(len(z)), 2, num_steps=60)
    order = found.loc[:, 0].argsort()
    torch.testing.assert_close(found.loc[order], law.loc, rtol=0, atol=0.06)
    torch.testing.assert_close(found.log_weight[order].exp(), law.log_weight.exp(), rtol=0, atol=0.03)
    scale = law.scale_tril @ law.scale_tril.mT  # shrunk by a hundredth of what is held, .01/.31 for the smaller one
    torch.testing.assert_close((found.scale_tril @ found.scale_tril.mT)[order], scale, rtol=0, atol=0.1)


def test_weights_count_like_repeats():
    z = mixture().sample(60)
    times = torch.arange(60) % 3 + 1
    repeated, equal = z.repeat_interleave(times, 0), torch.full((120,), 1 / 120, dtype=torch.float64)
    law, prior = first_guess(z, times.double() / 120, 2)
    one, other = em_step(law, z, times.double() / 120, prior), em_step(law, repeated, equal, prior)
    for a, b in zip(one[:3], other[:3], strict=True):
        torch.testing.assert_close(a, b, rtol=1e-10, atol=1e-12)


@pytest.mark.parametrize(("dim", "share"), [(2, 0.95), (10, 0.79), (50, 0.47)])
def test_price_where_the_target_is_normal(dim, share):
    """Radially: ``1/∫ p²/q``."""
    law = StudentMixture(*(x.double() for x in (torch.zeros(1), torch.zeros(1, dim), torch.eye(dim)[None])))
    radius = torch.linspace(1e-6, 30, 20_000, dtype=torch.float64)
    z = torch.zeros(len(radius), dim, dtype=torch.float64)
    z[:, 0] = radius
    log_p = -0.5 * radius.square() - dim / 2 * math.log(2 * math.pi)
    log_area = math.log(2) + dim / 2 * math.log(math.pi) - math.lgamma(dim / 2) + (dim - 1) * radius.log()
    integral = torch.exp(2 * log_p - law.log_prob(z) + log_area).sum() * (radius[1] - radius[0])
    assert 1 / float(integral) == pytest.approx(share, abs=0.01)


def test_few_draws_leave_a_density():
    """Three draws in five dimensions have no covariance: the prior has."""
    z = torch.randn(3, 5, dtype=torch.float64)
    law = fitted(z, torch.zeros(3), 12)
    assert law.num_components == 3
    assert bool(torch.isfinite(law.log_prob(torch.zeros(1, 5, dtype=torch.float64))).all())


def test_modes_far_apart_do_not_widen_each_other():
    law = mixture()._replace(loc=1e3 * mixture().loc)
    z = law.sample(2000)
    torch.manual_seed(1)
    found = fitted(z, torch.zeros(2000), 6)
    assert float(found.scale_tril.diagonal(dim1=-2, dim2=-1).max()) < 10


def test_a_law_with_the_moments_of_draws():
    z = mixture().sample(300)
    log_weight = torch.randn(300, dtype=torch.float64)
    law, weight = moment_law(z, log_weight), torch.softmax(log_weight, 0)
    beyond = torch.cat([z, torch.full((1, 2), math.inf)]), torch.cat([log_weight, torch.tensor([-math.inf])])
    torch.testing.assert_close(moment_law(*beyond).loc, law.loc)
    torch.testing.assert_close(fitted(*beyond, 1).num_components, 1)
    torch.testing.assert_close(law.mean(), weight @ z)
    torch.testing.assert_close(law.covariance(), torch.cov(z.T, aweights=weight, correction=0), rtol=1e-5, atol=1e-9)


def test_errors():
    z = torch.randn(4, 2, dtype=torch.float64)
    with pytest.raises(ValueError, match="num_components >= 1, found 0"):
        fitted(z, torch.zeros(4), 0)
    with pytest.raises(ValueError, match="at least one finite log weight"):
        fitted(z, torch.full((4,), -math.inf), 2)
    assert student_mixture.NU == 7.0
