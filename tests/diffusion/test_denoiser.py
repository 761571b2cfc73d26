# SPDX-License-Identifier: Apache-2.0
"""The denoiser and its network; and the exact denoiser of a Gaussian mixture, which other tests use too."""

import math

import pytest
import torch
from oracles import gauss_hermite, random_network, two_modes, zero_network

from pyro_sm.density import value_and_score
from pyro_sm.diffusion.denoiser import Denoiser
from pyro_sm.divergence import Exact
from pyro_sm.nn import mlp
from pyro_sm.nn.mlp import MLP, NoiseEmbedding

exact = {"rtol": 1e-10, "atol": 1e-12}


def batch(n=9, dim=2):
    return 2 * torch.randn(n, dim, dtype=torch.float64), torch.exp(torch.randn(n, dtype=torch.float64))


# ------------------------------------------------------------------------------------- known mixtures


@pytest.mark.parametrize("r", [0.05, 0.7, 6.0])
def test_mixture_moments_are_tweedies(r):
    """The helper itself: ``D = y + r² ∇log p_r`` and ``V = r² + r⁴ diag ∇²log p_r``, by autograd."""
    mixture = two_modes()
    y = mixture.sample(8) + r * torch.randn(8, 2, dtype=torch.float64)
    mean, variance = mixture.moments(y, torch.full((8,), r, dtype=torch.float64))
    _, score = value_and_score(mixture.law(r).log_prob, y)
    curvature = torch.stack([torch.autograd.functional.hessian(mixture.law(r).log_prob, row).diagonal() for row in y])
    torch.testing.assert_close(mean, y + r**2 * score, rtol=1e-9, atol=1e-9)
    torch.testing.assert_close(variance, r**2 + r**4 * curvature, rtol=1e-8, atol=1e-8)


def test_an_exact_network_makes_an_exact_denoiser():
    mixture = two_modes()
    y, r = batch()
    mean, variance = mixture.denoiser().moments(y, r)
    torch.testing.assert_close(mean, mixture.moments(y, r)[0], rtol=1e-9, atol=1e-9)
    torch.testing.assert_close(variance, mixture.moments(y, r)[1], rtol=1e-9, atol=1e-9)
    score = mixture.denoiser().score(y, r)
    for row, ratio, found in zip(y, r, score, strict=True):
        _, expected = value_and_score(mixture.law(float(ratio)).log_prob, row[None])
        torch.testing.assert_close(found[None], expected, rtol=1e-8, atol=1e-8)


# ---------------------------------------------------------------------------------------------- exact


def test_a_zero_network_knows_the_posterior_of_a_standard_normal():
    y, r = batch(dim=3)
    denoiser = Denoiser(zero_network(3))
    mean, variance = denoiser.moments(y, r)
    precision = 1 + 1 / r[:, None] ** 2
    torch.testing.assert_close(mean, (y / r[:, None] ** 2) / precision, **exact)
    torch.testing.assert_close(variance, (1 / precision).expand(-1, 3), **exact)
    torch.testing.assert_close(denoiser.score(y, r), -y / (1 + r[:, None] ** 2), rtol=1e-9, atol=1e-12)


@pytest.mark.parametrize("ratio", [0.002, 0.4, 30.0])
def test_moments_by_hand_for_a_network_that_is_not_zero(ratio):
    network = random_network(2)
    y, _ = batch()
    r = torch.tensor(ratio, dtype=torch.float64)
    v = 1 + ratio**2
    f, h = network(y / math.sqrt(v), torch.full((9,), math.log(ratio) / 4, dtype=torch.float64)).chunk(2, -1)
    mean, variance = Denoiser(network).moments(y, r)
    torch.testing.assert_close(mean, y / v + ratio / math.sqrt(v) * f, **exact)
    torch.testing.assert_close(variance, ratio**2 / v * h.exp(), **exact)
    assert float(f.abs().min()) > 1e-6
    # One ratio for all is the same as that ratio in each row.
    for one, many in zip((mean, variance), Denoiser(network).moments(y, r.expand(9)), strict=True):
        torch.testing.assert_close(one, many, **exact)


