# SPDX-License-Identifier: Apache-2.0
"""The two weightings: why numerator and score share their draws, and what the minimiser is."""

import itertools
import math
from dataclasses import replace

import pytest
import torch
from oracles import Mixture, gauss_hermite, random_network, two_modes, zero_network
from torch.distributions import Categorical, Independent, MixtureSameFamily, MultivariateNormal, Normal

from pyro_sm.base import Draws
from pyro_sm.density import FunctionDensity, value_and_score
from pyro_sm.diffusion.covering import WideCovering
from pyro_sm.diffusion.denoiser import Denoiser
from pyro_sm.diffusion.diffusion import Diffusion
from pyro_sm.diffusion.kernels import gaussian_kernels
from pyro_sm.diffusion.noise_range import NoiseRange
from pyro_sm.objectives.importance_weighted.buffer import Buffer, Round
from pyro_sm.objectives.importance_weighted.weightings import (
    MarginalWeights,
    PathWeights,
    StepNoise,
    denoising_loss,
    draw_step_noise,
    marginal_estimate,
    noised_buffer_log_prob,
)

exact = {"rtol": 1e-10, "atol": 1e-10}
LOC = torch.tensor([2.0, -1.0], dtype=torch.float64)
TRIL = torch.tensor([[2.0, 0.0], [0.8, 1.1]], dtype=torch.float64)


def levels(num_steps=8):
    return NoiseRange(0.1, 5.0).levels(num_steps, dtype=torch.float64, device=torch.device("cpu"))


def process_of(denoiser, loc=LOC, tril=TRIL):
    return Diffusion(denoiser, gaussian_kernels(levels(), loc.shape[0]), loc, tril)


def density_of(process, law, log_z=0.0):
    """``Z`` times the law, given in whitened space, as a density of latents."""

    def log_prob(z):
        u = process.to_white(z)
        return log_z + law.log_prob(u) - process.log_det(u)

    return FunctionDensity(log_prob, process.dim, dtype=torch.float64)


def normal(*shape):
    return torch.randn(*shape, dtype=torch.float64)


def standard_errors(values, expected=0.0):
    """How far the mean of ``values`` (N, ...) is from ``expected``, at most, in its standard errors."""
    return float(((values.mean(0) - expected).abs() / (values.std(0) / math.sqrt(len(values)))).max())


# ------------------------------------------------------------------------------------------ step noise


@pytest.mark.parametrize("num_inner", [0, 3])
def test_step_noise_is_stratified(num_inner):
    ratios = levels()
    step = draw_step_noise(ratios, 64, 2, num_inner)
    position = torch.log(step.level / ratios[1]) / torch.log(ratios[-1] / ratios[1])
    for uniform in (step.pick, position):
        assert uniform.shape == (64,)
        assert uniform.dtype == torch.float64
        stratum = (uniform * 64).floor().long()
        assert torch.equal(stratum.sort().values, torch.arange(64)), "each stratum once"
        assert not torch.equal(stratum, torch.arange(64)), "in random order"
    assert not torch.equal((step.pick * 64).floor(), (position * 64).floor()), "the two orders are independent"
    assert step.noise.shape == (64, 2)
    assert step.inner.shape == (num_inner, 64, 2)
    # Unstratified uniforms leave about a third of the strata empty.
    assert len((torch.rand(64) * 64).floor().unique()) < 60


def test_step_noise_is_standard_normal_and_its_orders_do_not_correlate():
    step = draw_step_noise(levels(), 20_000, 2, 2)
    for x in (step.noise, step.inner[0], step.inner[1]):
        assert standard_errors(x) < 5
        assert standard_errors(x.square(), 1.0) < 5
    products = (step.pick - 0.5) * (step.level.log() - step.level.log().mean())
    assert standard_errors(products) < 5


def test_step_noise_keeps_the_dtype():
    step = draw_step_noise(levels().float(), 8, 3, 2)
    assert {x.dtype for x in step} == {torch.float32}


# -------------------------------------------------------------------------------------- denoising loss


