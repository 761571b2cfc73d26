# SPDX-License-Identifier: Apache-2.0
"""Reverse kernels: exact weights where they are known, a second route for the rest, and E[w] = Z."""

import math

import pytest
import torch
from oracles import (
    Mixture,
    fitted_kernels,
    gauss_hermite,
    levels,
    normal,
    random_network,
    replay,
    two_modes,
    zero_network,
)
from torch.distributions import MultivariateNormal, Normal

from pyro_sm.diffusion.denoiser import Denoiser
from pyro_sm.diffusion.diffusion import Diffusion
from pyro_sm.diffusion.kernels import Kernels, fit_kernels, gaussian_kernels, path_log_ratio, sample_paths
from pyro_sm.diffusion.levels import fit_levels
from pyro_sm.diffusion.noise_range import NoiseRange
from pyro_sm.nn import mlp

exact = {"rtol": 1e-10, "atol": 1e-10}
LOG_Z = 0.7
LOC = torch.tensor([0.4, -1.0], dtype=torch.float64)
TRIL = torch.tensor([[1.5, 0.0], [-0.9, 0.6]], dtype=torch.float64)


# Not every mistake is a bias: a forward kernel of another width still integrates to one. Each path shows them all.
BIASED = ["no start", "no scale"]
WRONG = [*BIASED, "no factor", "no V", "g for g²"]


# ---------------------------------------------------------------------------------------------- exact


@pytest.mark.parametrize("noise", [NoiseRange(0.002, 8.0), NoiseRange(0.05, 3.0)], ids=["wide", "narrow"])
@pytest.mark.parametrize("dim", [1, 5])
def test_an_untrained_sampler_has_equal_weights(noise, dim):
    """``R + log N(u)`` is zero for every path, not only on average."""
    kernels = gaussian_kernels(levels(16, noise), dim)
    denoiser = Denoiser(zero_network(dim))
    u, log_ratio = sample_paths(denoiser, kernels, normal(17, 200, dim))
    log_p = Normal(0.0, 1.0).log_prob(u).sum(-1)
    torch.testing.assert_close(log_ratio + log_p, torch.zeros(200).double(), rtol=0, atol=1e-10)
    assert u.shape == (200, dim)
    assert float(log_p.std()) > 0.1
    given = 3 * normal(200, dim)
    log_ratio = path_log_ratio(denoiser, kernels, given, normal(16, 200, dim))
    expected = -Normal(0.0, 1.0).log_prob(given).sum(-1)
    torch.testing.assert_close(log_ratio, expected, rtol=0, atol=1e-9)


def test_any_diagonal_gaussian_is_exact_too():
    """The exact denoiser of ``N(m, diag s²)`` and its start: all weights equal again."""
    law = Mixture([1.0], [[0.7, -1.4]], [[[0.25, 0.0], [0.0, 2.2]]])
    r = levels()
    start = torch.sqrt(law.covariances[0].diagonal() + r[-1] ** 2)
    kernels = gaussian_kernels(r, 2)._replace(start_loc=law.means[0], start_scale=start)
    u, log_ratio = sample_paths(law.denoiser(), kernels, normal(8, 100, 2))
    torch.testing.assert_close(log_ratio, -law.log_prob(u), rtol=0, atol=1e-9)


def test_latent_weights_of_an_untrained_sampler_carry_the_base():
    kernels = gaussian_kernels(levels(), 2)
    process = Diffusion(Denoiser(zero_network(2)), kernels, LOC, TRIL)
    law = MultivariateNormal(LOC, scale_tril=TRIL)
    z, log_ratio = process.draw(50)
    torch.testing.assert_close(log_ratio, -law.log_prob(z), rtol=0, atol=1e-9)
    given = 2 * normal(50, 2)
    torch.testing.assert_close(process.path_log_ratio(given), -law.log_prob(given), rtol=0, atol=1e-9)
    # Without log|det L| the two would differ by a constant.
    assert abs(float(process.log_det(z)[0])) > 0.1


