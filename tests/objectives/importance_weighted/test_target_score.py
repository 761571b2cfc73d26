# SPDX-License-Identifier: Apache-2.0
"""The target's score as a control variate: no variance for normal laws, no bias for anything, and a good weight."""

import math

import pytest
import torch
from oracles import gauss_hermite, two_modes

from pyro_sm.density import value_and_score
from pyro_sm.objectives.importance_weighted.target_score import fisher_information, score_shift

exact = {"rtol": 1e-10, "atol": 1e-10}
ANY = torch.tensor([2.0, 0.5], dtype=torch.float64)


def log_variance_of(variance, r):
    """``h`` of a posterior variance (B, D) at ratios (B,)."""
    square = r[:, None].square()
    return torch.log(variance * (1 + square) / square)


def test_independent_normal_latents_leave_no_variance():
    torch.manual_seed(0)
    tau = torch.tensor([0.1, 1.0, 30.0], dtype=torch.float64)
    u = tau.sqrt() * torch.randn(50, 3, dtype=torch.float64)
    r, noise = torch.logspace(-2, 1, 50, dtype=torch.float64), torch.randn(50, 3, dtype=torch.float64)
    square = r[:, None].square()
    y, variance = u + r[:, None] * noise, tau * square / (tau + square)
    found = u + score_shift(-u / tau, r, noise, 1 / tau, log_variance_of(variance, r))
    torch.testing.assert_close(found, y * tau / (tau + square), **exact)
    # The weight of a unit normal, right where the base has the scale of the law, is wrong here.
    wrong = u + score_shift(-u / tau, r, noise, torch.ones(3).double(), torch.zeros(50, 3).double())
    assert not torch.allclose(wrong, y * tau / (tau + square), rtol=1e-2)


@pytest.mark.parametrize("r", [0.3, 1.0])
@pytest.mark.parametrize("h", [-3.0, 0.0, 2.0])
def test_the_conditional_mean_is_kept_whatever_the_weight(r, h):
    """By quadrature over ``u`` given ``y``, under two modes."""
    law, y = two_modes(), torch.tensor([0.4, -0.2], dtype=torch.float64)
    nodes, weights = gauss_hermite(60)
    noise = torch.cartesian_prod(nodes, nodes)
    u = y - r * noise  # the prior of ε, reweighted by the law of u, is the posterior
    weight = torch.outer(weights, weights).reshape(-1) * law.log_prob(u).exp()
    weight = weight / weight.sum()
    _, score = value_and_score(law.log_prob, u)
    level, log_variance = torch.full((len(u),), r, dtype=torch.float64), torch.full_like(u, h)
    shift = score_shift(score, level, noise, ANY, log_variance)
    torch.testing.assert_close(weight @ shift, torch.zeros(2, dtype=torch.float64), rtol=0, atol=1e-7)
    assert float((weight @ shift.square()).max()) > 1e-4
    wrong = score_shift(0.5 * score, level, noise, ANY, log_variance)
    assert float((weight @ wrong).abs().max()) > 1e-3


def spread(law_score, u, noise, r, mean, variance, information):
    level = torch.full((len(u),), r, dtype=torch.float64)
    shift = score_shift(law_score, level, noise, information, log_variance_of(variance, level))
    return float((u + shift - mean).square().mean())


@pytest.mark.parametrize("r", [0.1, 0.5, 2.0])
def test_the_weight_by_information_is_the_best_of_its_kind(r):
    law = two_modes()
    torch.manual_seed(0)
    u = law.sample(100_000)
    _, score = value_and_score(law.log_prob, u)
    noise = torch.randn_like(u)
    mean, _ = law.moments(u + r * noise, torch.full((len(u),), r, dtype=torch.float64))
    free = torch.full_like(u, math.inf)  # a variance that never binds
    best = fisher_information(score, torch.ones(len(u), dtype=torch.float64))
    least = spread(score, u, noise, r, mean, free, best)
    assert least < float((u - mean).square().mean())
    for factor in (0.5, 2.0):
        assert least < spread(score, u, noise, r, mean, free, factor * best)


def test_a_narrow_place_is_not_drowned_by_the_scores_of_wide_ones():
    """Two scales far apart: in the narrow one the weight by information alone adds noise of many of its widths."""
    torch.manual_seed(1)
    tau = torch.tensor([1e-4, 1.0], dtype=torch.float64).repeat(20_000)[:, None]
    u = tau.sqrt() * torch.randn(len(tau), 1, dtype=torch.float64)
    r, noise = 0.05, torch.randn_like(u)
    mean = (u + r * noise) * tau / (tau + r**2)
    information = fisher_information(-u / tau, torch.ones(len(u), dtype=torch.float64))
    narrow = tau[:, 0] < 1e-3

    def there(variance):
        return spread((-u / tau)[narrow], u[narrow], noise[narrow], r, mean[narrow], variance[narrow], information)

    plain = float((u - mean)[narrow].square().mean())
    assert there(tau * r**2 / (tau + r**2)) < 0.01 * plain
    assert there(torch.full_like(u, math.inf)) > 0.05 * plain


def test_rows_without_a_score_are_left_alone():
    score = torch.tensor([[1.0, 2.0], [math.nan, 0.0], [math.inf, 1.0], [3.0, -1.0]])
    weight = torch.tensor([0.5, 0.3, 0.2, 0.0])
    information = fisher_information(score, weight)
    torch.testing.assert_close(information, torch.tensor([1.0, 4.0]))
    shift = score_shift(score, torch.ones(4), torch.ones(4, 2), information, torch.zeros(4, 2))
    assert bool((shift[1:3] == 0).all())
    assert bool((shift[[0, 3]] != 0).any(-1).all())
    assert fisher_information(score, torch.tensor([0.0, 1.0, 1.0, 0.0])) is None
    assert fisher_information(1e30 * score[:1], weight[:1]) is None
