# SPDX-License-Identifier: Apache-2.0
"""The anchor: moments by another route, what a denoiser makes of it, and how it is fitted."""

import pytest
import torch
from oracles import Mixture, random_network, two_modes, zero_network

from pyro_sm.diffusion.anchor import Anchor, fit_anchor
from pyro_sm.diffusion.denoiser import Denoiser
from pyro_sm.diffusion.kernels import fit_kernels, gaussian_kernels, sample_paths
from pyro_sm.diffusion.noise_range import NoiseRange

DOUBLE = {"dtype": torch.float64}


def anchor_of(law: Mixture) -> Anchor:
    return Anchor(law.weights.log(), law.means, law.values, law.vectors)


@pytest.mark.parametrize("r", [0.01, 0.7, 20.0])
def test_moments_are_those_of_the_mixture(r):
    law = two_modes()
    y = law.sample(50) + r * torch.randn(50, 2, **DOUBLE)
    level = torch.full((50,), r, **DOUBLE)
    expected = law.moments(y, level)
    for given in (level, level[:1]):
        for found, wanted in zip(anchor_of(law).moments(y, given), expected, strict=True):
            torch.testing.assert_close(found, wanted, rtol=1e-7, atol=1e-9)
    # The share of a mode forgets how wide it is.
    wrong = anchor_of(law)._replace(values=law.values.mean(0).expand(2, 2)).moments(y, level)[1]
    assert not torch.allclose(wrong, expected[1], rtol=1e-4, atol=1e-8)


def test_pieces_are_the_whole(monkeypatch):
    anchor, y, r = anchor_of(two_modes()), torch.randn(23, 2, **DOUBLE), torch.rand(23, **DOUBLE) + 0.1
    whole, shared = anchor.moments(y, r), anchor.moments(y, r[:1])
    monkeypatch.setattr("pyro_sm.diffusion.anchor._NUMBERS_IN_CACHE", 4 * 5)
    for found, wanted in ((anchor.moments(y, r), whole), (anchor.moments(y, r[:1]), shared)):
        torch.testing.assert_close(found, wanted)


def test_an_untrained_denoiser_is_its_anchor_and_a_trained_one_adds_to_it():
    law = two_modes()
    y, r = torch.randn(30, 2, **DOUBLE), torch.rand(30, **DOUBLE) + 0.05
    anchored = Denoiser(zero_network(2), anchor=anchor_of(law))
    for found, wanted in zip(anchored.moments(y, r), law.moments(y, r), strict=True):
        torch.testing.assert_close(found, wanted, rtol=1e-7, atol=1e-9)
    network = random_network(2)
    plain, both = Denoiser(network), Denoiser(network, anchor=anchor_of(law))
    change = both.moments(y, r)[0] - anchored.moments(y, r)[0]
    torch.testing.assert_close(change, plain.moments(y, r)[0] - y / (1 + r**2)[:, None])


def test_the_regression_is_about_what_the_anchor_does_not_know():
    law = two_modes()
    torch.manual_seed(0)
    u, r = law.sample(40), torch.rand(40, **DOUBLE) + 0.05
    y = u + r[:, None] * torch.randn_like(u)
    untrained = Denoiser(zero_network(2), anchor=anchor_of(law)).regression(u, y, r)
    torch.testing.assert_close(untrained.error, -untrained.target)
    scale = (torch.sqrt(1 + r**2) / r)[:, None]
    torch.testing.assert_close(untrained.error, (law.moments(y, r)[0] - u) * scale, rtol=1e-6, atol=1e-8)
    trained = Denoiser(random_network(2), anchor=anchor_of(law))
    error, log_variance, target = trained.regression(u, y, r)
    torch.testing.assert_close(error, (trained.moments(y, r)[0] - u) * scale, rtol=1e-6, atol=1e-8)
    torch.testing.assert_close(log_variance, trained.field(y / (1 + r[:, None] ** 2).sqrt(), r.log())[1])
    torch.testing.assert_close(target, untrained.target)


def test_draws_of_an_untrained_sampler_come_from_the_anchor():
    torch.manual_seed(0)
    law = two_modes()
    ratios = NoiseRange(0.01, 20.0).levels(60, device=torch.device("cpu"), **DOUBLE)
    denoiser = Denoiser(zero_network(2), anchor=anchor_of(law))
    u = law.sample(4000)
    kernels = fit_kernels(denoiser, gaussian_kernels(ratios, 2), u, torch.randn_like(u))
    draws, log_ratio = sample_paths(denoiser, kernels, torch.randn(61, 4000, 2, **DOUBLE))
    weight = torch.softmax(law.log_prob(draws) + log_ratio, 0)
    assert float(1 / weight.square().sum()) > 0.9 * 4000
    assert float((draws.mean(0) - u.mean(0)).abs().max()) < 0.08


def groups(counts, dim=3):
    torch.manual_seed(1)
    label = torch.repeat_interleave(torch.arange(len(counts)), torch.tensor(counts))
    means = 10 * torch.randn(len(counts), dim, **DOUBLE)
    root = torch.randn(dim, dim, **DOUBLE)
    return means[label] + torch.randn(len(label), dim, **DOUBLE) @ root.T, label, means, root @ root.T


def test_the_fit_finds_groups_and_their_laws():
    u, label, means, covariance = groups([40_000, 20_000])
    anchor = fit_anchor(u, label)
    torch.testing.assert_close(anchor.log_weight.exp(), torch.tensor([2 / 3, 1 / 3], **DOUBLE))
    torch.testing.assert_close(anchor.loc, means, rtol=0, atol=0.1)
    for values, vectors in zip(anchor.values, anchor.vectors, strict=True):
        torch.testing.assert_close((vectors * values) @ vectors.T, covariance, rtol=0.05, atol=0.1)


def test_few_draws_lean_on_all_groups_at_their_own_size():
    u, label, means, covariance = groups([2000, 2000, 12], dim=6)
    small = label == 2
    u[small] = means[2] + 0.1 * (u[small] - means[2])
    anchor = fit_anchor(u, label)
    found = (anchor.vectors[2] * anchor.values[2]) @ anchor.vectors[2].T
    assert float(anchor.values[2].min()) > 0
    target = 0.01 * covariance
    alone = torch.cov(u[small].T)
    assert float((found - target).norm()) < 0.5 * float((alone - target).norm())


def test_no_anchor_without_two_groups():
    u, label, _, _ = groups([500, 5])
    assert fit_anchor(u, label) is None
    assert fit_anchor(u, torch.full_like(label, -1)) is None
    assert fit_anchor(u, torch.where(label == 0, torch.arange(len(label)) % 2, -1)) is not None
