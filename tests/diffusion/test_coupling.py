# SPDX-License-Identifier: Apache-2.0
"""The coupling: bijection and scores by autograd, what it finds in draws of funnels, and that it finds no others."""

import copy
import io
import math
import pickle

import pyro
import pytest
import torch
from adapting import move, noncentre
from oracles import Mixture, random_network, zero_network
from torch.distributions import MultivariateNormal

from pyro_sm import AutoDiffusion, GivenBase
from pyro_sm.density import FunctionDensity, value_and_score
from pyro_sm.diffusion import coupling_fit
from pyro_sm.diffusion.coupling import Coupling
from pyro_sm.diffusion.coupling_fit import (
    _climbed,
    _fisher_step,
    _log_scales,
    _Parts,
    _unpacked,
    entropy,
    fit_coupling,
    refit_coupling,
)
from pyro_sm.diffusion.covering import WideCovering, draw_with_covering
from pyro_sm.diffusion.denoiser import Denoiser
from pyro_sm.diffusion.diffusion import Diffusion
from pyro_sm.diffusion.flow import FlowSolver
from pyro_sm.diffusion.kernels import gaussian_kernels
from pyro_sm.diffusion.noise_range import NoiseRange
from pyro_sm.examples.improper import factor_model
from pyro_sm.gaussians.gaussian import fits
from pyro_sm.nn.egnn import EGNN
from pyro_sm.nn.mlp import MLP
from pyro_sm.objectives.importance_weighted.weightings import marginal_estimate
from pyro_sm.targets import Funnel, GaussianMixture, GaussianShells, ManyWell, PhiFour, Rings, UnequalModes
from pyro_sm.weights import evidence

exact = {"rtol": 1e-9, "atol": 1e-9}
DOUBLE = {"dtype": torch.float64}
LOG_Z = -1.3
# Of three latents the second drives the others, and the base of it is oblique. One follows its data, too.
BENT = Coupling(
    driven=torch.tensor([1.0, 0.0, 1.0], **DOUBLE),
    centre=torch.tensor([0.5, -1.0, 2.0], **DOUBLE),
    shift=torch.tensor([[0.0, 0.7, 0.0], [0.0, 0.0, 0.0], [0.0, -0.3, 0.0]], **DOUBLE),
    log_scale=torch.tensor([0.2, 0.0, -0.1], **DOUBLE),
    slope=torch.tensor([[0.0, 0.5, 0.0], [0.0, 0.0, 0.0], [0.0, 0.4, 0.0]], **DOUBLE),
    data=torch.tensor([0.0, 0.0, 1.2], **DOUBLE),
    log_precision=torch.tensor([-math.inf, 0.0, -1.0], **DOUBLE),
)
PLAIN = BENT._replace(log_precision=torch.full((3,), -60.0, **DOUBLE))
TRIL = torch.tensor([[1.5, 0.0, 0.0], [0.4, 0.8, 0.0], [-0.2, 0.3, 1.1]], **DOUBLE)
LOC = torch.tensor([0.3, 0.6, -0.4], **DOUBLE)


def normal(*shape):
    return torch.randn(*shape, **DOUBLE)


def random_coupling(dim, drivers):
    """Every latent that is no driver driven by every one that is, and by its data."""
    driven = torch.ones(dim, **DOUBLE)
    driven[drivers] = 0.0
    mask = driven[:, None] * (1 - driven)
    shift, slope = 0.5 * mask * normal(dim, dim), 0.3 * mask * normal(dim, dim)
    return Coupling(driven, normal(dim), shift, 0.5 * normal(dim), slope, normal(dim), normal(dim))


# ---------------------------------------------------------------------------------------------- exact


@pytest.mark.parametrize(("dim", "drivers"), [(2, [1]), (5, [2]), (5, [0, 3]), (3, [])])
def test_both_ways_and_their_derivatives(dim, drivers):
    coupling = random_coupling(dim, drivers)
    v = normal(7, dim)
    z = coupling.to_centred(v)
    torch.testing.assert_close(coupling.to_noncentred(z), v, **exact)
    torch.testing.assert_close(coupling.to_centred(coupling.to_noncentred(v)), v, **exact)
    assert coupling.drivers().nonzero().flatten().tolist() == drivers
    for row, found in zip(v, coupling.log_det(v), strict=True):
        jacobian = torch.autograd.functional.jacobian(lambda x: coupling.to_centred(x[None])[0], row)
        torch.testing.assert_close(found, torch.linalg.slogdet(jacobian)[1], **exact)
    law = MultivariateNormal(normal(dim), scale_tril=torch.eye(dim, **DOUBLE) + 0.3 * normal(dim, dim).tril(-1))
    _, score = value_and_score(law.log_prob, z)
    _, expected = value_and_score(lambda x: law.log_prob(coupling.to_centred(x)) + coupling.log_det(x), v)
    torch.testing.assert_close(coupling.noncentred_score(v, score), expected, **exact)


def test_a_latent_by_hand():
    """Prior ``N(ℓ, e^{2a})`` times a likelihood ``N(y, 1/κ)``, from one driver and one latent."""
    zero = torch.zeros(2, 2, **DOUBLE)
    shift, slope = zero.clone(), zero.clone()
    shift[1, 0], slope[1, 0] = 0.4, 0.3
    pairs = (torch.tensor(x, **DOUBLE) for x in ([0.0, 1.0], [2.0, 0.5], [0.0, -0.2], [0.0, 1.5], [0.0, 0.7]))
    driven, centre, log_scale, data, log_precision = pairs
    coupling = Coupling(driven, centre, shift, log_scale, slope, data, log_precision)
    driver, noise = 0.8, -1.1
    prior_precision, precision = math.exp(-2 * (-0.2 + 0.3 * driver)), math.exp(0.7)
    mean = (prior_precision * (0.5 + 0.4 * driver) + precision * 1.5) / (prior_precision + precision)
    sd = 1 / math.sqrt(prior_precision + precision)
    found = coupling.to_centred(torch.tensor([[driver, noise]], **DOUBLE))
    torch.testing.assert_close(found, torch.tensor([[2.0 + driver, mean + sd * noise]], **DOUBLE), **exact)
    assert float(coupling.log_det(torch.tensor([[driver, noise]], **DOUBLE))) == pytest.approx(math.log(sd))


