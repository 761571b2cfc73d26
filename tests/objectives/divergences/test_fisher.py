# SPDX-License-Identifier: Apache-2.0
"""The Fisher divergence: its formulas against known numbers, its metrics, its guides, and the contract with Pyro."""

import math

import numpy as np
import pyro
import pyro.distributions as dist
import pytest
import torch
from pyro import poutine
from pyro.contrib.easyguide import EasyGuide
from pyro.infer import SVI
from pyro.infer.autoguide import (
    AutoDelta,
    AutoDiagonalNormal,
    AutoGuideList,
    AutoIAFNormal,
    AutoLaplaceApproximation,
    AutoLowRankMultivariateNormal,
    AutoMultivariateNormal,
    AutoNormal,
    AutoNormalizingFlow,
    init_to_value,
)
from pyro.optim import Adam
from torch.distributions import constraints

from pyro_sm import AutoDiffusion, ModelRefusedError, PyroSMWarning
from pyro_sm.base import Arguments, PathDraws, PathGuide
from pyro_sm.diffusion.flow import FlowSolver
from pyro_sm.guides.mixture import AutoGaussianMixture
from pyro_sm.model.density import ModelDensity
from pyro_sm.model.pushforward import NoGaussianNoiseError, noise_shape, push
from pyro_sm.nn.mlp import MLP
from pyro_sm.objectives import (
    BaseSpace,
    EstimatedLogZ,
    FisherDivergence,
    FlowMetric,
    Identity,
    MatrixMetric,
    MixtureFisherDivergence,
)
from pyro_sm.objectives.divergences.fisher import fisher_terms, squared_norm, variance_values
from pyro_sm.objectives.divergences.guide_paths import Path, automatic_path, set_up, uniform
from pyro_sm.objectives.divergences.traced_paths import TracedGuide
from pyro_sm.objectives.gradients import gradient

F64 = torch.float64
RHO = 0.8
SIGMA = torch.tensor([[1.0, RHO], [RHO, 1.0]], dtype=F64)


def path_of(fn):
    """A distribution over (D,) as a path."""

    def draw(noise):
        z, log_q = push(fn, noise)
        return PathDraws(z, log_q, uniform(log_q))

    return Path(noise_shape(fn).numel(), draw, fn.log_prob, closed_form=True)


def latent_difference(log_q, log_p, z):
    """``Δ = ∇ log q − ∇ log p̃`` (N, D) at latents (N, D), which may carry a path gradient."""
    z = z if z.requires_grad else z.detach().requires_grad_(True)
    return gradient(log_q(z) - log_p(z), z, create_graph=True)


def hermite(n, dim):
    """Nodes (n^dim, dim) and weights of a rule that is exact for polynomials of degree 2n − 1 under N(0, I)."""
    x, w = (torch.from_numpy(v) for v in np.polynomial.hermite_e.hermegauss(n))
    nodes = torch.cartesian_prod(*[x] * dim).reshape(-1, dim)
    weights = torch.cartesian_prod(*[w / math.sqrt(2 * math.pi)] * dim).reshape(-1, dim).prod(1)
    return nodes, weights


def grid(width, n, centre=0.0):
    """Nodes (n, 1) and weights of a trapezoidal rule for expectations under N(0, 1)."""
    u = torch.linspace(-width, width, n, dtype=F64) + centre
    return u[:, None], torch.exp(-0.5 * u**2) / math.sqrt(2 * math.pi) * (u[1] - u[0])


TARGET = dist.MultivariateNormal(torch.zeros(2, dtype=F64), SIGMA)
NODES, WEIGHTS = hermite(4, 2)


# ------------------------------------------------------------------------------------- known answers: Gaussians


def root(gradient, low=0.05, high=2.0):
    for _ in range(60):
        middle = (low + high) / 2
        low, high = (middle, high) if gradient(middle) < 0 else (low, middle)
    return middle


def mean_field_gradient(metric, detach=False):
    def at(scale):
        s = torch.tensor(scale, dtype=F64, requires_grad=True)
        fn = dist.Normal(torch.zeros(2, dtype=F64), s).to_event(1)
        if detach:
            values = squared_norm(latent_difference(fn.log_prob, TARGET.log_prob, (s * NODES).detach()))
        else:
            values = fisher_terms(path_of(fn), TARGET.log_prob, NODES, metric).values
        return float(torch.autograd.grad((WEIGHTS * values).sum(), s)[0])

    return at


@pytest.mark.parametrize(
    ("metric", "variance"),
    [(Identity(), (1 - RHO**2) / math.sqrt(1 + RHO**2)), (BaseSpace(), (1 - RHO**2) / (1 + RHO**2))],
)
def test_mean_field_variance(metric, variance):
    assert root(mean_field_gradient(metric)) ** 2 == pytest.approx(variance, rel=1e-8)


def test_draws_without_path_gradient_find_the_fixed_point_of_the_elbo():
    assert root(mean_field_gradient(Identity(), detach=True)) ** 2 == pytest.approx(1 - RHO**2, rel=1e-8)


