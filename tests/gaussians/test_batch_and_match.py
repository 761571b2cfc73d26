# SPDX-License-Identifier: Apache-2.0
"""Batch-and-Match, full and low-rank: updates against matrix formulas, the patch, fixed points, and bad rows."""

import itertools
import math

import numpy as np
import pytest
import scipy.linalg
import torch

from pyro_sm.base import Evaluations
from pyro_sm.density import FunctionDensity
from pyro_sm.gaussians.batch_and_match import (
    FactoredGaussian,
    Gaussian,
    LowRankGaussian,
    batch_and_match,
    batch_and_match_update,
    low_rank_update,
    match_to_rest,
    patch,
    start_at_mode,
)
from pyro_sm.gaussians.gaussian import GaussianDensity

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
    found = batch_and_match(density, start(), num_batches=60, batch_size=16).gaussian
    torch.testing.assert_close(found.covariance, wanted.covariance, rtol=1e-6, atol=1e-6)
    torch.testing.assert_close(found.loc, wanted.loc, rtol=1e-6, atol=1e-6)
    assert density.evaluations == Evaluations(values=960, scores=960)


def test_float32_densities_are_served_in_float64():
    wanted = target()
    density = GaussianDensity(wanted.loc.float(), torch.linalg.cholesky(wanted.covariance).float())
    found = batch_and_match(density, Gaussian(*(x.float() for x in start())), num_batches=60).gaussian
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
    found = batch_and_match(density, begin, num_batches=1, batch_size=14).gaussian
    torch.manual_seed(1)
    z = begin.loc + torch.randn(14, DIM, dtype=torch.float64) @ torch.linalg.cholesky(begin.covariance).T
    good = z[:, 0] <= density.cut
    assert 2 <= int(good.sum()) < 14
    score = density_of(target()).log_prob_and_score(z)[1]
    value = density_of(target()).log_prob(z) - density_of(begin).log_prob(z)
    better = good & (value >= value[good].median())  # the start is far off
    expected = batch_and_match_update(begin, z[better], score[better], 14 * DIM)
    torch.testing.assert_close(found.loc, expected.loc, rtol=1e-10, atol=1e-10)
    torch.testing.assert_close(found.covariance, expected.covariance, rtol=1e-10, atol=1e-10)


def test_the_target_is_found_despite_bad_rows():
    wanted = target()
    found = batch_and_match(Broken(wanted, "score", float(wanted.loc[0]) + 1), start(), num_batches=80).gaussian
    torch.testing.assert_close(found.covariance, wanted.covariance, rtol=1e-5, atol=1e-5)


def test_nothing_finite_is_an_error():
    density = FunctionDensity(lambda z: z.sum(-1) * math.nan, DIM, dtype=torch.float64)
    with pytest.raises(ValueError, match="none of 7 updates"):
        batch_and_match(density, start(), num_batches=7)


def test_a_nan_score_alone_is_an_error():
    with pytest.raises(ValueError, match="not finite near the start"):
        batch_and_match(Broken(target(), "score", -math.inf), start(), num_batches=3)


# ---------------------------------------------------------------------------------------- how the fit goes


def test_fisher_and_elbo_of_a_batch_are_their_definitions():
    """Before the first update, by the same draws: ``‖Lᵀ s_p + u‖²`` and the log ratio."""
    begin = start()
    density = density_of(target())
    torch.manual_seed(3)
    found = batch_and_match(density, begin, num_batches=4, batch_size=11)
    torch.manual_seed(3)
    noise, tril = torch.randn(11, DIM, dtype=torch.float64), torch.linalg.cholesky(begin.covariance)
    z = begin.loc + noise @ tril.T
    score = density.log_prob_and_score(z)[1]
    torch.testing.assert_close(found.fisher[0], (score @ tril + noise).square().sum(1).mean(), rtol=1e-9, atol=1e-9)
    ratio = density.log_prob(z) - density_of(begin).log_prob(z)
    torch.testing.assert_close(found.elbo[0], ratio.mean(), rtol=1e-9, atol=1e-9)
    wrong = (score @ tril.T + noise).square().sum(1).mean()
    assert abs(float(wrong / found.fisher[0]) - 1) > 0.03


