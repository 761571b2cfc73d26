# SPDX-License-Identifier: Apache-2.0
"""Diffusion matrices, metrics, flows and flows along an ODE: one theorem, in every objective that takes them."""

import itertools
import math

import numpy as np
import pyro
import pyro.distributions as dist
import pytest
import torch
from oracles import diffusion_explicit
from pyro.infer.autoguide import AutoMultivariateNormal
from torch.distributions import AffineTransform, ExpTransform, constraints
from torch.distributions.transforms import Transform

from pyro_sm.divergence import Exact, jacobian
from pyro_sm.objectives import (
    AsinhFlow,
    ContinuousFlow,
    DiffusionScoreMatching,
    FisherDivergence,
    FlowMetric,
    ImplicitScoreMatching,
    MatrixMetric,
    RiemannianMetric,
    SteinDiscrepancy,
    fit_flow,
)
from pyro_sm.objectives.diffusion_matrices import along_flow, flow_matrix
from pyro_sm.objectives.divergences.stein import stein_discrepancy
from pyro_sm.objectives.energies import score_estimation as se
from pyro_sm.stein import IMQ

pytestmark = pytest.mark.usefixtures("float64")
exact = {"rtol": 1e-10, "atol": 1e-12}
TRIL = torch.tensor([[1.2, 0.0], [0.7, 0.6]], dtype=torch.float64)
MEAN = torch.tensor([0.3, -0.5], dtype=torch.float64)


def hermite(dim, nodes=6):
    """Points (n, dim) and weights (n,): exact means of polynomials under a standard normal."""
    x, w = np.polynomial.hermite_e.hermegauss(nodes)
    points = torch.tensor(list(itertools.product(x, repeat=dim)))
    weights = torch.tensor(list(itertools.product(w / w.sum(), repeat=dim))).prod(1)
    return points, weights


def data_points():
    u, w = hermite(2)
    return MEAN + u @ TRIL.T, w


def quartic(x):
    a, b = x.unbind(-1)
    return -0.1 * a**4 - 0.05 * b**4 - 0.2 * (a * b) ** 2 + 0.3 * a * b - 0.4 * a + 0.2 * b


def cubic(x):
    a, b = x.unbind(-1)
    return -0.3 * a**2 - 0.5 * b**2 + 0.1 * a**2 * b + 0.2 * a


def score_and_trace(log_prob, x):
    score, forms = se.score_and_forms(log_prob, x, Exact().probes(x))
    return score.detach(), Exact().combine(forms).detach()


class Triangular(Transform):
    """A non-linear triangular flow with a full lower Jacobian."""

    domain = codomain = constraints.real_vector
    bijective = True

    def _call(self, x):
        a, b = x.unbind(-1)
        return torch.stack([a + 0.3 * a**3, 0.8 * b + 0.5 * a**2 + 0.6 * a], -1)

    def log_abs_det_jacobian(self, x, y):
        return (1 + 0.9 * x[..., 0] ** 2).log() + math.log(0.8)


def varying(x):
    a, b = x.unbind(-1)
    rows = [torch.stack([1 + 0.2 * a, 0.3 * b], -1), torch.stack([0.1 - 0.4 * a, 0.8 + 0.1 * a * b], -1)]
    return torch.stack(rows, -2)


def test_a_flow_is_a_diffusion_matrix_and_its_transpose_is_not():
    flow = Triangular()
    x, w = data_points()
    q, p = cubic, quartic

    def pushed_score(log_prob):
        """In y-space, through the inverse function: ``∇_y [log p(x(y)) − log|det J|]``."""
        leaf = x.clone().requires_grad_(True)
        y = flow(leaf)
        value = log_prob(leaf) - flow.log_abs_det_jacobian(leaf, y)
        (gradient,) = torch.autograd.grad(value.sum(), leaf)
        j = torch.stack([torch.autograd.functional.jacobian(flow, row) for row in x])
        return torch.linalg.solve(j.mT, gradient[..., None]).squeeze(-1)

    matrix = flow_matrix(flow)(x).detach()
    s_q, s_p = score_and_trace(q, x)[0], score_and_trace(p, x)[0]
    in_y = (w * se.explicit(pushed_score(q), pushed_score(p))).sum()
    in_x = (w * diffusion_explicit(s_q, s_p, matrix)).sum()
    transposed = (w * diffusion_explicit(s_q, s_p, matrix.mT)).sum()
    torch.testing.assert_close(in_x, in_y, **exact)
    assert abs(float(transposed / in_y) - 1) > 0.1