@pytest.mark.parametrize("log_precision", [-60.0, -math.inf])
def test_without_a_likelihood_it_is_log_linear(log_precision):
    coupling = random_coupling(5, [0, 3])
    coupling = coupling._replace(log_precision=torch.full((5,), log_precision, **DOUBLE))
    v, score, driven = normal(9, 5), normal(9, 5), coupling.driven > 0
    log_scale = torch.where(driven, coupling.log_scale + v @ coupling.slope.T, 0.0)
    z = coupling.centre + v @ coupling.shift.T + torch.exp(log_scale) * v
    torch.testing.assert_close(coupling.to_centred(v), z, **exact)
    torch.testing.assert_close(coupling.to_noncentred(z), v, **exact)
    torch.testing.assert_close(coupling.log_det(v), log_scale.sum(-1), **exact)
    own = torch.exp(log_scale) * score
    by_log_scale = torch.where(driven, own * v + 1, 0.0)
    expected = own + by_log_scale @ coupling.slope + score @ coupling.shift
    torch.testing.assert_close(coupling.noncentred_score(v, score), expected, **exact)


def test_with_much_data_a_latent_follows_it_and_not_the_drivers():
    coupling = random_coupling(4, [1])
    coupling = coupling._replace(log_precision=torch.full((4,), 40.0, **DOUBLE))
    v, score, driven = normal(9, 4), normal(9, 4), coupling.driven > 0
    z = coupling.to_centred(v)
    torch.testing.assert_close(z[:, driven], coupling.data[driven] + math.exp(-20) * v[:, driven], **exact)
    torch.testing.assert_close(z[:, 1], coupling.centre[1] + v[:, 1], **exact)
    torch.testing.assert_close(coupling.log_det(v), torch.full((9,), -60.0, **DOUBLE), **exact)
    torch.testing.assert_close(coupling.noncentred_score(v, score)[:, 1], score[:, 1], **exact)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_dtypes_are_kept(dtype):
    coupling = fit_coupling(Funnel(4, dtype=dtype).sample(500))
    v = torch.randn(6, 4, dtype=dtype)
    z = coupling.to_centred(v)
    found = (*coupling, z, coupling.to_noncentred(z), coupling.log_det(v), coupling.noncentred_score(v, z))
    assert {x.dtype for x in found} == {dtype}
    torch.testing.assert_close(coupling.to_noncentred(z), v, rtol=1e-4, atol=1e-4)


def test_entropy_by_hand():
    """Of bent normal draws: that of the normal law with their straight moments, and the mean ``log|det|``."""
    v = LOC + normal(400, 3) @ TRIL.T
    covariance = torch.cov(v.T, correction=0)
    assert entropy(v, None) == pytest.approx(0.5 * float(torch.logdet(covariance)), abs=1e-9)
    bent = BENT.to_centred(v)
    log_sd = 0.2 + 0.5 * v[:, 1] - 0.5 * torch.log(torch.exp(0.2 - 0.8 * v[:, 1]) + math.exp(-1))
    expected = 0.5 * float(torch.logdet(covariance)) + float(log_sd.mean())
    assert entropy(bent, BENT) == pytest.approx(expected, abs=1e-9)
    # A minus mean log density, to a constant: of the bent law lower than of the best that does not bend.
    law = MultivariateNormal(v.mean(0), covariance)
    log_q = law.log_prob(BENT.to_noncentred(bent)) - BENT.log_det(v)
    assert entropy(bent, BENT) == pytest.approx(-float(log_q.mean()) - 1.5 * (1 + math.log(2 * math.pi)), abs=1e-9)
    assert entropy(bent, None) > entropy(bent, BENT)


# ------------------------------------------------------------------------------------------- the fit


def test_log_scales_are_at_the_minimum():
    """Of ``½ log mean(e² exp(−2 B h))``, by its gradient; regression alone is not there."""
    h = normal(300, 2)
    slope = torch.tensor([[0.5, -0.3], [0.0, 1.2], [2.0, 0.0]], **DOUBLE)
    square = (torch.exp(h @ slope.T) * normal(300, 3)).square()
    square[:3] = 0.0
    level, found = _log_scales(square, h)
    found.requires_grad_()
    value = 0.5 * torch.log((square * torch.exp(-2 * h @ found.T)).mean(0))
    value.sum().backward()
    assert float(found.grad.abs().max()) < 1e-4
    torch.testing.assert_close(found.detach(), slope, rtol=0, atol=0.25)
    torch.testing.assert_close(level, value.detach(), rtol=0, atol=1e-6)


def random_parts(num_driven, num_drivers):
    return _Parts(
        normal(num_driven),
        0.5 * normal(num_driven, num_drivers),
        0.5 * normal(num_driven),
        0.5 * normal(num_driven, num_drivers),
        normal(num_driven),
        normal(num_driven),
    )


@pytest.mark.parametrize("num_drivers", [1, 2])
def test_a_step_of_fisher_scoring_against_autograd(num_drivers):
    """From derivatives of mean and log sd by every parameter, and those of the mean log likelihood."""
    parts, x, h = random_parts(3, num_drivers), normal(40, 3), normal(40, num_drivers)
    packed = parts.packed()
    for one, other in zip(_unpacked(packed), parts, strict=True):
        assert torch.equal(one, other)
    damping = torch.tensor([0.0, 0.01, 3.0], **DOUBLE)
    found = _fisher_step(parts, x, h, damping)

    def row(values, i, what):
        return what(_unpacked(torch.cat([packed[:i], values[None], packed[i + 1 :]])))[..., i]

    for i in range(3):
        by_mean, by_log_sd, by_cost = (
            torch.autograd.functional.jacobian(lambda values, what=what, i=i: row(values, i, what), packed[i])
            for what in (
                lambda one: one.law(h).mean,
                lambda one: one.law(h).log_sd,
                lambda one: one.cost(x, h),
            )
        )
        by_mean = by_mean * torch.exp(-parts.law(h).log_sd[:, i : i + 1])
        information = (by_mean.T @ by_mean + 2 * by_log_sd.T @ by_log_sd) / 40
        held = information + torch.diag(damping[i] * information.diagonal() + 1e-9)
        expected = torch.linalg.solve(held, -by_cost).clamp(-2, 2)
        torch.testing.assert_close(found[i], expected, rtol=1e-6, atol=1e-9)
    assert bool((found.abs() < 2).any())


def test_climbing_is_row_by_row_and_never_down(monkeypatch):
    parts, x, h = random_parts(4, 2), normal(200, 4), normal(200, 2)
    before = parts.cost(x, h)
    monkeypatch.setattr(coupling_fit, "_AT_REST", -1.0)  # which is about all of them together
    best, cost = _climbed(parts, x, h, 30)
    assert bool((cost < before).all())
    torch.testing.assert_close(cost, best.cost(x, h), **exact)
    for i in range(4):
        alone, one = _climbed(_unpacked(parts.packed()[i : i + 1]), x[:, i : i + 1], h, 30)
        torch.testing.assert_close(one, cost[i : i + 1], rtol=1e-6, atol=1e-6)
        assert alone.packed().shape == (1, 8)


