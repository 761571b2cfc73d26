# SPDX-License-Identifier: Apache-2.0
"""The covering component: bounded weights, and the mode that a guide has lost."""

import math

import pytest
import torch
from oracles import BASE_LOC, BASE_TRIL, LOG_Z, Mixture, density_of, process_of, random_network, two_modes
from torch.distributions import MultivariateNormal

from pyro_sm.diffusion.covering import PriorCovering, WideCovering, draw_with_covering, mixture_log_weight
from pyro_sm.diffusion.denoiser import Denoiser
from pyro_sm.weights import evidence

exact = {"rtol": 1e-10, "atol": 1e-10}


# ---------------------------------------------------------------------------------------------- exact


@pytest.mark.parametrize("extra", [0.0, 0.7, torch.tensor([0.2, 0.0, 3.0, 1.0], dtype=torch.float64)])
def test_wide_density_in_whitened_space(extra):
    u = 3 * torch.randn(4, 2, dtype=torch.float64)
    variance = 1.8**2 + torch.as_tensor(extra, dtype=torch.float64).expand(4)
    expected = torch.distributions.Normal(0.0, variance.sqrt()[:, None]).log_prob(u).sum(-1)
    torch.testing.assert_close(WideCovering(0.1, 1.8).log_prob_white(u, extra), expected, **exact)


def test_balance_heuristic_by_hand():
    log_p, log_ratio, log_wide = torch.randn(3, 20, dtype=torch.float64) * 3
    found = mixture_log_weight(log_p, log_ratio, log_wide, 0.3)
    expected = log_p.exp() / (0.7 * (-log_ratio).exp() + 0.3 * log_wide.exp())
    torch.testing.assert_close(found.exp(), expected, **exact)
    assert torch.equal(mixture_log_weight(log_p, log_ratio, log_wide, 0.0), log_p + log_ratio)
    nothing = torch.full_like(log_p, -math.inf)
    assert torch.equal(mixture_log_weight(nothing, log_ratio, log_wide, 0.3), nothing)


def test_weights_are_bounded_by_the_wide_component():
    wide = WideCovering(0.25, 1.5)
    process = process_of(Denoiser(random_network(2, 0.5)))
    density = density_of(process, two_modes())
    draws, num_guide = draw_with_covering(process, density, wide, 400)
    assert num_guide == 300
    assert draws.z.shape == (400, 2)
    # The base scaled about its own location.
    law = MultivariateNormal(BASE_LOC, scale_tril=1.5 * BASE_TRIL)
    bound = draws.log_p - math.log(0.25) - law.log_prob(draws.z)
    assert bool((draws.log_weight <= bound + 1e-10).all())
    assert float((bound - draws.log_weight).min()) < 0.1, "some weight comes near its bound"
    torch.testing.assert_close(draws.log_p, density.log_prob(draws.z), **exact)
    # The bound of a component that is not there does not hold.
    plain, _ = draw_with_covering(process, density, WideCovering(0.0, 1.5), 4000)
    bound = plain.log_p - math.log(0.25) - law.log_prob(plain.z)
    assert bool((plain.log_weight > bound + 1e-3).any())


def test_the_wide_draws_come_last_and_are_wide():
    wide = WideCovering(0.5, 3.0)
    process = process_of(Denoiser(random_network(2, 0.1)))
    draws, num_guide = draw_with_covering(process, density_of(process, two_modes()), wide, 4000)
    outer = process.to_white(draws.z[num_guide:]) / 3
    n = len(outer)
    assert float((outer.T @ outer / n - torch.eye(2)).abs().max()) < 5 * math.sqrt(2 / n)
    assert float(outer.mean(0).abs().max()) < 5 / math.sqrt(n)
    assert float(process.to_white(draws.z[:num_guide]).std()) < 2