def test_denoising_loss_by_hand():
    process = process_of(Denoiser(random_network(2)))
    u, noise = normal(7, 2), normal(7, 2)
    r = torch.linspace(0.2, 3.0, 7, dtype=torch.float64)
    found = denoising_loss(process, u, r, noise)
    for i in range(7):
        v = 1 + r[i] ** 2
        y = u[i] + r[i] * noise[i]
        f, h = process.denoiser.network(y[None] / v.sqrt(), 0.25 * r[i : i + 1].log())[0].chunk(2)
        square = (f - (u[i] - y / v) * v.sqrt() / r[i]) ** 2
        start = ((u[i] - y / v) * v.sqrt() / r[i]) ** 2
        expected = (square - start + 0.5 * 0.5 * (h + square * torch.exp(-h) - start)).mean()
        torch.testing.assert_close(found[i], expected, **exact)


@pytest.mark.parametrize("ratio", [0.1, 1.0, 5.0])
def test_the_loss_counts_from_the_untrained_guide(ratio):
    """Zero for it on any data; below zero for a better one: here the exact posterior mean under N(0, ¼ I)."""
    nodes, weights = gauss_hermite(4)
    grid = torch.cartesian_prod(nodes, nodes, nodes, nodes)
    weight = torch.cartesian_prod(weights, weights, weights, weights).prod(1)
    r = torch.full((len(grid),), ratio, dtype=torch.float64)
    u, noise = 0.5 * grid[:, :2], grid[:, 2:]
    assert float(denoising_loss(process_of(Denoiser(zero_network(2))), u, r, noise).abs().max()) == 0.0

    def exact(x, c, context):
        square = torch.exp(8 * c)[:, None]  # r²
        v = 1 + square
        shrink = 0.25 / (0.25 + square)  # E[u | y] = shrink · y, y = √v x
        mean = (shrink * v.sqrt() - 1 / v.sqrt()) * x * v.sqrt() / square.sqrt()
        return torch.cat([mean, torch.log(shrink * v).expand_as(x)], 1)

    better = float((weight * denoising_loss(process_of(Denoiser(exact)), u, r, noise)).sum())
    # E[e²] is the posterior variance, shrink r², over the base's, r²/v; that of F* is E[(u − y/v)²] v/r².
    v, shrink = 1 + ratio**2, 0.25 / (0.25 + ratio**2)
    start = (0.25 * (1 - 1 / v) ** 2 + (ratio / v) ** 2) * v / ratio**2
    expected = shrink * v - start + 0.25 * (math.log(shrink * v) + 1 - start)
    assert better == pytest.approx(expected, rel=1e-9)
    assert better < 0


def test_the_variance_head_does_not_move_the_mean():
    network = random_network(2).requires_grad_(True)
    process = process_of(Denoiser(network))
    u, noise, r = normal(5, 2), normal(5, 2), torch.rand(5, dtype=torch.float64) + 0.3
    denoising_loss(process, u, r, noise).sum().backward()
    found = network.last.weight.grad[:2].clone()
    network.zero_grad()
    process.regression(u, u + r[:, None] * noise, r).error.square().mean(-1).sum().backward()
    torch.testing.assert_close(found, network.last.weight.grad[:2], **exact)


# ----------------------------------------------------------------------- minimiser of the denoising loss


class Tilted:
    """A network plus ``θ`` times a smooth basis: the loss's gradient in ``θ`` tests every direction at once."""

    def __init__(self, network, theta):
        self.network, self.theta = network, theta

    def __call__(self, x, c, context):
        shift = torch.stack([torch.ones_like(c), torch.tanh(x[:, 0]), torch.cos(2 * c + x[:, -1])], -1)  # (B, 3)
        return self.network(x, c, context) + torch.einsum("bk,bok->bo", shift, self.theta)


def tilted_gradients(network, dim, u, r, noise):
    """Gradient of each row's loss in ``θ = 0``: (B, 2D · 3)."""
    theta = torch.zeros(len(u), 2 * dim, 3, dtype=torch.float64, requires_grad=True)
    process = process_of(Denoiser(Tilted(network, theta)), torch.zeros(dim).double(), torch.eye(dim).double())
    (gradient,) = torch.autograd.grad(denoising_loss(process, u, r, noise).sum(), theta)
    return gradient.flatten(1)


