# SPDX-License-Identifier: Apache-2.0
"""Energy models fitted to data: the ELBO contract, the arithmetic row by row, refusals, and whether it learns."""

import math

import pyro
import pyro.distributions as dist
import pyro.distributions.transforms as transforms
import pytest
import torch
from pyro.infer import SVI
from pyro.nn import PyroModule, PyroParam, PyroSample
from pyro.optim import Adam
from torch import Size
from torch.distributions import AffineTransform, TanhTransform, Transform, constraints

from pyro_sm.base import ModelRefusedError
from pyro_sm.divergence import Exact, Hutchinson, Sliced, jacobian
from pyro_sm.objectives.diffusion_matrices import flow_matrix
from pyro_sm.objectives.energies.density_estimation import (
    DenoisingScoreMatching,
    DiffusionScoreMatching,
    ImplicitScoreMatching,
)
from pyro_sm.objectives.energies.energy_objective import no_guide
from pyro_sm.objectives.energies.score_estimation import gaussian_information

DIM = 2
exact = {"rtol": 1e-10, "atol": 1e-12}


def flat(dim=DIM):
    return dist.ImproperUniform(constraints.real_vector, Size(), Size((dim,)))


def gaussian():
    """Correlated, with plain params."""
    precision = pyro.param("precision", lambda: torch.eye(DIM), constraint=constraints.positive_definite)
    mean = pyro.param("mean", lambda: torch.zeros(DIM))
    x = pyro.sample("x", flat()) - mean
    pyro.factor("f", -0.5 * (x * (x @ precision)).sum(-1))


class Network(PyroModule):
    """A PyroModule with an nn.Module, a PyroParam and a factor."""

    def __init__(self, activation=torch.nn.Tanh):
        super().__init__()
        layers = [PyroModule[torch.nn.Linear](DIM, 8), activation(), PyroModule[torch.nn.Linear](8, 1)]
        self.net = PyroModule[torch.nn.Sequential](*layers)
        self.rate = PyroParam(torch.tensor(0.7), constraint=constraints.positive)

    def forward(self):
        x = pyro.sample("x", flat())
        pyro.factor("f", self.net(x).squeeze(-1) - self.rate * x.square().sum(-1))


def registered():
    """A plain network, registered by ``pyro.module``, and latents of a batch mixed by ``x.sum()``: needs vmap."""
    torch.manual_seed(3)
    net = torch.nn.Sequential(torch.nn.Linear(DIM, 8), torch.nn.Softplus(), torch.nn.Linear(8, 1))

    def energy():
        pyro.module("net", net)
        x = pyro.sample("x", flat())
        pyro.factor("f", net(x).squeeze(-1) - 0.5 * (x * x).sum() ** 2)

    return energy


MODELS = {"params": lambda: gaussian, "pyro module": Network, "pyro.module": registered}
OBJECTIVES = {
    "implicit": ImplicitScoreMatching,
    "hutchinson": lambda **k: ImplicitScoreMatching(Hutchinson(2), **k),
    "sliced": lambda **k: ImplicitScoreMatching(divergence=Sliced(2), **k),
    "denoising": lambda **k: DenoisingScoreMatching(0.3, **k),
    "plain denoising": lambda **k: DenoisingScoreMatching(0.3, control_variate=False, **k),
    "matrix": lambda **k: DiffusionScoreMatching(torch.tensor([[1.0, 0.0], [0.5, 2.0]]), **k),
    "flow": lambda **k: DiffusionScoreMatching(AffineTransform(0.0, torch.tensor([2.0, 0.5]), event_dim=1), **k),
}
every_model = pytest.mark.parametrize("model", MODELS)
every_objective = pytest.mark.parametrize("objective", OBJECTIVES)