def test_both_traces_go_to_zero_for_a_normalised_gaussian():
    found = batch_and_match(density_of(target()), start(), num_batches=60, batch_size=16)
    assert found.skipped == 0
    assert float(found.fisher[0]) > 10
    assert float(found.elbo[0]) < -10
    assert float(found.fisher[-1]) < 1e-9
    assert abs(float(found.elbo[-1])) < 1e-9


def test_skipped_batches_are_counted():
    begin = start()
    found = batch_and_match(Broken(target(), "value", float(begin.loc[0]) - 1), begin, num_batches=40, batch_size=3)
    assert found.skipped > 0
    assert int(torch.isnan(found.fisher).sum()) == int(torch.isnan(found.elbo).sum()) > 0


def rates():
    """log p̃ of five log rates with counts around 20, and its scores: ``y z − e^z``."""
    y = torch.tensor([20.0, 3, 11, 30, 7], dtype=torch.float64)
    return FunctionDensity(lambda z: (y * z - z.exp()).sum(1), DIM, dtype=torch.float64), y


def test_enormous_scores_far_off_do_not_stop_it():
    """From log rates of 8 ± 3 the largest scores decide: all draws together leave the Gaussian far off."""
    density, y = rates()
    begin = Gaussian(torch.full((DIM,), 8.0, dtype=torch.float64), 9 * torch.eye(DIM, dtype=torch.float64))
    found = batch_and_match(density, begin, num_batches=150).gaussian
    scale = y.rsqrt()
    assert bool(((found.loc - y.log()).abs() < 0.5 * scale).all())
    assert bool(((found.covariance.diagonal().sqrt() / scale - 1).abs() < 0.2).all())
    gaussian = begin
    for t in range(150):  # the same with all draws, and the schedule of the source
        z = gaussian.draws(32)
        try:
            new = batch_and_match_update(gaussian, z, density.log_prob_and_score(z)[1], 32 * DIM / (t + 1))
            torch.linalg.cholesky(new.covariance)
        except torch.linalg.LinAlgError:
            continue
        gaussian = new
    assert bool(((gaussian.loc - y.log()).abs() > 0.5 * scale).any())


# ------------------------------------------------------------------------------------------------ low rank


def low_rank_target(dim, rank):
    generator = torch.Generator().manual_seed(dim)
    loc = torch.randn(dim, dtype=torch.float64, generator=generator)
    diagonal = 0.2 + 2 * torch.rand(dim, dtype=torch.float64, generator=generator)
    return LowRankGaussian(loc, diagonal, torch.randn(dim, rank, dtype=torch.float64, generator=generator))


def unit_start(dim, rank):
    zero = torch.zeros(dim, dtype=torch.float64)
    return LowRankGaussian(zero, zero + 1, zero[:, None].expand(-1, rank).clone())


def low_rank_density(gaussian):
    density = FunctionDensity(lambda z: gaussian.log_prob_and_score(z)[0], len(gaussian.loc), dtype=torch.float64)
    density.log_prob_and_score = gaussian.log_prob_and_score
    return density


def test_a_low_rank_gaussian_is_the_full_one():
    gaussian = low_rank_target(6, 2)
    full = Gaussian(gaussian.loc, gaussian.covariance)
    z = gaussian.draws(5)
    law = torch.distributions.MultivariateNormal(gaussian.loc, gaussian.covariance)
    for one in (gaussian, full):
        log_q, score = one.log_prob_and_score(z)
        torch.testing.assert_close(log_q, law.log_prob(z), rtol=1e-10, atol=1e-10)
        expected = -torch.linalg.solve(gaussian.covariance, (z - gaussian.loc).T).T
        torch.testing.assert_close(score, expected, rtol=1e-10, atol=1e-10)
        torch.testing.assert_close(one.spread(score), -(z - gaussian.loc), rtol=1e-10, atol=1e-10)


