# SPDX-License-Identifier: Apache-2.0
"""The target's score as a control variate: no variance for Gaussians, no bias for anything, and the best weight."""

import math

import pytest
import torch
from test_denoiser import gauss_hermite, two_modes

from pyro_sm.density import value_and_score
from pyro_sm.objectives.target_score import ScoreBlend, fit_blend

exact = {"rtol": 1e-10, "atol": 1e-10}


def gaussian(dim=3):
    root = torch.randn(dim, dim, dtype=torch.float64)
    covariance = root @ root.T + 0.1 * torch.eye(dim, dtype=torch.float64)
    return covariance, torch.linalg.inv(covariance)


def blend_of(information):
    values, vectors = torch.linalg.eigh(information)
    return ScoreBlend(values, vectors)


def test_a_correlated_gaussian_leaves_no_variance():
    covariance, precision = gaussian()
    u = torch.randn(50, 3, dtype=torch.float64) @ torch.linalg.cholesky(covariance).T
    r, noise = torch.logspace(-2, 1, 50, dtype=torch.float64), torch.randn(50, 3, dtype=torch.float64)
    y = u + r[:, None] * noise
    eye = torch.eye(3, dtype=torch.float64)
    mean = torch.stack(
        [covariance @ torch.linalg.solve(covariance + s**2 * eye, row) for s, row in zip(r, y, strict=True)]
    )
    found = u + blend_of(precision).shift(-u @ precision, r, noise)
    torch.testing.assert_close(found, mean, **exact)
    # The weight of the identity, right for independent latents of unit size, is wrong here.
    assert not torch.allclose(u + blend_of(eye).shift(-u @ precision, r, noise), mean, rtol=1e-2)


def conditional(r, y, blend, score_factor=1.0):
    """Mean and variance (D,) of the blended target given ``y`` under two modes, by quadrature over ``u``."""
    law = two_modes()
    nodes, weights = gauss_hermite(60)
    grid = torch.cartesian_prod(nodes, nodes)
    weight = torch.outer(weights, weights).reshape(-1)
    # u = y − r ε under the prior of ε: reweighted by the law of u, it is the posterior.
    u = y - r * grid
    weight = weight * law.log_prob(u).exp()
    weight = weight / weight.sum()
    _, score = value_and_score(law.log_prob, u)
    target = u + blend.shift(score_factor * score, torch.full((len(u),), r, dtype=torch.float64), grid)
    mean = weight @ target
    return mean, weight @ (target - mean).square(), weight @ u


@pytest.mark.parametrize("r", [0.3, 1.0])
@pytest.mark.parametrize("size", [0.0, 1.0, 5.0])
def test_the_conditional_mean_is_kept_whatever_the_weight(r, size):
    y = torch.tensor([0.4, -0.2], dtype=torch.float64)
    blend = blend_of(size * torch.tensor([[2.0, 0.5], [0.5, 1.0]], dtype=torch.float64))
    found, _, mean = conditional(r, y, blend)
    torch.testing.assert_close(found, mean, rtol=1e-6, atol=1e-6)
    wrong, _, _ = conditional(r, y, blend, score_factor=0.5)
    assert not torch.allclose(wrong, mean, rtol=1e-3, atol=1e-3)


@pytest.mark.parametrize("r", [0.1, 0.5, 2.0])
def test_the_weight_is_the_best_there_is(r):
    law = two_modes()
    torch.manual_seed(0)
    u = law.sample(100_000)
    _, score = value_and_score(law.log_prob, u)
    noise = torch.randn_like(u)
    levels = torch.full((len(u),), r, dtype=torch.float64)
    mean, _ = law.moments(u + r * noise, levels)
    best = fit_blend(score, torch.ones(len(u), dtype=torch.float64))

    def spread(blend):
        return float((u + blend.shift(score, levels, noise) - mean).square().sum(-1).mean())

    least = spread(best)
    assert least < float((u - mean).square().sum(-1).mean())
    for factor in (0.5, 2.0):
        assert least < spread(ScoreBlend(factor * best.values, best.vectors))


def test_rows_without_a_score_are_left_alone():
    score = torch.tensor([[1.0, 2.0], [math.nan, 0.0], [math.inf, 1.0], [3.0, -1.0]])
    weight = torch.tensor([0.5, 0.3, 0.2, 0.0])
    blend = fit_blend(score, weight)
    torch.testing.assert_close(
        (blend.vectors * blend.values) @ blend.vectors.T, torch.tensor([[1.0, 2.0], [2.0, 4.0]])
    )
    shift = blend.shift(score, torch.ones(4), torch.ones(4, 2))
    assert bool((shift[1:3] == 0).all())
    assert bool((shift[[0, 3]] != 0).any(-1).all())
    assert fit_blend(score, torch.tensor([0.0, 1.0, 1.0, 0.0])) is None
    assert fit_blend(1e30 * score[:1], weight[:1]) is None
