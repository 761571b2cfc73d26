# SPDX-License-Identifier: Apache-2.0
"""Estimators of a score from data: identities by exact quadrature and enumeration, spreads against the theory."""

import itertools
import math

import numpy as np
import pytest
import torch
from oracles import diffusion_explicit

from pyro_sm.divergence import (
    Exact,
    Hutchinson,
    Sliced,
    jacobian,
    normal,
    quadratic_forms,
    rademacher,
    sphere,
)
from pyro_sm.objectives.diffusion_matrices import constant_matrix
from pyro_sm.objectives.energies import score_estimation as se
from pyro_sm.objectives.energies.density_estimation import DenoisingScoreMatching, ImplicitScoreMatching

pytestmark = [
    pytest.mark.usefixtures("float64"),
    # torch's own: the first forward-mode derivative of a process scripts a module.
    pytest.mark.filterwarnings("ignore:.torch.jit.script. is deprecated:DeprecationWarning"),
]
exact = {"rtol": 1e-10, "atol": 1e-12}
TRIL = torch.tensor([[1.2, 0.0], [0.7, 0.6]], dtype=torch.float64)
MEAN = torch.tensor([0.3, -0.5], dtype=torch.float64)
PRECISION = torch.linalg.inv(TRIL @ TRIL.T)


def hermite(dim, nodes=6):
    """Points (n, dim) and weights (n,): exact means of polynomials under a standard normal."""
    x, w = np.polynomial.hermite_e.hermegauss(nodes)
    points = torch.tensor(list(itertools.product(x, repeat=dim)))
    weights = torch.tensor(list(itertools.product(w / w.sum(), repeat=dim))).prod(1)
    return points, weights


def sliced(score, forms, probes):
    """``vᵀ∇s v + ½ (vᵀs)²``, mean over P slices, of forms (P, B): the form without ``E (vᵀs)² = ‖s‖²``."""
    return (forms + 0.5 * (probes * score).sum(-1).square()).mean(0)


def data_score(x):
    return -(x - MEAN) @ PRECISION


def data_points():
    u, w = hermite(2)
    return MEAN + u @ TRIL.T, w


def quartic(x):
    """An energy whose score is a polynomial, with a full Jacobian."""
    a, b = x.unbind(-1)
    return -0.1 * a**4 - 0.05 * b**4 - 0.2 * (a * b) ** 2 + 0.3 * a * b - 0.4 * a + 0.2 * b


def cubic(x):
    a, b = x.unbind(-1)
    return -0.3 * a**2 - 0.5 * b**2 + 0.1 * a**2 * b + 0.2 * a


def score_and_trace(log_prob, x):
    score, forms = se.score_and_forms(log_prob, x, Exact().probes(x))
    return score.detach(), Exact().combine(forms).detach()


def every_sign(x):
    signs = torch.tensor(list(itertools.product([-1.0, 1.0], repeat=x.shape[-1])), dtype=x.dtype)
    return signs[:, None, :].expand(-1, x.shape[0], -1)


# ---------------------------------------------------------------------------------------------- slices


def field(x):
    a, b, c = x.unbind(-1)
    return torch.stack([torch.sin(a * b) + c**2, a**3 - b * c, torch.exp(0.3 * c) * a], -1)


def jacobians(x):
    return torch.stack([torch.autograd.functional.jacobian(field, row) for row in x])


def test_reverse_mode_agrees_with_the_jacobian():
    x = torch.randn(5, 3).requires_grad_(True)
    v = torch.randn(4, 5, 3)
    value = field(x)
    expected = torch.einsum("pbi,bij,pbj->pb", v, jacobians(x), v)
    torch.testing.assert_close(quadratic_forms(value, x, v), expected, **exact)
    torch.testing.assert_close(jacobian(value, x), jacobians(x), **exact)
    assert float(quadratic_forms(torch.ones(5, 3), x, v).abs().max()) == 0
    constant = torch.stack([x[:, 0], torch.ones(5)], -1)
    torch.testing.assert_close(jacobian(constant, x)[:, 1], torch.zeros(5, 3), **exact)


@pytest.mark.parametrize("law", [rademacher, normal, sphere])
def test_slices_have_the_identity_as_second_moment(law):
    x = torch.zeros(20000, 3)
    v = Sliced(2, law).probes(x)
    assert v.shape == (2, 20000, 3)
    flat = v.reshape(-1, 3)
    second = flat.T @ flat / len(flat)
    error = 5 * (2 / len(flat)) ** 0.5
    assert float((second - torch.eye(3)).abs().max()) < error
    # directions of length one, the easy mistake, have a third of it
    unit = flat / flat.norm(dim=1, keepdim=True)
    assert float((unit.T @ unit / len(flat) - torch.eye(3)).abs().max()) > error