@pytest.mark.parametrize("metric", [Identity(), BaseSpace(), MatrixMetric(lambda z: SIGMA)])
def test_full_rank_finds_the_target(metric):
    loc = torch.tensor([1.0, -2.0], dtype=F64, requires_grad=True)
    raw = torch.tensor([[-0.7, 0.0], [0.0, 0.7]], dtype=F64, requires_grad=True)

    def tril():
        return raw.tril(-1) + torch.diag(raw.diagonal().exp())

    optimiser = torch.optim.LBFGS([loc, raw], max_iter=200, tolerance_grad=1e-12, line_search_fn="strong_wolfe")

    def closure():
        optimiser.zero_grad()
        fn = dist.MultivariateNormal(loc, scale_tril=tril())
        loss = (WEIGHTS * fisher_terms(path_of(fn), TARGET.log_prob, NODES, metric).values).sum()
        loss.backward()
        return loss

    optimiser.step(closure)
    assert torch.allclose(tril() @ tril().T, SIGMA, atol=1e-5)
    assert torch.allclose(loc, torch.zeros(2, dtype=F64), atol=1e-5)


@pytest.mark.parametrize("metric", [Identity(), BaseSpace(), MatrixMetric(lambda z: 2 * torch.diag_embed(1 + z**2))])
def test_zero_draw_by_draw_at_the_target(metric):
    noise = torch.randn(20, 2, dtype=F64)
    fn = dist.MultivariateNormal(TARGET.loc, SIGMA)
    values = fisher_terms(path_of(fn), lambda z: TARGET.log_prob(z) + 3.0, noise, metric, sobolev=1.0).values
    assert values.abs().max() < 1e-20
    far = dist.MultivariateNormal(TARGET.loc + 0.1, SIGMA)
    assert fisher_terms(path_of(far), TARGET.log_prob, noise, metric).values.min() > 1e-4


def test_base_space_is_the_formula():
    """‖∇_u[log p̃(F(u)) + log|det J_F|] + u‖², for an affine F with matrix C: ‖Cᵀ s_p(z) + u‖²."""
    noise = torch.randn(7, 2, dtype=F64)
    tril = torch.tensor([[0.7, 0.0], [-0.4, 1.3]], dtype=F64)
    loc = torch.tensor([0.3, -1.0], dtype=F64)
    values = fisher_terms(
        path_of(dist.MultivariateNormal(loc, scale_tril=tril)), TARGET.log_prob, noise, BaseSpace()
    ).values
    z = loc + noise @ tril.T
    score = -torch.linalg.solve(SIGMA, z.T).T
    assert torch.allclose(values, squared_norm(score @ tril + noise), rtol=1e-10)
    assert not torch.allclose(values, squared_norm(score @ tril.T + noise), rtol=1e-2)


def test_low_rank_base_space_is_measured_by_the_covariance():
    fn = dist.LowRankMultivariateNormal(
        torch.tensor([0.5, -0.2, 0.1], dtype=F64), torch.randn(3, 2, dtype=F64), torch.rand(3, dtype=F64) + 0.5
    )
    target = dist.Normal(torch.zeros(3, dtype=F64), 2.0).to_event(1)
    noise = torch.randn(6, 5, dtype=F64)
    z, _ = push(fn, noise)
    difference = latent_difference(fn.log_prob, target.log_prob, z)
    expected = torch.einsum("ni,ij,nj->n", difference, fn.covariance_matrix, difference)
    assert torch.allclose(fisher_terms(path_of(fn), target.log_prob, noise, BaseSpace()).values, expected, rtol=1e-9)


# ---------------------------------------------------------------------------------- known answers: heavy tails


def t3_divergence(scale, metric, nodes=200001):
    def log_p(z):
        return dist.StudentT(torch.tensor(3.0, dtype=F64)).log_prob(z[:, 0])

    u, w = grid(8.0, nodes)
    fn = dist.Normal(torch.zeros(1, dtype=F64), scale).to_event(1)
    return float((w * fisher_terms(path_of(fn), log_p, u, metric, create_graph=False).values).sum())


def test_false_infimum_of_the_plain_divergence():
    scales = torch.linspace(0.8, 4.0, 161).tolist()
    plain = [t3_divergence(s, Identity(), 4001) for s in scales]
    base = [t3_divergence(s, BaseSpace(), 4001) for s in scales]
    assert 0 < plain.index(min(plain)) < 160
    assert min(plain) == pytest.approx(0.0975, abs=5e-5)
    assert t3_divergence(100.0, Identity()) == pytest.approx(0.0556, abs=5e-5)
    assert t3_divergence(100.0, BaseSpace()) > 100 * min(base)


# -------------------------------------------------------------------------------------- known answers: blindness

BLIND = [
    (1, 1.455e-1, 0.2510),
    (2, 7.82e-2, 0.4451),
    (3, 1.005e-2, 0.4783),
    (4, 4.11e-4, 0.4804),
    (6, 2.84e-8, 0.4805),
    (8, 3.2e-14, 0.4805),
]


def modes(a, weight):
    parts = dist.Normal(torch.tensor([-a, a], dtype=F64), torch.ones(2, dtype=F64))
    mixture = dist.MixtureSameFamily(dist.Categorical(torch.tensor([weight, 1 - weight], dtype=F64)), parts)
    return lambda z: mixture.log_prob(z[:, 0])


def even_modes(a):
    """.5 N(−a, 1) + .5 N(a, 1) by stratified draws, as AutoGaussianMixture makes them."""
    log_q = modes(a, 0.5)

    def draw(noise):
        sign = 1 - 2 * (torch.arange(len(noise)) % 2)
        z = noise - a * sign[:, None]
        return PathDraws(z, log_q(z), uniform(log_q(z)))

    return Path(1, draw, log_q, closed_form=True)