@pytest.mark.parametrize("seed", range(4))
@pytest.mark.parametrize("cut", [-math.inf, -2.5])
def test_the_driver_of_a_funnel_and_its_slope(seed, cut):
    torch.manual_seed(seed)
    z = Funnel(10).sample(3000)
    z = z[z[:, 0] > cut]
    coupling = fit_coupling(z)
    assert coupling.drivers().nonzero().flatten().tolist() == [0]
    # The standard error of a log scale is 1/√(2N), of its slope that by the driver's.
    error = 5 / math.sqrt(2 * len(z)) / float(z[:, 0].std())
    assert float((coupling.slope[1:, 0] - 0.5).abs().max()) < error
    assert bool((coupling.slope[0] == 0).all())
    assert bool((coupling.shift[0] == 0).all())
    assert coupling.driven.tolist() == [0] + 9 * [1]
    v = coupling.to_noncentred(z)
    torch.testing.assert_close(v[:, 1:].std(0), torch.ones(9), rtol=0, atol=0.02)
    assert entropy(z, coupling) < entropy(z, None) - 5


def test_a_shifted_driven_mean_is_found():
    v = normal(6000, 3) * torch.tensor([1.0, 2.0, 0.5], **DOUBLE)
    coupling = fit_coupling(PLAIN.to_centred(v), min_gain=0.2)
    assert coupling.drivers().tolist() == [False, True, False]
    torch.testing.assert_close(coupling.slope, PLAIN.slope, rtol=0, atol=0.03)
    # The driven are of unit size once straightened.
    torch.testing.assert_close(
        coupling.to_noncentred(PLAIN.to_centred(v))[:, ::2].std(0), torch.ones(2, **DOUBLE), rtol=0, atol=1e-2
    )
    # The driver's own centre is the draws' mean; means of the others and slopes are about it.
    torch.testing.assert_close(coupling.shift, PLAIN.shift, rtol=0, atol=0.06)


def test_it_does_not_matter_where_the_driver_is_nor_in_which_units():
    z = Funnel(6, **DOUBLE).sample(1000)
    plain = fit_coupling(z)
    order = torch.tensor([3, 1, 5, 2, 4, 0])
    turned = fit_coupling(z[:, order])
    assert turned.drivers().nonzero().flatten().tolist() == [5]
    for found, wanted in zip(turned, plain, strict=True):
        wanted = wanted[order] if wanted.ndim == 1 else wanted[order][:, order]
        torch.testing.assert_close(found, wanted, rtol=1e-6, atol=1e-6)
    loc, scale = 10 * normal(6), torch.exp(3 * normal(6))
    units = fit_coupling(loc + scale * z)
    torch.testing.assert_close(units.slope, plain.slope / scale, rtol=1e-6, atol=1e-9)
    torch.testing.assert_close(units.shift, scale[:, None] * plain.shift / scale, rtol=1e-5, atol=1e-7)
    gain = entropy(z, None) - entropy(z, plain)
    moved = loc + scale * z
    own = torch.where(plain.driven > 0, 1.0, scale)  # drivers keep their size
    torch.testing.assert_close(units.to_noncentred(moved), own * plain.to_noncentred(z), rtol=1e-5, atol=1e-5)
    assert entropy(moved, None) - entropy(moved, units) == pytest.approx(gain, rel=1e-6)


def test_each_of_two_drivers_and_its_own_group():
    z = torch.cat([Funnel(6, **DOUBLE).sample(3000), Funnel(5, **DOUBLE).sample(3000)], 1)
    coupling = fit_coupling(z)
    assert coupling.drivers().nonzero().flatten().tolist() == [0, 6]
    expected = torch.zeros(11, 11, **DOUBLE)
    expected[1:6, 0] = expected[7:, 6] = 0.5
    torch.testing.assert_close(coupling.slope, expected, rtol=0, atol=0.05)


def test_repeated_draws_do_not_hide_a_funnel():
    z = Funnel(10).sample(300)
    repeated = fit_coupling(z[torch.randint(300, (2000,))])
    assert repeated.drivers().nonzero().flatten().tolist() == [0]
    assert float((repeated.slope[1:, 0] - 0.5).abs().max()) < 0.15


def test_more_must_be_saved_than_is_asked_for():
    z = Funnel(4, **DOUBLE).sample(1000)
    gain = entropy(z, None) - entropy(z, fit_coupling(z))
    assert fit_coupling(z, min_gain=0.9 * gain) is not None
    assert fit_coupling(z, min_gain=1.1 * gain) is None


def test_each_parameter_must_save_one_over_the_number_of_draws():
    """Beside ``min_gain``: four of each latent, ``c, a_0, y, κ``, and two of each driven one for its driver."""
    dim, count = 3, 80
    z = Funnel(dim).sample(count, torch.Generator().manual_seed(3)).double()
    low, high = 0.0, 20.0  # gains that are asked for, met and not
    for _ in range(10):
        middle = (low + high) / 2
        low, high = (middle, high) if fit_coupling(z, min_gain=middle) is not None else (low, middle)
    saved = entropy(z, None) - entropy(z, fit_coupling(z, min_gain=low))
    assert (saved - low) * count == pytest.approx(4 * dim + 2 * (dim - 1), abs=3)


@pytest.mark.parametrize(
    "target",
    [GaussianMixture(), ManyWell(), UnequalModes(), Rings(), PhiFour(), GaussianShells()],
    ids=lambda target: type(target).__name__,
)
@pytest.mark.parametrize("num_draws", [100, 2048])
def test_targets_without_funnels_have_none(target, num_draws):
    assert fit_coupling(target.sample(num_draws)) is None


@pytest.mark.parametrize("dim", [1, 2, 7, 30])
@pytest.mark.parametrize("per_latent", [0.5, 1, 3, 6, 100])
@pytest.mark.parametrize("repeats", [1, 8])
def test_normal_draws_few_or_repeated_have_none(dim, per_latent, repeats):
    num_draws = max(1, round(per_latent * dim))
    for _ in range(3):
        z = normal(dim) + normal(num_draws, dim) @ normal(dim, dim)
        if repeats > 1:  # at random: hardly anything then looks normal
            z = z[torch.randint(num_draws, (repeats * num_draws,))]
        assert fit_coupling(z) is None


@pytest.mark.parametrize("num_draws", [1, 2, 5, 10, 20])
def test_a_funnel_cannot_be_seen_in_a_few_draws(num_draws):
    assert fit_coupling(Funnel(6).sample(num_draws)[torch.randint(num_draws, (2000,))]) is None


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_constant_latents(dtype):
    z = torch.randn(500, 3, dtype=dtype)
    z[:, 1] = 3.0
    assert fit_coupling(z) is None
    assert fit_coupling(torch.full((500, 3), 2.0)) is None
    funnel = Funnel(5, dtype=dtype).sample(1000)
    funnel[:, 2] = 3.0
    coupling = fit_coupling(funnel)
    assert coupling.drivers().nonzero().flatten().tolist() == [0]
    v = coupling.to_noncentred(funnel)
    assert bool(torch.isfinite(v).all())
    torch.testing.assert_close(coupling.to_centred(v), funnel, rtol=1e-5, atol=1e-5)
    assert bool(torch.isfinite(coupling.noncentred_score(v, torch.ones_like(v))).all())