def test_the_exact_moments_minimise_the_loss_by_quadrature():
    """1-D, over a grid of clean points and Gauss–Hermite noise: zero gradient for mean and variance alike."""
    law = Mixture([0.4, 0.6], [[-1.0], [0.7]], [[[0.1]], [[0.4]]])
    grid = torch.linspace(-6, 6, 400, dtype=torch.float64)
    nodes, weights = gauss_hermite(60)
    u, noise = torch.cartesian_prod(grid, nodes).T[..., None]
    mass = torch.cartesian_prod(law.log_prob(grid[:, None]).exp() * (grid[1] - grid[0]), weights).prod(1)
    assert float(mass.sum()) == pytest.approx(1, abs=1e-9)
    r = torch.full_like(mass, 0.8)
    gradient = mass @ tilted_gradients(law.network, 1, u, r, noise)
    torch.testing.assert_close(gradient, torch.zeros(6).double(), rtol=0, atol=1e-6)
    # Neither the base's own moments, nor the right mean with another variance.
    for wrong in (
        lambda x, c, context: torch.zeros(len(x), 2).double(),
        lambda x, c, context: law.network(x, c) + torch.tensor([0.0, 0.2], dtype=torch.float64),
    ):
        assert float((mass @ tilted_gradients(wrong, 1, u, r, noise)).abs().max()) > 1e-2


def test_weights_make_the_exact_denoiser_the_minimiser():
    """Draws of a Gaussian with weights ``p/q``: gradient zero within five standard errors; without weights not."""
    law = two_modes()
    n = 100_000
    proposal = MultivariateNormal(torch.tensor([0.2, 0.3]).double(), torch.tensor([[2.0, 0.4], [0.4, 1.2]]).double())
    u = proposal.sample((n,))
    weight = torch.exp(law.log_prob(u) - proposal.log_prob(u))[:, None]
    r = draw_step_noise(levels(), n, 2, 0).level
    gradient = tilted_gradients(law.network, 2, u, r, normal(n, 2))
    assert standard_errors(weight * gradient) < 5
    assert standard_errors(gradient) > 10
    assert standard_errors(gradient / weight.clamp(min=0.05)) > 10
    untrained = tilted_gradients(zero_network(2), 2, u, r, normal(n, 2))
    assert standard_errors(weight * untrained) > 10


# ----------------------------------------------------------------------------------------- path weights


def small_buffer(process, *, num_guide=(6, 9), num_wide=2):
    rounds = []
    for size in num_guide:
        z = process.to_latent(normal(size + num_wide, 2))
        log_w = normal(size + num_wide)
        rounds.append(Round(Draws(z, log_w, log_w), torch.softmax(log_w, 0), 1.0, size))
    return Buffer(tuple(rounds))


def test_path_weights_pick_by_weight_and_denoise():
    process = process_of(Denoiser(random_network(2)))
    buffer = small_buffer(process)
    step = draw_step_noise(levels(), 50, 2, PathWeights().num_inner)
    density = density_of(process, two_modes())
    found = PathWeights().loss(process, density, WideCovering(), buffer, step)
    index = buffer.pick(buffer.weights(), step.pick)
    u = process.to_white(buffer.latents()[index])
    torch.testing.assert_close(found, denoising_loss(process, u, step.level, step.noise), **exact)
    assert density.evaluations.values == 0
    assert PathWeights().num_inner == 0
    # Stratified picks: every draw within one of its share of 50.
    counts = torch.bincount(index, minlength=len(buffer.weights()))
    assert float((counts - 50 * buffer.weights()).abs().max()) < 2


# ------------------------------------------------------------------------------------- marginal estimate


def test_marginal_estimate_by_hand():
    law = two_modes()
    process = process_of(Denoiser(zero_network(2)))
    density = density_of(process, law, log_z=0.8)
    y, inner = normal(5, 2), normal(4, 5, 2)
    r = torch.linspace(0.3, 2.0, 5, dtype=torch.float64)
    found = marginal_estimate(process, density, y, r, inner)
    assert (density.evaluations.values, density.evaluations.scores) == (20, 20)
    for b in range(5):
        values, scores = value_and_score(law.log_prob, torch.stack([y[b] + r[b] * inner[k, b] for k in range(4)]))
        expected = math.log(sum(math.exp(float(v)) for v in values) / 4) + 0.8
        assert float(found.log_p[b]) == pytest.approx(expected, rel=1e-10)
        share = values.exp() / values.exp().sum()
        torch.testing.assert_close(found.score[b], share @ scores, rtol=1e-9, atol=1e-9)