def test_flow_matrix_of_an_elementwise_transform():
    x = torch.randn(4, 2)
    torch.testing.assert_close(flow_matrix(ExpTransform())(x).detach(), torch.diag_embed(torch.exp(-x)), **exact)
    scale = torch.tensor([2.0, -0.5])
    torch.testing.assert_close(
        flow_matrix(AffineTransform(0.0, scale))(x).detach(), torch.diag_embed(1 / scale).expand(4, 2, 2), **exact
    )


def metric(x):
    root = varying(x)
    return root @ root.mT + torch.eye(2)


def test_a_riemannian_metric_is_the_inverse_of_its_matrix():
    x = torch.randn(4, 2)
    m = RiemannianMetric(metric)(x)
    torch.testing.assert_close(m @ m.mT, torch.linalg.inv(metric(x)), **exact)
    assert float((m.mT @ m - torch.linalg.inv(metric(x))).abs().max()) > 1e-3
    difference = torch.randn(4, 2)
    expected = torch.einsum("ni,nij,nj->n", difference, torch.linalg.inv(metric(x)), difference)
    found = RiemannianMetric(metric)(x, difference)
    torch.testing.assert_close(found.square().sum(1), expected, **exact)
    torch.testing.assert_close(found, MatrixMetric(RiemannianMetric(metric))(x, difference), **exact)
    constant = RiemannianMetric(lambda x: metric(x)[0])
    torch.testing.assert_close(constant(x[:1]), m[:1], **exact)


def test_a_riemannian_metric_of_the_wrong_shape_is_refused():
    with pytest.raises(ValueError, match=r"metric of shape \(4, 2, 2\) or \(2, 2\), found \(3, 3\)"):
        RiemannianMetric(lambda x: torch.eye(3))(torch.randn(4, 2))


def swirl(x, t):
    a, b = x.unbind(-1)
    return torch.stack([torch.sin(b) + 0.3 * t * a, a * torch.tanh(b) - 0.4 * a**2], -1)


def test_both_sides_of_the_continuous_flow_identity():
    u, w = hermite(2)
    x = MEAN + 0.5 * (u @ TRIL.T)
    delta = score_and_trace(cubic, x)[0] - score_and_trace(quartic, x)[0]
    times = torch.linspace(0.0, 1.0, 101)
    solution = ContinuousFlow(swirl, times)
    found = along_flow(swirl, x, delta, times)
    leaf = x.clone().requires_grad_(True)
    j = jacobian(solution(leaf), leaf, create_graph=False)
    expected = torch.linalg.solve(j.mT, delta[..., None]).squeeze(-1)
    torch.testing.assert_close(found.x, solution(x), **exact)
    torch.testing.assert_close(found.delta, expected, rtol=1e-7, atol=1e-7)
    torch.testing.assert_close(
        found.delta.square().sum(1), delta.square().sum(1) + found.change, rtol=1e-6, atol=1e-6
    )
    final, start = (w * expected.square().sum(1)).sum(), (w * delta.square().sum(1)).sum()
    assert abs(float(final - start + (w * found.change).sum())) > 1e-2, "the sign matters"


# ------------------------------------------------------------------------------------- a flow along an ODE

TIMES = torch.linspace(0.0, 1.0, 26)


