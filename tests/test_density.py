# SPDX-License-Identifier: Apache-2.0
"""Densities without Pyro: values, scores, counts, and what is not a number."""

import math

import pytest
import torch
from torch.distributions import MultivariateNormal

from pyro_sm.base import Density, Evaluations
from pyro_sm.density import FunctionDensity, value_and_score
from pyro_sm.gaussians.gaussian import GaussianDensity, gaussian_log_prob

LOC = torch.tensor([0.7, -1.1, 2.0], dtype=torch.float64)
TRIL = torch.tensor([[1.3, 0, 0], [-0.6, 0.4, 0], [0.9, 0.2, 2.1]], dtype=torch.float64)
exact = {"rtol": 1e-10, "atol": 1e-12}


def banana(z):
    """Not Gaussian, not symmetric, not normalised."""
    return -0.5 * (z[:, 0] / 2) ** 2 - 2 * (z[:, 1] - 0.3 * z[:, 0] ** 2) ** 2 + 0.4 * torch.sin(z[:, 2] * z[:, 0])


def banana_score(z):
    a, b, c = z.unbind(-1)
    to_centred = 4 * (b - 0.3 * a**2)
    wave = 0.4 * torch.cos(c * a)
    return torch.stack([-a / 4 + 0.6 * a * to_centred + c * wave, -to_centred, a * wave], -1)


def points(n=11):
    return torch.randn(n, 3, dtype=torch.float64) * 1.5


# ---------------------------------------------------------------------------------------------- exact


def test_value_and_score_against_the_derivative_by_hand():
    z = points()
    with torch.no_grad():
        value, score = value_and_score(banana, z)
    torch.testing.assert_close(value, banana(z), **exact)
    torch.testing.assert_close(score, banana_score(z), **exact)
    assert not value.requires_grad
    assert not score.requires_grad
    assert not z.requires_grad


def test_gaussian_against_torch():
    z = points()
    law = MultivariateNormal(LOC, scale_tril=TRIL)
    density = GaussianDensity(LOC, TRIL)
    value, score = density.log_prob_and_score(z)
    torch.testing.assert_close(value, law.log_prob(z), **exact)
    torch.testing.assert_close(density.log_prob(z), law.log_prob(z), **exact)
    torch.testing.assert_close(score, -torch.linalg.solve(TRIL @ TRIL.T, (z - LOC).T).T, **exact)


def test_gaussian_log_prob_takes_any_leading_shape():
    z = points(24).reshape(2, 3, 4, 3)
    law = MultivariateNormal(LOC, scale_tril=TRIL)
    torch.testing.assert_close(gaussian_log_prob(z, LOC, TRIL), law.log_prob(z), **exact)
    torch.testing.assert_close(gaussian_log_prob(z[0, 0, 0], LOC, TRIL), law.log_prob(z[0, 0, 0]), **exact)


def test_gaussian_draws_have_its_moments():
    draws = GaussianDensity(LOC, TRIL).sample(40_000)
    white = torch.linalg.solve(TRIL, (draws - LOC).T).T
    assert draws.dtype == torch.float64
    assert float(white.mean(0).abs().max()) < 5 / math.sqrt(40_000)
    assert float((white.T @ white / 40_000 - torch.eye(3)).abs().max()) < 5 * math.sqrt(2 / 40_000)
    # The transpose of the factor has another covariance.
    wrong = torch.linalg.solve(TRIL.T, (draws - LOC).T).T
    assert float((wrong.T @ wrong / 40_000 - torch.eye(3)).abs().max()) > 0.1


def test_log_prob_is_differentiable_while_grad_is_enabled():
    z = points().requires_grad_(True)
    (score,) = torch.autograd.grad(FunctionDensity(banana, 3).log_prob(z).sum(), z)
    torch.testing.assert_close(score, banana_score(z.detach()), **exact)


# ------------------------------------------------------------------------------------ counts and shapes


def test_evaluations_are_counted():
    density = FunctionDensity(banana, 3)
    assert isinstance(density, Density)
    density.log_prob(points(7))
    assert density.evaluations == Evaluations(values=7, scores=0)
    density.log_prob_and_score(points(5))
    assert density.evaluations == Evaluations(values=12, scores=5)


def test_nan_is_minus_infinity():
    def half(z):
        return torch.log(z[:, 0])  # NaN for negative, −inf at zero

    density = FunctionDensity(half, 2)
    z = torch.tensor([[-1.0, 0.0], [0.0, 0.0], [math.e, 0.0]])
    expected = torch.tensor([-math.inf, -math.inf, 1.0])
    torch.testing.assert_close(density.log_prob(z), expected)
    value, score = density.log_prob_and_score(z)
    torch.testing.assert_close(value, expected)
    torch.testing.assert_close(score[2], torch.tensor([1 / math.e, 0.0]))
    assert density.evaluations == Evaluations(values=6, scores=3, not_a_number=2)  # one NaN each; -inf is a number


@pytest.mark.parametrize("shape", [(3,), (4, 2), (2, 4, 3), (4, 4)])
def test_latents_of_a_wrong_shape_are_refused(shape):
    density = FunctionDensity(banana, 3)
    for method in (density.log_prob, density.log_prob_and_score):
        with pytest.raises(ValueError, match=r"shape \(B, 3\), found \(" + ", ".join(map(str, shape))):
            method(torch.zeros(shape))


@pytest.mark.parametrize("wrong", [lambda z: z.sum(), lambda z: z, lambda z: z.sum(-1, keepdim=True)])
def test_results_of_a_wrong_shape_are_refused(wrong):
    density = FunctionDensity(wrong, 3)
    for method in (density.log_prob, density.log_prob_and_score):
        with pytest.raises(ValueError, match=r"shape \(4,\), found"):
            method(torch.zeros(4, 3))


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_dtypes_are_kept(dtype):
    z = points().to(dtype)
    density = GaussianDensity(LOC.to(dtype), TRIL.to(dtype))
    value, score = density.log_prob_and_score(z)
    assert density.dtype == value.dtype == score.dtype == density.sample(2).dtype == dtype
    expected = MultivariateNormal(LOC, scale_tril=TRIL).log_prob(z.double())
    torch.testing.assert_close(value.double(), expected, rtol=1e-5 if dtype == torch.float32 else 1e-10, atol=0)


def test_default_dtype_is_the_current_one(float64):
    assert FunctionDensity(banana, 3).dtype == torch.float64
    assert FunctionDensity(banana, 3, dtype=torch.float32).dtype == torch.float32