def test_latents_and_whitened_points_are_inverse():
    process = Diffusion(Denoiser(zero_network(2)), gaussian_kernels(levels(), 2), LOC, TRIL)
    u = normal(6, 2)
    z = process.to_latent(u)
    torch.testing.assert_close(z, torch.stack([LOC + TRIL @ row for row in u]), **exact)
    torch.testing.assert_close(process.to_white(z), u, **exact)
    jacobian = torch.autograd.functional.jacobian(process.to_latent, u[0])
    torch.testing.assert_close(process.log_det(u), torch.linalg.slogdet(jacobian)[1].expand(6), **exact)
    score = normal(6, 2)
    torch.testing.assert_close(
        process.white_score(u, score), torch.stack([jacobian.T @ row for row in score]), **exact
    )
    assert process.dim == 2
    assert process.ratios is process.kernels.ratios


@pytest.mark.parametrize("dim", [1, 2, 4])
def test_paths_and_ratios_by_a_second_route(dim):
    kernels = fitted_kernels(levels(), dim)
    denoiser = Denoiser(random_network(dim))
    noise = normal(8, 30, dim)
    u, log_ratio = sample_paths(denoiser, kernels, noise)
    expected_u, expected, forward_noise = replay(denoiser, kernels, noise)
    torch.testing.assert_close(u, expected_u, **exact)
    torch.testing.assert_close(log_ratio, expected, rtol=1e-9, atol=1e-9)
    # The same path, seen from its clean end.
    torch.testing.assert_close(path_log_ratio(denoiser, kernels, u, forward_noise), expected, rtol=1e-9, atol=1e-9)
    for wrong in WRONG:
        _, other, _ = replay(denoiser, kernels, noise, wrong)
        assert float((other - log_ratio).abs().mean()) > 1e-2, wrong


def test_paths_do_not_depend_on_how_many_rows_the_network_takes_at_once(monkeypatch):
    kernels = fitted_kernels(levels())
    denoiser = Denoiser(random_network(2))
    noise = normal(8, 30, 2)
    whole = sample_paths(denoiser, kernels, noise)
    u = normal(30, 2)
    given = path_log_ratio(denoiser, kernels, u, noise[1:])
    monkeypatch.setattr(mlp, "_ROWS_IN_CACHE", 7)
    for found, expected in zip(sample_paths(denoiser, kernels, noise), whole, strict=True):
        torch.testing.assert_close(found, expected, **exact)
    torch.testing.assert_close(path_log_ratio(denoiser, kernels, u, noise[1:]), given, **exact)


def test_every_row_of_a_path_shares_its_level():
    seen = []

    def network(x, c, context):
        seen.append(c)
        return torch.zeros(x.shape[0], 2 * x.shape[1], dtype=x.dtype)

    kernels = gaussian_kernels(levels(), 2)
    noise = normal(8, 30, 2)
    sample_paths(Denoiser(network), kernels, noise)
    expected = (0.25 * kernels.ratios[1:].log())[:, None]
    torch.testing.assert_close(torch.stack(seen), expected.flip(0), **exact)
    seen.clear()
    path_log_ratio(Denoiser(network), kernels, normal(30, 2), noise[1:])
    torch.testing.assert_close(torch.stack(seen), expected, **exact)


def test_paths_are_differentiable_in_the_network():
    network = random_network(2).requires_grad_(True)
    kernels = fitted_kernels(levels())
    _, log_ratio = sample_paths(Denoiser(network), kernels, normal(8, 5, 2))
    log_ratio.sum().backward()
    assert all(p.grad is not None and bool(torch.isfinite(p.grad).all()) for p in network.parameters())
    assert float(network.first.weight.grad.abs().sum()) > 0


def test_float32_weights_stay_equal():
    r = levels(48, NoiseRange()).float()
    u, log_ratio = sample_paths(Denoiser(zero_network(3).float()), gaussian_kernels(r, 3), torch.randn(49, 500, 3))
    log_w = log_ratio + Normal(0.0, 1.0).log_prob(u).sum(-1)
    assert u.dtype == torch.float32
    assert float(log_w.std()) < 2e-2
    assert abs(float(log_w.mean())) < 2e-2


# ------------------------------------------------------------------------------------------------ fit


def orthonormal_draws(n, dim):
    """``u`` and ``ε`` (n, dim) whose sample moments are those of independent standard normals, exactly."""
    both = normal(n, 2 * dim)
    both = both - both.mean(0)
    tril = torch.linalg.cholesky(both.T @ both / n)
    return torch.linalg.solve_triangular(tril, both.T, upper=False).T.split(dim, 1)