@pytest.mark.parametrize("metric", [Identity(), BaseSpace()])
@pytest.mark.parametrize(("a", "fisher", "variance"), BLIND)
def test_blindness_and_the_sobolev_term(a, fisher, variance, metric):
    u, w = grid(20.0, 40001)
    u, w = u.repeat_interleave(2, 0), w.repeat_interleave(2) / 2
    path, log_p = even_modes(float(a)), modes(float(a), 0.2)
    values = fisher_terms(path, log_p, u, metric, create_graph=False).values
    assert float((w * values).sum()) == pytest.approx(fisher, rel=5e-3 if a < 8 else 2e-2)
    draws = path.draw(u)
    found = (w * variance_values(log_p(draws.z) + 7.0 - draws.log_q, w)).sum() * (1 - w.square().sum())
    assert float(found) == pytest.approx(variance, abs=1e-4)


def test_variance_values_are_unbiased():
    """All 4³ samples of size three from four values."""
    x = torch.tensor([0.3, -1.0, 2.0, 5.0], dtype=F64)
    samples = torch.cartesian_prod(x, x, x)
    weight = torch.full((3,), 1 / 3, dtype=F64)
    means = torch.stack([(weight * variance_values(row, weight)).sum() for row in samples])
    assert float(means.mean()) == pytest.approx(float(x.var(correction=0)), rel=1e-12)


# ------------------------------------------------------------------------------------------ metrics and flows


class Triangular(torch.distributions.Transform):
    """``y = (x₁ + ½ sin x₁, x₂ e^{0.4 x₁} + x₁²)``."""

    domain = codomain = constraints.real_vector
    bijective = True

    def _call(self, x):
        return torch.stack([x[:, 0] + 0.5 * torch.sin(x[:, 0]), x[:, 1] * torch.exp(0.4 * x[:, 0]) + x[:, 0] ** 2], 1)

    def _inverse(self, y):
        a = y[:, 0]
        for _ in range(30):  # Newton, differentiable
            a = a - (a + 0.5 * torch.sin(a) - y[:, 0]) / (1 + 0.5 * torch.cos(a))
        return torch.stack([a, (y[:, 1] - a**2) * torch.exp(-0.4 * a)], 1)

    def log_abs_det_jacobian(self, x, y):
        return torch.log(1 + 0.5 * torch.cos(x[:, 0])) + 0.4 * x[:, 0]

    @staticmethod
    def jacobian(x):
        zero = torch.zeros_like(x[:, 0])
        e = torch.exp(0.4 * x[:, 0])
        top = torch.stack([1 + 0.5 * torch.cos(x[:, 0]), zero], 1)
        return torch.stack([top, torch.stack([0.4 * x[:, 1] * e + 2 * x[:, 0], e], 1)], 1)


def test_a_flow_is_a_diffusion_matrix_and_its_transpose_is_not():
    flow = Triangular(cache_size=0)
    q = dist.MultivariateNormal(torch.tensor([0.2, -0.1], dtype=F64), 0.5 * torch.eye(2, dtype=F64))
    noise = torch.randn(50, 2, dtype=F64)

    def in_y(log_prob):
        def at(y):
            x = flow._inverse(y)
            return log_prob(x) - flow.log_abs_det_jacobian(x, y)

        return at

    y = flow(q.loc + noise @ q.scale_tril.T)
    there = squared_norm(latent_difference(in_y(q.log_prob), in_y(TARGET.log_prob), y)).detach()

    def here(metric):
        return fisher_terms(path_of(q), TARGET.log_prob, noise, metric).values.detach()

    assert torch.allclose(here(FlowMetric(flow)), there, rtol=1e-9)
    assert torch.allclose(here(MatrixMetric(lambda z: torch.linalg.inv(Triangular.jacobian(z)))), there, rtol=1e-9)
    wrong = here(MatrixMetric(lambda z: torch.linalg.inv(Triangular.jacobian(z)).mT))
    assert abs(float(wrong.mean() / there.mean()) - 1) > 0.1


def test_base_space_is_the_guides_own_flow_read_backwards():
    base = dist.Normal(torch.zeros(2, dtype=F64), torch.ones(2, dtype=F64)).to_event(1)
    flow = Triangular(cache_size=0)
    fn = dist.TransformedDistribution(base, [flow])
    noise = torch.randn(9, 2, dtype=F64)
    own = fisher_terms(path_of(fn), TARGET.log_prob, noise, BaseSpace()).values
    assert torch.allclose(
        own, fisher_terms(path_of(fn), TARGET.log_prob, noise, FlowMetric(flow.inv)).values, rtol=1e-8
    )
    assert not torch.allclose(own, fisher_terms(path_of(fn), TARGET.log_prob, noise, Identity()).values, rtol=0.1)


def test_flows_score_through_the_noise_as_through_the_density():
    base = dist.Normal(torch.zeros(2, dtype=F64), torch.ones(2, dtype=F64)).to_event(1)
    closed = path_of(dist.TransformedDistribution(base, [Triangular(cache_size=0)]))
    dear = Path(2, closed.draw, None, closed_form=False)
    noise = torch.randn(9, 2, dtype=F64)
    one, other = (fisher_terms(p, TARGET.log_prob, noise, Identity()).values for p in (closed, dear))
    assert torch.allclose(one, other, rtol=1e-8)


