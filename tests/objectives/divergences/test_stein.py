# SPDX-License-Identifier: Apache-2.0
"""Kernel Stein discrepancy: against autograd and quadrature, its null distribution, and as an objective."""

import math

import pyro
import pyro.distributions as dist
import pytest
import torch
from pyro.infer import SVI
from pyro.infer.autoguide import (
    AutoDiagonalNormal,
    AutoIAFNormal,
    AutoLowRankMultivariateNormal,
    AutoMultivariateNormal,
    AutoNormal,
)
from pyro.optim import Adam
from torch.distributions import AffineTransform, constraints
from torch.distributions.transforms import ComposeTransform, TanhTransform, Transform

from pyro_sm.base import Arguments
from pyro_sm.objectives.divergences.stein import SteinDiscrepancy, stein_discrepancy
from pyro_sm.stein import (
    IMQ,
    RBF,
    diffusion_stein_kernel,
    median_distance,
    stein_kernel,
    stein_statistics,
    stein_test,
    stein_test_from_signs,
    through_flow,
    through_matrix,
    wild_signs,
)

exact = {"rtol": 1e-10, "atol": 1e-10}
KERNELS = [IMQ(1.3), IMQ(0.8, beta=-0.3), RBF(0.9)]
kernels = pytest.mark.parametrize("kernel", KERNELS, ids=["imq", "imq .3", "rbf"])
TRIL = torch.tensor([[1.2, 0.0, 0.0], [0.7, 0.6, 0.0], [-0.3, 0.2, 0.9]], dtype=torch.float64)
MEAN = torch.tensor([0.3, -0.5, 1.0], dtype=torch.float64)
PRECISION = torch.linalg.inv(TRIL @ TRIL.T)


def score(x):
    return -(x - MEAN) @ PRECISION


def draws(n):
    return MEAN + torch.randn(n, 3, dtype=torch.float64) @ TRIL.T


def value(kernel, x, y):
    r = (x - y).square().sum()
    if isinstance(kernel, RBF):
        return torch.exp(-r / (2 * kernel.length_scale**2))
    return (1 + r / kernel.length_scale**2) ** kernel.beta


def stein_by_autograd(kernel, x, s, y, t, sign=1.0):
    """``h(x, y)`` from its definition, one pair."""
    x, y = x.clone().requires_grad_(True), y.clone().requires_grad_(True)
    k = value(kernel, x, y)
    by_x, by_y = torch.autograd.grad(k, (x, y), create_graph=True)
    mixed = sum(torch.autograd.grad(by_x[i], y, retain_graph=True)[0][i] for i in range(len(x)))
    return (s @ t * k + s @ by_y + t @ by_x + sign * mixed).detach()


def matrix_by_autograd(kernel, x, s, y, t, sign=1.0):
    rows = [[stein_by_autograd(kernel, x[i], s[i], y[j], t[j], sign) for j in range(len(y))] for i in range(len(x))]
    return torch.stack([torch.stack(row) for row in rows])


# -------------------------------------------------------------------------------------------------------- exact


@kernels
def test_the_stein_kernel_is_its_definition(kernel):
    x, y = draws(5) * 2 + 100, draws(4) + 100  # far from the origin: the cancellation is taken care of
    s, t = torch.randn_like(x), torch.randn_like(y)
    found = stein_kernel(x, s, y, t, kernel)
    expected = matrix_by_autograd(kernel, x, s, y, t)
    torch.testing.assert_close(found, expected, **exact)
    wrong = matrix_by_autograd(kernel, x, s, y, t, sign=-1.0)
    assert float((found - wrong).abs().max()) > 0.1


@kernels
@pytest.mark.parametrize("chunk_size", [1, 3, 100])
def test_both_statistics_are_means_of_the_matrix(kernel, chunk_size):
    x = draws(7)
    s = score(x)
    matrix = matrix_by_autograd(kernel, x, s, x, s)
    found = stein_statistics(x, s, kernel, chunk_size=chunk_size)
    torch.testing.assert_close(found.v, matrix.mean(), **exact)
    torch.testing.assert_close(found.u, (matrix.sum() - matrix.diagonal().sum()) / 42, **exact)
    assert float(found.v) > 0