@pytest.mark.parametrize("s", [1.0, 0.4, 2.5])
def test_fit_in_closed_form(s):
    """For ``N(m, s²)`` and an untrained denoiser, ``f = (1 + r² (s² + m²)) / (1 + r²)``."""
    u, noise = orthonormal_draws(400, 3)
    loc = torch.tensor([0.0, 0.5, -1.2], dtype=torch.float64)
    r = levels()
    for m in (0 * loc, loc):
        fitted = fit_kernels(Denoiser(zero_network(3)), gaussian_kernels(r, 3), m + s * u, noise)
        square = r[1:, None] ** 2
        torch.testing.assert_close(fitted.variance_factor, (1 + square * (s**2 + m**2)) / (1 + square), **exact)
        torch.testing.assert_close(fitted.start_loc, m, **exact)
        torch.testing.assert_close(fitted.start_scale, torch.sqrt(s**2 + r[-1] ** 2).expand(3), **exact)
        assert torch.equal(fitted.ratios, r)
        if s == 1 and m is not loc:
            for new, old in zip(fitted, gaussian_kernels(r, 3), strict=True):
                torch.testing.assert_close(new, old, **exact)


def test_a_fit_to_an_exact_denoiser_finds_ones():
    mixture = two_modes()
    u = mixture.sample(40_000)
    fitted = fit_kernels(mixture.denoiser(), gaussian_kernels(levels(), 2), u, normal(40_000, 2))
    assert float((fitted.variance_factor - 1).abs().max()) < 0.05
    untrained = fit_kernels(Denoiser(zero_network(2)), gaussian_kernels(levels(), 2), u, normal(40_000, 2))
    assert float((untrained.variance_factor - 1).abs().max()) > 0.3


def test_a_fit_is_bounded():
    u, noise = 1e4 * normal(20, 2), normal(20, 2)
    fitted = fit_kernels(Denoiser(zero_network(2)), gaussian_kernels(levels(), 2), u, noise)
    assert float(fitted.variance_factor.max()) == 1e3
    silent = fit_kernels(Denoiser(zero_network(2)), gaussian_kernels(levels(), 2), 0 * u, 0 * noise)
    assert float(silent.variance_factor.min()) == float(silent.variance_factor.max()) == 1e-3


def test_where_all_latents_are_alike_their_moments_are_one():
    """Means over latents of what each has by itself; for noisy draws, those are not alike."""
    u, noise = normal(60, 3), normal(60, 3)
    denoiser, kernels = Denoiser(zero_network(3)), gaussian_kernels(levels(), 3)
    each, one = fit_kernels(denoiser, kernels, u, noise), fit_kernels(denoiser, kernels, u, noise, isotropic=True)
    expected = each.variance_factor.mean(1, keepdim=True).expand(-1, 3)
    torch.testing.assert_close(one.variance_factor, expected, **exact)
    scale = torch.sqrt(u.square().mean() + kernels.ratios[-1] ** 2)
    torch.testing.assert_close(one.start_scale, scale.expand(3), **exact)
    assert not one.start_loc.any()
    assert torch.equal(one.ratios, each.ratios)
    assert float((each.variance_factor.amax(1) / each.variance_factor.amin(1)).max()) > 1.2
    # A third as many draws are worth as much.

    def errors(n, same):
        fits = [fit_kernels(denoiser, kernels, normal(n, 3), normal(n, 3), isotropic=same) for _ in range(40)]
        return torch.stack([fit.variance_factor - 1 for fit in fits])

    spread = [float(errors(n, same).square().mean()) for n, same in ((90, False), (30, True))]
    assert 0.6 < spread[1] / spread[0] < 1.6


def test_latent_fits_are_whitened_fits():
    process = Diffusion(Denoiser(random_network(2)), gaussian_kernels(levels(), 2), LOC, TRIL)
    z = normal(30, 2)
    torch.manual_seed(2)
    found = process.fit(z)
    torch.manual_seed(2)
    u, noise = torch.linalg.solve(TRIL, (z - LOC).T).T, normal(30, 2)
    ratios = fit_levels(process.denoiser, process.kernels.ratios, u, noise)
    expected = fit_kernels(process.denoiser, process.kernels._replace(ratios=ratios), u, noise)
    for one, other in zip(found, expected, strict=True):
        torch.testing.assert_close(one, other, rtol=1e-8, atol=1e-8)