# ------------------------------------------------------------------------------- hierarchies of normals


ERRORS = torch.tensor([15.0, 10.0, 16.0, 11.0, 9.0, 11.0, 10.0, 18.0], **DOUBLE)
OBSERVED = torch.tensor([28.0, 8.0, -3.0, 7.0, -1.0, 1.0, 18.0, 12.0], **DOUBLE)
BOTH = [True, True] + 8 * [False]


def eight_schools(num_draws, *, observed=OBSERVED, errors=ERRORS):
    """Exact draws of ``μ ~ N(0, 5²)``, ``log τ`` of a half-Cauchy(5), ``θ_i`` centred; and its entropy.

    ``log τ`` on a grid with ``μ`` and ``θ`` integrated out, then the two in turn.
    """
    log_tau = torch.linspace(-8, 4.5, 20_001, **DOUBLE)
    spread = errors**2 + torch.exp(2 * log_tau)[:, None]
    precision = 1 / 25 + (1 / spread).sum(1)
    mean = (observed / spread).sum(1) / precision
    log_p = (
        log_tau - torch.log1p(torch.exp(2 * log_tau) / 25) - 0.5 * precision.log() + 0.5 * mean.square() * precision
    )
    log_p = log_p - 0.5 * (spread.log() + observed**2 / spread).sum(1)
    index = torch.multinomial(torch.softmax(log_p, 0), num_draws, replacement=True)
    mu = mean[index] + normal(num_draws) / precision[index].sqrt()
    prior = torch.exp(-2 * log_tau[index])[:, None]
    precision = 1 / errors**2 + prior
    mean, noise = (observed / errors**2 + mu[:, None] * prior) / precision, normal(num_draws, 8)
    driving = torch.stack([mu, log_tau[index]], 1)
    straight = torch.cat([driving, noise], 1)
    z = torch.cat([driving, mean + noise / precision.sqrt()], 1)
    return z, entropy(straight, None) - 0.5 * float(precision.log().sum(1).mean())


def parts_of(coupling):
    """What is fitted, packed, and the drivers."""
    driven = coupling.driven > 0
    columns = [part[driven] for part in (coupling.centre, coupling.log_scale, coupling.data, coupling.log_precision)]
    loc, log_scale, data, log_precision = columns
    shift, slope = coupling.shift[driven][:, ~driven], coupling.slope[driven][:, ~driven]
    return _Parts(loc, shift, log_scale, slope, data, log_precision), driven


def cost_of(coupling, z):
    """Minus the mean log likelihood of every driven latent, and its gradient."""
    parts, driven = parts_of(coupling)
    packed = parts.packed().requires_grad_()
    h = (z - coupling.centre)[:, ~driven]
    cost = _unpacked(packed).cost(z[:, driven], h)
    return cost.detach(), torch.autograd.grad(cost.sum(), packed)[0]


def test_a_hierarchy_of_normals_has_two_drivers_and_every_latent_its_data(monkeypatch):
    z, ideal = eight_schools(4096)
    coupling = fit_coupling(z)
    assert coupling.drivers().tolist() == BOTH
    assert coupling.driven.tolist() == [0.0, 0.0] + 8 * [1.0]
    assert entropy(z, coupling) == pytest.approx(ideal, abs=0.05)
    # The likelihood's own precision and place, and the prior's: its mean is μ, its log scale log τ.
    apart = (coupling.log_precision[2:] + 2 * ERRORS.log()).abs()
    assert float(apart.median()) < 0.25
    assert float(apart.max()) < 1.5
    apart = (coupling.data[2:] - OBSERVED).abs() / ERRORS
    assert float(apart.median()) < 0.15
    assert float(apart.max()) < 1.0
    ones, zeros = torch.ones(8, **DOUBLE), torch.zeros(8, **DOUBLE)
    torch.testing.assert_close(coupling.shift[2:, 0], ones, rtol=0, atol=0.1)
    torch.testing.assert_close(coupling.slope[2:, 1], ones, rtol=0, atol=0.1)
    torch.testing.assert_close(coupling.slope[2:, 0], zeros, rtol=0, atol=0.03)
    torch.testing.assert_close(coupling.centre[2:], coupling.centre[0].expand(8), rtol=0, atol=0.3)
    torch.testing.assert_close(coupling.log_scale[2:], coupling.centre[1].expand(8), rtol=0, atol=0.15)
    # Without a likelihood of their own, or straight:
    monkeypatch.setattr(coupling_fit, "_STARTS", (-39.0, -39.0))
    bare = fit_coupling(z)
    assert bool((bare.log_precision[bare.driven > 0] < -20).all())
    assert entropy(z, bare) > entropy(z, coupling) + 0.05
    assert entropy(z, None) > ideal + 1.5


def test_a_likelihood_of_its_own_is_worth_much_where_the_scale_spans_it(monkeypatch):
    """From necks far narrower than what the data say to mouths far wider."""
    ones = torch.tensor([0.0, 0.0] + 8 * [1.0], **DOUBLE)
    shift, slope = torch.zeros(10, 10, **DOUBLE), torch.zeros(10, 10, **DOUBLE)
    shift[2:, 0] = slope[2:, 1] = 1.0
    zero = torch.zeros(10, **DOUBLE)
    true = Coupling(ones, zero, shift, zero, slope, torch.linspace(-2, 2, 10, **DOUBLE), zero + math.log(0.05))
    v = normal(2048, 10)
    v[:, 1] *= 3
    z = true.to_centred(v)
    found = fit_coupling(z)
    assert found.drivers().tolist() == BOTH
    assert entropy(z, found) == pytest.approx(entropy(z, true), abs=0.05)
    torch.testing.assert_close(found.log_precision[2:], true.log_precision[2:], rtol=0, atol=0.3)
    torch.testing.assert_close(found.data[2:], true.data[2:], rtol=0, atol=1.0)
    monkeypatch.setattr(coupling_fit, "_STARTS", (-39.0, -39.0))
    bare = fit_coupling(z)
    assert bool((bare.log_precision[bare.driven > 0] < -20).all())
    assert entropy(z, bare) > entropy(z, true) + 1.5


@pytest.mark.parametrize("seed", range(2))
def test_a_population_s_draws_are_enough_for_a_hierarchy(seed):
    torch.manual_seed(seed)
    z, ideal = eight_schools(2048)
    coupling = fit_coupling(z)
    assert coupling.drivers().tolist() == BOTH
    assert entropy(z, coupling) == pytest.approx(ideal, abs=0.07)


def test_precise_data_leave_nothing_to_straighten():
    """A centred hierarchy is right where the data say where latents are."""
    z, _ = eight_schools(2048, errors=torch.full((8,), 0.5, **DOUBLE))
    assert fit_coupling(z) is None