@kernels
def test_profiles_are_derivatives(kernel):
    r = torch.linspace(0.1, 4.0, 9, dtype=torch.float64).requires_grad_(True)
    profile = kernel.profile(r)
    (first,) = torch.autograd.grad(profile.value.sum(), r, create_graph=True)
    (second,) = torch.autograd.grad(first.sum(), r)
    torch.testing.assert_close(profile.first, first, **exact)
    torch.testing.assert_close(profile.second, second, **exact)


@kernels
def test_a_gaussian_pair_in_closed_form(kernel):
    """``E h`` under q, by quadrature, is ``E (s_p − s_q)(s_p − s_q)' κ``; and zero under p itself."""
    u = torch.linspace(-10, 10, 801, dtype=torch.float64)
    w = torch.softmax(-0.5 * u.square(), 0)

    def discrepancy(mean, scale, sign=1.0):
        x = (mean + scale * u)[:, None]
        s_p, s_q = -sign * x, -(x - mean) / scale**2
        delta = (-x - s_q)[:, 0]
        k = kernel.profile((x - x.T).square()).value
        return float(w @ stein_kernel(x, s_p, x, s_p, kernel) @ w), float((w * delta) @ k @ (w * delta))

    found, expected = discrepancy(0.4, 1.3)
    assert found == pytest.approx(expected, rel=1e-9)
    assert discrepancy(0.0, 1.0)[0] == pytest.approx(0, abs=1e-10)
    wrong, _ = discrepancy(0.4, 1.3, sign=-1.0)
    assert abs(wrong - expected) > 0.1


class Bent(Transform):
    """A non-linear triangular flow in three dimensions."""

    domain = codomain = constraints.real_vector
    bijective = True

    def _call(self, x):
        a, b, c = x.unbind(-1)
        return torch.stack([a + 0.2 * a**3, 0.8 * b + 0.5 * a**2, 1.5 * c + torch.sin(a) * b], -1)

    def log_abs_det_jacobian(self, x, y):
        return (1 + 0.6 * x[..., 0] ** 2).log() + math.log(1.2)


def test_scores_pass_through_a_flow():
    """The score in y of ``log p(x(y)) − log|det J|``: the diffusion discrepancy of x is the plain one of y."""
    x, flow = draws(6), Bent()
    leaf = x.clone().requires_grad_(True)
    log_prob = -0.5 * ((leaf - MEAN) @ PRECISION * (leaf - MEAN)).sum(-1)
    (gradient,) = torch.autograd.grad((log_prob - flow.log_abs_det_jacobian(leaf, None)).sum(), leaf)
    j = torch.stack([torch.autograd.functional.jacobian(flow, row) for row in x])
    found = through_flow(flow, x, score(x))
    torch.testing.assert_close(found.z, flow(x), **exact)
    torch.testing.assert_close(found.score, torch.linalg.solve(j.mT, gradient[..., None]).squeeze(-1), **exact)
    # without the volume term, or by the transpose, it is another score
    assert float((found.score - torch.linalg.solve(j.mT, score(x)[..., None]).squeeze(-1)).abs().max()) > 0.1
    assert float((found.score - torch.linalg.solve(j, gradient[..., None]).squeeze(-1)).abs().max()) > 0.1


def test_elementwise_flows_pass_too():
    x = 0.3 * draws(4)
    flow = ComposeTransform([AffineTransform(0.1, 0.5), TanhTransform()])
    y, s = through_flow(flow, x, score(x))
    slope = 0.5 * (1 - y**2)
    torch.testing.assert_close(s, (score(x) + 2 * 0.5 * y) / slope, **exact)
    y, s = through_flow(AffineTransform(0.0, 2.0), x, score(x))
    torch.testing.assert_close(s, score(x) / 2, **exact)


def test_the_length_scale_is_the_median_distance():
    x = draws(50)
    expected = float(torch.pdist(x).median())
    assert median_distance(x) == expected
    assert IMQ().fitted(x) == IMQ(expected)
    assert RBF().fitted(x) == RBF(expected)
    assert IMQ(2.0).fitted(x) == IMQ(2.0)
    assert median_distance(x[:1]) == median_distance(torch.zeros(3, 2)) == 1.0
    assert stein_statistics(x, score(x)) == stein_statistics(x, score(x), IMQ(expected))


