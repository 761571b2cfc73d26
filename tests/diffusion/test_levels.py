# SPDX-License-Identifier: Apache-2.0
"""Levels by dynamic programming: the shortest walk, the cost of a step by a second route, and what is gained."""

import itertools
import math

import pytest
import torch
from oracles import two_modes, zero_network
from torch.distributions import Independent, Normal, kl_divergence

from pyro_sm.diffusion import diffusion
from pyro_sm.diffusion.denoiser import Denoiser
from pyro_sm.diffusion.kernels import fit_kernels, gaussian_kernels, path_log_ratio
from pyro_sm.diffusion.levels import cheapest_walk, fit_levels, step_costs
from pyro_sm.diffusion.noise_range import NoiseRange

DOUBLE = {"dtype": torch.float64}


def even(num_steps, noise=None):
    return (noise or NoiseRange(0.02, 8.0)).levels(num_steps, device=torch.device("cpu"), **DOUBLE)


def test_the_walk_is_the_best_of_all_walks():
    torch.manual_seed(0)
    cost = torch.full((7, 7), math.inf, **DOUBLE)
    for high in range(1, 7):
        cost[:high, high] = torch.rand(high, **DOUBLE)
    for num_steps in (1, 3, 6):
        walks = [(0, *inner, 6) for inner in itertools.combinations(range(1, 6), num_steps - 1)]
        best = min(walks, key=lambda walk: sum(float(cost[a, b]) for a, b in itertools.pairwise(walk)))
        assert cheapest_walk(cost, num_steps) == list(best)
    assert cheapest_walk(cost, 7) is None


def test_the_cost_of_a_step_is_a_divergence_between_gaussians():
    law = two_modes()
    torch.manual_seed(0)
    u, noise = law.sample(200), torch.randn(200, 2, **DOUBLE)
    grid = torch.tensor([0.1, 0.4, 1.5], **DOUBLE)
    found = step_costs(law.denoiser(), grid, 2, u, noise)
    for low, high in ((0, 1), (1, 2), (0, 2)):
        y = u + grid[high] * noise
        mean, variance = law.denoiser().moments(y, grid[high])
        variance = variance * ((u - mean).square() / variance).mean(0)
        c = 1 - grid[low] ** 2 / grid[high] ** 2
        tau = grid[low] ** 2 * c
        true = Independent(Normal(y + c * (u - y), tau.sqrt()), 1)
        ours = Independent(Normal(y + c * (mean - y), torch.sqrt(tau + c**2 * variance)), 1)
        torch.testing.assert_close(found[low, high], kl_divergence(true, ours).mean(), rtol=1e-9, atol=1e-9)
        assert not math.isclose(float(found[low, high]), float(kl_divergence(ours, true).mean()), rel_tol=1e-2)
    assert bool(found[torch.ones(3, 3).tril() > 0].isinf().all())
    assert bool(step_costs(law.denoiser(), grid, 1, u, noise)[0, 2].isinf())


def mean_log_ratio(law, ratios, u, noise):
    kernels = fit_kernels(law.denoiser(), gaussian_kernels(ratios, law.dim), u, noise)
    torch.manual_seed(7)
    return float(path_log_ratio(law.denoiser(), kernels, u, torch.randn(len(ratios) - 1, *u.shape, **DOUBLE)).mean())


@pytest.mark.parametrize("num_steps", [6, 12])
def test_paths_lose_less(num_steps):
    """Under the target, ``E[R]`` is the forward KL between path measures, up to a constant."""
    law = two_modes()
    torch.manual_seed(0)
    u, noise = law.sample(20_000), torch.randn(20_000, 2, **DOUBLE)
    ratios = even(num_steps)
    loss = mean_log_ratio(law, ratios, u, noise)
    assert mean_log_ratio(law, fit_levels(law.denoiser(), ratios, u[:2000], noise[:2000]), u, noise) < loss - 0.02
    # The other way round: crowded where the even schedule was already fine enough.
    crowded = torch.linspace(0.01, 0.1, num_steps - 2, **DOUBLE)
    wrong = torch.cat([ratios[:2], ratios[1] * (ratios[-1] / ratios[1]) ** crowded, ratios[-1:]])
    assert mean_log_ratio(law, wrong, u, noise) > loss + 0.02