@pytest.mark.parametrize(
    "draw", [low_rank_target(4, 2), Gaussian(torch.ones(4).double(), low_rank_target(4, 1)[1].diag())]
)
def test_draws_have_the_moments(draw):
    n = 40_000
    z = draw.draws(n)
    covariance = draw.covariance
    scale = covariance.diagonal().sqrt()
    assert bool(((z.mean(0) - draw.loc).abs() < 5 * scale / n**0.5).all())
    assert bool(((torch.cov(z.T) - covariance).abs() < 5 * 2**0.5 * torch.outer(scale, scale) / n**0.5).all())


@pytest.mark.parametrize("rate", [0.3, 5.0, 200.0])
@pytest.mark.parametrize(("batch", "rank"), [(4, 2), (9, 6)])
def test_the_update_in_factors_is_the_full_update(rate, batch, rank):
    gaussian = low_rank_target(14, rank)  # K + 2(B+1) = 12 < D, and 26 > D
    z = gaussian.draws(batch)
    score = torch.randn_like(z) - torch.tanh(z)
    found = low_rank_update(gaussian, z, score, rate)
    full = batch_and_match_update(Gaussian(gaussian.loc, gaussian.covariance), z, score, rate)
    torch.testing.assert_close(found.covariance, full.covariance, rtol=1e-8, atol=1e-8)
    torch.testing.assert_close(found.loc, full.loc, rtol=1e-8, atol=1e-8)


def kl(p, q):
    """``KL(N(0, p) ‖ N(0, q))`` of covariances."""
    return 0.5 * float(torch.trace(torch.linalg.solve(q, p)) - len(p) + torch.logdet(q) - torch.logdet(p))


def factored(dim, m):
    gaussian = low_rank_target(dim, m)
    basis, _ = torch.linalg.qr(gaussian.factor)
    core = torch.diag(torch.linspace(-0.3, 3.0, m).double())
    return FactoredGaussian(gaussian.loc, gaussian.diagonal, gaussian.diagonal.sqrt()[:, None] * basis, core)


def test_every_step_of_the_patch_lowers_the_divergence():
    target = factored(10, 6)
    divergence = [kl(target.covariance, patch(target, 2, num_steps=n).covariance) for n in range(8)]
    assert all(b <= a + 1e-12 for a, b in itertools.pairwise(divergence))
    assert divergence[-1] < 0.9 * divergence[0]


def test_the_patch_ends_where_the_gradient_vanishes():
    target = factored(10, 6)
    found = patch(target, 2, num_steps=3000)
    diagonal, factor = (value.clone().requires_grad_(True) for value in found[1:])
    covariance = torch.diag(diagonal) + factor @ factor.T
    loss = torch.trace(torch.linalg.solve(covariance, target.covariance)) + torch.logdet(covariance)
    for gradient in torch.autograd.grad(loss, (diagonal, factor)):
        assert float(gradient.abs().max()) < 1e-6
    torch.testing.assert_close(found.covariance.diagonal(), target.covariance.diagonal(), rtol=1e-6, atol=1e-6)


def test_a_patch_without_loss_is_exact():
    """Of a covariance in the family, and at full rank."""
    wanted = low_rank_target(9, 2)
    root = wanted.diagonal.sqrt()[:, None]
    basis, upper = torch.linalg.qr(wanted.factor / root)
    found = patch(FactoredGaussian(wanted.loc, wanted.diagonal, root * basis, upper @ upper.T), 2)
    torch.testing.assert_close(found.covariance, wanted.covariance, rtol=1e-8, atol=1e-8)
    wider = patch(FactoredGaussian(wanted.loc, wanted.diagonal, root * basis, upper @ upper.T), 5)
    torch.testing.assert_close(wider.covariance, wanted.covariance, rtol=1e-8, atol=1e-8)