def test_a_refit_is_at_the_maximum_of_the_likelihood(monkeypatch):
    z, _ = eight_schools(2048)
    z = (z - z.mean(0)) / z.std(0)
    first = fit_coupling(z)
    torch.testing.assert_close(cost_of(first, z)[0], cost_of(refit_coupling(z, first), z)[0], rtol=0, atol=1e-3)
    other = z * torch.linspace(0.5, 2.0, 10, **DOUBLE) + 1.0
    found = refit_coupling(other, first)
    assert torch.equal(found.driven, first.driven)
    assert found.drivers().tolist() == BOTH
    torch.testing.assert_close(found.centre[:2], first.centre[:2], rtol=1e-9, atol=1e-12)
    before, steep = cost_of(first, other)
    after, flat = cost_of(found, other)
    assert bool((after < before - 0.1).all())
    assert float(steep.abs().max()) > 0.5
    assert float(flat.abs().max()) < 0.05
    monkeypatch.setattr(coupling_fit, "_AT_REST", -1.0)
    parts, driven = parts_of(found)
    _, least = _climbed(parts, other[:, driven], (other - found.centre)[:, ~driven], 100)
    assert float((after - least).max()) < 0.01


@pytest.mark.parametrize("cut", [-1.0, 0.0, 0.5])
def test_a_refit_mends_what_cut_draws_gave(cut):
    """Of particles that have not been in the neck yet; what is then nearest may be a poor maximum."""
    z, ideal = eight_schools(2048)
    early = fit_coupling(z[z[:, 1] > cut], min_gain=0.1)
    assert early.drivers().tolist() == BOTH
    found = refit_coupling(z, early)
    assert torch.equal(found.driven, early.driven)
    torch.testing.assert_close(found.centre[:2], early.centre[:2], rtol=1e-12, atol=0)
    assert entropy(z, early) > ideal + 2
    assert entropy(z, found) == pytest.approx(ideal, abs=0.07)


def test_a_refit_of_a_cut_funnel():
    z = Funnel(6).sample(3000)
    early = fit_coupling(z[z[:, 0] > 0])
    found = refit_coupling(z, early)
    assert {part.dtype for part in found} == {torch.float32}
    assert found.drivers().tolist() == early.drivers().tolist() == [True] + 5 * [False]
    torch.testing.assert_close(found.centre[0], early.centre[0])
    assert float((found.slope[1:, 0] - 0.5).abs().max()) < 0.03
    assert entropy(z, found) < entropy(z, early) - 0.02
    # About another place of the driver it is the same law.
    assert entropy(z, found) == pytest.approx(entropy(z, fit_coupling(z)), abs=0.02)


def test_a_refit_to_draws_far_from_all_that_was_held():
    held_one = fit_coupling(Funnel(5).sample(2000))
    for z in (1e6 + torch.randn(500, 5), 1e4 * torch.randn(500, 5), torch.randn(500, 5) - 50):
        found = refit_coupling(z, held_one)
        assert all(bool(torch.isfinite(part).all()) for part in found)
        assert torch.equal(found.driven, held_one.driven)


# ---------------------------------------------------------------------------- a diffusion that is bent


def process_of(denoiser, coupling=BENT, **kernels):
    levels = NoiseRange(0.1, 5.0).levels(8, device=torch.device("cpu"), **DOUBLE)
    return Diffusion(denoiser, gaussian_kernels(levels, 3)._replace(**kernels), LOC, TRIL, coupling=coupling)


def bent_base(z):
    v = BENT.to_noncentred(z)
    return MultivariateNormal(LOC, scale_tril=TRIL).log_prob(v) - BENT.log_det(v)


def law_of_three():
    """In whitened space: two modes and a third latent that follows them."""
    return Mixture(
        [0.3, 0.7],
        [[-1.2, 0.5, 0.3], [0.8, -0.4, 0.0]],
        [
            [[0.30, 0.12, 0.0], [0.12, 0.20, 0.05], [0.0, 0.05, 0.4]],
            [[0.25, -0.10, 0.1], [-0.10, 0.45, 0.0], [0.1, 0.0, 0.6]],
        ],
    )


def density_of(law, log_z=LOG_Z):
    """``Z`` times the law bent, by hand."""

    def log_prob(z):
        v = BENT.to_noncentred(z)
        u = torch.linalg.solve_triangular(TRIL, (v - LOC).T, upper=False).T
        return log_z + law.log_prob(u) - BENT.log_det(v) - TRIL.diagonal().log().sum()

    return FunctionDensity(log_prob, 3, dtype=torch.float64)


def test_maps_of_a_bent_diffusion():
    process = process_of(Denoiser(zero_network(3)))
    u = normal(6, 3)
    z = process.to_latent(u)
    torch.testing.assert_close(z, BENT.to_centred(LOC + u @ TRIL.T), **exact)
    torch.testing.assert_close(process.to_white(z), u, **exact)
    for row, found in zip(u, process.log_det(u), strict=True):
        jacobian = torch.autograd.functional.jacobian(lambda x: process.to_latent(x[None])[0], row)
        torch.testing.assert_close(found, torch.linalg.slogdet(jacobian)[1], **exact)
    density = density_of(law_of_three())
    _, score = density.log_prob_and_score(z)
    _, expected = value_and_score(law_of_three().log_prob, u)
    torch.testing.assert_close(process.white_score(u, score), expected, rtol=1e-8, atol=1e-8)
    plain = process_of(Denoiser(zero_network(3)), None)
    assert plain.log_det(u).shape == (6,)
    assert float((plain.white_score(u, score) - expected).abs().max()) > 0.1


def test_an_untrained_bent_sampler_is_its_bent_base():
    process = process_of(Denoiser(zero_network(3)))
    z, log_ratio = process.draw(50)
    torch.testing.assert_close(log_ratio, -bent_base(z), **exact)
    given = 2 * normal(50, 3)
    torch.testing.assert_close(process.path_log_ratio(given), -bent_base(given), **exact)
    torch.testing.assert_close(process.log_prob(given), bent_base(given), **exact)
    torch.testing.assert_close(
        WideCovering(0.1, 1.0).log_prob(process, density_of(law_of_three()), given), bent_base(given), **exact
    )
    # Its log|det| is not a constant.
    assert float(process.log_det(given).std()) > 0.1


def test_the_covering_normal_law_has_the_moments_of_the_bent_base():
    process = process_of(Denoiser(zero_network(3)))
    state = torch.get_rng_state()
    loc, tril = process.covering_gaussian()
    assert torch.equal(torch.get_rng_state(), state)
    z = process.to_latent(normal(200_000, 3))
    torch.testing.assert_close(tril @ tril.T, torch.cov(z.T), rtol=0.15, atol=0.05)
    torch.testing.assert_close(loc, z.mean(0), rtol=0, atol=0.1)
    assert torch.equal(tril, tril.tril())
    plain_loc, plain_tril = process_of(Denoiser(zero_network(3)), None).covering_gaussian()
    assert torch.equal(plain_loc, LOC)
    assert torch.equal(plain_tril, TRIL)