@pytest.mark.parametrize(("share", "num_draws"), [(0.0, 60), (0.001, 60), (0.1, 4)])
def test_a_share_of_no_draws_leaves_the_path_weights(share, num_draws):
    process = process_of(Denoiser(random_network(2)))
    density = density_of(process, two_modes())
    torch.manual_seed(8)
    draws, num_guide = draw_with_covering(process, density, WideCovering(share), num_draws)
    torch.manual_seed(8)
    z, log_ratio = process.draw(num_draws)
    assert num_guide == num_draws
    assert torch.equal(draws.z, z)
    torch.testing.assert_close(draws.log_weight, density.log_prob(z) + log_ratio, **exact)
    torch.testing.assert_close(draws.log_q, -log_ratio, **exact)


@pytest.mark.parametrize("num_draws", [1, 2, 3])
def test_some_draws_are_always_the_guides_own(num_draws):
    """A share that rounds to all of them has no weights: there is nobody to take the rest."""
    process = process_of(Denoiser(random_network(2)))
    draws, num_guide = draw_with_covering(process, density_of(process, two_modes()), WideCovering(0.9), num_draws)
    assert num_guide == 1
    assert bool(torch.isfinite(draws.log_weight).all())


def test_each_draw_is_evaluated_once():
    process = process_of(Denoiser(random_network(2)))
    density = density_of(process, two_modes())
    draw_with_covering(process, density, WideCovering(0.3), 50)
    assert density.evaluations.values == 50
    assert density.evaluations.scores == 0


class Overflowing:
    """A process with some of its paths lost: to infinity, to NaN, or with a ratio that is none."""

    LOST = ((2, math.inf, 0.5), (5, math.nan, 0.5), (7, None, math.nan), (11, -math.inf, math.inf))

    def __init__(self, process):
        self.process = process

    def __getattr__(self, name):
        return getattr(self.process, name)

    def draw(self, num_draws):
        z, log_ratio = self.process.draw(num_draws)
        for row, value, ratio in self.LOST:
            log_ratio[row] = ratio
            if value is not None:
                z[row, 1] = value
        return z, log_ratio


@pytest.mark.parametrize("share", [0.0, 0.25])
@pytest.mark.parametrize("with_score", [False, True])
def test_paths_that_overflow_have_no_weight_and_spoil_no_other(share, with_score):
    process = process_of(Denoiser(random_network(2, 0.3)))
    density, wide = density_of(process, two_modes()), WideCovering(share)
    found = []
    for one in (process, Overflowing(process)):
        torch.manual_seed(9)
        found.append(draw_with_covering(one, density, wide, 400, with_score=with_score)[0])
    good, spoilt = found
    lost = torch.zeros(400).bool()
    lost[[row for row, _, _ in Overflowing.LOST]] = True
    assert bool((spoilt.log_weight[lost] == -math.inf).all())
    assert bool(torch.isfinite(spoilt.z).all())
    assert bool(torch.isfinite(spoilt.log_p).all())
    for have, want in zip(spoilt, good, strict=True):
        if want is not None:
            assert torch.equal(have[~lost], want[~lost])
            assert bool(torch.isfinite(have[~lost]).all())
    # The lost count as draws of weight zero: to leave them out would make too much of the rest.
    expected = torch.logsumexp(good.log_weight[~lost], 0) - math.log(400)
    assert evidence(spoilt.log_weight).log_evidence == pytest.approx(float(expected), abs=1e-12)


@pytest.mark.parametrize("share", [-0.1, 1.0, 2.0, math.nan])
def test_bad_shares_are_refused(share):
    with pytest.raises(ValueError, match=r"share in \[0, 1\)"):
        WideCovering(share)


@pytest.mark.parametrize("scale", [0.0, -1.0, math.nan])
def test_bad_scales_are_refused(scale):
    with pytest.raises(ValueError, match="positive scale"):
        WideCovering(0.1, scale)


# ---------------------------------------------------------------------------------------- statistical

LOST = 0.3
BOTH = Mixture(
    [1 - LOST, LOST], [[-0.6, 0.3], [1.6, -1.2]], [[[0.08, 0.03], [0.03, 0.05]], [[0.06, -0.02], [-0.02, 0.10]]]
)
FIRST = Mixture([1.0], BOTH.means[:1].tolist(), BOTH.covariances[:1].tolist())