@pytest.mark.parametrize("times", [TIMES, TIMES.flip(0)], ids=["forward", "backward"])
def test_a_continuous_flow_is_a_transform(times):
    flow = ContinuousFlow(swirl, times)
    x = 0.7 * torch.randn(5, 2)
    y = flow(x)
    torch.testing.assert_close(flow.inv(y), x, rtol=1e-5, atol=1e-5)
    j = torch.stack([torch.autograd.functional.jacobian(flow, row) for row in x])
    torch.testing.assert_close(flow.log_abs_det_jacobian(x, y), torch.linalg.slogdet(j).logabsdet, **exact)
    torch.testing.assert_close(flow_matrix(flow)(x).detach(), torch.linalg.inv(j), **exact)
    torch.testing.assert_close(flow(x.reshape(5, 1, 2)), y.reshape(5, 1, 2), **exact)
    assert float((y - x).abs().max()) > 0.1


def test_a_continuous_flow_is_of_fourth_order():
    x = torch.randn(3, 2)
    truth = ContinuousFlow(swirl, torch.linspace(0, 1, 1025))(x)
    steps = [4, 8, 16, 32]
    errors = [float((ContinuousFlow(swirl, torch.linspace(0, 1, n + 1))(x) - truth).norm()) for n in steps]
    slope = np.polyfit(np.log(steps), np.log(errors), 1)[0]
    assert abs(slope + 4) < 0.3


def test_a_linear_field_has_its_exponential():
    a = torch.tensor([[0.3, -1.0], [0.6, -0.2]])
    flow = ContinuousFlow(lambda x, t: x @ a.T, torch.linspace(0, 2, 101))
    x = torch.randn(4, 2)
    torch.testing.assert_close(flow(x), x @ torch.linalg.matrix_exp(2 * a).T, rtol=1e-6, atol=1e-6)
    log_det = flow.log_abs_det_jacobian(x, flow(x))
    torch.testing.assert_close(log_det, (2 * torch.trace(a)).expand(4), rtol=1e-6, atol=1e-6)


@pytest.mark.parametrize("times", [[0.0], [0.0, 1.0, 0.5], [0.0, 0.0]])
def test_times_are_checked(times):
    with pytest.raises(ValueError, match="two or more monotone times"):
        ContinuousFlow(swirl, times)


def test_the_continuous_identity_holds_in_every_form():
    """FD at the start plus the integral of ``−2δᵀAδ`` is FD by metric and by the implicit losses, up to constants."""
    flow = ContinuousFlow(swirl, torch.linspace(0, 1, 51))
    u, w = hermite(2)
    x = MEAN + 0.5 * (u @ TRIL.T)
    s_q, s_p = score_and_trace(cubic, x)[0], score_and_trace(quartic, x)[0]
    moved = along_flow(swirl, x, s_q - s_p, torch.linspace(0, 1, 51))
    start = (w * (s_q - s_p).square().sum(1)).sum()
    expected = start + (w * moved.change).sum()
    by_metric = (w * FlowMetric(flow)(x, s_q - s_p).square().sum(1)).sum().detach()
    by_matrix = 2 * (w * diffusion_explicit(s_q, s_p, flow_matrix(flow)(x).detach())).sum()
    torch.testing.assert_close(by_metric, expected, rtol=1e-6, atol=1e-6)
    torch.testing.assert_close(by_matrix, expected, rtol=1e-6, atol=1e-6)
    assert abs(float(start - (w * moved.change).sum() - expected)) > 1e-2, "the sign matters"


def test_diffusion_score_matching_along_an_ode_is_explicit_up_to_one_constant():
    flow = ContinuousFlow(lambda x, t: 0.3 * torch.tanh(x.flip(-1)) - 0.2 * x, torch.linspace(0, 1, 9))
    u, w = hermite(2, 24)
    x = MEAN + u @ TRIL.T
    s_data = -(x - MEAN) @ torch.linalg.inv(TRIL @ TRIL.T)
    loss = DiffusionScoreMatching(flow)
    matrix = flow_matrix(flow)(x).detach()
    constants = []
    for energy in (quartic, cubic):
        value = (w * loss.row_losses(energy, x).detach()).sum()
        gap = (w * diffusion_explicit(score_and_trace(energy, x)[0], s_data, matrix)).sum()
        constants.append(float(value - gap))
    assert constants[0] == pytest.approx(constants[1], rel=1e-4)
    wrong = [
        float((w * loss.row_losses(e, x).detach()).sum())
        - float((w * diffusion_explicit(score_and_trace(e, x)[0], s_data, matrix.mT.inverse())).sum())
        for e in (quartic, cubic)
    ]
    assert abs(wrong[0] - wrong[1]) > 1e-2