@pytest.mark.parametrize("metric", [MatrixMetric(lambda z: torch.eye(3)), FlowMetric(lambda z: z[:, :1])])
def test_metrics_of_the_wrong_shape_are_named(metric):
    with pytest.raises(ValueError, match=r"expected a .* of shape"):
        metric(torch.randn(4, 2), torch.randn(4, 2))


# -------------------------------------------------------------------------------------------------- pushforward

DISTRIBUTIONS = [
    dist.Normal(torch.tensor([1.0, 2.0]), torch.tensor([0.5, 2.0])),
    dist.Normal(0.5, 2.0).expand([3]).to_event(1),
    dist.Normal(0.5, 2.0).mask(True).expand([3, 2]).to_event(2),
    dist.LogNormal(torch.tensor([0.1, 0.3]), 0.5).to_event(1),
    dist.MultivariateNormal(torch.tensor([1.0, 2.0]), SIGMA.float()),
    dist.MultivariateNormal(torch.zeros(2), SIGMA.float()).expand([3]).to_event(1),
    dist.LowRankMultivariateNormal(torch.zeros(3), torch.tensor([[1.0], [2.0], [0.5]]), torch.ones(3)),
    dist.Laplace(torch.tensor([0.3, 1.0]), 2.0),
    dist.TransformedDistribution(dist.Normal(torch.zeros(3), 1.0).to_event(1), [dist.transforms.OrderedTransform()]),
    dist.TransformedDistribution(dist.Normal(torch.zeros(3), 1.0), [dist.transforms.OrderedTransform()]),
]


@pytest.mark.parametrize("fn", DISTRIBUTIONS, ids=lambda f: type(f).__name__)
def test_pushing_noise_samples_the_distribution(fn):
    noise = torch.randn(4000, *noise_shape(fn))
    value, log_q = push(fn, noise)
    assert value.shape == (4000, *fn.shape())
    assert torch.allclose(log_q, fn.log_prob(value), atol=2e-3, rtol=1e-3)
    other = fn.sample((4000,))
    error = (value.std(0) + other.std(0)) / math.sqrt(4000) + 1e-6
    assert ((value.mean(0) - other.mean(0)).abs() < 5 * error).all()


def test_what_has_no_gaussian_noise_is_named():
    with pytest.raises(NoGaussianNoiseError, match="Gamma"):
        push(dist.Gamma(torch.ones(2), torch.ones(2)), torch.randn(2))


# ------------------------------------------------------------------------------------------- guides as paths

Y = torch.tensor([0.5, -1.0, 2.0])


def model(y):
    mu = pyro.sample("mu", dist.Normal(y.new_zeros(()), 2.0))
    s = pyro.sample("s", dist.LogNormal(y.new_zeros(()), 0.7))
    with pyro.plate("n", len(y)):
        t = pyro.sample("t", dist.Normal(mu, y.new_ones(())))
        pyro.sample("y", dist.Normal(t, s), obs=y)


def parameter(name, value, constraint=constraints.real):
    return pyro.param(name, lambda: value.clone(), constraint=constraint)


def positive(name, value):
    return parameter(name, value, constraints.positive)


def hand_written(y):
    mu = pyro.sample("mu", dist.Normal(parameter("a", y[0]), positive("b", 0.5 + 0 * y[0])))
    s = pyro.sample("s", dist.LogNormal(parameter("c", 0 * y[0]), positive("d", 0.3 + 0 * y[0])))
    with pyro.plate("n", len(y)):
        pyro.sample("t", dist.Normal(mu + parameter("e", 0 * y) * s, positive("f", 0.4 + 0 * y)))


def with_auxiliary_site(y):
    """As EasyGuide does it: one draw for several sites."""
    scale = parameter("L", torch.eye(5).to(y) + 0.1 * torch.ones(5, 5).to(y).tril(-1), constraints.lower_cholesky)
    loc = parameter("m", 0.1 + torch.zeros(5).to(y))
    z = pyro.sample("z", dist.MultivariateNormal(loc, scale_tril=scale), infer={"is_auxiliary": True})
    pyro.sample("mu", dist.Delta(z[..., 0]))
    s = z[..., 1].exp()
    pyro.sample("s", dist.Delta(s, log_density=-z[..., 1]))
    with pyro.plate("n", len(y)):
        pyro.sample("t", dist.Delta(z[..., 2:]))


def sequential(y):
    """Does not broadcast: it must be run draw by draw."""
    mu = pyro.sample("mu", dist.Normal(parameter("a", y[0]), positive("b", 0.5 + 0 * y[0])))
    pyro.sample("s", dist.LogNormal(parameter("c", 0 * y[0]), positive("d", 0.3 + 0 * y[0])))
    shift = float(mu.detach().reshape(-1)[0] > 100)
    with pyro.plate("n", len(y)):
        loc = torch.stack([mu.sum() + shift, y[1], y[2]]) + parameter("e", 0 * y)
        pyro.sample("t", dist.Normal(loc, positive("f", 0.4 + 0 * y)))