def data(n=6, dtype=None):
    return torch.randn(n, DIM, dtype=dtype or torch.get_default_dtype()) @ torch.tensor(
        [[1.0, 0.5], [0.0, 0.8]], dtype=dtype or torch.get_default_dtype()
    ) + torch.tensor([0.5, -1.0], dtype=dtype or torch.get_default_dtype())


def store():
    return {name: value.detach().clone() for name, value in pyro.get_param_store().items()}


# ---------------------------------------------------------------------------------------------- the ELBO contract


@every_model
@every_objective
def test_the_contract(model, objective):
    """Three equal losses, gradients in every parameter, no draws left over, ``no_grad``, several steps."""
    energy, loss, x = MODELS[model](), OBJECTIVES[objective](num_draws=2), data()
    svi = SVI(energy, no_guide, Adam({"lr": 0.01}), loss)
    found = []
    for step in (svi.step, svi.step):
        loss.loss(energy, no_guide, x)  # the params are drawn here, in the first round
        for parameter in pyro.get_param_store()._params.values():
            parameter.grad = None
        values = []
        for name in ("loss", "differentiable_loss", "loss_and_grads"):
            pyro.set_rng_seed(0)
            value = getattr(loss, name)(energy, no_guide, x)
            values.append(value if isinstance(value, float) else float(value.detach()))
        assert values[0] == values[1] == values[2]
        assert math.isfinite(values[0])
        for name, parameter in pyro.get_param_store()._params.items():
            bias_of_output = name.endswith("2.bias")  # a constant in log p̃: the score does not see it
            assert parameter.grad is not None or bias_of_output, name
            assert bias_of_output or bool(parameter.grad.abs().sum() > 0), name
        pyro.set_rng_seed(0)
        assert svi.evaluate_loss(x) == values[0]
        before = store()
        pyro.set_rng_seed(0)
        assert step(x) == values[0]
        after = store()
        assert any(not torch.equal(before[name], after[name]) for name in before)
        found.append(values[0])
    assert found[0] != found[1]


@every_objective
def test_deterministic_under_a_seed(objective):
    found = []
    for _ in range(2):
        pyro.clear_param_store()
        pyro.set_rng_seed(4)
        x = data()
        svi = SVI(gaussian, no_guide, Adam({"lr": 0.01}), OBJECTIVES[objective]())
        found.append([svi.step(x) for _ in range(3)])
    assert found[0] == found[1]


@every_objective
def test_double_precision(objective, float64):
    x = data()
    assert x.dtype == torch.float64
    loss = OBJECTIVES[objective]()
    assert loss.differentiable_loss(gaussian, no_guide, x).dtype == torch.float64


def test_double_precision_where_single_is_the_default():
    """A flat prior has no dtype of its own: it takes that of the data."""

    def energy():
        precision = pyro.param("precision", torch.eye(DIM, dtype=torch.float64))
        x = pyro.sample("x", flat())
        pyro.factor("f", -0.5 * (x * (x @ precision)).sum(-1))

    x = data(dtype=torch.float64)
    for loss in (ImplicitScoreMatching(), DenoisingScoreMatching(0.1)):
        assert loss.differentiable_loss(energy, no_guide, x).dtype == torch.float64


def test_the_torch_path():
    """``elbo = loss(model, guide)`` and a torch optimiser."""
    model, x = Network(), data()
    elbo = ImplicitScoreMatching()(model, no_guide)
    before = float(elbo(x).detach())
    optimiser = torch.optim.Adam(elbo.parameters(), lr=0.02)
    for _ in range(20):
        optimiser.zero_grad()
        elbo(x).backward()
        optimiser.step()
    assert float(elbo(x).detach()) < before
    with torch.no_grad():
        assert not elbo(x).requires_grad


def test_making_the_energy_takes_nothing_from_the_random_stream():
    found = []
    loss, x = DenoisingScoreMatching(0.3), data()
    for _ in range(2):  # the first call makes the params and inspects the model
        pyro.set_rng_seed(0)
        found.append(loss.loss(gaussian, no_guide, x))
    assert found[0] == found[1]


