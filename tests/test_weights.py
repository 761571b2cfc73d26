# SPDX-License-Identifier: Apache-2.0
"""Importance weights: exact formulas, ArviZ's two signs, unbiasedness by enumeration, statistics."""

import itertools
import math
from fractions import Fraction

import arviz
import numpy as np
import pytest
import scipy.integrate
import scipy.stats
import torch

from pyro_sm.weights import (
    _unseen,
    damping,
    effective_sample_size,
    evidence,
    evidence_with_tail,
    generalised_pareto_fit,
    log_mean_exp,
    normalised,
    pareto_smooth,
    resample,
    systematic,
    unseen_mass,
    upper_tail,
)

WEIGHTS = torch.tensor([0.5, 2.0, 0.0, 1.25, 7.0], dtype=torch.float64)


def pareto_log_weights(n: int, shape: float, seed: int = 0) -> torch.Tensor:
    """Weights with survival ``w^(-1/shape)`` above one: the tail has Pareto shape ``shape``."""
    generator = torch.Generator().manual_seed(seed)
    return -shape * torch.log(torch.rand(n, dtype=torch.float64, generator=generator))


# ---------------------------------------------------------------------------------------------- exact


@pytest.mark.parametrize("shift", [0.0, -800.0, 900.0])
def test_formulas_agree_with_the_weights_themselves(shift):
    log_w = WEIGHTS.log() + shift
    n = len(WEIGHTS)
    torch.testing.assert_close(log_mean_exp(log_w) - shift, WEIGHTS.mean().log(), rtol=1e-10, atol=1e-10)
    torch.testing.assert_close(normalised(log_w), WEIGHTS / WEIGHTS.sum(), rtol=1e-10, atol=0)
    expected = float(WEIGHTS.sum() ** 2 / (WEIGHTS**2).sum())
    assert effective_sample_size(log_w) == pytest.approx(expected, rel=1e-10)
    found = evidence(log_w)
    assert found.log_evidence == pytest.approx(float(WEIGHTS.mean().log()) + shift, rel=1e-10)
    error = float(WEIGHTS.std() / (math.sqrt(n) * WEIGHTS.mean()))
    assert found.log_evidence_se == pytest.approx(error, rel=1e-10)


def test_effective_sample_size_bounds():
    assert effective_sample_size(torch.full((17,), -3e4)) == 17.0
    assert effective_sample_size(torch.tensor([0.0, -math.inf, -math.inf])) == 1.0
    assert effective_sample_size(torch.full((4,), -math.inf)) == 0.0


def test_effective_sample_size_of_large_float32_weights():
    log_w = torch.tensor([0.0, 0.5, -0.25, 0.125]) * 1.0
    assert effective_sample_size(log_w - 65536) == pytest.approx(effective_sample_size(log_w), rel=1e-6)


def test_evidence_of_one_weight_has_no_error_estimate():
    assert evidence(torch.tensor([1.5])) == (1.5, math.inf)


def test_evidence_of_no_weight():
    assert evidence(torch.full((4,), -math.inf)) == (-math.inf, math.inf)


@pytest.mark.parametrize(
    ("bad", "message"),
    [
        ([-math.inf, -math.inf], "at least one finite log weight, found none among 2"),
        ([0.0, math.nan, 1.0], "found 1 NaN or .inf among 3"),
        ([0.0, math.inf, math.nan], "found 2 NaN or .inf among 3"),
    ],
)
def test_bad_weights_are_refused(bad, message):
    with pytest.raises(ValueError, match=message):
        normalised(torch.tensor(bad))
    with pytest.raises(ValueError, match=message):
        resample(torch.tensor(bad), 3)


# -------------------------------------------------------------------------------------------- damping


def test_damping_meets_the_effective_share_and_no_more():
    log_w = pareto_log_weights(2000, 3.0)
    gamma = damping(log_w, 0.3)
    assert 0 < gamma < 1
    assert effective_sample_size(gamma * log_w) >= 0.3 * 2000
    assert effective_sample_size((gamma + 1e-9) * log_w) < 0.3 * 2000