def test_the_evidence_is_unbiased_for_a_random_network():
    process = process_of(Denoiser(random_network(3, 0.2)))
    density = density_of(law_of_three())
    draws, _ = draw_with_covering(process, density, WideCovering(0.2, 1.5), 40_000)
    found = evidence(draws.log_weight)
    assert found.log_evidence_se < 0.02
    assert abs(found.log_evidence - LOG_Z) < 5 * found.log_evidence_se
    z, log_ratio = process.draw(40_000)
    found = evidence(density.log_prob(z) + log_ratio)
    assert abs(found.log_evidence - LOG_Z) < 5 * found.log_evidence_se
    # The coupling's log|det| forgotten.
    forgotten = log_ratio - BENT.log_det(BENT.to_noncentred(z))
    wrong = evidence(density.log_prob(z) + forgotten)
    assert abs(wrong.log_evidence - LOG_Z) > 10 * wrong.log_evidence_se


def test_two_densities_of_one_bent_sampler():
    """``E[exp(log q_flow − log q_path)] = 1`` over the sampler's own paths, and of given points over their noise."""
    process = process_of(Denoiser(random_network(3, 0.05)))
    z, log_ratio = process.draw(4000)
    given = process.path_log_ratio(z)
    log_q = process.log_prob(z)
    ratio = torch.exp(log_q + log_ratio)
    error = float(ratio.std()) / math.sqrt(4000)
    assert error < 0.02
    assert abs(float(ratio.mean()) - 1) < 5 * error
    assert float((given - log_ratio).abs().max()) > 1e-3  # another path to the same point
    forgotten = ratio * torch.exp(process.log_det(process.to_white(z)))
    assert abs(float(forgotten.mean()) - 1) > 10 * float(forgotten.std()) / math.sqrt(4000)


def test_a_wide_draw_whose_way_back_is_lost_has_the_weight_of_its_density():
    """Bent to within 1e-19 of a centre of 2: float64 holds no digit of it."""
    narrow = BENT._replace(
        log_scale=torch.tensor([-44.0, 0.0, -44.0], **DOUBLE),
        slope=torch.zeros(3, 3, **DOUBLE),
        log_precision=torch.full((3,), -math.inf, **DOUBLE),
    )
    process = process_of(Denoiser(zero_network(3)), narrow)
    density = FunctionDensity(lambda z: -0.5 * z.square().sum(-1), 3, dtype=torch.float64)
    wide = WideCovering(0.5, 1.7)
    draws, num_guide = draw_with_covering(process, density, wide, 400)
    log_p, log_weight = draws.log_p[num_guide:], draws.log_weight[num_guide:]
    # b is nowhere smaller than eight standard deviations out in every direction, and so the weight nowhere larger.
    middle = torch.zeros(1, 3, **DOUBLE)
    least = wide.log_prob_white(middle) - 3 * 32 - process.log_det(middle)
    assert bool((log_weight <= log_p - math.log(0.5) - least).all())
    wrong = log_p - math.log(0.5) - wide.log_prob(process, density, draws.z[num_guide:])
    assert float((wrong - log_weight).max()) > 1e5  # what it would be, judged by where its way back ends


def test_the_bent_wide_component_is_normalised_and_is_what_it_draws():
    process, density = process_of(Denoiser(zero_network(3))), density_of(law_of_three())
    wide = WideCovering(0.2, 1.7)
    z, log_b_there = wide.draw(process, density, 100_000)
    torch.testing.assert_close(log_b_there, wide.log_prob(process, density, z), rtol=1e-9, atol=1e-9)
    v = BENT.to_noncentred(z)
    torch.testing.assert_close(torch.cov(v.T), 1.7**2 * TRIL @ TRIL.T, rtol=0.03, atol=0.05)
    # ∫ b = 1 by draws of the base, twice as wide again.
    u = 2.5 * normal(100_000, 3)
    log_q = MultivariateNormal(torch.zeros(3, **DOUBLE), 6.25 * torch.eye(3, **DOUBLE)).log_prob(u)
    there = process.to_latent(u)
    log_b = wide.log_prob(process, density, there)
    weight = torch.exp(log_b + process.log_det(u) - log_q)
    assert abs(float(weight.mean()) - 1) < 5 * float(weight.std()) / math.sqrt(100_000)
    wrong = weight * torch.exp(BENT.log_det(BENT.to_noncentred(there)))  # forgotten in the density
    assert abs(float(wrong.mean()) - 1) > 10 * float(wrong.std()) / math.sqrt(100_000)


def test_points_deep_in_the_neck_have_no_weight_and_no_nan():
    """A wide prior draws where ``exp(−B v)`` overflows; the sampler's density of them is zero."""
    z = Funnel(3).sample(1000)
    coupling = fit_coupling(z)
    levels = NoiseRange(0.1, 5.0).levels(8, device=torch.device("cpu"), dtype=torch.float32)
    denoiser = Denoiser(random_network(3).float())
    process = Diffusion(denoiser, gaussian_kernels(levels, 3), z[0], TRIL.float(), coupling=coupling)
    far = torch.tensor(
        [[-50.0, 1.0, -2.0], [-150.0, 1.0, 2.0], [-300.0, 1.0, -2.0], [-1e4, 2.0, 2.0], [5.0, 1.0, 1.0]]
    )
    u = process.to_white(far)
    assert bool(torch.isfinite(u).all())
    assert bool((process.path_log_ratio(far)[:-1] > 1e10).all())
    wide = WideCovering().log_prob(process, FunctionDensity(Funnel(3).log_prob, 3), far)
    assert bool((wide[:-1] < -1e10).all())
    torch.testing.assert_close(process.to_latent(u[-1:]), far[-1:], rtol=1e-3, atol=1e-3)


def test_marginal_estimates_are_of_the_straightened_law():
    law = law_of_three()
    process, density = process_of(Denoiser(zero_network(3))), density_of(law)
    y, inner, r = normal(5, 3), normal(4, 5, 3), torch.linspace(0.3, 2.0, 5, **DOUBLE)
    found = marginal_estimate(process, density, y, r, inner)
    values, scores = value_and_score(law.log_prob, (y + r[:, None] * inner).reshape(-1, 3))
    values, scores = values.reshape(4, 5), scores.reshape(4, 5, 3)
    torch.testing.assert_close(found.log_p, torch.logsumexp(values, 0) - math.log(4) + LOG_Z, **exact)
    share = torch.softmax(values, 0)[..., None]
    torch.testing.assert_close(found.score, (share * scores).sum(0), rtol=1e-8, atol=1e-8)
    # Without the coupling it is another law.
    other = marginal_estimate(process_of(Denoiser(zero_network(3)), None), density, y, r, inner)
    assert float((other.log_p - found.log_p).abs().max()) > 0.1