def test_the_diffusion_discrepancy_is_the_plain_one_behind_the_flow():
    """From the definition: ``κ(T(x), T(x')) e_j`` under the operator ``p⁻¹ ∇·(p m f)``, in x, in both arguments."""
    flow, kernel, x = Bent(), IMQ(1.2), draws(3)

    def log_p(v):
        return -0.5 * (v - MEAN) @ PRECISION @ (v - MEAN)

    def operator(function, at, m_of):
        """``Σ_i p⁻¹ ∂_i (p m_ij f)``, one value per column j of m, with its graph."""
        p_m_f = torch.exp(log_p(at))[None, None] * m_of(at) * function(at)
        flat = [torch.autograd.grad(p_m_f[i, j], at, create_graph=True)[0][i] for j in range(3) for i in range(3)]
        return torch.stack(flat).reshape(3, 3).sum(1) / torch.exp(log_p(at))

    def inverse_jacobian(v):
        return torch.linalg.inv(torch.autograd.functional.jacobian(flow, v, create_graph=True))

    def h(a, b, m_of):
        a, b = a.clone().requires_grad_(True), b.clone().requires_grad_(True)
        total = 0.0
        for j in range(3):

            def inner(v, j=j):
                return operator(lambda w: value(kernel, flow(v), flow(w)), b, m_of)[j]

            total = total + operator(inner, a, m_of)[j]
        return total.detach()

    y, s = through_flow(flow, x, score(x))
    found = stein_kernel(y, s, y, s, kernel)
    pairs = [(0, 1), (2, 0), (1, 1)]
    for i, j in pairs:
        torch.testing.assert_close(found[i, j], h(x[i], x[j], inverse_jacobian), rtol=1e-9, atol=1e-9)
        transposed = h(x[i], x[j], lambda v: inverse_jacobian(v).mT)
        assert abs(float(found[i, j] - transposed)) > 1e-2


# ------------------------------------------------------------------------------------------- diffusion matrices


def varying(x):
    a, b, c = x.unbind(-1)
    rows = [
        torch.stack([1 + 0.2 * a**2, 0.3 * b, 0.1 * a * c], -1),
        torch.stack([0.4 * torch.sin(a), 0.8 + 0.1 * c, -0.5 * b], -1),
        torch.stack([0.2 * c, 0.1 * a, 1.3 + 0.2 * torch.tanh(b)], -1),
    ]
    return torch.stack(rows, -2)


def operator(matrix, x, log_p, field):
    """``p⁻¹ ∇·(p m f)`` at one point, from its definition, differentiable in what ``field`` depends on."""

    def flux(at):
        return torch.exp(log_p(at)) * (matrix(at[None])[0] @ field(at))

    j = torch.autograd.functional.jacobian(flux, x, create_graph=True)
    return torch.trace(j) / torch.exp(log_p(x))


def log_density(x):
    return -0.5 * (x - MEAN) @ PRECISION @ (x - MEAN)


def diffusion_by_autograd(kernel, matrix, x, y):
    """``Σ_j S_x S_y [κ(x, y) e_j ⊗ e_j]``: the operator applied to both arguments of the kernel."""
    total = 0.0
    for j in range(3):
        unit = torch.eye(3, dtype=x.dtype)[j]

        def outer(at, unit=unit):
            return operator(matrix, y, log_density, lambda b: value(kernel, at, b) * unit) * unit

        total = total + operator(matrix, x, log_density, outer)
    return total.detach()


@kernels
def test_the_diffusion_stein_kernel_is_its_definition(kernel):
    x, y = draws(3), draws(2)
    at_x, at_y = through_matrix(varying, x, score(x)), through_matrix(varying, y, score(y))
    found = diffusion_stein_kernel(x, at_x.drift, at_x.matrix, y, at_y.drift, at_y.matrix, kernel)
    expected = torch.stack([torch.stack([diffusion_by_autograd(kernel, varying, a, b) for b in y]) for a in x])
    torch.testing.assert_close(found, expected, rtol=1e-8, atol=1e-8)
    transposed = diffusion_stein_kernel(x, at_x.drift, at_x.matrix.mT, y, at_y.drift, at_y.matrix.mT, kernel)
    assert float((transposed - found).abs().max()) > 1e-2
    plain = (varying(x).mT @ score(x)[..., None])[..., 0]  # the drift without the divergence of the matrix
    without = diffusion_stein_kernel(x, plain, at_x.matrix, y, at_y.drift, at_y.matrix, kernel)
    assert float((without - found).abs().max()) > 1e-2