def test_batches_of_other_sizes_and_a_cleared_store():
    loss = ImplicitScoreMatching()
    svi = SVI(gaussian, no_guide, Adam({"lr": 0.1}), loss)
    x = data(8)
    start = svi.evaluate_loss(x)
    svi.step(x)
    svi.step(x[:3])
    svi.step(x[:1])
    assert svi.evaluate_loss(x) != start
    pyro.clear_param_store()
    assert svi.evaluate_loss(x) == start
    pyro.clear_param_store()
    svi.step(x)
    assert svi.evaluate_loss(x) != start, "params created anew are trained"


def test_arguments_of_the_model():
    def energy(rate, *, shift):
        scale = pyro.param("scale", torch.tensor(1.0))
        pyro.factor("f", -rate * (scale * pyro.sample("x", flat()) - shift).square().sum(-1))

    loss, x, two = ImplicitScoreMatching(), data(), torch.tensor(2.0)
    found = loss.loss(energy, no_guide, x, two, shift=torch.tensor(1.0))
    expected = (0.5 * (4 * (x - 1)).square().sum(1) - 2 * 2 * DIM).mean()
    assert found == pytest.approx(float(expected), rel=1e-5)
    assert loss.loss(energy, no_guide, x, torch.tensor(1.0), shift=torch.tensor(1.0)) != found


def test_a_proper_prior_and_a_discrete_latent_are_part_of_the_energy(float64):
    """A mixture as Pyro users write it: the component is summed out."""

    def energy():
        means = pyro.param("means", torch.tensor([[-1.0, 0.0], [2.0, 1.0]]))
        k = pyro.sample("k", dist.Categorical(torch.tensor([0.3, 0.7])))
        pyro.sample("x", dist.Normal(means[k], 1.0).to_event(1))

    x = data()
    found = ImplicitScoreMatching().loss(energy, no_guide, x)
    leaf = x.clone().requires_grad_(True)
    means = torch.tensor([[-1.0, 0.0], [2.0, 1.0]])
    terms = torch.tensor([0.3, 0.7]).log() - 0.5 * (leaf[:, None] - means).square().sum(-1)
    (score,) = torch.autograd.grad(torch.logsumexp(terms, 1).sum(), leaf, create_graph=True)
    columns = [torch.autograd.grad(score[:, i].sum(), leaf, retain_graph=True)[0][:, i] for i in range(DIM)]
    expected = (0.5 * score.square().sum(1) + sum(columns)).mean()
    assert found == pytest.approx(float(expected.detach()), rel=1e-10)


# -------------------------------------------------------------------------------------------------- the arithmetic


@every_model
def test_every_row_alone_gives_the_same(model, float64):
    """Batched losses and their parameter gradients are those of one row after another."""
    energy, x, loss = MODELS[model](), data(5), ImplicitScoreMatching()

    def value_and_gradients(rows):
        svi_loss = loss.differentiable_loss(energy, no_guide, rows)
        store = pyro.get_param_store()._params
        names = [name for name in store if not name.endswith("2.bias")]
        return svi_loss, torch.autograd.grad(svi_loss, [store[name] for name in names])

    together, gradients = value_and_gradients(x)
    single = [value_and_gradients(row[None]) for row in x]
    torch.testing.assert_close(together, sum(value for value, _ in single) / 5, **exact)
    for index, gradient in enumerate(gradients):
        torch.testing.assert_close(gradient, sum(g[index] for _, g in single) / 5, **exact)


def test_batching_is_looked_at_again_when_the_parameters_have_moved(float64):
    """At first the line that mixes the rows has no effect, so that a plate looks right."""

    def energy():
        weight = pyro.param("weight", torch.zeros(()))
        x = pyro.sample("x", flat())
        pyro.factor("f", -0.5 * x.square().sum(-1) + weight * x.sum() ** 2)

    loss, x = ImplicitScoreMatching(), data()
    svi = SVI(energy, no_guide, Adam({"lr": 0.1}), loss)
    svi.step(x)
    assert loss._energy.density.batching_method == "outer plate"
    for _ in range(9):
        svi.step(x)
    assert loss._energy.density.batching_method == "vmap"