def with_gamma(y):
    pyro.sample("mu", dist.Normal(parameter("a", y[0]), positive("b", 0.5 + 0 * y[0])))
    k = positive("k", 3.0 + 0 * y[0])
    pyro.sample("s", dist.Gamma(k, positive("r", 2.0 + 0 * y[0])))
    with pyro.plate("n", len(y)):
        pyro.sample("t", dist.Normal(parameter("e", y), positive("f", 0.4 + 0 * y)))


def listed(model):
    guide = AutoGuideList(model)
    guide.append(AutoDiagonalNormal(poutine.block(model, expose=["mu", "s"])))
    guide.append(AutoNormal(poutine.block(model, expose=["t"])))
    return guide


class Easy(EasyGuide):
    """Pyro's own half-automatic guide: one joint draw for two sites, another for the plate."""

    def guide(self, y):
        both = self.group(match="mu|s")
        loc = parameter("easy_loc", 0.1 + torch.zeros(2).to(y))
        tril = parameter(
            "easy_tril", torch.eye(2).to(y) + 0.1 * torch.ones(2, 2).to(y).tril(-1), constraints.lower_cholesky
        )
        both.sample("both", dist.MultivariateNormal(loc, scale_tril=tril))
        with self.plate("n", len(y)):
            pyro.sample("t", dist.Normal(parameter("e", y), positive("f", 0.4 + 0 * y)))


def diffusion(model):
    return AutoDiffusion(
        model, num_steps=4, architecture=MLP(width=8, depth=1), solver=FlowSolver(rtol=0.1, atol=0.1)
    )


def spline(model):
    return AutoNormalizingFlow(model, lambda d: dist.transforms.spline_coupling(d, hidden_dims=[8], count_bins=4))


CONTINUOUS = {
    "AutoNormal": AutoNormal,
    "AutoDiagonalNormal": AutoDiagonalNormal,
    "AutoMultivariateNormal": AutoMultivariateNormal,
    "AutoLowRankMultivariateNormal": AutoLowRankMultivariateNormal,
    "AutoIAFNormal": lambda model: AutoIAFNormal(model, hidden_dim=[8]),
    "AutoNormalizingFlow": spline,
    "AutoDiffusion": diffusion,
    "AutoGaussianMixture": lambda model: AutoGaussianMixture(model, 2),
}
TRACED = {
    "hand-written": lambda model: hand_written,
    "sequential": lambda model: sequential,
    "auxiliary": lambda model: with_auxiliary_site,
    "AutoGuideList": listed,
    "EasyGuide": Easy,
}
GUIDES = CONTINUOUS | TRACED
OBJECTIVES = {
    "base": lambda: FisherDivergence(6),
    "identity": lambda: FisherDivergence(6, metric=Identity()),
    "flow": lambda: FisherDivergence(6, metric=FlowMetric(dist.transforms.AffineTransform(0.0, 2.0))),
    "sobolev": lambda: FisherDivergence(6, sobolev=0.5),
    "mixture": lambda: MixtureFisherDivergence(12, log_z=EstimatedLogZ(16)),
}


def path_for(guide, density, args):
    arguments = Arguments(args)
    set_up(guide, model, arguments)
    return automatic_path(guide, density, arguments) or TracedGuide(guide, density, arguments).path(arguments)


@pytest.mark.parametrize("name", [n for n in GUIDES if n != "AutoDiffusion"])
@pytest.mark.usefixtures("float64")
def test_the_path_of_a_guide_is_its_distribution(name):
    """Draws against the guide's own, ``log q`` against a trace of the guide, where it has one."""
    y = Y.double()
    density = ModelDensity(model, (y,))
    guide = GUIDES[name](model)
    path = path_for(guide, density, (y,))
    draws = path.draw(torch.randn(400 if name in ("sequential", "auxiliary") else 3000, path.noise_dim))
    if path.log_q is not None:
        assert torch.allclose(path.log_q(draws.z), draws.log_q, rtol=1e-5, atol=1e-5)
    own = []
    for _ in range(300):
        trace = poutine.trace(guide).get_trace(y)
        own.append(density.pack({s.name: trace.nodes[s.name]["value"][None] for s in density.sites})[0])
    own = torch.stack(own).detach()
    mean = (draws.weight[:, None] * draws.z).sum(0).detach()
    assert ((mean - own.mean(0)).abs() < 5 * own.std(0) * math.sqrt(1 / 300 + 1 / len(draws.z))).all()


@pytest.mark.parametrize(
    "name", ["AutoNormal", "AutoMultivariateNormal", "AutoIAFNormal", "hand-written", "auxiliary"]
)
@pytest.mark.usefixtures("float64")
def test_log_q_agrees_with_a_trace(name):
    y = Y.double()
    density = ModelDensity(model, (y,))
    guide = GUIDES[name](model)
    path = path_for(guide, density, (y,))
    draws = path.draw(torch.randn(3, path.noise_dim))
    torch.manual_seed(0)
    trace = poutine.trace(guide).get_trace(y)
    z = density.pack({s.name: trace.nodes[s.name]["value"][None] for s in density.sites})
    values = density.unpack(z)
    assert values["t"].shape == (1, 3)
    log_q = trace.log_prob_sum() + z[0, next(s.start for s in density.sites if s.name == "s")]
    if path.log_q is not None:
        assert torch.allclose(path.log_q(z)[0], log_q, rtol=1e-6)
    else:
        fn = dist.MultivariateNormal(pyro.param("m"), scale_tril=pyro.param("L"))
        assert torch.allclose(fn.log_prob(z)[0], log_q, rtol=1e-6)
        assert torch.allclose(draws.log_q, fn.log_prob(draws.z), rtol=1e-6)