def test_the_log_variance_is_held_in_its_range():
    denoiser = Denoiser(lambda x, c, context: torch.cat([0 * x, 100 * x.sign()], -1))
    y = torch.tensor([[1.0, -1.0]], dtype=torch.float64)
    r = torch.ones(1, dtype=torch.float64)
    torch.testing.assert_close(denoiser.moments(y, r)[1], 0.5 * torch.tensor([[6.0, -14.0]]).double().exp(), **exact)


def test_regression_measures_the_moments():
    """``error = (D − target) √v / r``, in which the moments of the posterior have unit scale."""
    denoiser = Denoiser(random_network(2))
    y, r = batch()
    u = torch.randn_like(y)
    error, log_variance, target = denoiser.regression(u, y, r)
    torch.testing.assert_close(-Denoiser(zero_network(2)).regression(u, y, r).error, target)
    mean, variance = denoiser.moments(y, r)
    scale = torch.sqrt(1 + r**2)[:, None] / r[:, None]
    torch.testing.assert_close(error, (mean - u) * scale, rtol=1e-9, atol=1e-11)
    torch.testing.assert_close(log_variance.exp(), variance * scale**2, rtol=1e-9, atol=1e-11)
    torch.testing.assert_close(denoiser.regression(mean, y, r).error, torch.zeros_like(y), rtol=0, atol=1e-10)


def test_the_regression_target_has_unit_size_under_the_base():
    """``E[F*²] = 1`` and ``E[F* | y] = 0`` when ``u ~ N(0, 1)``: Gauss–Hermite, exact for polynomials."""
    nodes, weights = gauss_hermite(6)
    u, eps = (x.reshape(-1, 1) for x in torch.meshgrid(nodes, nodes, indexing="ij"))
    weight = torch.outer(weights, weights).reshape(-1, 1)
    denoiser = Denoiser(zero_network(1))
    for ratio in (0.01, 0.5, 7.0):
        r = torch.full((36,), ratio, dtype=torch.float64)
        y = u + ratio * eps
        error = denoiser.regression(u, y, r).error
        assert float((weight * error**2).sum()) == pytest.approx(1, rel=1e-9)
        for power in (1, 3):
            assert float((weight * error * y**power).sum()) == pytest.approx(0, abs=1e-9)


# -------------------------------------------------------------------------------------------- network


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_an_untrained_network_is_zero_everywhere(dtype):
    network = MLP(width=8, depth=2).build(3, 6, 2).to(dtype)
    found = network(torch.randn(5, 3, dtype=dtype), torch.randn(5, dtype=dtype), torch.ones(2, dtype=dtype))
    assert found.shape == (5, 6)
    assert found.dtype == dtype
    assert torch.equal(found, torch.zeros(5, 6, dtype=dtype))
    assert len(network.hidden) == 2
    assert network.first.out_features == 8


def test_an_untrained_network_can_learn():
    network = MLP(width=8, depth=2).build(3, 6, 0)
    network(torch.randn(5, 3), torch.randn(5)).sum().backward()
    assert float(network.last.weight.grad.abs().sum()) > 0
    assert float(network.skip.weight.grad.abs().sum()) > 0


def test_embedding_is_cosines_and_sines():
    c = torch.tensor([0.3, -1.0])
    f = 2.0 ** torch.linspace(-3, 2, 16)
    expected = torch.cat([torch.cos(2 * math.pi * f * c[:, None]), torch.sin(2 * math.pi * f * c[:, None])], -1)
    torch.testing.assert_close(NoiseEmbedding()(c), expected, rtol=1e-4, atol=1e-5)


def test_rows_are_independent_and_know_noise_and_context():
    network = random_network(2, context_dim=3)
    x, c = torch.randn(6, 2, dtype=torch.float64), torch.randn(6, dtype=torch.float64)
    context = torch.randn(6, 3, dtype=torch.float64)
    whole = network(x, c, context)
    rows = torch.cat([network(x[i : i + 1], c[i : i + 1], context[i : i + 1]) for i in range(6)])
    torch.testing.assert_close(whole, rows, **exact)
    assert float((network(x, c + 0.3, context) - whole).abs().min(1).values.max()) > 1e-4
    assert float((network(x, c, context + 1) - whole).abs().min(1).values.max()) > 1e-4
    one = network(x, c, context[0])
    torch.testing.assert_close(one, network(x, c, context[:1].expand(6, -1)), **exact)