def test_sphere_slices_lie_on_the_sphere():
    v = sphere(4, torch.zeros(7, 3))
    torch.testing.assert_close(v.norm(dim=-1), torch.full((4, 7), math.sqrt(3)), **exact)


def test_sliced_is_unbiased_over_the_scaled_frame_and_over_all_signs():
    x = torch.randn(5, 3)
    expected = jacobians(x).diagonal(dim1=1, dim2=2).sum(1)
    frame = math.sqrt(3) * Exact().probes(x)
    for probes in (frame, torch.cat([frame, -frame]), every_sign(x)):
        value, trace = Sliced(len(probes))(field, x, probes)
        torch.testing.assert_close(value, field(x), **exact)
        torch.testing.assert_close(trace, expected, **exact)
    _, unscaled = Sliced(3)(field, x, Exact().probes(x))
    assert float((unscaled - expected).abs().min()) > 1e-3


def test_no_slices_are_refused():
    with pytest.raises(ValueError, match="num_slices >= 1, found 0"):
        Sliced(0)


@pytest.mark.parametrize("divergence", [Hutchinson(2), Sliced(2), Sliced(1)])
def test_combine_is_what_the_call_does(divergence):
    x = torch.randn(5, 3).requires_grad_(True)
    probes = divergence.probes(x)
    torch.testing.assert_close(
        divergence.combine(quadratic_forms(field(x), x, probes)), divergence(field, x.detach(), probes)[1], **exact
    )


# ------------------------------------------------------------------------------------------- identities


@pytest.mark.parametrize("energy", [quartic, cubic])
def test_explicit_is_implicit_plus_half_the_information(energy):
    x, w = data_points()
    score, trace = score_and_trace(energy, x)
    esm = (w * se.explicit(score, data_score(x))).sum()
    ism = (w * se.implicit(score, trace)).sum()
    information = se.gaussian_information(TRIL @ TRIL.T)
    torch.testing.assert_close(ImplicitScoreMatching().explicit_loss(ism, information), esm, **exact)
    assert abs(float(ism + information - esm)) > 0.1, "the factor ½ matters"


@pytest.mark.parametrize("sigma", [0.1, 0.7])
@pytest.mark.parametrize("energy", [quartic, cubic])
def test_denoising_and_implicit_differ_by_their_constant(energy, sigma):
    grid, w = hermite(4)
    x, noise = MEAN + grid[:, :2] @ TRIL.T, grid[:, 2:]
    y = x + sigma * noise
    score, trace = score_and_trace(energy, y)
    clean, _ = score_and_trace(energy, x)
    ism = (w * se.implicit(score, trace)).sum()
    dsm = (w * se.denoising(score, noise, sigma)).sum()
    close = {"rtol": 1e-9, "atol": 1e-9}
    torch.testing.assert_close(dsm - ism, torch.tensor(2 / (2 * sigma**2)), **close)
    torch.testing.assert_close(dsm - se.denoising_constant(2, sigma), ism, **close)
    torch.testing.assert_close((w * se.denoising_centred(score, noise, sigma)).sum(), ism, **close)
    torch.testing.assert_close((w * se.denoising_controlled(score, clean, noise, sigma)).sum(), ism, **close)
    # wrong variants: the sign of the noise, and a control variate taken at the noised point
    assert abs(float((w * se.denoising_centred(score, -noise, sigma)).sum() - ism)) > 0.1
    assert abs(float((w * se.denoising_controlled(score, score, noise, sigma)).sum() - ism)) > 0.1


@pytest.mark.parametrize("sigma", [0.3, 1.0])
def test_one_scale_is_the_explicit_loss_on_noised_gaussian_data(sigma):
    grid, w = hermite(4)
    x, noise = MEAN + grid[:, :2] @ TRIL.T, grid[:, 2:]
    y = x + sigma * noise
    covariance = TRIL @ TRIL.T
    target = -(y - MEAN) @ torch.linalg.inv(covariance + sigma**2 * torch.eye(2))
    score, _ = score_and_trace(quartic, y)
    esm = (w * se.explicit(score, target)).sum()
    dsm = (w * se.denoising(score, noise, sigma)).sum()
    information = se.gaussian_information(covariance, sigma)
    loss, value = DenoisingScoreMatching(sigma), dsm - se.denoising_constant(2, sigma)
    found = loss.explicit_loss(value, information)
    torch.testing.assert_close(found, esm, rtol=1e-9, atol=1e-9)
    clean = loss.explicit_loss(value, se.gaussian_information(covariance))
    assert abs(float(clean - esm)) > 0.1, "the information of the clean data is another number"