# ---------------------------------------------------------------------------- one argument, three objectives


def model():
    x = pyro.sample("x", dist.MultivariateNormal(MEAN, scale_tril=TRIL))
    pyro.factor("f", -0.1 * (x**4).sum(-1))


def log_p(z):
    return dist.MultivariateNormal(MEAN, scale_tril=TRIL).log_prob(z) - 0.1 * (z**4).sum(-1)


FLOW = ContinuousFlow(lambda x, t: torch.sin(x.flip(-1)) - 0.3 * t * x, torch.linspace(0, 1, 6))


def guide():
    made = AutoMultivariateNormal(model, init_scale=0.8)
    made()
    return made


@pytest.mark.parametrize(
    ("metric", "matrix"),
    [
        (FlowMetric(FLOW), flow_matrix(FLOW)),
        (MatrixMetric(varying), varying),
        (RiemannianMetric(metric), RiemannianMetric(metric)),
    ],
    ids=["ode", "matrix", "riemannian"],
)
def test_fisher_in_each_metric(metric, matrix):
    made = guide()
    seed = torch.get_rng_state()
    found = FisherDivergence(50, metric=metric).loss(model, made)
    torch.set_rng_state(seed)
    law = made.get_posterior()
    z = law.mean + torch.randn(50, 2) @ law.scale_tril.T
    z = z.detach().requires_grad_(True)
    (delta,) = torch.autograd.grad((law.log_prob(z) - log_p(z)).sum(), z)
    m = matrix(z).detach()
    expected = (m.mT @ delta[..., None])[..., 0].square().sum(1).mean()
    assert found == pytest.approx(float(expected), rel=1e-8)
    assert found != pytest.approx(float((m @ delta[..., None]).square().sum((1, 2)).mean()), rel=1e-3)


@pytest.mark.parametrize(
    ("options", "expected"),
    [
        ({"flow": FLOW}, {"flow": FLOW}),
        ({"matrix": varying}, {"matrix": varying}),
        ({"matrix": RiemannianMetric(metric)}, {"matrix": RiemannianMetric(metric)}),
        ({"matrix": torch.eye(2)}, {}),
    ],
    ids=["ode", "matrix", "riemannian", "identity"],
)
def test_stein_in_each_metric(options, expected):
    made = guide()
    seed = torch.get_rng_state()
    objective = SteinDiscrepancy(IMQ(1.1), 30, **options)
    found = objective.differentiable_loss(model, made)
    torch.set_rng_state(seed)
    law = made.get_posterior()
    z = law.mean + torch.randn(30, 2) @ law.scale_tril.T
    torch.testing.assert_close(found, stein_discrepancy(log_p, z, IMQ(1.1), **expected), rtol=1e-8, atol=1e-10)
    found.backward()
    assert float(made.loc.grad.abs().min()) > 0
    if expected:
        plain = stein_discrepancy(log_p, z.detach(), IMQ(1.1))
        assert abs(float((found - plain).detach() / plain.detach())) > 1e-3


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ({"flow": FLOW, "matrix": varying}, "found both"),
        ({"matrix": torch.ones(2, 3)}, r"matrix \(D, D\), found \(2, 3\)"),
    ],
)
def test_stein_refuses(options, words):
    with pytest.raises(ValueError, match=words):
        SteinDiscrepancy(**options)


# --------------------------------------------------------------------------------------------- a learned flow


def test_the_asinh_flow_is_a_transform():
    flow = AsinhFlow(2)
    with torch.no_grad():
        for parameter in flow.parameters():
            parameter.copy_(0.5 * torch.randn(2))
    x = 3 * torch.randn(5, 2)
    y = flow(x)
    torch.testing.assert_close(flow.inv(y), x, **exact)
    j = torch.stack([torch.autograd.functional.jacobian(flow, row) for row in x])
    torch.testing.assert_close(flow.log_abs_det_jacobian(x, y), torch.linalg.slogdet(j).logabsdet, **exact)