def test_damping_falls_with_the_share_and_with_the_spread():
    log_w = pareto_log_weights(500, 2.0)
    by_share = [damping(log_w, share) for share in (0.05, 0.2, 0.5, 0.8, 0.99)]
    assert by_share == sorted(by_share, reverse=True)
    assert len(set(by_share)) == 5
    by_spread = [damping(scale * log_w, 0.5) for scale in (0.1, 1.0, 3.0, 30.0)]
    assert by_spread[0] == 1.0
    assert by_spread == sorted(by_spread, reverse=True)
    assert by_spread[3] * 30 == pytest.approx(by_spread[2] * 3, rel=1e-6)


def test_damping_keeps_its_promise_for_very_large_spreads():
    log_w = 1e9 * pareto_log_weights(500, 1.0)
    gamma = damping(log_w, 0.5)
    assert gamma < 1e-7
    assert effective_sample_size(gamma * log_w) >= 250


def test_damping_counts_finite_weights_only():
    log_w = pareto_log_weights(300, 2.0)
    padded = torch.cat([log_w, torch.full((700,), -math.inf, dtype=torch.float64)])
    assert damping(padded, 0.5) == damping(log_w, 0.5)
    assert damping(torch.full((5,), -math.inf), 0.5) == 1.0


@pytest.mark.parametrize("share", [0.0, 1.0, -0.1, 1.7])
def test_damping_refuses_impossible_shares(share):
    with pytest.raises(ValueError, match="effective share in"):
        damping(torch.zeros(3), share)


# ----------------------------------------------------------------------------------- Pareto smoothing


@pytest.mark.parametrize("shape", [0.1, 0.5, 0.69, 0.9, 1.5])
@pytest.mark.parametrize("n", [50, 400, 3001])
def test_smoothing_agrees_with_arviz_0(shape, n):
    log_w = pareto_log_weights(n, shape, seed=n) - 321.0
    expected, khat = arviz.psislw(log_w.numpy().copy(), normalize=False)
    found = pareto_smooth(log_w)
    assert found.khat == pytest.approx(float(khat), rel=1e-8)
    np.testing.assert_allclose(found.log_w.numpy(), expected, rtol=1e-10)


@pytest.mark.parametrize("shape", [0.3, 0.9])
def test_smoothing_agrees_with_arviz_1_which_takes_minus_log_ratios(shape):
    """With 900 draws, since the tail has ⌈3√N⌉ draws in one line and ⌊3√N⌋ in the other."""
    base = pytest.importorskip("arviz_stats.base")
    log_w = pareto_log_weights(900, shape)
    expected, khat = base.array_stats.psislw(-log_w.numpy())
    found = pareto_smooth(log_w)
    assert found.khat == pytest.approx(float(khat), rel=1e-8)
    np.testing.assert_allclose(torch.log_softmax(found.log_w, 0).numpy(), expected, rtol=1e-8)
    _, wrong = base.array_stats.psislw(log_w.numpy())  # the sign of the other line
    assert abs(float(wrong) - found.khat) > 0.2


def test_smoothing_with_ties_agrees_with_arviz():
    log_w = torch.round(pareto_log_weights(600, 0.8), decimals=1)
    expected, khat = arviz.psislw(log_w.numpy().copy(), normalize=False)
    found = pareto_smooth(log_w)
    assert found.khat == pytest.approx(float(khat), rel=1e-8)
    np.testing.assert_allclose(np.sort(found.log_w.numpy()), np.sort(expected), rtol=1e-10)


def test_smoothing_with_zero_weights_agrees_with_arviz():
    log_w = pareto_log_weights(600, 0.6)
    log_w[::3] = -math.inf
    expected, khat = arviz.psislw(log_w.numpy().copy(), normalize=False)
    found = pareto_smooth(log_w)
    assert found.khat == pytest.approx(float(khat), rel=1e-8)
    np.testing.assert_allclose(found.log_w.numpy(), expected, rtol=1e-10)


def test_smoothing_keeps_order_maximum_and_everything_below_the_tail():
    log_w = pareto_log_weights(1000, 1.2)
    smooth = pareto_smooth(log_w).log_w
    tail = upper_tail(log_w).position
    body = torch.ones(1000, dtype=torch.bool)
    body[tail] = False
    assert len(tail) == math.ceil(3 * math.sqrt(1000))
    assert torch.equal(smooth[body], log_w[body])
    assert float(smooth.max()) <= float(log_w.max())
    assert torch.equal(torch.argsort(smooth[tail], stable=True), torch.arange(len(tail)))