# ---------------------------------------------------------------------------------------- enumeration


def test_the_weights_integrate_to_the_evidence():
    """``E[w] = Z`` for D = 1 and K = 2 by Gauss–Hermite over all three normals of a path."""
    target = Mixture([0.35, 0.65], [[-0.8], [0.6]], [[[0.35]], [[0.5]]])
    ratios = torch.tensor([0.0, 0.7, 1.6], dtype=torch.float64)
    factor = torch.tensor([[1.5], [1.3]], dtype=torch.float64)
    start = torch.sqrt(torch.tensor([1.4], dtype=torch.float64) + ratios[-1] ** 2)
    kernels = Kernels(ratios, factor, torch.tensor([0.1], dtype=torch.float64), start)
    denoiser = Denoiser(lambda x, c, _: torch.cat([0.2 * torch.sin(x) - 0.1, 0.1 * torch.cos(x) + c[:, None]], -1))
    nodes, weights = gauss_hermite(48)
    noise = torch.cartesian_prod(nodes, nodes, nodes).T[..., None]
    weight = torch.cartesian_prod(weights, weights, weights).prod(1)

    def mean_weight(u, log_ratio):
        return float((weight * torch.exp(LOG_Z + target.log_prob(u) + log_ratio)).sum())

    found = mean_weight(*sample_paths(denoiser, kernels, noise))
    assert found == pytest.approx(math.exp(LOG_Z), rel=1e-6)
    for wrong in [*BIASED, "no V"]:
        assert abs(mean_weight(*replay(denoiser, kernels, noise, wrong)[:2]) / found - 1) > 1e-2, wrong


# ---------------------------------------------------------------------------------------- statistical


def test_the_evidence_is_unbiased_for_a_random_network():
    target = two_modes()
    kernels = fitted_kernels(levels(6, NoiseRange(0.3, 3.0)))
    denoiser = Denoiser(random_network(2, 0.2))
    noise = normal(7, 100_000, 2)

    def off(u, log_ratio):
        w = torch.exp(LOG_Z + target.log_prob(u) + log_ratio)
        return abs(float(w.mean()) - math.exp(LOG_Z)) / (float(w.std()) / math.sqrt(len(w)))

    found = sample_paths(denoiser, kernels, noise)
    log_w = target.log_prob(found[0]) + found[1]
    share = float(torch.softmax(log_w, 0).square().sum().reciprocal()) / len(log_w)
    assert 0.02 < share < 0.9, "the sampler must be wrong, but not so wrong that an error says nothing"
    assert off(*found) < 5
    for wrong in BIASED:
        assert off(*replay(denoiser, kernels, noise, wrong)[:2]) > 10, wrong


def test_given_points_have_the_ratio_of_their_marginal():
    """``E[exp(−R) | u]`` is the sampler's own density of ``u``: compare with the histogram of its draws."""
    kernels = gaussian_kernels(levels(4, NoiseRange(0.5, 3.0)), 1)
    u = torch.linspace(-2, 2, 5, dtype=torch.float64)
    rows = u.repeat_interleave(10_000)[:, None]
    denoiser = Denoiser(random_network(1, 0.15))
    inverse = torch.exp(-path_log_ratio(denoiser, kernels, rows, normal(4, len(rows), 1))).reshape(5, -1)
    draws, _ = sample_paths(denoiser, kernels, normal(5, 200_000, 1))
    width = 0.1
    for centre, ratio in zip(u, inverse, strict=True):
        inside = ((draws - centre).abs() < width / 2).double()
        found, error = float(inside.mean()) / width, float(inside.std()) / width / math.sqrt(len(draws))
        expected, expected_error = float(ratio.mean()), float(ratio.std()) / math.sqrt(len(ratio))
        assert abs(found - expected) < 5 * math.hypot(error, expected_error)
        assert abs(found - 1.3 * expected) > 5 * math.hypot(error, expected_error)