def test_gaussian_losses_in_closed_form(float64):
    x = data(50)
    a = torch.tensor([[1.5, 0.4], [0.4, 0.9]])

    def energy():
        scale = pyro.param("scale", torch.tensor(1.0))
        v = pyro.sample("x", flat())
        pyro.factor("f", -0.5 * scale * (v * (v @ a)).sum(-1))

    ism = float((0.5 * (x @ a).square().sum(1) - a.diagonal().sum()).mean())
    assert ImplicitScoreMatching().loss(energy, no_guide, x) == pytest.approx(ism, rel=1e-12)
    m = torch.tensor([[1.0, 0.0], [0.5, 2.0]])
    weighted = float((0.5 * (x @ a @ m).square().sum(1) - (m @ m.T @ a).diagonal().sum()).mean())
    assert DiffusionScoreMatching(m).loss(energy, no_guide, x) == pytest.approx(weighted, rel=1e-12)
    assert DiffusionScoreMatching(m.T).loss(energy, no_guide, x) != pytest.approx(weighted, rel=1e-2)
    flow = AffineTransform(torch.tensor([1.0, 0.0]), torch.tensor([2.0, 0.5]), event_dim=1)
    inverse = torch.diag(torch.tensor([0.5, 2.0]))
    by_flow, by_matrix = DiffusionScoreMatching(flow), DiffusionScoreMatching(inverse)
    assert by_flow.loss(energy, no_guide, x) == pytest.approx(by_matrix.loss(energy, no_guide, x), rel=1e-12)


def test_implicit_and_denoising_lie_on_one_scale(float64):
    """Both estimate ``J_ISM^σ``; adding half the information gives the explicit loss."""
    sigma, n = 0.5, 20_000
    covariance = torch.tensor([[1.0, 0.4], [0.4, 0.6]])
    x = torch.randn(n, DIM) @ torch.linalg.cholesky(covariance).T
    implicit, denoising = ImplicitScoreMatching(), DenoisingScoreMatching(sigma)
    noised = x + sigma * torch.randn_like(x)
    ism, dsm = implicit.loss(gaussian, no_guide, noised), denoising.loss(gaussian, no_guide, x)
    blurred = covariance + sigma**2 * torch.eye(DIM)
    gap = torch.eye(DIM) - torch.linalg.inv(blurred)  # s − s_p is this times −y
    expected = 0.5 * float((gap @ blurred @ gap).diagonal().sum())
    information = float(gaussian_information(covariance, sigma))
    error = 5 * 3 / n**0.5
    assert abs(denoising.explicit_loss(dsm, information) - expected) < error
    assert abs(implicit.explicit_loss(ism, information) - expected) < error
    # Vincent's number, with its constant, and the information of the clean data, are elsewhere
    assert denoising.constant(DIM) == DIM / (2 * sigma**2)
    assert implicit.constant(DIM) == 0
    assert abs(dsm + denoising.constant(DIM) + information / 2 - expected) > error
    assert abs(dsm + float(gaussian_information(covariance)) / 2 - expected) > error


def test_the_control_variate_takes_away_the_spread(float64):
    x = data(2000)
    plain, controlled = DenoisingScoreMatching(0.01, control_variate=False), DenoisingScoreMatching(0.01)

    def spread(loss):
        return float(loss.row_losses(lambda v: -0.5 * v.square().sum(-1), x).detach().std())

    assert spread(controlled) < spread(plain) / 20