def test_sliced_losses_are_unbiased_over_all_signs():
    x, w = data_points()
    probes = every_sign(x)
    score, forms = (value.detach() for value in se.score_and_forms(quartic, x, probes))
    _, trace = score_and_trace(quartic, x)
    expected = se.implicit(score, trace)
    torch.testing.assert_close(sliced(score, forms, probes), expected, **exact)
    torch.testing.assert_close(se.implicit(score, forms.mean(0)), expected, **exact)
    assert float((sliced(score, forms, probes / math.sqrt(2)) - expected).abs().max()) > 0.1
    spread = (w * (sliced(score, forms[:1], probes[:1]) - se.implicit(score, forms[0])).square()).sum()
    assert float(spread) > 0.01, "the two differ draw by draw"


# ------------------------------------------------------------------------------------- spreads, d = 5

TABLE = {  # σ: ISM, DSM, DSM less its constant term, with control variate, sliced, ESM
    0.01: (1.58, 15848, 224, 3.54, 3.53, 0.000),
    0.1: (1.60, 156, 22.4, 3.53, 3.58, 0.000),
    0.3: (1.72, 16.1, 7.59, 3.48, 3.83, 0.012),
    1.0: (3.16, 1.6, 2.24, 3.16, 7.07, 0.791),
}


@pytest.mark.parametrize("sigma", TABLE)
def test_the_spread_of_every_loss(sigma):
    """At ``s(x) = −x``, the optimum for clean data ``N(0, I)``; every row of the table to its printed digits."""
    n, d = 400_000, 5
    x, noise = torch.randn(n, d), torch.randn(n, d)
    y = x + sigma * noise
    probes = rademacher(1, y)
    score, trace = -y, torch.full((n,), -float(d))
    values = (
        se.implicit(score, trace),
        se.denoising(score, noise, sigma),
        se.denoising_centred(score, noise, sigma),
        se.denoising_controlled(score, -x, noise, sigma),
        sliced(score, -probes.square().sum(-1), probes),
        se.explicit(score, -y / (1 + sigma**2)),
    )
    for value, expected in zip(values, TABLE[sigma], strict=True):
        # the spread of a chi-square-like variable is known to 5/√n·1.5, the table to half its last digit
        assert abs(float(value.std()) - expected) < 0.012 * expected + 0.006
    # without the ½, or with the probe squared wrongly, the figures are others
    assert abs(float((2 * values[0]).std()) - TABLE[sigma][0]) > 1


# ---------------------------------------------------------------------- diffusion matrices and flows


def varying(x):
    a, b = x.unbind(-1)
    rows = [torch.stack([1 + 0.2 * a, 0.3 * b], -1), torch.stack([0.1 - 0.4 * a, 0.8 + 0.1 * a * b], -1)]
    return torch.stack(rows, -2)


@pytest.mark.parametrize("divergence", [Exact(), "signs"])
def test_diffusion_implicit_is_explicit_up_to_one_constant(divergence):
    """``J_m − ½E‖mᵀ(s−s_p)‖² = −½E‖mᵀ s_p‖²`` for every model."""
    u, w = hermite(2, 10)
    x = MEAN + u @ TRIL.T
    probes = every_sign(x) if divergence == "signs" else divergence.probes(x)
    combine = (lambda forms: forms.mean(0)) if divergence == "signs" else divergence.combine
    matrix = varying(x)
    expected = -(w * diffusion_explicit(data_score(x), torch.zeros_like(x), matrix)).sum()
    for energy in (quartic, cubic):
        weighted = se.weighted_score_and_forms(energy, varying, x, probes)
        score, _ = score_and_trace(energy, x)
        loss = (w * se.diffusion_implicit(weighted.score, combine(weighted.forms))).sum().detach()
        gap = (w * diffusion_explicit(score, data_score(x), matrix)).sum()
        torch.testing.assert_close(loss - gap, expected, rtol=1e-9, atol=1e-9)
        wrong = se.weighted_score_and_forms(energy, lambda x: varying(x).mT, x, probes)
        assert abs(float((w * se.diffusion_implicit(wrong.score, combine(wrong.forms))).sum().detach() - loss)) > 1e-2


def test_the_identity_matrix_gives_the_implicit_loss():
    x, _ = data_points()
    weighted = se.weighted_score_and_forms(quartic, constant_matrix(torch.eye(2)), x, Exact().probes(x))
    score, trace = score_and_trace(quartic, x)
    found = se.diffusion_implicit(weighted.score, weighted.forms.sum(0)).detach()
    torch.testing.assert_close(found, se.implicit(score, trace), **exact)