@pytest.mark.parametrize("context_shape", [None, (3,), (1, 3), (9, 3)])
def test_one_level_for_all_rows_is_that_level_in_each(context_shape):
    network = random_network(2, context_dim=0 if context_shape is None else 3).requires_grad_(True)
    context = None if context_shape is None else torch.randn(*context_shape, dtype=torch.float64)
    x, c = torch.randn(9, 2, dtype=torch.float64), torch.randn(9, dtype=torch.float64)
    results = []
    for level in (c[:1], c[:1].expand(9)):
        found = network(x, level, context)
        results.append((found, *torch.autograd.grad(found.square().sum(), list(network.parameters()))))
    for one, many in zip(*results, strict=True):
        torch.testing.assert_close(one, many, **exact)
    # Wrong where rows have levels of their own: only the row whose level was taken is right.
    difference = (network(x, c, context) - results[0][0]).detach().abs().amax(1)
    assert float(difference[0]) < 1e-10
    assert float(difference[1:].max()) > 1e-3


def test_one_level_is_modulated_once():
    network = random_network(2)
    rows = []
    for modulation in network.modulation:
        modulation.register_forward_hook(lambda _, given, __: rows.append(given[0].shape[0]))
    y, r = batch()
    denoiser = Denoiser(network)
    denoiser.moments(y, r[0])
    denoiser.score(y, r[0])
    assert rows == [1, 1]
    denoiser.moments(y, r)
    denoiser.regression(y, y, r)
    assert rows == [1, 1, 9, 9]


@pytest.mark.parametrize("one_level", [True, False])
@pytest.mark.parametrize("context_shape", [None, (3,), (9, 3)])
def test_pieces_of_rows_are_the_whole(monkeypatch, one_level, context_shape):
    network = random_network(2, context_dim=0 if context_shape is None else 3).requires_grad_(True)
    context = None if context_shape is None else torch.randn(*context_shape, dtype=torch.float64)
    x, c = torch.randn(9, 2, dtype=torch.float64), torch.randn(1 if one_level else 9, dtype=torch.float64)
    results = []
    for size in (9, 4, 1):
        monkeypatch.setattr(mlp, "_ROWS_IN_CACHE", size)
        found = network(x, c, context)
        results.append((found, *torch.autograd.grad(found.square().sum(), list(network.parameters()))))
    for other in results[1:]:
        for found, expected in zip(other, results[0], strict=True):
            torch.testing.assert_close(found, expected, **exact)
    if not one_level:
        # Wrong: the levels of the first piece for the rows of the second.
        monkeypatch.setattr(mlp, "_ROWS_IN_CACHE", 9)
        wrong = network(x[4:8], c[:4], None if context is None else context.expand(9, 3)[:4])
        assert float((wrong - results[0][0][4:8]).detach().abs().max()) > 1e-3


def test_one_level_and_pieces_under_forward_mode_products(monkeypatch):
    """As the probability flow uses the network: ``vmap`` over ``jvp``."""
    network = random_network(3)
    x = torch.randn(7, 3, dtype=torch.float64)
    level = torch.tensor([0.2], dtype=torch.float64)
    divergence = Exact()
    jacobians = [torch.autograd.functional.jacobian(lambda at: network(at[None], level)[0, :3], row) for row in x]
    for size in (7, 3):
        monkeypatch.setattr(mlp, "_ROWS_IN_CACHE", size)
        value, trace = divergence(lambda at: network(at, level)[:, :3], x, divergence.probes(x))
        torch.testing.assert_close(value, network(x, level)[:, :3], **exact)
        torch.testing.assert_close(trace, torch.stack([j.trace() for j in jacobians]), **exact)


def test_the_denoiser_hands_its_context_down():
    network = random_network(2, context_dim=3)
    y, r = batch()
    context = torch.randn(3, dtype=torch.float64)
    mean, _ = Denoiser(network, context).moments(y, r)
    expected, _ = Denoiser(lambda x, c, _: network(x, c, context)).moments(y, r)
    torch.testing.assert_close(mean, expected, **exact)
    assert float((Denoiser(network, -context).moments(y, r)[0] - mean).abs().max()) > 1e-4


def test_a_missing_context_is_an_error():
    with pytest.raises(ValueError, match="context of size 3, found none"):
        random_network(2, context_dim=3)(*batch())