@kernels
def test_the_identity_matrix_is_the_plain_discrepancy(kernel):
    x = draws(6)
    s = score(x)
    at = through_matrix(lambda z: torch.eye(3, dtype=z.dtype).expand(len(z), 3, 3), x, s)
    torch.testing.assert_close(at.drift, s, **exact)
    found = stein_statistics(x, at.drift, kernel, matrix=at.matrix, chunk_size=4)
    for one, other in zip(found, stein_statistics(x, s, kernel), strict=True):
        torch.testing.assert_close(one, other, **exact)


def test_the_drift_of_a_flows_matrix_is_the_score_behind_the_flow():
    """``m = J⁻¹``: ``mᵀs + ∇·m = J⁻ᵀ(s − ∇log|det J|)``, the score in y."""
    x = draws(5)
    flow = Bent()

    def inverse_jacobian(z):
        rows = [torch.autograd.grad(c.sum(), z, create_graph=True)[0] for c in flow(z).unbind(-1)]
        return torch.linalg.inv(torch.stack(rows, -2))

    at = through_matrix(inverse_jacobian, x, score(x))
    torch.testing.assert_close(at.drift, through_flow(flow, x, score(x)).score, **exact)
    wrong = through_matrix(lambda z: inverse_jacobian(z).mT, x, score(x)).drift
    assert float((wrong - at.drift).abs().max()) > 0.1


def test_a_rotation_is_a_matrix_and_a_flow():
    """With ``y = cRx`` the kernel in y is one in x with another length scale: both routes to one number."""
    x = draws(40)
    rotation = 1.7 * torch.linalg.qr(torch.tensor([[1.0, 2, 0], [0.3, -1, 1], [0, 1, 1]], dtype=torch.float64))[0]
    pushed = x @ rotation.T
    s = score(x)
    behind = stein_statistics(pushed, torch.linalg.solve(rotation.T, s.T).T, IMQ(1.3))
    inverse = torch.linalg.inv(rotation)
    at = through_matrix(lambda z: inverse.expand(len(z), 3, 3), x, s)
    found = stein_statistics(x, at.drift, IMQ(1.3 / 1.7), matrix=at.matrix)
    torch.testing.assert_close(found.u, behind.u, **exact)
    torch.testing.assert_close(found.v, behind.v, **exact)


def test_the_diffusion_stein_kernel_has_mean_zero_under_the_density():
    """By quadrature in one argument, for any other."""
    u = torch.linspace(-9, 9, 4001, dtype=torch.float64)
    w = torch.softmax(-0.5 * u.square(), 0)
    x, other = u[:, None], torch.tensor([[0.3], [-1.7]], dtype=torch.float64)

    def matrix(z):
        return (1 + 0.5 * torch.sin(z))[..., None]

    at, there = through_matrix(matrix, x, -x), through_matrix(matrix, other, -other)
    for kernel in KERNELS:
        h = diffusion_stein_kernel(x, at.drift, at.matrix, other, there.drift, there.matrix, kernel)
        torch.testing.assert_close(w @ h, torch.zeros(2, dtype=torch.float64), rtol=0.0, atol=1e-10)
        wrong = diffusion_stein_kernel(x, -x * at.matrix[:, 0], at.matrix, other, there.drift, there.matrix, kernel)
        assert float((w @ wrong).abs().max()) > 1e-2


def test_a_diffusion_matrix_of_the_wrong_shape_is_refused():
    with pytest.raises(ValueError, match=r"matrix of shape \(4, 3, 3\), found \(3, 3\)"):
        through_matrix(lambda z: torch.eye(3), draws(4), draws(4))


# --------------------------------------------------------------------------------------------------- weights