def test_only_the_guide_that_broadcasts_is_run_once():
    density = ModelDensity(model, (Y,))
    for guide, expected in ((hand_written, True), (listed(model), True), (sequential, False)):
        set_up(guide, model, Arguments((Y,)))
        traced = TracedGuide(guide, density, Arguments((Y,)))
        traced.path(Arguments((Y,))).draw(torch.randn(6, traced.noise_dim))
        assert traced._batched is expected


def test_a_mixture_guide_is_a_path_guide():
    assert isinstance(AutoGaussianMixture(model, 2), PathGuide)
    assert not isinstance(AutoNormal(model), PathGuide)


# --------------------------------------------------------------------------------------------------- contract


def cases():
    for objective in OBJECTIVES:
        for guide in GUIDES:
            if objective == "mixture" and guide in ("auxiliary", "AutoGuideList", "EasyGuide"):
                continue  # their density at a given latent is not known
            if guide == "AutoDiffusion" and objective in ("flow", "sobolev"):
                continue  # below: a whole contract is half a minute of ODEs
            slow = guide == "AutoDiffusion" and objective == "identity"
            yield pytest.param(objective, guide, marks=[pytest.mark.slow] if slow else [])


LEVELS = "AutoDiffusion.ratios"  # fitted by dynamic programming, never by gradient


def parameters():
    left_out = ("AutoDiffusion.log_variance_factor", LEVELS)
    return {n: p for n, p in pyro.get_param_store().named_parameters() if n not in left_out}


def levels():
    return [p.detach().clone() for n, p in pyro.get_param_store().named_parameters() if n == LEVELS]


@pytest.mark.parametrize(("objective", "name"), list(cases()))
def test_contract(objective, name):
    guide, loss = GUIDES[name](model), OBJECTIVES[objective]()
    svi = SVI(model, guide, Adam({"lr": 1e-3}), loss)
    loss.loss(model, guide, Y)
    before, stand = {n: p.detach().clone() for n, p in parameters().items()}, levels()
    assert len(stand) == (name == "AutoDiffusion")
    svi.step(Y)
    assert all((p != before[n]).any() for n, p in parameters().items())
    assert all(torch.equal(one, other) for one, other in zip(stand, levels(), strict=True))
    for method in (loss.loss, loss.differentiable_loss, loss.loss_and_grads):
        torch.manual_seed(3)
        value = method(model, guide, Y)
        if method == loss.loss:
            first = value
        assert isinstance(value, torch.Tensor) == (method == loss.differentiable_loss)
        assert float(torch.as_tensor(value).detach()) == pytest.approx(first, rel=1e-5)
    assert math.isfinite(first)
    for parameter_name, p in parameters().items():
        assert p.grad is not None, parameter_name
        assert p.grad.isfinite().all(), parameter_name
        assert (p.grad != 0).any(), parameter_name
    before = {n: p.detach().clone() for n, p in parameters().items()}
    torch.manual_seed(3)
    with torch.no_grad():
        assert svi.evaluate_loss(Y) == pytest.approx(first, rel=1e-4)
        assert not loss.differentiable_loss(model, guide, Y).requires_grad
    assert all(torch.equal(before[n], p) for n, p in parameters().items())


@pytest.mark.slow
@pytest.mark.parametrize("objective", ["flow", "sobolev"])
def test_a_diffusion_guide_takes_the_other_metrics(objective):
    guide, loss = diffusion(model), OBJECTIVES[objective]()
    value = loss.loss_and_grads(model, guide, Y)
    assert math.isfinite(value)
    for name, p in parameters().items():
        assert p.grad is not None, name
        assert p.grad.isfinite().all(), name
        assert (p.grad != 0).any(), name


@pytest.mark.parametrize("objective", OBJECTIVES)
@pytest.mark.parametrize("name", ["AutoNormal", "AutoIAFNormal", "hand-written", "AutoGaussianMixture"])
def test_a_seed_determines_the_run(objective, name):
    def run():
        pyro.clear_param_store()
        pyro.set_rng_seed(5)
        svi = SVI(model, GUIDES[name](model), Adam({"lr": 0.01}), OBJECTIVES[objective]())
        losses = [svi.step(Y) for _ in range(3)]
        return losses, {n: p.detach().clone() for n, p in parameters().items()}

    (one, params), (other, again) = run(), run()
    assert one == other
    assert all(torch.equal(p, again[n]) for n, p in params.items())


@pytest.mark.parametrize("objective", OBJECTIVES)
@pytest.mark.parametrize(
    "name", ["AutoNormal", "AutoLowRankMultivariateNormal", "hand-written", "AutoGaussianMixture"]
)
@pytest.mark.usefixtures("float64")
def test_double_precision(objective, name):
    y, loss = Y.double(), OBJECTIVES[objective]()
    guide = GUIDES[name](model)
    value = loss.differentiable_loss(model, guide, y)
    assert value.dtype == F64
    assert value.shape == ()


