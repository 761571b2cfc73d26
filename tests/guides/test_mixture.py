# SPDX-License-Identifier: Apache-2.0
"""GMM-40: the published definition, its evidence, exact draws, and the coverage figure."""

import math

import pytest
import torch
from torch.distributions import Categorical, Independent, MixtureSameFamily, Normal

from pyro_sm.targets.gaussian_mixture import GaussianMixture


def published_means(num_modes):
    with torch.random.fork_rng():
        torch.manual_seed(0)
        return (torch.rand((num_modes, 2), dtype=torch.float32) - 0.5) * 2 * 40


@pytest.mark.parametrize("num_modes", [40, 80, 120])
def test_means_follow_the_published_recipe(num_modes):
    target = GaussianMixture(num_modes)
    assert torch.equal(target.means, published_means(num_modes))
    assert target.means.shape == (num_modes, 2)


def test_first_means_as_printed():
    expected = torch.tensor([[-0.2995, 21.4577], [-32.9218, -29.4376], [-15.4062, 10.7263]])
    torch.testing.assert_close(GaussianMixture().means[:3], expected, rtol=0, atol=6e-5)


def test_the_target_is_the_same_under_any_default_dtype(float64):
    target = GaussianMixture()
    assert target.means.dtype == torch.float64
    assert torch.equal(target.means, published_means(40).double())
    assert GaussianMixture(dtype=torch.float32).means.dtype == torch.float32


def test_making_one_leaves_the_random_state_alone():
    before = torch.get_rng_state()
    GaussianMixture().mode_total_variation(torch.zeros(3, 2), 100)
    assert torch.equal(before, torch.get_rng_state())


def test_log_prob_against_torch():
    target = GaussianMixture(dtype=torch.float64)
    scale = torch.nn.functional.softplus(torch.tensor(1.0, dtype=torch.float64))
    assert target.scale == pytest.approx(1.3133, abs=5e-5)
    law = MixtureSameFamily(Categorical(torch.ones(40).double()), Independent(Normal(target.means, scale), 1))
    x = 60 * torch.rand(3, 5, 2, dtype=torch.float64) - 30
    torch.testing.assert_close(target.log_prob(x), law.log_prob(x), rtol=1e-10, atol=1e-10)
    found = GaussianMixture().log_prob(x.float()).double()
    torch.testing.assert_close(found, law.log_prob(x), rtol=1e-3, atol=1e-3)


@pytest.mark.parametrize("num_modes", [40, 120])
def test_the_evidence_is_one_by_quadrature(num_modes):
    target = GaussianMixture(num_modes, dtype=torch.float64)
    axis = torch.linspace(-52, 52, 261, dtype=torch.float64)
    grid = torch.cartesian_prod(axis, axis)
    log_z = torch.logsumexp(target.log_prob(grid), 0) + 2 * math.log(float(axis[1] - axis[0]))
    assert float(log_z) == pytest.approx(target.log_evidence, abs=1e-9)


def test_draws_are_exact():
    """Moments of the responsibilities' own residuals, within five standard errors."""
    target = GaussianMixture(dtype=torch.float64)
    n = 100_000
    x = target.sample(n)
    assert x.shape == (n, 2)
    assert x.dtype == torch.float64
    mean, second = target.means.mean(0), target.means.square().mean(0) + target.scale**2
    error = x.std(0) / math.sqrt(n)
    assert bool(((x.mean(0) - mean).abs() < 5 * error).all())
    error = x.square().std(0) / math.sqrt(n)
    assert bool(((x.square().mean(0) - second).abs() < 5 * error).all())
    # E[-log p(X)] is the entropy by quadrature; a scale 3 % off would be seen.
    axis = torch.linspace(-50, 50, 251, dtype=torch.float64)
    log_p = target.log_prob(torch.cartesian_prod(axis, axis))
    entropy = -float((log_p.exp() * log_p).sum()) * float(axis[1] - axis[0]) ** 2

    def off(draws):
        value = -target.log_prob(draws)
        return abs(float(value.mean()) - entropy) / (float(value.std()) / math.sqrt(n))

    assert off(x) < 5
    nearest = target.means[torch.cdist(x, target.means).argmin(1)]
    assert off(nearest + 1.03 * (x - nearest)) > 5


def test_draws_follow_their_generator():
    target = GaussianMixture()
    a, b = (target.sample(6, torch.Generator().manual_seed(4)) for _ in range(2))
    assert torch.equal(a, b)
    assert not torch.equal(a, target.sample(6, torch.Generator().manual_seed(5)))


def test_mode_shares_count_the_nearest_mean():
    target = GaussianMixture()
    x = torch.cat([target.means[3:4].expand(3, 2), target.means[7:8]]) + 0.01
    expected = torch.zeros(40)
    expected[3], expected[7] = 0.75, 0.25
    torch.testing.assert_close(target.mode_shares(x), expected)


def test_total_variation_is_small_for_exact_draws_and_shows_a_lost_mode():
    target = GaussianMixture()
    x = target.sample(10_000)
    small = target.mode_total_variation(x, 200_000)
    assert 0.01 < small < 0.04  # about .025 for 10,000 exact draws
    near = target.mode_shares(x[:1]).argmax()
    kept = x[torch.cdist(x, target.means).argmin(1) != near]
    assert target.mode_total_variation(kept, 200_000) > small + 0.005
    assert target.mode_total_variation(target.means[:1].expand(50, 2), 200_000) == pytest.approx(0.975, abs=0.01)