@pytest.mark.parametrize(
    "make",
    [
        lambda: transforms.affine_autoregressive(DIM, hidden_dims=[4]).inv,
        lambda: transforms.spline_autoregressive(DIM, hidden_dims=[4]),
        lambda: transforms.affine_coupling(DIM, hidden_dims=[4]),
        lambda: transforms.ComposeTransform(
            [transforms.affine_coupling(DIM, hidden_dims=[4]), transforms.permute(DIM)]
        ),
        lambda: transforms.Sylvester(DIM),
    ],
    ids=["autoregressive", "spline", "coupling", "composed", "sylvester"],
)
def test_flows_of_pyro(make, float64):
    """``m`` is the inverse Jacobian, and the loss the implicit one in y up to what no model changes."""
    flow, x = make(), data(8)
    m = flow_matrix(flow)(x).detach()
    jacobians = torch.stack([torch.autograd.functional.jacobian(flow, row[None])[0, :, 0] for row in x])
    torch.testing.assert_close(m @ jacobians, torch.eye(DIM).expand(8, -1, -1), rtol=1e-9, atol=1e-9)
    loss = DiffusionScoreMatching(flow)
    gradients = loss.differentiable_loss(gaussian, no_guide, x)
    mean = pyro.get_param_store()._params["mean"]
    assert float(torch.autograd.grad(gradients, mean)[0].abs().sum()) > 0


def test_the_loss_of_a_flow_is_the_implicit_loss_behind_it(float64):
    """Row by row, up to a term without the model in it: the same for any two models."""
    x = data(7)
    shear = AffineTransform(0.2, 3.0)
    flow = transforms.ComposeTransform([TanhTransform(), shear, transforms.affine_coupling(DIM, hidden_dims=[4])])

    def in_x(v, rate):
        return -rate * (v.square().sum(-1) + 0.3 * v[..., 0] * v[..., 1] ** 2)

    def in_y(y, rate):
        v = flow.inv(y)
        return in_x(v, rate) - torch.linalg.slogdet(jacobian(flow(v), v)).logabsdet

    y = flow(x).detach()

    def difference(rate, matrix):
        behind = ImplicitScoreMatching().row_losses(lambda v: in_y(v, rate), y)
        return (DiffusionScoreMatching(matrix).row_losses(lambda v: in_x(v, rate), x) - behind).detach()

    torch.testing.assert_close(difference(0.5, flow), difference(1.5, flow), rtol=1e-8, atol=1e-8)
    m = flow_matrix(flow)
    wrong = difference(0.5, lambda v: m(v).mT) - difference(1.5, lambda v: m(v).mT)
    assert float(wrong.abs().max()) > 1e-2, "the transpose"


# -------------------------------------------------------------------------------------------------------- refusals


def other_latent():
    scale = pyro.sample("scale", dist.Normal(0.0, 1.0))
    weight = pyro.param("weight", torch.tensor(1.0))
    pyro.factor("f", -weight * (pyro.sample("x", flat()) - scale).square().sum(-1))


def positive_latent():
    weight = pyro.param("weight", torch.tensor(1.0))
    x = pyro.sample("x", dist.ImproperUniform(constraints.independent(constraints.positive, 1), Size(), Size((DIM,))))
    pyro.factor("f", -weight * x.sum(-1))


def scalar_latent():
    weight = pyro.param("weight", torch.tensor(1.0))
    pyro.factor("f", -weight * pyro.sample("x", dist.Normal(0.0, 1.0)) ** 2)


def without_parameters():
    pyro.factor("f", -pyro.sample("x", flat()).square().sum(-1))


def unregistered():
    net = torch.nn.Linear(DIM, 1)

    def energy():
        x = pyro.sample("x", flat())
        pyro.factor("f", torch.tanh(net(x)).squeeze(-1) - x.square().sum(-1))

    return energy