@pytest.mark.parametrize("objective", OBJECTIVES)
def test_trains_on_the_torch_path(objective):
    guide = AutoMultivariateNormal(model)
    elbo = OBJECTIVES[objective]()(model, guide)
    elbo(Y)
    before = [p.detach().clone() for p in elbo.parameters()]
    optimiser = torch.optim.Adam(elbo.parameters(), lr=0.01)
    elbo(Y).backward()
    optimiser.step()
    assert len(before) == 3
    assert all((p != b).any() for p, b in zip(elbo.parameters(), before, strict=True))


def test_one_particle_and_many_have_the_same_mean():
    guide = AutoNormal(model)
    few, many = FisherDivergence(1), FisherDivergence(4000)
    ones = torch.tensor([few.loss(model, guide, Y) for _ in range(300)])
    assert abs(ones.mean() - many.loss(model, guide, Y)) < 5 * ones.std() / math.sqrt(280)
    assert many.evaluations.values == 4000 + 16  # the check of the second derivatives
    assert many.evaluations.scores == 4000


def test_gamma_site_trains_in_latent_space_only():
    with pytest.raises(TypeError, match=r"no base space: use FisherDivergence\(metric=Identity"):
        FisherDivergence().loss(model, with_gamma, Y)
    loss = FisherDivergence(4, metric=Identity())
    loss.loss_and_grads(model, with_gamma, Y)
    assert all((p.grad != 0).any() for p in parameters().values())


# ----------------------------------------------------------------------------------------------------- errors


def gaussian():
    pyro.sample("x", dist.Normal(0.0, 1.0))


def bad(make):
    def guide(*args):
        pyro.sample("x", make())

    return guide


class NotReparametrised(dist.Normal):
    has_rsample = False


@pytest.mark.parametrize(
    ("guide", "error", "message"),
    [
        (bad(lambda: NotReparametrised(0.0, 1.0)), TypeError, r"samples 'x' .* without reparametrisation"),
        (bad(lambda: dist.Delta(torch.tensor(0.5))), TypeError, "point estimate"),
        (lambda: pyro.sample("other", dist.Normal(0.0, 1.0)), TypeError, "no sample statement for the latent site x"),
        (AutoDelta(gaussian), TypeError, "AutoDelta is a point estimate"),
        (AutoLaplaceApproximation(gaussian), TypeError, "point estimate"),
        (3, TypeError, "expected a Pyro guide"),
    ],
)
def test_guides_that_cannot_be_trained_are_named(guide, error, message):
    with pytest.raises(error, match=message):
        FisherDivergence().loss(gaussian, guide)


def test_extra_sites_of_the_guide_are_named():
    def guide():
        pyro.sample("x", dist.Normal(pyro.sample("w", dist.Normal(0.0, 1.0)), 1.0))

    with pytest.raises(TypeError, match="w of guide is no latent site"):
        FisherDivergence().loss(gaussian, guide)


@pytest.mark.parametrize("make", [AutoNormal, AutoDiagonalNormal, lambda m: AutoGaussianMixture(m, 2)])
def test_a_guide_of_another_model_is_named(make):
    guide = make(gaussian)
    guide()
    with pytest.raises(ValueError, match="covers the"):
        FisherDivergence().loss(model, guide, Y)


def test_more_data_than_the_guide_was_made_for():
    guide = AutoNormal(model)
    guide(Y)
    with pytest.raises(ValueError, match="site 't': AutoNormal holds 3 locations, the model has 4"):
        FisherDivergence().loss(model, guide, torch.cat([Y, Y[:1]]))


def test_minibatches_are_refused():
    def given(y, index):
        mu = pyro.sample("mu", dist.Normal(0.0, 1.0))
        with pyro.plate("n", len(y), subsample=index):
            pyro.sample("y", dist.Normal(mu, 1.0), obs=y[index])

    def drawn(y):
        mu = pyro.sample("mu", dist.Normal(0.0, 1.0))
        with pyro.plate("n", len(y), 2) as index:
            pyro.sample("y", dist.Normal(mu, 1.0), obs=y[index])

    with pytest.raises(ValueError, match="'n' of the model is subsampled to 2 of 3"):
        FisherDivergence().loss(given, AutoNormal(given), Y, torch.tensor([0, 2]))
    with pytest.raises(ModelRefusedError):
        FisherDivergence().loss(drawn, AutoNormal(drawn), Y)


def test_a_subsampled_guide_is_refused():
    def guide(y):
        pyro.sample("mu", dist.Normal(0.0, 1.0))
        pyro.sample("s", dist.LogNormal(0.0, 1.0))
        with pyro.plate("n", 3, 2):
            pyro.sample("t", dist.Normal(torch.zeros(2), 1.0))

    with pytest.raises(ValueError, match="'n' of guide is subsampled to 2 of 3"):
        FisherDivergence().loss(model, guide, Y)


def test_vanishing_second_derivatives_are_reported():
    def kinked():
        pyro.sample("x", dist.Laplace(0.0, 3.0))
        z = pyro.sample("z", dist.Normal(0.0, 3.0))
        pyro.factor("f", torch.relu(z))

    loss, guide = FisherDivergence(4), AutoNormal(kinked)
    with pytest.warns(PyroSMWarning, match="second derivatives .* vanish at the latent site x"):
        loss.loss(kinked, guide)
    loss.loss(kinked, guide)  # once


def test_trainable_models_are_warned_about():
    def trained():
        pyro.sample("x", dist.Normal(pyro.param("theta", torch.tensor(0.0)), 1.0))

    with pytest.warns(PyroSMWarning, match="theta"):
        FisherDivergence(2).loss(trained, AutoNormal(trained))