def shifted_grid(law, ratio, y, num_inner, n):
    """All combinations of ``num_inner`` Gauss–Hermite nodes as inner draws of one point, with their weights."""
    nodes, weights = gauss_hermite(n)
    combination = torch.cartesian_prod(*[nodes] * num_inner)
    weight = torch.cartesian_prod(*[weights] * num_inner).prod(1)
    process = process_of(Denoiser(zero_network(1)), torch.tensor([0.3]).double(), torch.tensor([[1.7]]).double())
    rows = len(combination)
    estimate = marginal_estimate(
        process,
        density_of(process, law),
        torch.full((rows, 1), y, dtype=torch.float64),
        torch.full((rows,), ratio, dtype=torch.float64),
        combination.T[..., None].contiguous(),
    )
    log_p = estimate.log_p
    return log_p.exp(), estimate.score[:, 0], weight


@pytest.mark.parametrize("y", [-1.1, 0.7, 1.6])
def test_shared_draws_remove_the_ratio_bias_by_enumeration(y):
    """``E[w Ŝ | y] / E[w | y] = ∇p_r / p_r`` for K = 2, over all pairs of Gauss–Hermite nodes."""
    law = Mixture([0.35, 0.65], [[-1.0], [1.1]], [[[0.3]], [[0.5]]])
    ratio = 0.9
    p, score, weight = shifted_grid(law, ratio, y, 2, 120)
    _, truth = value_and_score(law.law(ratio).log_prob, torch.tensor([[y]]).double())
    assert float(weight @ p) == pytest.approx(
        float(law.law(ratio).log_prob(torch.tensor([y]).double()).exp()), rel=1e-6
    )
    assert float(weight @ (p * score) / (weight @ p)) == pytest.approx(float(truth), abs=1e-6)
    # The unweighted target, and so also a weight from draws of its own, which is independent of Ŝ.
    assert abs(float(weight @ score) - float(truth)) > 0.02


def test_shared_draws_remove_the_ratio_bias_in_two_dimensions():
    """K = 4, correlated base and target: the weighted mean is the noised score, the unweighted one is not."""
    law = two_modes()
    process = process_of(Denoiser(zero_network(2)))
    density = density_of(process, law)
    n, ratio = 100_000, 1.0
    point = torch.tensor([[0.3, 0.9]], dtype=torch.float64)
    _, truth = value_and_score(law.law(ratio).log_prob, point)
    y, r = point.expand(n, 2), torch.full((n,), ratio, dtype=torch.float64)
    estimate = marginal_estimate(process, density, y, r, normal(4, n, 2))
    other = marginal_estimate(process, density, y, r, normal(4, n, 2))

    def off(log_p, score):
        """Errors of a ratio of means, by its influence function."""
        w = torch.exp(log_p - log_p.max())[:, None]
        return standard_errors(w * (score - truth) / w.mean())

    assert off(estimate.log_p, estimate.score) < 5
    assert off(torch.zeros(n).double(), estimate.score) > 10
    assert off(other.log_p, estimate.score) > 10


def test_inner_draws_outside_the_support_carry_nothing():
    def half(z):
        return torch.where(z[:, 0] > 0, -z[:, 0] - 0.5 * z[:, 1] ** 2, math.nan)

    process = process_of(Denoiser(zero_network(2)), torch.zeros(2).double(), torch.eye(2).double())
    density = FunctionDensity(half, 2, dtype=torch.float64)
    y = torch.tensor([[0.5, 0.3], [-50.0, 0.0]], dtype=torch.float64)
    inner = torch.tensor([[[1.0, 0.0], [0.0, 0.0]], [[-2.0, 0.0], [1.0, 0.0]]], dtype=torch.float64)
    found = marginal_estimate(process, density, y, torch.ones(2).double(), inner)
    assert float(found.log_p[0]) == pytest.approx(-1.5 - 0.045 - math.log(2), rel=1e-10)
    torch.testing.assert_close(found.score[0], torch.tensor([-1.0, -0.3], dtype=torch.float64), **exact)
    assert float(found.log_p[1]) == -math.inf
    assert torch.equal(found.score[1], torch.zeros(2).double())