@pytest.mark.parametrize(
    ("model", "words"),
    [
        (other_latent, "one continuous latent site, the data vector, found 2: 'scale', 'x'"),
        (positive_latent, "'x' to be unconstrained"),
        (scalar_latent, r"'x' to be a vector \(D,\), found shape \(\)"),
        (without_parameters, "no parameter that Pyro can see"),
        (unregistered(), r'pyro.module\("net", net\)'),
    ],
)
def test_models_that_are_refused(model, words):
    with pytest.raises(ModelRefusedError, match=words):
        SVI(model, no_guide, Adam({"lr": 0.1}), DenoisingScoreMatching(0.1)).step(data())


@pytest.mark.parametrize(
    "make",
    [
        ImplicitScoreMatching,
        lambda: DiffusionScoreMatching(torch.eye(DIM)),
        lambda: ImplicitScoreMatching(Hutchinson()),
    ],
)
def test_relu_is_refused_where_second_derivatives_are_needed(make):
    x = data(40)
    svi = SVI(Network(torch.nn.ReLU), no_guide, Adam({"lr": 0.1}), make())
    with pytest.raises(ModelRefusedError, match="ReLU-like activations hide the curvature"):
        svi.step(x)
    assert math.isfinite(
        SVI(Network(torch.nn.ReLU), no_guide, Adam({"lr": 0.1}), DenoisingScoreMatching(0.1)).step(x)
    )
    assert math.isfinite(SVI(Network(torch.nn.Tanh), no_guide, Adam({"lr": 0.1}), make()).step(x))


@pytest.mark.parametrize(
    ("arguments", "error", "words"),
    [
        ((), TypeError, "as the first argument of svi.step, found no argument"),
        (([1.0, 2.0],), TypeError, "found list"),
        ((torch.ones(3, DIM, dtype=torch.long),), TypeError, "floating-point data, found torch.int64"),
        ((torch.ones(DIM),), ValueError, r"shape \(N, D\), found \(2,\)"),
        ((torch.ones(0, DIM),), ValueError, r"found \(0, 2\)"),
        ((torch.ones(4, 3),), ValueError, r"\(N, 2\) for the latent site 'x', found \(4, 3\)"),
        ((torch.tensor([[1.0, math.nan]]),), ValueError, "finite data, found 1"),
    ],
)
def test_data_that_are_refused(arguments, error, words):
    with pytest.raises(error, match=words):
        ImplicitScoreMatching().loss(gaussian, no_guide, *arguments)


def test_a_density_that_vanishes_on_the_data_is_refused():
    def energy():
        x = pyro.sample("x", flat())
        w = pyro.param("w", torch.tensor(1.0))
        pyro.factor("f", torch.where(x[..., 0] > 50, -math.inf, -w * x.square().sum(-1)))

    with pytest.raises(ValueError, match="finite log density at every row of the data, found 1 of 3"):
        ImplicitScoreMatching().loss(energy, no_guide, torch.tensor([[0.0, 1.0], [60.0, 0.0], [1.0, 1.0]]))


@pytest.mark.parametrize(
    ("make", "error", "words"),
    [
        (lambda: ImplicitScoreMatching(num_draws=0), ValueError, "num_draws >= 1"),
        (lambda: DenoisingScoreMatching(0.0), ValueError, "sigma > 0, found 0.0"),
        (lambda: DenoisingScoreMatching(math.nan), ValueError, "sigma > 0"),
        (lambda: DiffusionScoreMatching(torch.ones(2, 3)), ValueError, r"\(D, D\), found \(2, 3\)"),
        (lambda: DiffusionScoreMatching("eye"), TypeError, "a transform, found str"),
    ],
)
def test_arguments_that_are_refused(make, error, words):
    with pytest.raises(error, match=words):
        make()


@pytest.mark.parametrize("matrix", [lambda x: x, torch.eye(3)])
def test_a_diffusion_matrix_of_the_wrong_shape_is_refused(matrix):
    with pytest.raises((ValueError, RuntimeError), match=r"\(1, 2, 2\) for one row"):
        DiffusionScoreMatching(matrix).loss(gaussian, no_guide, data())