def test_weighted_statistics():
    x, kernel = draws(6), IMQ(1.3)
    weight = torch.softmax(torch.randn(6, dtype=torch.float64), 0)
    h = stein_kernel(x, score(x), x, score(x), kernel)
    found = stein_statistics(x, score(x), kernel, weight=weight, chunk_size=4)
    products = torch.outer(weight, weight)
    off = products - products.diagonal().diag()
    torch.testing.assert_close(found.v, (products * h).sum(), **exact)
    torch.testing.assert_close(found.u, (off * h).sum() / off.sum(), **exact)
    with pytest.raises(ValueError, match=r"weights of shape \(6,\), found \(5,\)"):
        stein_statistics(x, score(x), kernel, weight=weight[:5])


# -------------------------------------------------------------------------------------------------- statistical


@kernels
def test_the_u_statistic_has_mean_zero_under_the_density(kernel):
    u = torch.stack([stein_statistics(x, score(x), kernel).u for x in (draws(60) for _ in range(200))])
    error = 5 * float(u.std()) / len(u) ** 0.5
    assert abs(float(u.mean())) < error
    v = torch.stack([stein_statistics(x, score(x), kernel).v for x in (draws(60) for _ in range(50))])
    assert float(v.mean()) > error, "the V-statistic is biased"
    shifted = torch.stack([stein_statistics(x, score(x + 0.5), kernel).u for x in (draws(60) for _ in range(50))])
    assert float(shifted.mean()) > error


def test_signs_flip_as_often_as_they_should():
    for flip in (0.5, 0.1):
        signs = wild_signs(400, 200, flip, torch.zeros((), dtype=torch.float64))
        assert set(signs.unique().tolist()) == {-1.0, 1.0}
        changes = float((signs[1:] != signs[:-1]).double().mean())
        assert abs(changes - flip) < 5 * (flip * (1 - flip) / signs.numel()) ** 0.5
        assert abs(float(signs[0].mean())) < 5 / 200**0.5


def test_p_values_are_about_uniform_under_the_density():
    p = torch.tensor(
        [stein_test(x, score(x), IMQ(1.3), num_bootstrap=99).p_value for x in (draws(60) for _ in range(200))]
    )
    assert 0.4 < float(p.mean()) < 0.6
    assert float((p <= 0.1).double().mean()) < 0.1 + 5 * (0.09 / 200) ** 0.5
    assert float((p >= 0.9).double().mean()) < 0.1 + 5 * (0.09 / 200) ** 0.5
    wrong = [stein_test(x, -score(x), IMQ(1.3), num_bootstrap=99).p_value for x in (draws(60) for _ in range(20))]
    assert max(wrong) <= 0.05, "a score of the wrong sign is found out"


def test_a_shift_and_a_scale_are_rejected():
    x = draws(300)
    assert stein_test(x + 0.4, score(x + 0.4)).p_value < 0.01
    wide = MEAN + 1.8 * (x - MEAN)
    found = stein_test(wide, score(wide))
    assert found.p_value < 0.01
    assert found.u > 0
    assert isinstance(found.kernel, IMQ)
    assert found.kernel.length_scale == median_distance(wide)
    assert found.bootstrap.shape == (500,)


def test_the_test_is_the_statistic_and_its_signed_sums():
    x, kernel = draws(9), IMQ(1.1)
    signs = wild_signs(9, 20, 0.5, x)
    matrix = stein_kernel(x, score(x), x, score(x), kernel)
    found = stein_test_from_signs(x, score(x), kernel, signs, chunk_size=4)
    null = torch.einsum("ib,ij,jb->b", signs, matrix, signs) / 81
    torch.testing.assert_close(found.bootstrap, null, **exact)
    plain = stein_statistics(x, score(x), kernel)
    assert found.u == pytest.approx(float(plain.u), rel=1e-10)
    assert found.v == pytest.approx(float(plain.v), rel=1e-10)
    assert found.p_value == (1 + int((null >= found.v).sum())) / 21


def test_a_markov_chain_needs_a_smaller_flip():
    """Autocorrelated draws of the right density: independent signs reject far too often."""
    rho, rejected = 0.9, {0.5: 0, 0.02: 0}
    for _ in range(30):
        noise = torch.randn(300, 1, dtype=torch.float64)
        chain = [noise[0]]
        for step in noise[1:]:
            chain.append(rho * chain[-1] + (1 - rho**2) ** 0.5 * step)
        z = torch.stack(chain)
        for flip in rejected:
            rejected[flip] += stein_test(z, -z, IMQ(1.0), num_bootstrap=99, flip=flip).p_value <= 0.05
    assert rejected[0.5] > 15
    assert rejected[0.02] <= 8