def test_inner_draws_whose_score_is_no_number_carry_nothing():
    """A density may be finite where its slope is not."""

    def root(z):
        return -z[:, 0].abs().sqrt() - 0.5 * z[:, 1] ** 2

    process = process_of(Denoiser(zero_network(2)), torch.zeros(2).double(), torch.eye(2).double())
    density = FunctionDensity(root, 2, dtype=torch.float64)
    inner = torch.tensor([[[-1.0, 0.0]], [[3.0, 0.5]]], dtype=torch.float64)
    found = marginal_estimate(process, density, torch.tensor([[1.0, 0.0]]).double(), torch.ones(1).double(), inner)
    assert float(found.log_p[0]) == pytest.approx(-2 - 0.125 - math.log(2), rel=1e-10)
    torch.testing.assert_close(found.score[0], torch.tensor([-0.25, -0.5], dtype=torch.float64), **exact)


# --------------------------------------------------------------------------------------- noised buffer


def mixture_log_prob(y, r, u, share, scale):
    """One row at a time, by torch."""
    rows = []
    for point, ratio in zip(y, r, strict=True):
        dim = y.shape[1]
        kernels = Independent(Normal(u, ratio), 1)
        own = MixtureSameFamily(Categorical(torch.ones(len(u)).to(u)), kernels).log_prob(point).exp()
        wide = Normal(torch.zeros(dim).to(u), torch.sqrt(scale**2 + ratio**2)).log_prob(point).sum().exp()
        rows.append(((1 - share) * own + share * wide).log())
    return torch.stack(rows)


@pytest.mark.parametrize("share", [0.0, 0.2])
@pytest.mark.parametrize("size", [5, 60])
def test_noised_buffer_against_torch(share, size):
    u, y = normal(size, 2), 1.5 * normal(8, 2)
    r = torch.linspace(0.3, 4.0, 8, dtype=torch.float64)
    found = noised_buffer_log_prob(y, r, u, WideCovering(share, 1.7))
    torch.testing.assert_close(found, mixture_log_prob(y, r, u, share, 1.7), rtol=1e-9, atol=1e-9)


def test_noised_buffer_integrates_to_one():
    axis = torch.linspace(-14, 14, 141, dtype=torch.float64)
    grid = torch.cartesian_prod(axis, axis)
    r = torch.full((len(grid),), 0.8, dtype=torch.float64)
    log_p = noised_buffer_log_prob(grid, r, normal(7, 2), WideCovering(0.3, 1.6))
    assert float(log_p.exp().sum() * (axis[1] - axis[0]) ** 2) == pytest.approx(1, abs=1e-6)


def test_noised_buffer_keeps_its_digits_in_float32():
    """At the smallest ratio, points stand a thousandth of their norm from their kernel."""
    u = 6 + normal(400, 2)
    r = torch.full((400,), 0.002, dtype=torch.float64)
    u = u.float().double()
    y = (u + 0.002 * normal(400, 2)).float().double()
    wide = WideCovering(0.1, 1.5)
    expected = noised_buffer_log_prob(y, r, u, wide)
    found = noised_buffer_log_prob(y.float(), r.float(), u.float(), wide)
    torch.testing.assert_close(found.double(), expected, rtol=0, atol=1e-2)
    fast = torch.cdist(y.float(), u.float(), compute_mode="use_mm_for_euclid_dist").square().min(1).values
    assert float(((fast - (y - u).square().sum(1)).abs() / 0.002**2).max()) > 0.5, "what the other mode would lose"


# ------------------------------------------------------------------------------------ marginal weights


@pytest.mark.parametrize("share", [0.0, 0.2])
def test_marginal_loss_by_hand(share):
    law = two_modes()
    process = process_of(Denoiser(random_network(2)))
    buffer = small_buffer(process)
    weighting = MarginalWeights(num_inner=3)
    wide = WideCovering(share, 1.6)
    step = draw_step_noise(levels(), 12, 2, weighting.num_inner)
    density = density_of(process, law, log_z=0.4)
    found = weighting.loss(process, density, wide, buffer, step)
    assert density.evaluations.scores == 36

    latents = buffer.latents()
    own = process.to_white(torch.cat([latents[:6], latents[8:17]]))  # without the wide draws of either round
    u = process.to_white(latents[(step.pick * len(latents)).floor().long()])
    r = step.level
    y = u + r[:, None] * step.noise
    log_weight, score = [], []
    for b in range(12):
        values, scores = value_and_score(law.log_prob, y[b] + r[b] * step.inner[:, b])
        log_weight.append(torch.logsumexp(values, 0))
        score.append(values.softmax(0) @ scores)
    log_weight = torch.stack(log_weight) - mixture_log_prob(y, r, own, share, 1.6)
    gap = process.denoiser.score(y, r) - torch.stack(score)
    start = Denoiser(zero_network(2)).score(y, r) - torch.stack(score)
    _, h, _ = process.regression(u, y, r)
    excess = (gap.square() - start.square()).mean(1)
    expected = 12 * log_weight.softmax(0) * r**2 * excess + 0.01 * h.square().mean(1)
    torch.testing.assert_close(found, expected, rtol=1e-8, atol=1e-8)
    assert float((log_weight.softmax(0) * 12).std()) > 0.1