def test_smoothing_does_not_change_its_argument():
    log_w = pareto_log_weights(100, 1.0)
    before = log_w.clone()
    pareto_smooth(log_w)
    assert torch.equal(log_w, before)


@pytest.mark.parametrize(
    "log_w",
    [
        pareto_log_weights(20, 0.5)[:20],
        torch.full((100,), -math.inf),
        torch.tensor([0.0] * 99 + [math.nan]),
        torch.tensor([0.0] * 99 + [math.inf]),
        torch.tensor([0.0, 1.0, 3.0] + [-math.inf] * 97),
    ],
    ids=["few", "zero", "nan", "inf", "three"],
)
def test_khat_that_cannot_be_estimated_is_infinite(log_w):
    found = pareto_smooth(log_w)
    assert found.khat == math.inf
    assert found.log_w is log_w


@pytest.mark.parametrize("noise", [0.0, 1e-5])
def test_equal_weights_up_to_rounding_have_no_tail(noise):
    generator = torch.Generator().manual_seed(3)
    log_w = -7.0 + noise * torch.randn(500, generator=generator)
    assert pareto_smooth(log_w).khat == -math.inf


@pytest.mark.parametrize("k", [-0.3, 0.2, 0.7, 1.1])
def test_shape_and_scale_of_an_exact_pareto_sample(k):
    """Quantiles of the law itself are fitted to within the shrinkage of ten observations in two thousand."""
    p = (np.arange(2000) + 0.5) / 2000
    x = torch.tensor(scipy.stats.genpareto.ppf(p, c=k, scale=3.0))
    shape, scale = generalised_pareto_fit(x)
    assert shape == pytest.approx((2000 * k + 5) / 2010, abs=0.01)
    assert scale == pytest.approx(3.0, rel=0.02)


# -------------------------------------------------------------------------------------- resampling


def expected_counts(weights: list[Fraction], num_draws: int, right: bool = True) -> torch.Tensor:
    """Counts of each index averaged exactly over the uniform start.

    The indices change only where a boundary ``num_draws · Σ_{j≤i} w_j`` leaves a remainder equal to it,
    so the average is a finite sum over the pieces between the remainders.
    """
    total, cuts = Fraction(0), {Fraction(0), Fraction(1)}
    for weight in weights:
        total += weight
        cuts.add((total * num_draws) % 1)
    ordered = sorted(cuts)
    counts = torch.zeros(len(weights), dtype=torch.float64)
    w = torch.tensor([float(weight) for weight in weights], dtype=torch.float64)
    for low, high in itertools.pairwise(ordered):
        start = torch.tensor(float((low + high) / 2), dtype=torch.float64)
        index = systematic(w, start if right else start / 2, num_draws)
        counts += float(high - low) * torch.bincount(index, minlength=len(weights)).double()
    return counts


FRACTIONS = [Fraction(3, 17), Fraction(0), Fraction(1, 17), Fraction(8, 17), Fraction(0), Fraction(5, 17)]


@pytest.mark.parametrize("num_draws", [1, 4, 7, 17, 50])
def test_systematic_resampling_is_unbiased(num_draws):
    expected = num_draws * torch.tensor([float(w) for w in FRACTIONS], dtype=torch.float64)
    torch.testing.assert_close(expected_counts(FRACTIONS, num_draws), expected, rtol=1e-10, atol=1e-10)


def test_systematic_resampling_with_half_the_start_is_biased():
    expected = 7 * torch.tensor([float(w) for w in FRACTIONS], dtype=torch.float64)
    assert (expected_counts(FRACTIONS, 7, right=False) - expected).abs().max() > 0.1


@pytest.mark.parametrize("start", [0.0, 0.3, 1 - 2**-53])
def test_every_count_is_within_one_of_its_expectation_and_zero_weights_are_never_drawn(start):
    w = torch.tensor([float(weight) for weight in FRACTIONS], dtype=torch.float64)
    w = torch.cat([torch.zeros(2, dtype=torch.float64), w, torch.zeros(2, dtype=torch.float64)])
    index = systematic(w, torch.tensor(start, dtype=torch.float64), 23)
    counts = torch.bincount(index, minlength=len(w))
    assert (counts - 23 * w).abs().max() < 1
    assert counts[w == 0].sum() == 0