# ------------------------------------------------------------------------------------------------------ refusals


@pytest.mark.parametrize(
    ("call", "words"),
    [
        (lambda: IMQ(0.0), "length_scale > 0, found 0.0"),
        (lambda: RBF(-1.0), "length_scale > 0"),
        (lambda: IMQ(beta=-1.0), r"beta in \(-1, 0\), found -1.0"),
        (
            lambda: stein_statistics(torch.ones(3, 2), torch.ones(3, 1)),
            r"one shape \(N, D\), found \(3, 2\), \(3, 1\)",
        ),
        (lambda: stein_statistics(torch.ones(3), torch.ones(3)), "one shape"),
        (lambda: stein_test(torch.ones(1, 2), torch.ones(1, 2)), "two draws, found 1"),
        (lambda: stein_test(torch.ones(3, 2), torch.ones(3, 2), num_bootstrap=0), "num_bootstrap >= 1"),
        (lambda: stein_test(torch.ones(3, 2), torch.ones(3, 2), flip=0.7), r"\(0, 0.5\], found 0.7"),
        (lambda: SteinDiscrepancy(num_draws=1), "num_draws >= 2, found 1"),
    ],
)
def test_arguments_that_are_refused(call, words):
    with pytest.raises(ValueError, match=words):
        call()


# ------------------------------------------------------------------------------------------------- the objective

DATA = torch.tensor([1.0, -0.5, 2.0, 0.3])


def model(y):
    mean = pyro.sample("mean", dist.Normal(y.new_zeros(()), 2.0))
    scale = pyro.sample("scale", dist.LogNormal(y.new_zeros(()), 0.5))
    with pyro.plate("n", len(y)):
        pyro.sample("y", dist.Normal(mean, scale), obs=y)


def by_hand(y):
    """A guide as users write it."""
    loc = pyro.param("loc", torch.zeros(2))
    width = pyro.param("width", torch.full((2,), 0.3), constraint=constraints.positive)
    pyro.sample("mean", dist.Normal(loc[0], width[0]))
    pyro.sample("scale", dist.LogNormal(loc[1], width[1]))


GUIDES = [
    AutoNormal,
    lambda model: by_hand,
    AutoDiagonalNormal,
    AutoMultivariateNormal,
    AutoLowRankMultivariateNormal,
    lambda model: AutoIAFNormal(model, hidden_dim=[4], num_transforms=1),
]


@pytest.mark.parametrize("make", GUIDES, ids=["normal", "by hand", "diagonal", "multivariate", "low rank", "iaf"])
@pytest.mark.parametrize("kernel", [IMQ(), RBF(1.0)], ids=["imq", "rbf"])
@pytest.mark.parametrize("unbiased", [True, False])
def test_the_contract(make, kernel, unbiased):
    guide, loss = make(model), SteinDiscrepancy(kernel, num_draws=8, unbiased=unbiased)
    svi = SVI(model, guide, Adam({"lr": 0.01}), loss)
    loss.loss(model, guide, DATA)
    found = []
    for _ in range(2):
        for parameter in pyro.get_param_store()._params.values():
            parameter.grad = None
        values = []
        for name in ("loss", "differentiable_loss", "loss_and_grads"):
            pyro.set_rng_seed(0)
            result = getattr(loss, name)(model, guide, DATA)
            values.append(result if isinstance(result, float) else float(result.detach()))
        assert values[0] == values[1] == values[2]
        assert math.isfinite(values[0])
        for name, parameter in pyro.get_param_store()._params.items():
            assert parameter.grad is not None, name
            assert torch.isfinite(parameter.grad).all(), name
        pyro.set_rng_seed(0)
        assert svi.evaluate_loss(DATA) == values[0]
        pyro.set_rng_seed(0)
        assert svi.step(DATA) == values[0]
        found.append(values[0])
    assert found[0] != found[1]
    assert svi.evaluate_loss(DATA[:2]) != svi.evaluate_loss(DATA)