@pytest.mark.parametrize("steepness", [1e10, 1e22])
def test_rows_without_weight_teach_nothing_however_steep_the_density(steepness):
    """In float32 the square of a score of 1e22 is infinite, and zero times it is NaN."""

    def walled(z):
        return -0.5 * z.square().sum(-1) - steepness * (z[:, 0] - 2).clamp(min=0)

    process = process_of(Denoiser(random_network(2).float()), torch.zeros(2), torch.eye(2))
    ratios = levels().float()
    process = replace(process, kernels=gaussian_kernels(ratios, 2))
    torch.manual_seed(0)
    buffer = Buffer((Round(Draws(torch.randn(64, 2), torch.zeros(64), torch.zeros(64)), torch.ones(64), 1.0, 64),))
    step = draw_step_noise(ratios, 256, 2, 3)
    rows = MarginalWeights(3).loss(process, FunctionDensity(walled, 2), WideCovering(0.1), buffer, step)
    assert bool(torch.isfinite(rows).all())
    assert float(rows.abs().max()) < 1e4
    seen = MarginalWeights(3).loss(
        process, FunctionDensity(lambda z: walled(z).clamp(min=-1e4), 2), WideCovering(0.1), buffer, step
    )
    torch.testing.assert_close(rows, seen, rtol=1e-4, atol=1e-4)


def test_marginal_weights_do_not_depend_on_the_evidence():
    process = process_of(Denoiser(random_network(2)))
    buffer = small_buffer(process)
    step = draw_step_noise(levels(), 12, 2, 4)
    one, other = (
        MarginalWeights(4).loss(process, density_of(process, two_modes(), z), WideCovering(), buffer, step)
        for z in (0.0, -700.0)
    )
    torch.testing.assert_close(one, other, rtol=1e-8, atol=1e-8)


def test_the_exact_score_minimises_the_marginal_loss():
    """With ``Ŝ`` and ``w`` from shared draws the loss's mean gradient vanishes at the exact denoiser."""
    law = two_modes()
    n = 60_000
    theta = torch.zeros(n, 4, 3, dtype=torch.float64, requires_grad=True)
    process = process_of(Denoiser(Tilted(law.network, theta)))
    density = density_of(process, law)
    wide = WideCovering(0.3, 1.5)
    own = law.sample(40)
    step = draw_step_noise(levels(), n, 2, 4)
    # Rows from the very mixture that is the denominator; levels large enough for four inner draws.
    outer = 1.5 * normal(n, 2)
    u = torch.where(torch.rand(n, 1) < 0.3, outer, own[torch.randint(40, (n,))])
    r = 0.5 + step.pick
    y = u + r[:, None] * step.noise

    def gradient(estimate, log_weight):
        error, _, _ = process.regression(y + r[:, None] ** 2 * estimate.score, y, r)
        loss = torch.exp(log_weight) * (error.square() / (1 + r[:, None] ** 2)).mean(-1)
        return torch.autograd.grad(loss.sum(), theta)[0][:, :2].flatten(1)

    with torch.no_grad():
        estimate = marginal_estimate(process, density, y, r, step.inner)
        other = marginal_estimate(process, density, y, r, normal(4, n, 2))
        log_buffer = noised_buffer_log_prob(y, r, own, wide)
    assert standard_errors(gradient(estimate, estimate.log_p - log_buffer)) < 5
    assert standard_errors(gradient(estimate, torch.zeros(n).double())) > 10
    assert standard_errors(gradient(estimate, other.log_p - log_buffer)) > 10