def test_ends_and_order_are_kept():
    law = two_modes()
    torch.manual_seed(1)
    ratios = even(10)
    found = fit_levels(law.denoiser(), ratios, law.sample(500), torch.randn(500, 2, **DOUBLE))
    assert found.shape == ratios.shape
    assert torch.equal(found[[0, 1, -1]], ratios[[0, 1, -1]])
    assert bool((found.diff() > 0).all())


def test_evenness_decides_where_nothing_else_does(monkeypatch):
    """The costs of all walks are one if each is a difference of a potential, as for an exact Gaussian."""
    ratios = even(12)
    potential = torch.randn(34, **DOUBLE)

    def costs(denoiser, grid, widest, u, noise):
        assert len(grid) == 34
        return torch.where(torch.ones(34, 34).triu(1) > 0, potential[None, :] - potential[:, None], math.inf)

    monkeypatch.setattr("pyro_sm.diffusion.levels.step_costs", costs)
    u = torch.zeros(1, 2, **DOUBLE)
    torch.testing.assert_close(fit_levels(Denoiser(zero_network(2)), ratios, u, u), ratios)
    monkeypatch.setattr("pyro_sm.diffusion.levels._EVENNESS", 0.0)
    assert not torch.allclose(fit_levels(Denoiser(zero_network(2)), ratios, u, u), ratios)


def test_too_few_steps_and_a_broken_network_change_nothing():
    ratios = even(3)
    u = torch.randn(50, 3, **DOUBLE)
    assert torch.equal(fit_levels(Denoiser(zero_network(3)), ratios[:3], u, u), ratios[:3])
    broken = Denoiser(lambda x, c, context: torch.full((len(x), 6), math.nan, **DOUBLE))
    assert torch.equal(fit_levels(broken, ratios, u, u), ratios)


@pytest.mark.parametrize(("dim", "draws"), [(2, 1024), (64, 1024), (100, 655), (1000, 65)])
def test_many_latents_need_fewer_draws(monkeypatch, dim, draws):
    """The cost of a step is a sum over latents, each of which is one more look at the same levels."""
    seen = []

    def kept(denoiser, ratios, u, noise):
        seen.append((u.shape, noise.shape))
        return ratios

    monkeypatch.setattr(diffusion, "fit_levels", kept)
    kernels = gaussian_kernels(even(4), dim)
    process = diffusion.Diffusion(
        Denoiser(zero_network(dim)), kernels, torch.zeros(dim, **DOUBLE), torch.eye(dim, **DOUBLE)
    )
    process.fit(torch.randn(1500, dim, **DOUBLE))
    assert seen == [((draws, dim), (draws, dim))]


@pytest.mark.parametrize(("dim", "for_levels", "for_moments"), [(2, 1024, 1500), (36, 227, 910), (162, 50, 202)])
def test_where_all_latents_are_alike_fewer_do(monkeypatch, dim, for_levels, for_moments):
    """Each latent is one more look at the one variance."""
    seen = []

    def kept(denoiser, ratios, u, noise):
        seen.append(len(u))
        return ratios

    def moments(denoiser, kernels, u, noise, *, isotropic):
        seen.append((len(u), isotropic))
        return kernels

    monkeypatch.setattr(diffusion, "fit_levels", kept)
    monkeypatch.setattr(diffusion, "fit_kernels", moments)
    kernels = gaussian_kernels(even(4), dim)
    process = diffusion.Diffusion(
        Denoiser(zero_network(dim)), kernels, torch.zeros(dim, **DOUBLE), 2 * torch.eye(dim, **DOUBLE)
    )
    assert process.is_round()
    process.fit(torch.randn(1500, dim, **DOUBLE), isotropic=True)
    assert seen == [for_levels, (for_moments, True)]


def test_what_is_round():
    eye, origin = torch.eye(3, **DOUBLE), torch.zeros(3, **DOUBLE)
    kernels, network = gaussian_kernels(even(4), 3), Denoiser(zero_network(3))
    tilted = eye.clone()
    tilted[2, 0] = 0.1
    for loc, tril, expected in (
        (origin, 0.3 * eye, True),
        (origin + torch.tensor([0, 0, 1e-6], **DOUBLE), eye, False),
        (origin, eye * torch.tensor([1.0, 1.0, 1.01], **DOUBLE), False),
        (origin, tilted, False),
    ):
        assert diffusion.Diffusion(network, kernels, loc, tril).is_round() is expected