def test_a_bayesian_network_is_refused_by_the_names_of_its_latents():
    class Bayesian(PyroModule):
        def __init__(self):
            super().__init__()
            self.rate = PyroSample(dist.LogNormal(0.0, 1.0))

        def forward(self):
            pyro.factor("f", -self.rate * pyro.sample("x", flat()).square().sum(-1))

    with pytest.raises(ModelRefusedError, match="'rate'"):
        ImplicitScoreMatching().loss(Bayesian(), no_guide, data())


# -------------------------------------------------------------------------------------------------------- learning


def fit(loss, x, steps=600, lr=0.02):
    svi = SVI(gaussian, no_guide, Adam({"lr": lr}), loss)
    for _ in range(steps):
        svi.step(x)
    return pyro.param("mean").detach(), pyro.param("precision").detach()


@pytest.mark.slow
@pytest.mark.parametrize(
    ("loss", "tolerance"),
    [
        (ImplicitScoreMatching(Exact()), 1e-3),
        (ImplicitScoreMatching(Sliced(8)), 0.05),
        (DiffusionScoreMatching(torch.tensor([[1.0, 0.0], [0.5, 1.5]])), 1e-3),
        (DenoisingScoreMatching(0.05, num_draws=4), 0.05),
    ],
    ids=["exact", "sliced", "diffusion", "denoising"],
)
def test_a_gaussian_energy_finds_the_maximum_likelihood_estimate(loss, tolerance, float64):
    """For a Gaussian family, score matching and maximum likelihood agree exactly on any data."""
    x = data(500)
    mean, precision = fit(loss, x)
    truth = torch.linalg.inv(torch.cov(x.T, correction=0))
    assert float((mean - x.mean(0)).abs().max()) < tolerance
    assert float((precision / truth - 1).abs().max()) < tolerance
    assert float((torch.linalg.inv(precision) - truth).abs().max()) > 0.3, "precision and covariance differ"


class Asinh(Transform):
    domain = codomain = constraints.real
    bijective = True

    def _call(self, x):
        return torch.asinh(x)


@pytest.mark.slow
def test_a_flow_finds_heavy_tails_where_the_plain_loss_does_not():
    """Student-t data with two degrees of freedom, four data sets; the plain loss does not look at the tails."""

    def energy():
        scale = pyro.param("scale", torch.tensor(1.5), constraint=constraints.positive)
        freedom = pyro.param("freedom", torch.tensor(6.0), constraint=constraints.positive)
        z = pyro.sample("x", flat(1)) / scale
        pyro.factor("f", -0.5 * (freedom + 1) * torch.log1p(z * z / freedom).sum(-1))

    errors = {}
    for name, loss in (("plain", ImplicitScoreMatching()), ("flow", DiffusionScoreMatching(Asinh()))):
        worst = 0.0
        for seed in range(4):
            pyro.clear_param_store()
            torch.manual_seed(seed)
            x = dist.StudentT(2.0).sample((1000, 1))
            svi = SVI(energy, no_guide, Adam({"lr": 0.05}), loss)
            for _ in range(250):
                svi.step(x)
            worst = max(worst, abs(float(pyro.param("freedom").detach().log()) - math.log(2)))
        errors[name] = worst
    assert errors["flow"] < 0.25
    assert errors["plain"] > 2 * errors["flow"]


@pytest.mark.slow
def test_denoising_finds_the_blurred_density(float64):
    x = data(500)
    _, precision = fit(DenoisingScoreMatching(0.7, num_draws=8), x)
    covariance = torch.cov(x.T, correction=0)
    blurred = torch.linalg.inv(covariance + 0.49 * torch.eye(DIM))
    assert float((precision - blurred).abs().max()) < 0.05
    assert float((precision - torch.linalg.inv(covariance)).abs().max()) > 0.3