def test_many_kernels_are_thinned():
    process = process_of(Denoiser(random_network(2)))
    buffer = small_buffer(process, num_guide=(30, 31), num_wide=0)
    step = draw_step_noise(levels(), 12, 2, 2)
    density, wide = density_of(process, two_modes()), WideCovering(0.0)
    found = MarginalWeights(2, max_kernels=20).loss(process, density, wide, buffer, step)
    # 61 draws, at most 20 of them: every fourth.
    thin = Buffer((Round(Draws(*(x[::4] for x in (buffer.latents(),) * 3)), torch.ones(16), 1.0, 16),))
    all_kernels = MarginalWeights(2).loss(process, density, wide, buffer, step)
    assert float((found - all_kernels).abs().max()) > 1e-6
    with torch.no_grad():
        index = buffer.pick(torch.ones(61), step.pick)
        y = process.to_white(buffer.latents()[index]) + step.level[:, None] * step.noise
        estimate = marginal_estimate(process, density, y, step.level, step.inner)
        own = process.to_white(thin.latents())
        weight = torch.softmax(estimate.log_p - noised_buffer_log_prob(y, step.level, own, wide), 0)
        gap = process.denoiser.score(y, step.level) - estimate.score
        start = Denoiser(zero_network(2)).score(y, step.level) - estimate.score
        _, h, _ = process.regression(y, y, step.level)
    excess = (gap.square() - start.square()).mean(1)
    expected = 12 * weight * step.level**2 * excess + 0.01 * h.square().mean(1)
    torch.testing.assert_close(found, expected, rtol=1e-8, atol=1e-8)


def test_a_batch_without_a_finite_density_is_an_error():
    process = process_of(Denoiser(random_network(2)))
    density = FunctionDensity(lambda z: z.sum(-1) * math.nan, 2, dtype=torch.float64)
    step = draw_step_noise(levels(), 6, 2, 2)
    with pytest.raises(ValueError, match="no inner draw has a finite density"):
        MarginalWeights(2).loss(process, density, WideCovering(), small_buffer(process), step)


@pytest.mark.parametrize(("num_inner", "max_kernels"), [(0, 5), (-1, 5), (5, 0)])
def test_counts_that_are_not_positive_are_refused(num_inner, max_kernels):
    with pytest.raises(ValueError, match=f"positive counts, found {num_inner} and {max_kernels}"):
        MarginalWeights(num_inner, max_kernels)


def test_only_the_network_is_trained():
    network = random_network(2).requires_grad_(True)
    process = process_of(Denoiser(network))
    buffer = small_buffer(process)
    for weighting in (PathWeights(), MarginalWeights(2)):
        step = draw_step_noise(levels(), 6, 2, weighting.num_inner)
        assert isinstance(step, StepNoise)
        loss = weighting.loss(process, density_of(process, two_modes()), WideCovering(), buffer, step)
        assert loss.shape == (6,)
        assert loss.dtype == torch.float64
        grads = torch.autograd.grad(loss.mean(), list(network.parameters()))
        assert all(bool(torch.isfinite(g).all()) for g in itertools.chain(grads))


def test_the_scores_of_the_draws_take_the_noise_out_of_the_gradients():
    """Two independent batches give nearly the same gradient; without the scores they do not."""
    law = MultivariateNormal(torch.zeros(2).double(), torch.eye(2).double())
    spread = {}
    for needs_score in (True, False):
        weighting = PathWeights(target_score=needs_score)
        gradients = []
        for seed in range(20):
            torch.manual_seed(seed)
            z = law.sample((4000,))
            score = -z @ law.precision_matrix if weighting.needs_score else None
            log_p = law.log_prob(z)
            draws = Draws(z, log_p, torch.zeros_like(log_p), score)
            buffer = Buffer((Round(draws, torch.full_like(log_p, 1 / 4000), 1.0, 4000),))
            network = zero_network(2).requires_grad_(True)
            kernels = gaussian_kernels(NoiseRange().levels(8, dtype=torch.float64, device=z.device), 2)
            process = Diffusion(Denoiser(network), kernels, torch.zeros(2).double(), torch.eye(2).double())
            noise = draw_step_noise(process.ratios, 256, 2, 0)
            weighting.loss(process, None, None, buffer, noise).mean().backward()
            gradients.append(network.last.bias.grad)
        spread[needs_score] = float(torch.stack(gradients)[:, :2].var(0).sum())
    assert spread[True] < 0.1 * spread[False]