def test_impossible_draws_count_as_infinite_and_do_not_spoil_the_gradient():
    def truncated():
        x = pyro.sample("x", dist.Normal(0.0, 1.0))
        pyro.factor("f", torch.where(x > 1.5, -torch.inf, 0.0))

    loss, guide = FisherDivergence(200, sobolev=1.0), AutoNormal(truncated, init_scale=1.0)
    assert loss.loss_and_grads(truncated, guide) == math.inf
    assert all(p.grad.isfinite().all() for p in parameters().values())


def test_with_one_possible_draw_or_none_the_gradient_is_still_a_number():
    fn = dist.Normal(torch.zeros(1, requires_grad=True), 1.0).to_event(1)
    for cut in (0.5, -5.0):
        noise = torch.tensor([[0.0], [1.0], [2.0]])
        terms = fisher_terms(
            path_of(fn),
            lambda z, c=cut: torch.where(z[:, 0] < c, -(z[:, 0] ** 2), -torch.inf),
            noise,
            BaseSpace(),
            sobolev=1.0,
        )
        (grad,) = torch.autograd.grad((terms.weight * terms.values).sum(), fn.base_dist.loc, allow_unused=True)
        assert grad is None or grad.isfinite().all()
        assert int(terms.values.isinf().sum()) == (2 if cut > 0 else 3)


def test_many_components_need_as_many_draws():
    guide = AutoGaussianMixture(gaussian, 20)
    assert math.isfinite(FisherDivergence(20).loss(gaussian, guide))
    assert math.isfinite(MixtureFisherDivergence(40).loss(gaussian, guide))


def test_a_flow_without_inverse_has_a_divergence_but_no_density():
    guide = AutoNormalizingFlow(model, lambda d: dist.transforms.planar(d))
    assert math.isfinite(FisherDivergence(4).loss(model, guide, Y))
    assert math.isfinite(FisherDivergence(4, metric=Identity()).loss(model, guide, Y))
    with pytest.raises(TypeError, match="has no inverse"):
        MixtureFisherDivergence(8).loss(model, guide, Y)


@pytest.mark.parametrize(
    "make",
    [
        lambda: FisherDivergence(0),
        lambda: FisherDivergence(sobolev=-1.0),
        lambda: FisherDivergence(1, sobolev=1.0),
        lambda: AutoGaussianMixture(model, 0),
        lambda: AutoGaussianMixture(model, 2, init_scale=0.0),
        lambda: FisherDivergence(2).loss(model, AutoGaussianMixture(model, 3), Y),
        lambda: FisherDivergence().loss(model, AutoGaussianMixture(model, 2, init_locs=torch.zeros(2, 3)), Y),
    ],
)
def test_bad_arguments(make):
    with pytest.raises(ValueError, match="expected"):
        make()


def test_the_mixture_guide_keeps_the_promises_of_an_autoguide():
    guide = AutoGaussianMixture(model, 2)
    assert guide(Y)["t"].shape == (3,)
    assert guide.median(Y)["t"].shape == (3,)
    quantiles = guide.quantiles([0.1, 0.9], Y)
    assert quantiles["s"].shape == (2,)
    assert (quantiles["s"] > 0).all()
    with pyro.plate("particles", 5, dim=-2):
        assert guide(Y)["t"].shape == (5, 3)


# --------------------------------------------------------------------------------------------------- learning


def off(make):
    """A guide that starts one and a half standard deviations off in every latent, and too narrow."""
    start = init_to_value(values={"z": torch.tensor([2.5, -3.5])})
    return lambda target: make(target, init_loc_fn=start, init_scale=0.5)


@pytest.mark.slow
@pytest.mark.parametrize(
    ("make", "metric", "variance"),
    [
        (off(AutoNormal), BaseSpace(), (1 - RHO**2) / (1 + RHO**2)),
        (off(AutoDiagonalNormal), Identity(), (1 - RHO**2) / math.sqrt(1 + RHO**2)),
        (AutoMultivariateNormal, BaseSpace(), 1.0),
        (off(AutoLowRankMultivariateNormal), BaseSpace(), 1.0),
        (AutoIAFNormal, BaseSpace(), 1.0),
    ],
    ids=["normal", "diagonal identity", "full rank", "low rank", "IAF"],
)
def test_learns_a_gaussian(make, metric, variance):
    def correlated():
        pyro.sample("z", dist.MultivariateNormal(torch.tensor([1.0, -2.0]), SIGMA.float()))

    guide = make(correlated)
    optimiser = pyro.optim.ClippedAdam({"lr": 0.05, "lrd": 0.998, "clip_norm": 1e3})
    svi = SVI(correlated, guide, optimiser, FisherDivergence(64, metric=metric))
    for _ in range(2000):
        svi.step()
    path = automatic_path(guide, ModelDensity(correlated), Arguments())
    z = path.draw(torch.randn(20000, path.noise_dim)).z.detach()
    assert torch.allclose(z.mean(0), torch.tensor([1.0, -2.0]), atol=0.1)
    assert torch.allclose(z.var(0), torch.full((2,), variance), rtol=0.08)
    if variance == 1.0:
        assert abs(float(torch.corrcoef(z.T)[0, 1]) - RHO) < 0.02