def test_a_low_rank_target_is_found():
    wanted = low_rank_target(20, 3)
    density = low_rank_density(wanted)
    found = batch_and_match(density, unit_start(20, 3), num_batches=60, batch_size=16)
    assert isinstance(found.gaussian, LowRankGaussian)
    torch.testing.assert_close(found.gaussian.loc, wanted.loc, rtol=1e-6, atol=1e-6)
    torch.testing.assert_close(found.gaussian.covariance, wanted.covariance, rtol=1e-6, atol=1e-6)
    assert float(found.fisher[-1]) < 1e-10


def test_without_the_diagonal_step_the_target_is_missed():
    """The wrong variant keeps Ψ and patches the factor only."""
    wanted = low_rank_target(20, 3)
    gaussian = unit_start(20, 3)
    for t in range(60):
        z = gaussian.draws(16)
        score = wanted.log_prob_and_score(z)[1]
        moved = low_rank_update(gaussian, z, score, 16 * 20 / (t + 1))
        gaussian = patch(moved, 3)._replace(diagonal=gaussian.diagonal)
    error = (gaussian.covariance - wanted.covariance).norm() / wanted.covariance.norm()
    assert float(error) > 0.05


def test_five_hundred_latents_without_a_matrix_of_their_size():
    dim, rank = 500, 5
    wanted = low_rank_target(dim, rank)

    class Watch(torch.utils._python_dispatch.TorchDispatchMode):
        largest = 0

        def __torch_dispatch__(self, func, types, args=(), kwargs=None):
            result = func(*args, **(kwargs or {}))
            for value in torch.utils._pytree.tree_leaves(result):
                if isinstance(value, torch.Tensor):
                    self.largest = max(self.largest, value.numel())
            return result

    with Watch() as watch:
        found = batch_and_match(low_rank_density(wanted), unit_start(dim, rank), num_batches=170, batch_size=32)
    assert watch.largest <= dim * (rank + 2 * 33)
    assert watch.largest < dim * dim / 4
    scale = wanted.covariance.diagonal().sqrt()
    gap = (found.gaussian.covariance - wanted.covariance).abs() / torch.outer(scale, scale)
    assert float(((found.gaussian.loc - wanted.loc) / scale).abs().max()) < 0.1
    assert float(gap.max()) < 0.1
    assert float(found.fisher[-1]) < 0.02 * dim


# ----------------------------------------------------------------------------------------------- where to start


def ill_conditioned(z):
    """A Gaussian far away, with standard deviations from .01 to 100: a raw regression."""
    scale = torch.tensor([0.01, 1.0, 100.0], dtype=z.dtype)
    return -0.5 * ((z - torch.tensor([3.0, -40.0, 500.0], dtype=z.dtype)) / scale).square().sum(-1)


def test_the_start_moves_to_the_mode_where_that_is_better():
    density = FunctionDensity(ill_conditioned, 3, dtype=torch.float64)
    start = Gaussian(torch.zeros(3).double(), 0.01 * torch.eye(3).double())
    found = start_at_mode(density, start)
    assert torch.allclose(found.loc, torch.tensor([3.0, -40.0, 500.0]).double(), rtol=1e-2)
    assert density.evaluations.scores < 600


def test_the_start_stays_where_there_is_no_mode():
    """A centred hierarchy: the density grows without bound down the neck of the funnel."""

    def neck(z):
        return -8 * z[:, 0] - 0.5 * (z[:, 1:] * torch.exp(-z[:, :1])).square().sum(1) - 0.001 * z[:, 0].square()

    density = FunctionDensity(neck, 9, dtype=torch.float64)
    start = Gaussian(torch.zeros(9).double(), torch.eye(9).double())
    assert start_at_mode(density, start) is start