def lost_mode():
    """A guide that knows the first mode exactly and has never seen the second."""
    start = torch.sqrt(FIRST.covariances[0].diagonal() + 25.0)
    return process_of(FIRST.denoiser(), start_loc=FIRST.means[0], start_scale=start)


def test_the_wide_component_recovers_a_lost_mode():
    process = lost_mode()
    density = density_of(process, BOTH)
    draws, num_guide = draw_with_covering(process, density, WideCovering(0.2, 1.5), 40_000)
    found = evidence(draws.log_weight)
    assert found.log_evidence_se < LOST / 10
    assert abs(found.log_evidence - LOG_Z) < 5 * found.log_evidence_se
    u = process.to_white(draws.z)
    second = u[:, 0] - u[:, 1] > 0.8
    assert not bool(second[:num_guide].any())
    mass = float(torch.softmax(draws.log_weight, 0)[second].sum())
    assert mass == pytest.approx(LOST, abs=0.03)
    # Weights that forget who drew are wrong: wide draws weighted as the guide's own, or everything as one or other.
    log_wide = WideCovering(0.2, 1.5).log_prob_white(u) - process.log_det(u)
    wrong = torch.where(torch.arange(40_000) < num_guide, draws.log_weight, draws.log_p - log_wide)
    assert abs(evidence(wrong).log_evidence - LOG_Z) > 5 * evidence(wrong).log_evidence_se


def test_without_it_the_lost_mass_is_missing_and_nothing_shows():
    process = lost_mode()
    draws, _ = draw_with_covering(process, density_of(process, BOTH), WideCovering(0.0), 40_000)
    found = evidence(draws.log_weight)
    assert found.log_evidence == pytest.approx(LOG_Z + math.log(1 - LOST), abs=5 * found.log_evidence_se)
    assert abs(found.log_evidence - LOG_Z) > 10 * found.log_evidence_se


def test_the_evidence_is_unbiased_for_a_random_guide_too():
    process = process_of(Denoiser(random_network(2, 0.2)))
    density = density_of(process, two_modes())
    wide = WideCovering(0.4, 1.5)
    torch.manual_seed(6)
    draws, num_guide = draw_with_covering(process, density, wide, 40_000)
    found = evidence(draws.log_weight)
    assert found.log_evidence_se < 0.02
    assert abs(found.log_evidence - LOG_Z) < 5 * found.log_evidence_se
    # The same draws by hand; log|det L| forgotten in the wide density would show.
    torch.manual_seed(6)
    z, log_ratio = process.draw(24_000)
    outer = BASE_LOC + 1.5 * torch.randn(16_000, 2, dtype=torch.float64) @ BASE_TRIL.T
    log_ratio = torch.cat([log_ratio, process.path_log_ratio(outer)])
    z = torch.cat([z, outer])
    assert num_guide == 24_000
    torch.testing.assert_close(draws.z, z, **exact)
    log_wide = MultivariateNormal(BASE_LOC, scale_tril=1.5 * BASE_TRIL).log_prob(z)
    log_p = density.log_prob(z)
    weight = mixture_log_weight(log_p, log_ratio, log_wide, 0.4)
    torch.testing.assert_close(draws.log_weight, weight, rtol=1e-9, atol=1e-9)
    wrong = evidence(mixture_log_weight(log_p, log_ratio, log_wide + process.log_det(z), 0.4))
    assert abs(wrong.log_evidence - LOG_Z) > 10 * wrong.log_evidence_se


def test_a_tenth_of_the_draws_looks_elsewhere_unless_told_otherwise():
    process = lost_mode()
    for covering, expected in ((WideCovering(), 900), (WideCovering(share=0.25), 750)):
        draws, num_guide = draw_with_covering(process, density_of(process, BOTH), covering, 1000)
        assert (len(draws.z), num_guide) == (1000, expected)
    assert PriorCovering().share == WideCovering().share