# ------------------------------------------------------------------------------------------- information


def test_score_of_the_noised_data():
    data, y = torch.randn(7, 2), torch.randn(5, 2)
    leaf = y.clone().requires_grad_(True)

    def log_prob(points, rows):
        return torch.logsumexp(-0.5 * ((points[:, None] - rows) / 0.4).square().sum(-1), 1)

    (expected,) = torch.autograd.grad(log_prob(leaf, data).sum(), leaf)
    torch.testing.assert_close(se.noised_data_score(data, y, 0.4), expected, **exact)
    leaf = y[:1].clone().requires_grad_(True)
    (expected,) = torch.autograd.grad(log_prob(leaf, torch.cat([data[:3], data[4:]])).sum(), leaf)
    found = se.noised_data_score(data, y[:1], 0.4, leave_out=torch.tensor([3]))
    torch.testing.assert_close(found, expected, **exact)


@pytest.mark.parametrize("sigma", [0.5, 1.0])
def test_estimated_information_of_gaussian_data(sigma):
    n = 2000
    data = torch.randn(n, 2) @ TRIL.T
    index, noise = torch.arange(n), torch.randn(n, 2)
    truth = float(se.gaussian_information(TRIL @ TRIL.T, sigma))
    held_out = float(se.estimated_information(data, sigma, index, noise))
    empirical = float(se.estimated_information(data, sigma, index, noise, held_out=False))
    assert abs(held_out / truth - 1) < 0.12
    assert empirical > held_out
    assert abs(float(se.gaussian_information(TRIL @ TRIL.T)) / truth - 1) > 0.3, "without the noise: another number"


def test_the_information_of_the_data_themselves_explodes():
    data, noise = torch.randn(50, 2), torch.randn(50, 2)
    small = se.estimated_information(data, 1e-4, torch.arange(50), noise, held_out=False)
    torch.testing.assert_close(small, noise.square().sum(1).mean() / 1e-8, rtol=1e-6, atol=0.0)


@pytest.mark.parametrize(("sigma", "rows", "words"), [(0.0, 5, "sigma > 0"), (0.1, 1, "two rows")])
def test_information_refuses(sigma, rows, words):
    with pytest.raises(ValueError, match=words):
        se.estimated_information(torch.randn(rows, 2), sigma, torch.zeros(1, dtype=torch.long), torch.randn(1, 2))


# ------------------------------------------------------------------------------------------------- kinks


def network(activation):
    with torch.random.fork_rng():
        torch.manual_seed(1)
        net = torch.nn.Sequential(torch.nn.Linear(2, 16), activation, torch.nn.Linear(16, 1))
    return lambda x: net.to(x.dtype)(x).squeeze(-1) - 0.5 * x.square().sum(-1)


def separated(x):
    return torch.logaddexp(-0.5 * (x - 10).square().sum(-1), -0.5 * (x + 10).square().sum(-1))


@pytest.mark.parametrize(
    ("energy", "jumps"),
    [
        (network(torch.nn.ReLU()), True),
        (network(torch.nn.LeakyReLU()), True),
        (lambda x: -x.abs().sum(-1), True),
        (network(torch.nn.Tanh()), False),
        (network(torch.nn.Softplus(beta=5.0)), False),
        (separated, False),
        (lambda x: -0.5 * x.square().sum(-1), False),
        (lambda x: x.sum(-1), False),
        (lambda x: 0 * x.sum(-1), False),
    ],
    ids=["relu", "leaky", "abs", "tanh", "softplus", "separated", "quadratic", "linear", "constant"],
)
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_kinks_are_found_and_only_kinks(energy, jumps, dtype):
    x = torch.randn(40, 2)
    if energy is separated:
        x[::2] += 10
        x[1::2] -= 10
    assert se.score_jumps(energy, x.to(dtype)) is jumps
    assert not se.score_jumps(energy, x[:1].to(dtype))


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("seed", range(6))
def test_outliers_are_no_jumps(dtype, seed):
    """Segments between Cauchy data are thousands of units long; a kink among them is still found."""
    torch.manual_seed(seed)
    x = torch.distributions.Cauchy(0.0, 1.0).sample((64, 1)).to(dtype)
    assert not se.score_jumps(lambda at: -torch.log1p(at.square()).sum(-1), x)
    assert se.score_jumps(lambda at: -torch.log1p(at.square()).sum(-1) - (at - 0.3).abs().sum(-1), x)