# ----------------------------------------------------------------------------------------- the guide


TARGET = Funnel(5)
MODEL = factor_model(TARGET.log_prob, 5)
NAMES = [f"coupling_{name}" for name in Coupling._fields]


def make_guide(**options):
    start = TARGET.start
    base = GivenBase(start.loc, start.scale)
    guide = AutoDiffusion(MODEL, **{"num_steps": 8, "architecture": MLP(width=16, depth=1), "base": base, **options})
    guide()
    return guide


def taught(guide):
    """As if its network had learned something."""
    with torch.no_grad():
        guide.network_weights.add_(0.1 * torch.randn_like(guide.network_weights))
    return guide


def learned(guide):
    return guide._network.at(guide.network_weights)(torch.ones(3, 5), torch.zeros(1), None).detach()


def drawn(guide):
    torch.manual_seed(0)
    return guide.diffusion().draw(200)[0].detach()


def held(guide):
    return {key for key in guide.state_dict() if "coupling" in key}


def held_coupling(guide):
    return Coupling(*(part.detach().clone() for part in guide.diffusion().coupling))


def test_a_funnel_is_straightened_and_the_network_begins_anew():
    guide, z = taught(make_guide()), TARGET.sample(2000)
    with torch.no_grad():
        guide.log_variance_factor.add_(0.3)
    assert not noncentre(guide, z, begin=False)
    assert not held(guide)
    assert bool((learned(guide) != 0).any())
    assert noncentre(guide, z)
    process = guide.diffusion()
    for found, wanted in zip(process.coupling, fit_coupling(z), strict=True):
        assert torch.equal(found, wanted)
    assert held(guide) == {f"{name}_unconstrained" for name in NAMES}
    assert {f"AutoDiffusion.{name}" for name in NAMES} < set(pyro.get_param_store().keys())
    assert bool((learned(guide) == 0).all())
    assert bool((guide.log_variance_factor == 0).all())
    u = process.to_white(z).detach()
    torch.testing.assert_close(u.mean(0), torch.zeros(5), rtol=0, atol=1e-4)
    torch.testing.assert_close(torch.cov(u.T), torch.eye(5), rtol=0, atol=0.02)
    assert bool(torch.isfinite(drawn(guide)).all())
    # What it now is is the funnel.
    far = TARGET.sample(1000)
    log_q = guide.get_posterior().log_prob(far).detach()
    assert float((TARGET.log_prob(far) - log_q).abs().mean()) < 0.15


def test_a_held_coupling_follows_and_the_network_stays():
    guide, z = make_guide(), TARGET.sample(2000)
    noncentre(guide, z)
    taught(guide)
    before, said = held_coupling(guide), learned(guide)
    # About the same draws: not worth it.
    assert not noncentre(guide, TARGET.sample(2000))
    assert all(torch.equal(one, other) for one, other in zip(guide.diffusion().coupling, before, strict=True))
    moved = z * torch.tensor([1.0, 4.0, 0.3, 1.0, 1.0]) * torch.exp(0.2 * z[:, :1]) + 3 * z[:, :1]
    moved[:, 0] = z[:, 0]
    assert noncentre(guide, moved, begin=False)
    found = guide.diffusion().coupling
    for one, other in zip(found, refit_coupling(moved, before), strict=True):
        assert torch.equal(one, other)
    torch.testing.assert_close(found.centre[0], before.centre[0])
    torch.testing.assert_close(found.slope[1:, 0], torch.full((4,), 0.7), rtol=0, atol=0.05)
    assert torch.equal(learned(guide), said)
    torch.testing.assert_close(guide.diffusion().to_white(moved).std(0), torch.ones(5), rtol=0, atol=0.02)


def test_draws_without_a_funnel_straighten_what_is_held():
    guide = make_guide()
    noncentre(guide, TARGET.sample(2000))
    taught(guide)
    said, plain = learned(guide), torch.randn(2000, 5)
    assert noncentre(guide, plain)
    assert float(guide.diffusion().coupling.slope.abs().max()) < 0.1
    assert torch.equal(learned(guide), said)
    assert fits(guide.diffusion().to_white(plain).detach())


def entropies(monkeypatch, **values):
    """As if those of ``held``, ``followed`` and ``found`` were these; the couplings themselves."""
    made = {name: fit_coupling(TARGET.sample(2000)) for name in values}
    place = "pyro_sm.diffusion.diffusion."
    monkeypatch.setattr(place + "refit_coupling", lambda z, held: made["followed"])
    monkeypatch.setattr(place + "fit_coupling", lambda z: made.get("found"))

    def entropy(z, coupling):
        return next((values[name] for name in ("followed", "found") if coupling is made.get(name)), values["held"])

    monkeypatch.setattr(place + "entropy", entropy)
    return made


@pytest.mark.parametrize(("saved", "follows"), [(0.05, False), (0.3, True)])
@pytest.mark.parametrize("found", [None, 0.45, 0.55])
@pytest.mark.parametrize("begin", [True, False])
def test_what_a_coupling_must_save_to_be_followed_and_another_to_begin(monkeypatch, saved, follows, found, begin):
    """A tenth of a nat, and half a nat beyond what following gives."""
    guide = make_guide()
    noncentre(guide, TARGET.sample(2000))
    taught(guide)
    said, before = learned(guide), held_coupling(guide)
    values = {"held": 1.0, "followed": 1.0 - saved}
    if found is not None:
        values["found"] = 1.0 - saved - found
    made = entropies(monkeypatch, **values)
    begins = begin and found == 0.55
    assert noncentre(guide, TARGET.sample(2000), begin=begin) is (begins or follows)
    now = guide.diffusion().coupling
    expected = made["found"] if begins else made["followed"] if follows else before
    assert all(torch.equal(one, other) for one, other in zip(now, expected, strict=True))
    assert torch.equal(learned(guide), said) is not begins


def test_a_base_that_still_fits_stays_when_a_coupling_follows(monkeypatch):
    guide, z = make_guide(), TARGET.sample(2000)
    noncentre(guide, z)
    with torch.no_grad():
        guide.log_variance_factor.add_(0.3)
    base = guide.base_scale_tril.detach().clone()
    first = held_coupling(guide)
    followed = first._replace(log_scale=first.log_scale - 0.2)
    place = "pyro_sm.diffusion.diffusion."
    monkeypatch.setattr(place + "fit_coupling", lambda z: None)
    monkeypatch.setattr(place + "refit_coupling", lambda z, held: followed)
    monkeypatch.setattr(place + "entropy", lambda z, c: 0.5 if c is followed else 1.0)
    assert noncentre(guide, z)
    assert torch.equal(guide.diffusion().coupling.log_scale, followed.log_scale)
    assert torch.equal(guide.base_scale_tril, base)
    torch.testing.assert_close(guide.log_variance_factor.detach(), torch.full_like(guide.log_variance_factor, 0.3))
    followed = first._replace(log_scale=first.log_scale - 2.0)
    assert noncentre(guide, z)
    assert not torch.equal(guide.base_scale_tril, base)
    assert bool((guide.log_variance_factor == 0).all())
    u = guide.diffusion().to_white(z).detach()
    torch.testing.assert_close(u.std(0), torch.ones(5), rtol=0, atol=0.02)