def test_the_gradient_is_that_of_the_path():
    """Against a Gaussian written by hand; draws without their path would give another gradient."""
    noise = torch.randn(20, 3, dtype=torch.float64)
    loc = torch.zeros(3, dtype=torch.float64).requires_grad_(True)
    kernel = IMQ(1.2)

    def log_prob(z):
        return -0.5 * ((z - MEAN) @ PRECISION * (z - MEAN)).sum(-1)

    found = stein_discrepancy(log_prob, loc + 0.5 * noise, kernel)
    (gradient,) = torch.autograd.grad(found, loc)
    z = (0.5 * noise).requires_grad_(True)
    (expected,) = torch.autograd.grad(stein_statistics(z, score(z), kernel).u, z)
    torch.testing.assert_close(gradient, expected.sum(0), **exact)
    torch.testing.assert_close(found, stein_statistics(z, score(z), kernel).u, **exact)
    z = (0.5 * noise).requires_grad_(True)
    (frozen,) = torch.autograd.grad(stein_statistics(z, score(z).detach(), kernel).u, z)
    assert float((gradient - frozen.sum(0)).abs().max()) > 1e-2


def test_guides_that_are_refused():
    def other(y):
        pyro.sample("mean", dist.Normal(0.0, 1.0))

    with pytest.raises(ValueError, match="covers the latent sites"):
        SteinDiscrepancy().loss(other, AutoDiagonalNormal(model), DATA)

    def step(y):
        pyro.sample("mean", dist.Normal(0.0, 1.0).has_rsample_(False))

    with pytest.raises(TypeError, match="reparametri"):
        SteinDiscrepancy().loss(other, step, DATA)


@pytest.mark.parametrize("flow", [AffineTransform(0.0, torch.tensor([2.0, 0.5]), event_dim=1), TanhTransform()])
def test_a_flow_in_the_objective_is_the_discrepancy_behind_it(flow):
    guide = AutoDiagonalNormal(model)
    plain, behind = (SteinDiscrepancy(RBF(1.0), num_draws=16, flow=f) for f in (None, flow))
    plain.loss(model, guide, DATA)
    pyro.set_rng_seed(0)
    found = behind.differentiable_loss(model, guide, DATA)
    gradient = torch.autograd.grad(found, guide.loc)[0]
    pyro.set_rng_seed(0)
    z = guide.loc + guide.scale * torch.randn(16, 2)
    density = plain._density(model, Arguments((DATA,)))
    (score_z,) = torch.autograd.grad(density.log_prob(z).sum(), z, create_graph=True)
    y = flow(z)
    if isinstance(flow, TanhTransform):
        slope, volume = 1 - y**2, -2 * y
    else:
        slope, volume = torch.tensor([2.0, 0.5]), 0.0
    expected = stein_statistics(y, (score_z - volume) / slope, RBF(1.0)).u
    torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-4)
    torch.testing.assert_close(gradient, torch.autograd.grad(expected, guide.loc)[0], rtol=1e-3, atol=1e-3)
    pyro.set_rng_seed(0)
    assert abs(plain.loss(model, guide, DATA) / float(found.detach()) - 1) > 0.05


@pytest.mark.slow
def test_a_gaussian_posterior_is_found():
    """Correlated normal target, full-rank guide; the closed form is the target itself."""
    covariance = torch.tensor([[1.0, 0.6], [0.6, 0.8]])
    mean = torch.tensor([1.0, -0.5])

    def target():
        pyro.sample("z", dist.MultivariateNormal(mean, covariance))

    guide = AutoMultivariateNormal(target, init_scale=0.5)
    loss = SteinDiscrepancy(IMQ(1.0), num_draws=64)
    for rate, steps in ((0.03, 400), (0.005, 300)):
        svi = SVI(target, guide, Adam({"lr": rate}), loss)
        for _ in range(steps):
            svi.step()
    posterior = guide.get_posterior()
    assert float((posterior.mean.detach() - mean).abs().max()) < 0.1
    found = posterior.covariance_matrix.detach()
    assert float((found - covariance).abs().max()) < 0.12
    assert float((found - covariance.diag().diag()).abs().max()) > 0.3, "a mean-field fit would be seen"
