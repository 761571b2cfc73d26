# SPDX-License-Identifier: Apache-2.0
"""Corrections: which draws are chosen, how often, and what is refused."""

import math

import pytest
import torch

from pyro_sm.base import Draws
from pyro_sm.corrections import Correction, DampedResampling, ImportanceResampling, NoCorrection
from pyro_sm.weights import effective_sample_size

CORRECTIONS = [ImportanceResampling(), ImportanceResampling(smooth=False), DampedResampling(), NoCorrection()]


def make_draws(n: int = 1000, seed: int = 0, scale: float = 1.0) -> Draws:
    """Draws of N(0, 1) weighted towards N(0.7, 0.6²)."""
    z = torch.randn(n, 1, dtype=torch.float64, generator=torch.Generator().manual_seed(seed))
    log_p = torch.distributions.Normal(0.7, 0.6).log_prob(z[:, 0])
    log_q = torch.distributions.Normal(0.0, 1.0).log_prob(z[:, 0])
    return Draws(z, log_p, scale * (log_p - log_q))


@pytest.mark.parametrize("correction", CORRECTIONS, ids=lambda c: c.name)
def test_the_contract(correction):
    assert isinstance(correction, Correction)
    assert correction.name
    draws = make_draws()
    index = correction.apply(draws, 300, torch.Generator().manual_seed(1))
    assert index.shape == (300,)
    assert index.dtype == torch.int64
    assert 0 <= int(index.min()) <= int(index.max()) < 1000
    assert torch.equal(index, correction.apply(draws, 300, torch.Generator().manual_seed(1)))


@pytest.mark.parametrize("correction", CORRECTIONS, ids=lambda c: c.name)
def test_too_few_draws(correction):
    with pytest.raises(ValueError, match="at least num_samples=11 draws to choose from, found 10"):
        correction.apply(make_draws(10), 11)
    with pytest.raises(ValueError, match="num_samples of at least 1, found 0"):
        correction.apply(make_draws(10), 0)


@pytest.mark.parametrize("smooth", [True, False])
@pytest.mark.parametrize(
    ("bad", "message"),
    [(math.nan, "found 3 NaN or .inf among 100"), (math.inf, "found 3 NaN or .inf among 100")],
)
def test_weights_that_are_no_weights(smooth, bad, message):
    draws = make_draws(100)
    draws.log_weight[:3] = bad
    with pytest.raises(ValueError, match=message):
        ImportanceResampling(smooth=smooth).apply(draws, 10)


@pytest.mark.parametrize("smooth", [True, False])
def test_no_weight_at_all(smooth):
    draws = make_draws(100)
    draws.log_weight[:] = -math.inf
    with pytest.raises(ValueError, match="at least one finite log weight, found none among 100"):
        ImportanceResampling(smooth=smooth).apply(draws, 10)


def test_raw_takes_the_first_draws_whatever_their_weights():
    draws = make_draws(100)
    draws.log_weight[:] = math.nan
    assert torch.equal(NoCorrection().apply(draws, 7), torch.arange(7))


@pytest.mark.parametrize("smooth", [True, False])
def test_draws_of_weight_zero_are_never_chosen(smooth):
    draws = make_draws(400)
    draws.log_weight[::2] = -math.inf
    index = ImportanceResampling(smooth=smooth).apply(draws, 400, torch.Generator().manual_seed(2))
    assert bool((index % 2 == 1).all())


@pytest.mark.parametrize("smooth", [True, False])
def test_resampled_moments_are_those_of_the_target(smooth):
    """Mean and sd within five standard errors, sized so that the raw draws are more than ten away."""
    draws = make_draws(40_000, seed=3)
    index = ImportanceResampling(smooth=smooth).apply(draws, 20_000, torch.Generator().manual_seed(4))
    share = float(draws.log_weight.exp().sum() ** 2 / (2 * draws.log_weight).exp().sum()) / 40_000
    error = 0.6 * math.sqrt(1 / 20_000 + 1 / (40_000 * share))
    assert abs(float(draws.z[index].mean()) - 0.7) < 5 * error
    assert abs(float(draws.z[index].std()) - 0.6) < 5 * error / math.sqrt(2)
    raw = NoCorrection().apply(draws, 20_000)
    assert abs(float(draws.z[raw].mean()) - 0.7) > 10 * error
    inverted = draws._replace(log_weight=-draws.log_weight)  # a known wrong variant: the sign of the weights
    wrong = ImportanceResampling(smooth=smooth).apply(inverted, 20_000, torch.Generator().manual_seed(4))
    assert abs(float(draws.z[wrong].mean()) - 0.7) > 10 * error


def test_smoothing_tames_the_largest_weight():
    draws = make_draws(2000, scale=0.0)
    draws.log_weight[:] = -1.3 * torch.log(torch.rand(2000, generator=torch.Generator().manual_seed(5)))
    largest = int(draws.log_weight.argmax())
    counts = []
    for smooth in (False, True):
        index = ImportanceResampling(smooth=smooth).apply(draws, 2000, torch.Generator().manual_seed(6))
        counts.append(int((index == largest).sum()))
    assert counts[0] > 100
    assert counts[1] <= counts[0]


def test_damping_leaves_good_weights_alone():
    draws = make_draws(2000)
    assert effective_sample_size(draws.log_weight) > 0.3 * 2000
    plain = ImportanceResampling(smooth=False).apply(draws, 500, torch.Generator().manual_seed(1))
    damped = DampedResampling().apply(draws, 500, torch.Generator().manual_seed(1))
    assert torch.equal(plain, damped)


def test_damping_chooses_many_draws_where_a_few_have_all_the_weight():
    draws = make_draws(2000, scale=300.0)
    few = ImportanceResampling(smooth=False).apply(draws, 2000, torch.Generator().manual_seed(1)).unique()
    many = DampedResampling().apply(draws, 2000, torch.Generator().manual_seed(1)).unique()
    assert len(few) < 300
    assert len(many) > 500
    assert float(draws.log_weight[many].mean()) > float(draws.log_weight.mean())  # but not any


@pytest.mark.parametrize("share", [0.0, 1.0, -1.0])
def test_damping_to_no_share(share):
    with pytest.raises(ValueError, match="expected effective_share in"):
        DampedResampling(share)