def test_other_drivers_are_other_coordinates():
    guide, z = make_guide(), TARGET.sample(2000)
    noncentre(guide, z)
    taught(guide)
    assert noncentre(guide, z.flip(1))
    assert guide.diffusion().coupling.drivers().nonzero().flatten().tolist() == [4]
    assert bool((learned(guide) == 0).all())


def test_who_is_not_straightened():
    z = TARGET.sample(2000)
    anchored = make_guide(name="anchored")
    group = torch.arange(2000) % 2
    assert move(anchored, z + 50 * group[:, None], group)
    assert "anchor_loc_unconstrained" in anchored.state_dict()
    assert not noncentre(anchored, z)
    assert not held(anchored)
    target = Funnel(4)
    model = factor_model(target.log_prob, 4)
    symmetric = AutoDiffusion(
        model, num_steps=8, architecture=EGNN(3, 2, width=8), base=GivenBase(0.0, 3.0), name="symmetric"
    )
    symmetric()
    assert not noncentre(symmetric, target.sample(2000))
    assert move(symmetric, target.sample(2000))
    assert not held(symmetric)
    # One guide for many data sets: each has a funnel of its own.
    shared = make_guide(name="shared", context=lambda: torch.zeros(2))
    assert not noncentre(shared, z)
    assert move(shared, z)
    assert not held(shared)


def test_a_population_in_a_funnel_gives_a_bent_base():
    guide, z = make_guide(), TARGET.sample(2000)
    assert move(guide, z)
    for found, wanted in zip(guide.diffusion().coupling, fit_coupling(z), strict=True):
        assert torch.equal(found, wanted)
    torch.testing.assert_close(guide.diffusion().to_white(z).std(0), torch.ones(5), rtol=0, atol=0.02)
    plain = TARGET.start.loc + 20 * torch.randn(2000, 5)  # without a funnel: nothing is bent any more
    assert move(guide, plain)
    assert not held(guide)
    torch.testing.assert_close(guide.diffusion().to_white(plain).std(0), torch.ones(5), rtol=0, atol=0.02)
    assert move(guide, z)
    taught(guide)
    assert not move(guide, plain)
    # Groups in a funnel mean nothing; of what is none they are the anchor, and what was bent is no more.
    other = make_guide(name="other")
    group = (z[:, 1] > 0).long()
    assert move(other, z, group)
    assert held(other)
    assert "anchor_loc_unconstrained" not in other.state_dict()
    apart = 50 * group[:, None] + torch.randn(2000, 5)
    assert move(other, apart, group)
    assert not held(other)
    assert "anchor_loc_unconstrained" in other.state_dict()
    assert move(other, z, group)
    assert held(other)
    assert "anchor_loc_unconstrained" not in other.state_dict()


def test_a_coupling_goes_wherever_the_guide_goes(tmp_path):
    guide, z = make_guide(), TARGET.sample(2000)
    plain_state = {name: value.clone() for name, value in guide.state_dict().items()}
    noncentre(guide, z)
    expected = drawn(taught(guide))
    state = {name: value.clone() for name, value in guide.state_dict().items()}
    assert torch.equal(drawn(copy.deepcopy(guide)), expected)
    pickled = pickle.dumps(guide)
    whole = io.BytesIO()
    torch.save(guide, whole)
    pyro.get_param_store().save(tmp_path / "store.pt")

    plain = make_guide(name="plain")
    assert not torch.equal(drawn(plain), expected)
    plain.load_state_dict(state)
    assert torch.equal(drawn(plain), expected)
    plain.load_state_dict(plain_state)  # what the state has not is dropped
    assert not held(plain)
    assert plain.diffusion().coupling is None
    assert not any(key.startswith("plain.coupling") for key in pyro.get_param_store().keys())  # noqa: SIM118

    fresh = AutoDiffusion(MODEL, num_steps=8, architecture=MLP(width=16, depth=1), name="fresh")
    fresh.load_state_dict(state)
    assert torch.equal(drawn(fresh), expected)

    guide.release()
    assert not any(key.startswith("AutoDiffusion.") for key in pyro.get_param_store().keys())  # noqa: SIM118
    again = make_guide()
    assert again.diffusion().coupling is None
    pyro.clear_param_store()
    assert torch.equal(drawn(pickle.loads(pickled)), expected)
    pyro.clear_param_store()
    whole.seek(0)
    assert torch.equal(drawn(torch.load(whole, weights_only=False)), expected)
    pyro.clear_param_store()
    pyro.get_param_store().load(tmp_path / "store.pt")
    assert torch.equal(drawn(make_guide()), expected)


def test_the_transform_of_a_bent_guide_is_a_bijection(float64):
    target = Funnel(3)
    guide = AutoDiffusion(
        factor_model(target.log_prob, 3),
        num_steps=8,
        architecture=MLP(width=16, depth=1),
        base=GivenBase(0.0, 3.0),
        solver=FlowSolver(1e-6, 1e-6),
        network_dtype=torch.float64,
    )
    guide()
    assert noncentre(guide, target.sample(2000))
    with torch.no_grad():
        guide.network_weights.add_(0.02 * torch.randn_like(guide.network_weights))
        transform, x = guide.get_transform(), torch.randn(1, 3)
        z = transform(x)
        log_det = transform.log_abs_det_jacobian(x, z)
        torch.testing.assert_close(transform.inv(z.clone()), x, rtol=1e-4, atol=1e-4)
        step = 1e-2 * torch.eye(3)
        around = transform(torch.cat([x[:, None] + step, x[:, None] - step], 1))
        expected = ((around[:, :3] - around[:, 3:]) / 2e-2).det().abs().log()
        torch.testing.assert_close(log_det, expected, rtol=1e-3, atol=1e-3)
        fresh, at = guide.get_transform(), z.clone()
        back = fresh.inv(at)
        torch.testing.assert_close(fresh.inv.log_abs_det_jacobian(at, back), -log_det, rtol=1e-4, atol=1e-4)
        through_flow = guide.get_base_dist().log_prob(x) - log_det
        torch.testing.assert_close(guide.get_posterior().log_prob(at), through_flow, rtol=1e-4, atol=1e-4)
