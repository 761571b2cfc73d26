# SPDX-License-Identifier: Apache-2.0
"""Kernels with heavy tails: the mixture written out, weights that stay exact, and what they reach."""

import math

import pyro
import pytest
import torch
from oracles import Mixture, fitted_kernels, gauss_hermite, levels, normal, random_network, replay, two_modes
from torch.distributions import Normal

from pyro_sm import AutoDiffusion, GivenBase, HeavyTails
from pyro_sm.diffusion.denoiser import Denoiser
from pyro_sm.diffusion.kernels import Kernels, gaussian_kernels, path_log_ratio, sample_paths
from pyro_sm.diffusion.noise_range import NoiseRange

TAILS = HeavyTails(0.3, 2.5)


def log_factor_written_out(noise, tails):
    """``log B'/B`` by one density for every place the push may be at."""
    count, dim = noise.shape[0] * noise.shape[2], noise.shape[2]
    total = torch.full(noise.shape[1:2], 1 - tails.share, dtype=noise.dtype)
    for level in range(noise.shape[0]):
        for latent in range(dim):
            e = noise[level, :, latent]
            ratio = Normal(0.0, tails.scale).log_prob(e) - Normal(0.0, 1.0).log_prob(e)
            total = total + tails.share / count * ratio.exp()
    return total.log()


@pytest.mark.parametrize("dim", [1, 3])
def test_the_mixture_written_out(dim):
    noise = 2 * normal(5, 40, dim)
    found = TAILS.log_factor(TAILS.log_sum(noise.square()), dim)
    torch.testing.assert_close(found, log_factor_written_out(noise, TAILS))
    assert float(found.min()) >= math.log1p(-TAILS.share)


def test_a_push_far_out_does_not_overflow():
    noise = torch.zeros(4, 2, 3)
    noise[1, 0, 2] = 1e3
    found = TAILS.log_factor(TAILS.log_sum(noise.square()), 3)
    assert bool(torch.isfinite(found).all())
    assert float(found[0]) > 1e5


def test_drawn_and_given_paths_have_one_law():
    """The ratio of a drawn path, and of the same path given from its clean end."""
    kernels, denoiser = fitted_kernels(levels(6, NoiseRange(0.3, 3.0))), Denoiser(random_network(2, 0.2))
    noise = TAILS.inflated(normal(7, 50, 2))
    u, log_ratio = sample_paths(denoiser, kernels, noise, TAILS)
    again, plain, forward = replay(denoiser, kernels, noise)
    torch.testing.assert_close(u, again)
    torch.testing.assert_close(log_ratio, plain - log_factor_written_out(noise, TAILS))
    torch.testing.assert_close(path_log_ratio(denoiser, kernels, u, forward, TAILS), log_ratio)


def test_a_share_of_the_paths_has_one_noise_inflated():
    torch.manual_seed(0)
    noise = normal(6, 20_000, 4)
    changed = TAILS.inflated(noise) / noise
    pushed = changed != 1
    assert set(pushed.sum((0, 2)).tolist()) == {0, 1}
    torch.testing.assert_close(changed[pushed], torch.full_like(changed[pushed], TAILS.scale))
    share = float(pushed.any(2).any(0).double().mean())
    assert abs(share - 0.3) < 5 * math.sqrt(0.3 * 0.7 / 20_000)
    places = pushed.double().sum(1) / 20_000  # each level and latent alike
    assert float((places - share / 24).abs().max()) < 5 * math.sqrt(share / 24 / 20_000)


