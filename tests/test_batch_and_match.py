# SPDX-License-Identifier: Apache-2.0
"""Batch-and-Match: the update against its matrix formula, the Gaussian fixed point, and bad rows."""

import math

import numpy as np
import pytest
import scipy.linalg
import torch

from pyro_sm.base import Evaluations
from pyro_sm.batch_and_match import Gaussian, batch_and_match, batch_and_match_update
from pyro_sm.density import FunctionDensity, GaussianDensity

DIM = 5


def target():
    """A correlated Gaussian with scales between 0.1 and 8."""
    generator = torch.Generator().manual_seed(3)
    loc = 3 * torch.randn(DIM, dtype=torch.float64, generator=generator)
    mixing = torch.randn(DIM, DIM, dtype=torch.float64, generator=generator)
    covariance = mixing @ torch.diag(torch.tensor([0.01, 0.3, 1.0, 3.0, 9.0]).double()) @ mixing.T
    return Gaussian(loc, covariance)


def start():
    tril = torch.tril(0.3 * torch.ones(DIM, DIM, dtype=torch.float64)) + torch.eye(DIM)
    return Gaussian(torch.arange(DIM, dtype=torch.float64) - 2, tril @ tril.T)


def density_of(gaussian):
    return GaussianDensity(gaussian.loc, torch.linalg.cholesky(gaussian.covariance))


def by_matrix_formula(gaussian, z, score, rate, *, four=4.0, spread=True):
    """``Σ' = 2V(I + (I + 4UV)^{1/2})⁻¹`` as it stands in the paper, by a general matrix square root."""
    loc, covariance = gaussian.loc.numpy(), gaussian.covariance.numpy()
    z, score = z.numpy(), score.numpy()
    blend = rate / (1 + rate)
    spread_of_z = np.cov(z.T, bias=True)
    u = rate * np.cov(score.T, bias=True) + blend * np.outer(score.mean(0), score.mean(0))
    gap = loc - z.mean(0)
    v = covariance + (rate if spread else 1.0) * spread_of_z + blend * np.outer(gap, gap)
    eye = np.eye(len(loc))
    root = np.real(scipy.linalg.sqrtm(eye + four * u @ v))
    new = 2 * v @ np.linalg.inv(eye + root)
    return loc / (1 + rate) + blend * (new @ score.mean(0) + z.mean(0)), new


# ---------------------------------------------------------------------------------------------- exact


@pytest.mark.parametrize("rate", [0.2, 3.0, 160.0])
def test_update_against_the_matrix_formula(rate):
    gaussian = start()
    z = torch.randn(12, DIM, dtype=torch.float64) * 1.4 + 0.5
    score = torch.randn(12, DIM, dtype=torch.float64) - torch.tanh(z)
    found = batch_and_match_update(gaussian, z, score, rate)
    loc, covariance = by_matrix_formula(gaussian, z, score, rate)
    np.testing.assert_allclose(found.covariance, covariance, rtol=1e-8, atol=1e-10)
    np.testing.assert_allclose(found.loc, loc, rtol=1e-8, atol=1e-10)
    assert torch.equal(found.covariance, found.covariance.T)
    assert float(torch.linalg.eigvalsh(found.covariance).min()) > 0
    for wrong in ({"four": 1.0}, {"spread": False}):
        _, other = by_matrix_formula(gaussian, z, score, rate, **wrong)
        assert np.abs(found.covariance.numpy() - other).max() > 1e-2, wrong


@pytest.mark.parametrize("rate", [0.5, 40.0])
def test_the_gaussian_target_is_a_fixed_point_of_any_batch(rate):
    gaussian = target()
    z = torch.randn(9, DIM, dtype=torch.float64) * 3 + 1  # not even draws of the Gaussian
    score = -torch.linalg.solve(gaussian.covariance, (z - gaussian.loc).T).T
    found = batch_and_match_update(gaussian, z, score, rate)
    torch.testing.assert_close(found.covariance, gaussian.covariance, rtol=1e-7, atol=1e-8)
    torch.testing.assert_close(found.loc, gaussian.loc, rtol=1e-7, atol=1e-8)
    for wrong in ({"four": 1.0}, {"spread": False}):
        _, other = by_matrix_formula(gaussian, z, score, rate, **wrong)
        assert np.abs(gaussian.covariance.numpy() - other).max() > 1e-2, wrong


def test_the_gaussian_target_is_found():
    wanted = target()
    density = density_of(wanted)
    found = batch_and_match(density, start(), num_batches=60, batch_size=16)
    torch.testing.assert_close(found.covariance, wanted.covariance, rtol=1e-6, atol=1e-6)
    torch.testing.assert_close(found.loc, wanted.loc, rtol=1e-6, atol=1e-6)
    assert density.evaluations == Evaluations(density=960, gradient=960)


def test_float32_densities_are_served_in_float64():
    wanted = target()
    density = GaussianDensity(wanted.loc.float(), torch.linalg.cholesky(wanted.covariance).float())
    found = batch_and_match(density, Gaussian(*(x.float() for x in start())), num_batches=60)
    assert found.loc.dtype == found.covariance.dtype == torch.float64
    torch.testing.assert_close(found.loc, wanted.loc, rtol=1e-2, atol=1e-2)
    torch.testing.assert_close(found.covariance, wanted.covariance, rtol=1e-2, atol=1e-2)


# ------------------------------------------------------------------------------------------- bad rows


class Broken(GaussianDensity):
    """Right values, but a NaN in the score, or a density of −inf, in a half-space."""

    def __init__(self, gaussian, what, cut):
        super().__init__(gaussian.loc, torch.linalg.cholesky(gaussian.covariance))
        self.what, self.cut = what, cut

    def log_prob_and_score(self, z):
        value, score = super().log_prob_and_score(z)
        bad = z[:, 0] > self.cut
        if self.what == "score":
            score[bad, 2] = math.nan
        else:
            value[bad] = -math.inf
        return value, score


@pytest.mark.parametrize("what", ["score", "value"])
def test_bad_rows_are_left_out(what):
    begin = start()
    density = Broken(target(), what, float(begin.loc[0]))
    torch.manual_seed(1)
    found = batch_and_match(density, begin, num_batches=1, batch_size=14)
    torch.manual_seed(1)
    z = begin.loc + torch.randn(14, DIM, dtype=torch.float64) @ torch.linalg.cholesky(begin.covariance).T
    good = z[:, 0] <= density.cut
    assert 2 <= int(good.sum()) < 14
    score = density_of(target()).log_prob_and_score(z)[1]
    expected = batch_and_match_update(begin, z[good], score[good], 14 * DIM)
    torch.testing.assert_close(found.loc, expected.loc, rtol=1e-10, atol=1e-10)
    torch.testing.assert_close(found.covariance, expected.covariance, rtol=1e-10, atol=1e-10)


def test_the_target_is_found_despite_bad_rows():
    wanted = target()
    found = batch_and_match(Broken(wanted, "score", float(wanted.loc[0]) + 1), start(), num_batches=80)
    torch.testing.assert_close(found.covariance, wanted.covariance, rtol=1e-5, atol=1e-5)


def test_nothing_finite_is_an_error():
    density = FunctionDensity(lambda z: z.sum(-1) * math.nan, DIM, dtype=torch.float64)
    with pytest.raises(ValueError, match="none of 7 updates"):
        batch_and_match(density, start(), num_batches=7)


def test_a_nan_score_alone_is_an_error():
    with pytest.raises(ValueError, match="not finite near the start"):
        batch_and_match(Broken(target(), "score", -math.inf), start(), num_batches=3)