def test_resampling_is_reproducible_and_in_random_order():
    log_w = pareto_log_weights(200, 0.4)
    first, second = (resample(log_w, 100, torch.Generator().manual_seed(5)) for _ in range(2))
    assert torch.equal(first, second)
    assert not torch.equal(first, first.sort().values)


def gaussian_log_weights(n: int, seed: int) -> tuple[torch.Tensor, torch.Tensor]:
    """Draws of N(0.5, 1.5²) weighted towards 3.7 · N(1, 0.8²); the largest weight is finite."""
    z = 0.5 + 1.5 * torch.randn(n, dtype=torch.float64, generator=torch.Generator().manual_seed(seed))
    log_p = torch.distributions.Normal(1.0, 0.8).log_prob(z) + math.log(3.7)
    return z, log_p - torch.distributions.Normal(0.5, 1.5).log_prob(z)


def test_resampled_moments_and_slices_of_them():
    """Moments within five standard errors; the raw draws, used in their place, are more than ten away."""
    n = 200_000
    z, log_w = gaussian_log_weights(n, seed=1)
    ess = effective_sample_size(log_w)
    index = resample(log_w, n, torch.Generator().manual_seed(2))
    for part, size in ((index, ess), (index[: n // 4], n // 4), (index[-n // 4 :], n // 4)):
        error = 0.8 * math.sqrt(1 / size + 1 / ess)
        assert abs(float(z[part].mean()) - 1) < 5 * error
        assert abs(float(z.mean()) - 1) > 10 * error


def test_evidence_error_is_the_spread_of_repeated_estimates():
    """2000 repetitions: sd of the estimate against its mean reported error (relative sd of an sd: 1.6 %)."""
    repeats, n = 2000, 500
    _, log_w = gaussian_log_weights(repeats * n, seed=4)
    found = [evidence(part) for part in log_w.split(n)]
    values = np.array([e.log_evidence for e in found])
    errors = np.array([e.log_evidence_se for e in found])
    spread, margin = values.std(ddof=1), 5 / math.sqrt(2 * repeats)
    assert abs(spread / errors.mean() - 1) < margin
    assert abs(values.mean() - math.log(3.7)) < 5 * spread / math.sqrt(repeats) + spread**2
    forgotten_root = errors * math.sqrt(math.sqrt(n))  # a known wrong variant: N^(1/4) for N^(1/2)
    assert abs(spread / forgotten_root.mean() - 1) > 2 * margin


def test_log_weights_of_the_wrong_sign_miss_the_evidence():
    _, log_w = gaussian_log_weights(20_000, seed=6)
    right, wrong = evidence(log_w), evidence(-log_w)
    assert abs(right.log_evidence - math.log(3.7)) < 5 * right.log_evidence_se
    assert abs(wrong.log_evidence - math.log(3.7)) > 10 * right.log_evidence_se


# ------------------------------------------------------------------------------- the error of heavy tails


@pytest.mark.parametrize("k", [0.6, 0.8, 0.95])
def test_mass_above_the_largest_weight_by_quadrature(k):
    """Of a law whose quantiles are fitted; the shape in use comes back, so that it is known."""
    p = (np.arange(2000) + 0.5) / 2000
    x = torch.tensor(scipy.stats.genpareto.ppf(p, c=k, scale=0.004))
    x = 0.9 * x / x[-1]
    found, scale = generalised_pareto_fit(x)
    shape, mass = _unseen(x, 0.1, 0.0)
    assert shape == found
    law = scipy.stats.genpareto(c=found, scale=scale)
    # In the survival function s, x = quantile: the tail of x itself is too long for a quadrature.
    inside, _ = scipy.integrate.quad(lambda t: (0.1 + law.isf(math.exp(-t))) * math.exp(-t), -law.logsf(0.9), 700)
    assert mass == pytest.approx(2000 * inside, rel=1e-6)
    wider, more = _unseen(x, 0.1, 1.0)
    assert wider == pytest.approx(found + (1 + found) / math.sqrt(2000), rel=1e-12)
    assert more > mass


@pytest.mark.parametrize("shape", [0.0, 0.15, 0.3])
def test_weights_with_a_variance_keep_the_error_of_the_delta_method(shape):
    log_w = pareto_log_weights(10_000, shape, seed=3) if shape else gaussian_log_weights(10_000, seed=3)[1]
    assert pareto_smooth(log_w).khat < 0.4
    assert unseen_mass(log_w) == 0
    assert evidence_with_tail(log_w) == evidence(log_w)


def test_the_error_of_a_heavy_tail_holds_and_that_of_the_delta_method_does_not():
    """400 repetitions of weights with shape .7 and ``Z = 1``: a share of 99 % within three errors, ± 0.5 %."""
    n, repeats, shape = 2000, 400, 0.7
    log_w = pareto_log_weights(n * repeats, shape, seed=8) + math.log(1 - shape)
    parts = log_w.split(n)
    with_tail, plain = [evidence_with_tail(part) for part in parts], [evidence(part) for part in parts]
    assert all(one.log_evidence == other.log_evidence for one, other in zip(with_tail, plain, strict=True))
    errors = np.array(
        [[one.log_evidence_se, other.log_evidence_se] for one, other in zip(with_tail, plain, strict=True)]
    )
    off = np.abs([one.log_evidence for one in plain])
    assert (off <= 3 * errors[:, 0]).mean() > 0.975
    assert (off <= 3 * errors[:, 1]).mean() < 0.92
    # And is no excuse: where the shape is not near 1, there is a figure, and not one that allows everything.
    assert np.median(errors[:, 0]) < 0.5


def test_a_rare_component_with_bounded_weights_is_no_heavy_tail():
    """Its few hundred weights lie far above all others, which looks like a tail without a mean; but they end."""
    generator = torch.Generator().manual_seed(1)
    uniform = torch.rand(40_000, dtype=torch.float64, generator=generator)
    rare = torch.rand(40_000, generator=generator) < 0.01
    log_w = torch.log(torch.where(rare, 30 * uniform, 0.5 + 0.4 * uniform))
    assert pareto_smooth(log_w).khat > 1
    assert evidence_with_tail(log_w) == evidence(log_w)
    truth = math.log(0.01 * 15 + 0.99 * 0.7)
    assert abs(evidence(log_w).log_evidence - truth) < 4 * evidence(log_w).log_evidence_se


def test_the_upper_quarter_of_a_tail_counts_if_it_is_lighter_by_two_of_its_errors():
    generator = torch.Generator().manual_seed(2)
    rare = torch.rand(40_000, generator=generator) < 0.01
    body = 0.4 * torch.rand(40_000, dtype=torch.float64, generator=generator)
    log_w = torch.where(rare, 2 + pareto_log_weights(40_000, 0.55, seed=2), body)
    x = upper_tail(log_w).exceedance
    quarter = x[-(len(x) // 4) - 1 :]
    whole, _ = _unseen(x, upper_tail(log_w).cut, 1.0)
    shape, mass = _unseen((quarter - quarter[0])[1:], upper_tail(log_w).cut + float(quarter[0]), 2.0)
    assert 0.5 < shape < 0.9 < whole
    share = mass * math.exp(float(log_w.max() - torch.logsumexp(log_w, 0)))
    assert unseen_mass(log_w) == pytest.approx(share, rel=1e-9)
    found = evidence_with_tail(log_w).log_evidence_se
    assert found == pytest.approx(math.hypot(evidence(log_w).log_evidence_se, share), rel=1e-9)


def test_what_rests_on_one_draw_has_no_error():
    alone = torch.full((1000,), -math.inf)
    alone[7] = 0.3
    assert evidence(alone).log_evidence_se == pytest.approx(1.0, abs=1e-6)
    assert evidence_with_tail(alone) == (evidence(alone).log_evidence, math.inf)
    assert evidence_with_tail(pareto_log_weights(1000, 2.0)).log_evidence_se == math.inf
    few = torch.full((1000,), -math.inf)
    few[:50] = 0.0  # a hard constraint: equal weights, and their number says it all
    assert evidence_with_tail(few) == evidence(few)
    assert evidence_with_tail(torch.full((4,), -math.inf)) == (-math.inf, math.inf)
    assert evidence_with_tail(torch.tensor([1.5])) == (1.5, math.inf)