def test_the_weights_integrate_to_the_evidence():
    """``E[w] = Z`` for D = 1, K = 2, by Gauss–Hermite over the noises of every component of the mixture."""
    target = Mixture([0.35, 0.65], [[-0.8], [0.6]], [[[0.35]], [[0.5]]])
    ratios = torch.tensor([0.0, 0.7, 1.6], dtype=torch.float64)
    start = torch.sqrt(torch.tensor([1.4], dtype=torch.float64) + ratios[-1] ** 2)
    kernels = Kernels(ratios, torch.tensor([[1.5], [1.3]]).double(), torch.tensor([0.1]).double(), start)
    denoiser = Denoiser(lambda x, c, _: torch.cat([0.2 * torch.sin(x) - 0.1, 0.1 * torch.cos(x) + c[:, None]], -1))
    nodes, weights = gauss_hermite(48)
    noise = torch.cartesian_prod(nodes, nodes, nodes).T[..., None]
    weight = torch.cartesian_prod(weights, weights, weights).prod(1)
    tails = HeavyTails(0.4, 1.5)

    def mean_weight(heavy):
        parts = [(1 - tails.share, noise)]
        for level in range(3):
            pushed = noise.clone()
            pushed[level] *= tails.scale
            parts.append((tails.share / 3, pushed))
        total = 0.0
        for share, drawn in parts:
            u, log_ratio = sample_paths(denoiser, kernels, drawn, heavy)
            total += share * float((weight * torch.exp(target.log_prob(u) + log_ratio)).sum())
        return total

    assert mean_weight(tails) == pytest.approx(1, rel=1e-4)
    assert abs(mean_weight(None) - 1) > 1e-2  # a known wrong variant: pushed paths weighed as if they were not
    assert abs(mean_weight(HeavyTails(0.4, 1.8)) - 1) > 1e-2


def test_the_evidence_is_unbiased_for_a_random_network():
    torch.manual_seed(2)
    target, kernels = two_modes(), fitted_kernels(levels(6, NoiseRange(0.3, 3.0)))
    denoiser = Denoiser(random_network(2, 0.2))
    noise = TAILS.inflated(normal(7, 100_000, 2))

    def off(heavy):
        u, log_ratio = sample_paths(denoiser, kernels, noise, heavy)
        w = torch.exp(target.log_prob(u) + log_ratio)
        return abs(float(w.mean()) - 1) / (float(w.std()) / math.sqrt(len(w)))

    assert off(TAILS) < 5
    assert off(None) > 5


def test_they_reach_what_gaussian_kernels_do_not():
    """A sampler of ``N(0, 1)`` draws beyond four standard deviations, and knows how seldom it does."""
    torch.manual_seed(3)
    kernels = gaussian_kernels(levels(8, NoiseRange(0.1, 4.0)), 1)
    denoiser = Denoiser(lambda x, c, _: torch.zeros(x.shape[0], 2, dtype=x.dtype))

    def far(tails):
        noise = normal(9, 200_000, 1)
        u, log_ratio = sample_paths(denoiser, kernels, noise if tails is None else tails.inflated(noise), tails)
        beyond = u[:, 0].abs() > 4
        w = torch.exp(Normal(0.0, 1.0).log_prob(u[:, 0]) + log_ratio)
        return float(beyond.double().mean()), float((w * beyond).mean())

    plain, heavy = far(None), far(HeavyTails(0.3, 3.0))
    assert heavy[0] > 20 * plain[0]
    assert heavy[1] == pytest.approx(math.erfc(4 / math.sqrt(2)), rel=0.2)  # weighted, it is the target's


def test_a_guide_draws_with_them():
    def model():
        pyro.sample("x", pyro.distributions.Normal(torch.zeros(3), 1.0).to_event(1))

    def weights(heavy, name):
        guide = AutoDiffusion(model, base=GivenBase(0.0, 1.0), name=name, heavy=heavy)
        guide.bind(model)
        with torch.no_grad():
            z, log_ratio = guide.diffusion().draw(20_000)
        return torch.exp(-0.5 * z.square().sum(-1) - 1.5 * math.log(2 * math.pi) + log_ratio)

    torch.manual_seed(4)
    plain, heavy = weights(None, "plain"), weights(TAILS, "heavy")
    torch.testing.assert_close(plain, torch.ones_like(plain), rtol=1e-3, atol=1e-3)  # its base is the posterior
    assert 1.05 < float(heavy.max()) < 1 / 0.7 * 1.001
    assert abs(float(heavy.mean()) - 1) < 5 * float(heavy.std()) / math.sqrt(20_000)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [((0.0, 3.0), "share"), ((1.0, 3.0), "share"), ((0.1, 1.0), "scale"), ((0.1, math.inf), "scale")],
)
def test_refusals(arguments, message):
    with pytest.raises(ValueError, match=f"expected a .*{message}"):
        HeavyTails(*arguments)