# ------------------------------------------------------------------------------------------- large batches


def far_start(dim):
    return Gaussian(torch.full((dim,), 3.0, dtype=torch.float64), 25 * torch.eye(dim, dtype=torch.float64))


@pytest.mark.parametrize("dim", [1, 5, 80])
def test_large_batches_are_at_rest_at_the_target(dim):
    """Exactly, in a few of them: with more draws than latents the noise of draws and scores cancels."""
    wanted = low_rank_target(dim, 2)
    density = low_rank_density(wanted)
    found = match_to_rest(density, far_start(dim), batch_size=4 * dim + 8)
    scale = wanted.covariance.diagonal().sqrt()
    assert float(((found.loc - wanted.loc) / scale).abs().max()) < 0.02
    assert float(((found.covariance - wanted.covariance) / torch.outer(scale, scale)).abs().max()) < 0.05
    z = found.draws(500)
    log_ratio = density.log_prob(z) - found.log_prob_and_score(z)[0]
    assert float(log_ratio.std()) < 0.1
    # As many draws have moments that are off by nats.
    z = wanted.draws(4 * dim + 8)
    if dim == 80:
        moments = Gaussian(z.mean(0), torch.cov(z.T))
        z = moments.draws(500)
        assert float((density.log_prob(z) - moments.log_prob_and_score(z)[0]).mean()) < -3


def test_an_update_that_lowers_the_elbo_is_taken_back(monkeypatch):
    """As if every step at a rate above 50 went far too far; smaller ones are tried from the same batch."""
    wanted = low_rank_target(5, 2)
    density, rates = low_rank_density(wanted), []

    def overshooting(gaussian, z, score, rate):
        rates.append((rate, float(z[0, 0])))
        moved = batch_and_match_update(gaussian, z, score, rate)
        return moved if rate < 50 else moved._replace(loc=moved.loc + 100)

    monkeypatch.setattr("pyro_sm.gaussians.batch_and_match.batch_and_match_update", overshooting)
    found = match_to_rest(density, far_start(5), batch_size=40)
    scale = wanted.covariance.diagonal().sqrt()
    assert float(((found.loc - wanted.loc) / scale).abs().max()) < 0.05
    assert rates[0][0] == 200
    assert rates[1] == (20, rates[0][1])


def test_rows_without_a_density_are_no_gain():
    """Of a law that is cut off at zero: a Gaussian across the edge would have the better of what is left of it."""

    def cut(z):
        return torch.where((z > 0).all(-1), -0.5 * (z - 4).square().sum(-1), -math.inf)

    density = FunctionDensity(cut, 3, dtype=torch.float64)
    begun = Gaussian(torch.full((3,), 5.0, dtype=torch.float64), 0.3 * torch.eye(3, dtype=torch.float64))
    found = match_to_rest(density, begun, batch_size=64)
    assert bool(torch.isfinite(density.log_prob(found.draws(200))).float().mean() > 0.97)
    torch.testing.assert_close(found.loc, torch.full((3,), 4.0, dtype=torch.float64), rtol=0, atol=0.2)


def test_large_batches_are_bounded_and_counted():
    density = low_rank_density(low_rank_target(4, 1))
    calls, real = [], density.log_prob_and_score
    density.log_prob_and_score = lambda z: (calls.append(len(z)), real(z))[1]
    match_to_rest(density, far_start(4), batch_size=30, max_batches=3)
    assert calls == [30] * 4
    calls.clear()
    match_to_rest(density, far_start(4), batch_size=30)
    assert len(calls) < 20


def test_a_start_without_a_density_stays():
    density = FunctionDensity(lambda z: torch.where(z[:, 0] > 1e6, 0 * z[:, 0], -math.inf), 2, dtype=torch.float64)
    begun = far_start(2)
    assert match_to_rest(density, begun, batch_size=16) is begun