def test_a_flow_is_fitted_by_maximum_likelihood_and_then_held():
    """Data that the flow can make exactly normal: the likelihood is that of the truth."""
    truth = AsinhFlow(2)
    with torch.no_grad():
        truth.loc.copy_(torch.tensor([1.0, -0.5]))
        truth.log_slope.copy_(torch.tensor([0.3, -0.1]))
    base = torch.randn(800, 2)
    data = truth.inv(base).detach()
    flow = AsinhFlow(2)
    losses = fit_flow(flow, data, num_steps=300, learning_rate=0.05)
    log_det = truth.log_abs_det_jacobian(data, base)
    best = -(dist.Normal(0.0, 1.0).log_prob(base).sum(1) + log_det).mean().detach()
    assert losses.shape == (300,)
    assert float(losses[0]) > float(best) + 0.05
    assert float(best) - 0.02 < float(losses[-1]) <= float(best) + 1e-4  # eight fitted parameters gain 8/(2N)
    assert not any(parameter.requires_grad for parameter in flow.parameters())


def test_any_pyro_transform_may_be_fitted():
    data = torch.randn(300, 2) @ TRIL.T
    for flow in (dist.transforms.Spline(2, count_bins=4, bound=5.0), dist.transforms.affine_autoregressive(2, [8])):
        losses = fit_flow(flow, data, num_steps=40)
        assert float(losses[-1]) < float(losses[0])


@pytest.mark.parametrize(
    ("flow", "data", "options", "error", "words"),
    [
        (ExpTransform(), torch.randn(5, 2), {}, TypeError, "found ExpTransform"),
        (AsinhFlow(2), torch.randn(5), {}, ValueError, r"found \(5,\)"),
        (AsinhFlow(2), torch.randn(5, 2), {"num_steps": 0}, ValueError, "num_steps >= 1"),
        (AsinhFlow(2), torch.full((5, 2), math.nan), {}, ValueError, "not finite"),
    ],
)
def test_what_a_fit_refuses(flow, data, options, error, words):
    with pytest.raises(error, match=words):
        fit_flow(flow, data, **options)


def test_no_dimensions_are_refused():
    with pytest.raises(ValueError, match="dim >= 1, found 0"):
        AsinhFlow(0)


def student(theta, df=3.0):
    """An unnormalised Student-t energy with location ``theta[0]`` and log scale ``theta[1]``."""
    return lambda x: -(df + 1) / 2 * torch.log1p(((x - theta[0]) / theta[1].exp()).square() / df).sum(-1)


def estimate(loss, x, start):
    theta = start.clone().requires_grad_(True)
    optimiser = torch.optim.LBFGS([theta], max_iter=40, line_search_fn="strong_wolfe")

    def closure():
        optimiser.zero_grad()
        value = loss.row_losses(student(theta), x).mean()
        value.backward()
        return value

    optimiser.step(closure)
    return theta.detach()


def test_heavy_tails_behind_a_learned_flow():
    """Student-t data, three degrees of freedom: a smaller error of the scale."""
    truth = torch.tensor([1.0, math.log(2.0)])
    errors = {"plain": [], "flow": []}
    for _ in range(20):
        x = 1 + 2 * dist.StudentT(3.0).sample((150, 1))
        flow = AsinhFlow(1)
        fit_flow(flow, x, num_steps=150, learning_rate=0.1)
        for name, loss in (("plain", ImplicitScoreMatching()), ("flow", DiffusionScoreMatching(flow))):
            errors[name].append(estimate(loss, x, truth) - truth)
    plain, learned = (torch.stack(errors[name]).square().mean(0).sqrt() for name in ("plain", "flow"))
    assert float(plain[1] / learned[1]) > 1.2  # the ratio is 1.5
    assert float(learned[1]) < 0.13
    assert float(learned[0]) < 0.35
