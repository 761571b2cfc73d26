# SPDX-License-Identifier: Apache-2.0
"""Models of every kind, as a user writes them, through ``DiffusionSampler``: right, or refused with the reason.

Every kind has an evidence and a posterior mean known in another way, in closed form or by quadrature, and the
evidence of a wrong reading of the same model, which the same draws must tell from the right one.
"""

import math
from typing import NamedTuple

import numpy as np
import pyro
import pyro.contrib.gp as gp
import pyro.distributions as dist
import pytest
import torch
from models import Regression, local_level, radon
from pyro import poutine
from pyro.contrib.autoname import scope
from pyro.infer.reparam import LocScaleReparam, ProjectedNormalReparam
from pyro.nn import PyroSample
from torchdiffeq import odeint

from pyro_sm import (
    AutoDiffusion,
    BatchAndMatchBase,
    DiffusionSampler,
    ImportanceWeightedScoreMatching,
    ModelRefusedError,
    PyroSMWarning,
    StoppingRule,
)
from pyro_sm.diagnostics.verdict.verdict import Trust
from pyro_sm.model.density import ModelDensity, OneByOne
from pyro_sm.nn.mlp import MLP

pytestmark = pytest.mark.usefixtures("float64")


class Kind(NamedTuple):
    """A model with what is known about it."""

    model: object
    args: tuple
    log_evidence: float
    wrong: float
    """The evidence, were the model read wrongly; NaN where there is no such reading."""
    statistic: object
    """Maps draws by site to (N,); its posterior mean is the next."""
    mean: float


def gaussian(y, loc, covariance):
    return dist.MultivariateNormal(loc.expand(len(y)), covariance).log_prob(y)


def quadrature(log_joint, statistic, *grids):
    """``log ∫ exp log_joint`` over a product of equidistant grids, and the mean of ``statistic`` under it."""
    points = torch.meshgrid(*grids, indexing="ij")
    log_w = log_joint(*points) + sum(math.log(float(grid[1] - grid[0])) for grid in grids)
    total = log_w.logsumexp(tuple(range(log_w.dim())))
    return float(total), float(((log_w - total).exp() * statistic(*points)).sum())


def normal(x, loc, scale):
    return dist.Normal(loc, scale).log_prob(x)


# ---------------------------------------------------------------- the kinds

SEEN = torch.tensor([True, False, True, True])


def with_a_gap():
    """Four measurements, one of them missing."""
    return torch.tensor([0.5, math.nan, 2.0, -1.0])


def masked_data():
    """NaN stand for what is missing, and a mask leaves them out."""

    def model(y, seen):
        mu = pyro.sample("mu", dist.Normal(0.0, 2.0))
        with pyro.plate("n", 4), poutine.mask(mask=seen):
            pyro.sample("y", dist.Normal(mu, 1.0), obs=y)

    def exact(y):
        return gaussian(y, torch.zeros(1), 4 + torch.eye(len(y)))

    y = with_a_gap()
    counted = torch.where(SEEN, y, y[0])  # the placeholder taken for data
    return Kind(model, (y, SEEN), exact(y[SEEN]), exact(counted), lambda s: s["mu"], 4 * 1.5 / 13)


def imputed_data():
    """``obs_mask=``; a second measurement says something about the missing value."""
    x = torch.tensor([0.4, 1.5, 2.2, -1.0])

    def model(y, seen, x):
        mu = pyro.sample("mu", dist.Normal(0.0, 2.0))
        with pyro.plate("n", 4):
            y = pyro.sample("y", dist.Normal(mu, 1.0), obs=y, obs_mask=seen)
            pyro.sample("x", dist.Normal(y, 0.5), obs=x)

    cov = torch.zeros(8, 8)
    cov[:4, :4] = cov[:4, 4:] = cov[4:, :4] = cov[4:, 4:] = 4 + torch.eye(4)
    cov[4:, 4:] += 0.25 * torch.eye(4)
    keep = torch.cat([SEEN, torch.ones(4, dtype=torch.bool)])
    y = with_a_gap()
    data = torch.cat([y, x])
    known = cov[keep][:, keep]
    mean = cov[1, keep] @ torch.linalg.solve(known, data[keep])
    filled = torch.where(data.isnan(), 0.0, data)  # zero taken for the missing value
    return Kind(
        model,
        (y, SEEN, x),
        gaussian(data[keep], torch.zeros(1), known),
        gaussian(filled, torch.zeros(1), cov),
        lambda s: s["y"][:, 1],
        float(mean),
    )


def ragged_walks():
    """Two random walks of unequal length in one plate: a mask over their latents and their data."""
    y = torch.tensor([[0.3, -1.0], [0.9, math.nan], [1.4, math.nan]])
    there = ~y.isnan()

    def model(y):
        with pyro.plate("walk", 2):
            x = torch.zeros(2)
            for t in pyro.markov(range(3)):
                with poutine.mask(mask=there[t]):
                    x = pyro.sample(f"x_{t}", dist.Normal(x, 1.0))
                    pyro.sample(f"y_{t}", dist.Normal(x, 0.5), obs=y[t])

    steps = torch.arange(1.0, 4.0)
    cov = torch.minimum(steps[:, None], steps) + 0.25 * torch.eye(3)
    first, zero = y[:, 0], torch.zeros(1)
    exact = gaussian(first, zero, cov) + gaussian(y[:1, 1], zero, cov[:1, :1])
    everything = gaussian(first, zero, cov) + gaussian(torch.full((3,), -1.0), zero, cov)
    mean = (cov[2] - torch.tensor([0, 0, 0.25])) @ torch.linalg.solve(cov, first)
    return Kind(model, (y,), exact, everything, lambda s: s["x_2"][:, 0], float(mean))


def nested_plates():
    """A crossed design: effects of rows and of columns."""
    y = torch.tensor([[0.2, 1.9, -0.4], [1.0, 3.1, 0.2]])

    def model(y):
        rows, columns = pyro.plate("rows", 2, dim=-2), pyro.plate("columns", 3, dim=-1)
        with rows:
            row = pyro.sample("row", dist.Normal(0.0, 1.0))
        with columns:
            column = pyro.sample("column", dist.Normal(0.0, 2.0))
        with rows, columns:
            pyro.sample("y", dist.Normal(row + column, 0.5), obs=y)

    same_row = torch.kron(torch.eye(2), torch.ones(3, 3))
    same_column = torch.kron(torch.ones(2, 2), torch.eye(3))
    cov = same_row + 4 * same_column + 0.25 * torch.eye(6)
    flat = y.reshape(-1)
    mean = 4 * same_column[1] @ torch.linalg.solve(cov, flat)
    own = same_row + 4 * torch.eye(6) + 0.25 * torch.eye(6)  # a column effect for every cell
    zero = torch.zeros(1)
    return Kind(
        model, (y,), gaussian(flat, zero, cov), gaussian(flat, zero, own), lambda s: s["column"][:, 1], float(mean)
    )


def pyro_module():
    """A PyroModule with PyroSample: linear regression with normal priors."""
    x = torch.stack([torch.linspace(-1, 1, 5), torch.linspace(0, 1, 5).square()], 1)
    y = x @ torch.tensor([1.0, -2.0]) + 0.3
    design = torch.cat([x, torch.ones(5, 1)], 1)
    cov = design @ design.T + 0.25 * torch.eye(5)
    mean = (design.T @ torch.linalg.solve(cov, y))[1]
    without = x @ x.T + 0.25 * torch.eye(5)
    zero = torch.zeros(1)
    return Kind(
        Regression(),
        (x, y),
        gaussian(y, zero, cov),
        gaussian(y, zero, without),
        lambda s: s["linear.weight"][:, 0, 1],
        float(mean),
    )


def lifted():
    """``poutine.lift`` gives a parameter a prior; its old initial value must not matter."""

    def model(y):
        mu = pyro.param("mu", torch.tensor(50.0))
        with pyro.plate("n", 3):
            pyro.sample("y", dist.Normal(mu, 1.0), obs=y)

    y = torch.tensor([1.0, 0.0, 2.5])
    exact, prior = gaussian(y, torch.zeros(1), 4 + torch.eye(3)), {"mu": dist.Normal(0.0, 2.0)}
    wrong = normal(y, 0.0, 1.0).sum()  # a parameter at the mean of its prior
    return Kind(poutine.lift(model, prior=prior), (y,), exact, wrong, lambda s: s["mu"], 4 * 3.5 / 13)


def reparametrised():
    """``poutine.reparam``: same evidence as the centred model, and the original site among the draws."""

    def model(y):
        mu = pyro.sample("mu", dist.Normal(0.0, 2.0))
        with pyro.plate("n", 3):
            theta = pyro.sample("theta", dist.Normal(mu, 0.7))
            pyro.sample("y", dist.Normal(theta, 1.0), obs=y)

    y = torch.tensor([4.0, -2.5, 3.0])
    cov = 4 + 1.49 * torch.eye(3)
    mean = (4 + 0.49 * torch.eye(3)[2]) @ torch.linalg.solve(cov, y)
    zero = torch.zeros(1)
    return Kind(
        poutine.reparam(model, {"theta": LocScaleReparam(0.0)}),
        (y,),
        gaussian(y, zero, cov),
        gaussian(y, zero, 4 + 2.0 * torch.eye(3)),  # theta with the scale of its standardised form
        lambda s: s["theta"][:, 2],
        float(mean),
    )


def positive_definite():
    """A Wishart prior on a precision matrix: conjugate to normal data."""
    y = torch.tensor([[0.5, 0.2], [-1.0, -0.7], [0.3, 1.1], [2.0, 1.0]])
    df, n, p = 5.0, 4, 2

    def model(y):
        precision = pyro.sample("precision", dist.Wishart(torch.tensor(df), 0.5 * torch.eye(2)))
        with pyro.plate("n", 4):
            pyro.sample("y", dist.MultivariateNormal(torch.zeros(2), precision_matrix=precision), obs=y)

    inverse = 2 * torch.eye(2) + y.T @ y

    def log_gamma(a):
        return torch.mvlgamma(torch.tensor(a), p)

    exact = (
        -0.5 * n * p * math.log(math.pi)
        + log_gamma((df + n) / 2)
        - log_gamma(df / 2)
        + df / 2 * p * math.log(2)
        - (df + n) / 2 * torch.logdet(inverse)
    )
    mean = (df + n) * torch.linalg.inv(inverse)[0, 1]
    # without n log 2 in the log determinant of L -> L Lᵀ
    return Kind(model, (y,), exact, exact - 2 * math.log(2), lambda s: s["precision"][:, 0, 1], float(mean))


def correlation():
    """LKJ in two dimensions: the correlation is uniform on (-1, 1)."""
    y = torch.tensor([[0.5, 0.2], [-1.0, -0.7], [0.3, 1.1], [2.0, 1.0]])

    def model(y):
        tril = pyro.sample("tril", dist.LKJCholesky(2, 1.0))
        with pyro.plate("n", 4):
            pyro.sample("y", dist.MultivariateNormal(torch.zeros(2), scale_tril=tril), obs=y)

    def log_joint(rho, power=0.0):
        quadratic = (y[:, 0, None] ** 2 + y[:, 1, None] ** 2 - 2 * rho * y[:, :1] * y[:, 1:]) / (1 - rho**2)
        log_det = 0.5 * torch.log1p(-(rho**2))
        return (-0.5 * quadratic - log_det - math.log(2 * math.pi)).sum(0) - math.log(2) + power * log_det

    grid = torch.linspace(-1, 1, 20002)[1:-1]
    exact, mean = quadrature(log_joint, lambda rho: rho, grid)
    wrong, _ = quadrature(lambda rho: log_joint(rho, 2.0), lambda rho: rho, grid)  # a Jacobian too many
    return Kind(model, (y,), exact, wrong, lambda s: s["tril"][:, 1, 0], mean)


def simplex():
    """Dirichlet and multinomial."""
    prior, counts = torch.tensor([1.0, 2.0, 0.5]), torch.tensor([3.0, 1.0, 6.0])

    def model(counts):
        p = pyro.sample("p", dist.Dirichlet(prior))
        pyro.sample("counts", dist.Multinomial(10, p), obs=counts)

    exact = dist.DirichletMultinomial(prior, 10).log_prob(counts)
    wrong = dist.DirichletMultinomial(prior + 1, 10).log_prob(counts)  # without the Jacobian, up to a constant
    return Kind(model, (counts,), exact, wrong, lambda s: s["p"][:, 2], 6.5 / 13.5)


def ordered():
    """Cut points of an ordered logistic regression."""
    grades = torch.tensor([0, 2, 1, 2, 2, 0])

    def model(grades):
        base = dist.Normal(torch.tensor([-1.0, 0.0]), 1.0).to_event(1)
        cuts = pyro.sample("cuts", dist.TransformedDistribution(base, dist.transforms.OrderedTransform()))
        with pyro.plate("n", 6):
            pyro.sample("grade", dist.OrderedLogistic(torch.zeros(6), cuts), obs=grades)

    def log_joint(a, b, power=0.0):
        low, high = a.sigmoid(), (a + b.exp()).sigmoid()
        likelihood = 2 * low.log() + (high - low).log() + 3 * (1 - high).log()
        return normal(a, -1.0, 1.0) + normal(b, 0.0, 1.0) + likelihood + power * b

    grids = torch.linspace(-7, 5, 401), torch.linspace(-8, 5, 401)
    exact, mean = quadrature(log_joint, lambda a, b: a, *grids)
    wrong, _ = quadrature(lambda a, b: log_joint(a, b, 1.0), lambda a, b: a, *grids)
    return Kind(model, (grades,), exact, wrong, lambda s: s["cuts"][:, 0], mean)


def hidden_markov():
    """``pyro.markov`` with an enumerated state of two values: against the forward algorithm."""
    y = torch.tensor([-1.3, -1.8, 1.6, 1.9, 1.1])

    def model(y):
        stay = pyro.sample("stay", dist.Beta(4.0, 2.0))
        gap = pyro.sample("gap", dist.LogNormal(0.0, 0.5))
        state = torch.tensor(0)
        for t in pyro.markov(range(len(y))):
            one = torch.where(state == 1, stay, 1 - stay)
            state = pyro.sample(f"s_{t}", dist.Bernoulli(one), infer={"enumerate": "parallel"}).long()
            pyro.sample(f"y_{t}", dist.Normal(gap * (2 * state - 1), 0.7), obs=y[t])

    def log_joint(u, v, memory=True):
        stay, gap = u.sigmoid(), v.exp()
        prior = dist.Beta(4.0, 2.0).log_prob(stay) + stay.log() + (1 - stay).log() + normal(v, 0.0, 0.5)
        alpha = (torch.ones_like(u), torch.zeros_like(u))
        for x in y:
            if memory:
                alpha = alpha[0] * stay + alpha[1] * (1 - stay), alpha[1] * stay + alpha[0] * (1 - stay)
            else:
                alpha = (alpha[0] + alpha[1]) * stay, (alpha[0] + alpha[1]) * (1 - stay)
            alpha = alpha[0] * normal(x, -gap, 0.7).exp(), alpha[1] * normal(x, gap, 0.7).exp()
        return prior + (alpha[0] + alpha[1]).log()

    grids = torch.linspace(-5, 8, 401), torch.linspace(-3, 3, 401)
    exact, mean = quadrature(log_joint, lambda u, v: v.exp(), *grids)
    wrong, _ = quadrature(lambda u, v: log_joint(u, v, False), lambda u, v: u, *grids)
    return Kind(model, (y,), exact, wrong, lambda s: s["gap"], mean)


def gaussian_process():
    """``pyro.contrib.gp`` with priors on the kernel's parameters."""
    x = torch.linspace(0, 1, 6)
    y = torch.sin(5 * x)
    kernel = gp.kernels.RBF(1)
    kernel.variance = PyroSample(dist.LogNormal(0.0, 0.7))
    kernel.lengthscale = PyroSample(dist.LogNormal(-1.0, 0.5))
    process = gp.models.GPRegression(x, y, kernel)
    process.noise = PyroSample(dist.Uniform(0.04, 0.06))

    def log_joint(u, v, jitter=0.05):
        square = (x[:, None] - x) ** 2
        cov = u.exp()[..., None, None] * torch.exp(-0.5 * square / (2 * v).exp()[..., None, None])
        law = dist.MultivariateNormal(torch.zeros(6), cov + jitter * torch.eye(6))
        return normal(u, 0.0, 0.7) + normal(v, -1.0, 0.5) + law.log_prob(y)

    grids = torch.linspace(-4, 4, 121), torch.linspace(-4, 2, 121)
    exact, mean = quadrature(log_joint, lambda u, v: v, *grids)
    wrong, _ = quadrature(lambda u, v: log_joint(u, v, 0.05**2), lambda u, v: v, *grids)  # a variance, not a scale
    return Kind(process.model, (), exact, wrong, lambda s: s["kernel.lengthscale"].log(), mean)


def differential_equation():
    """Logistic growth, integrated by hand (Runge-Kutta of order four): against its solution."""
    t = torch.linspace(0, 2, 9)
    y = 0.1 * t.exp() / (1 + 0.1 * (t.exp() - 1)) + 0.05 * torch.cos(7 * t)

    def model(y):
        rate = pyro.sample("rate", dist.LogNormal(0.0, 0.5))
        x = pyro.sample("start", dist.Beta(2.0, 10.0))
        path, step = [x], float(t[1])
        for _ in range(8):
            a = rate * x * (1 - x)
            b = rate * (x + step / 2 * a) * (1 - x - step / 2 * a)
            c = rate * (x + step / 2 * b) * (1 - x - step / 2 * b)
            d = rate * (x + step * c) * (1 - x - step * c)
            x = x + step / 6 * (a + 2 * b + 2 * c + d)
            path.append(x)
        pyro.sample("y", dist.Normal(torch.stack(path, -1), 0.1).to_event(1), obs=y)

    def log_joint(u, v, linear=False):
        start, grown = v.sigmoid()[..., None], (u.exp()[..., None] * t).exp()
        x = start * grown if linear else start * grown / (1 + start * (grown - 1))
        prior = dist.Beta(2.0, 10.0).log_prob(v.sigmoid()) + v.sigmoid().log() + (1 - v.sigmoid()).log()
        return normal(u, 0.0, 0.5) + prior + normal(y, x, 0.1).sum(-1)

    grids = torch.linspace(-3, 3, 301), torch.linspace(-8, 3, 301)
    exact, mean = quadrature(log_joint, lambda u, v: u.exp(), *grids)
    wrong, _ = quadrature(lambda u, v: log_joint(u, v, True), lambda u, v: u, *grids)
    return Kind(model, (y,), exact, wrong, lambda s: s["rate"], mean)


def circle():
    """An angle the way the refusal says: the direction of a normal vector."""
    y = torch.tensor([3.0, -2.8, 2.5])  # around the place where -π and π meet

    def model(y):
        v = pyro.sample("v", dist.Normal(torch.zeros(2), 1.0).to_event(1))
        angle = pyro.deterministic("angle", torch.atan2(v[..., 1], v[..., 0]))
        pyro.factor("law", dist.VonMises(3.0, 1.0).log_prob(angle) + math.log(2 * math.pi))
        pyro.sample("y", dist.VonMises(angle[..., None], 2.0).to_event(1), obs=y)

    def log_joint(angle):
        return dist.VonMises(3.0, 1.0).log_prob(angle) + dist.VonMises(angle, 2.0).log_prob(y[:, None]).sum(0)

    grid = torch.linspace(-math.pi, math.pi, 4001)[1:]
    exact, mean = quadrature(log_joint, torch.cos, grid)
    return Kind(model, (y,), exact, exact + math.log(2 * math.pi), lambda s: s["angle"].cos(), mean)


def sphere():
    """A direction by ``ProjectedNormalReparam``: uniform on the sphere, so that its height is uniform on (-1, 1)."""

    def model(y):
        x = pyro.sample("x", dist.ProjectedNormal(torch.zeros(3)))
        pyro.sample("y", dist.Normal(x[..., 0], 0.3), obs=y)

    y = torch.tensor(0.6)
    grid = torch.linspace(-1, 1, 20001)
    exact, mean = quadrature(lambda h: normal(y, h, 0.3) - math.log(2), lambda h: h, grid)
    # uniform on a circle instead
    wrong, _ = quadrature(
        lambda h: normal(y, h, 0.3) - torch.log1p(-(h**2)) / 2 - math.log(math.pi), torch.cos, grid[1:-1]
    )
    model = poutine.reparam(model, {"x": ProjectedNormalReparam()})
    return Kind(model, (y,), exact, wrong, lambda s: s["x"][:, 0], mean)


KINDS = {
    kind.__name__: kind
    for kind in (
        masked_data, imputed_data, ragged_walks, nested_plates, pyro_module, lifted, reparametrised, simplex, ordered,
        positive_definite, correlation, hidden_markov, gaussian_process, differential_equation, circle, sphere,
    )
}  # fmt: skip


def fitted(model, args, budget=1536):
    """A small sampler, trained a little: the weights make it right, training makes it precise."""
    sampler = DiffusionSampler(
        model,
        guide=AutoDiffusion(model, num_steps=12, architecture=MLP(width=32, depth=1)),
        objective=ImportanceWeightedScoreMatching(
            num_particles=512, batch_size=256, steps_per_round=10, population=None
        ),
        stopping=StoppingRule(max_evaluations=budget),
        disable_progbar=True,
    )
    sampler.run(*args)
    return sampler


@pytest.mark.filterwarnings("ignore:Singular sample detected")  # torch's Wishart says so of every good draw
@pytest.mark.parametrize("name", KINDS)
def test_kind(name):
    kind = KINDS[name]()
    sampler = fitted(kind.model, kind.args)
    assert sampler.replicas[0].density.batching_method != "one by one"
    found, se = sampler.evidence
    assert se < 0.1
    assert abs(found - float(kind.log_evidence)) < 5 * se
    assert abs(found - float(kind.wrong)) > 10 * se
    draws = kind.statistic(sampler.get_samples(4000))
    error = float(draws.std()) * math.sqrt(1 / 4000 + 1 / (16000 * sampler.ess))
    assert abs(float(draws.mean()) - kind.mean) < 5 * error
    assert abs(kind.mean) > 10 * error  # a mean of zero would not do


# ---------------------------------------------------------------- missing data


def test_missing_values_are_latents_and_the_rest_is_data():
    kind, y = imputed_data(), with_a_gap()
    density = ModelDensity(kind.model, kind.args)
    z = density.prior_draws(5)
    values, draws = density.unpack(z), density.deterministics(z)
    torch.testing.assert_close(draws["y"][:, SEEN], y[SEEN].expand(5, 3))
    torch.testing.assert_close(draws["y"][:, 1], values["y_unobserved"][:, 1])
    torch.testing.assert_close(density.observed["y_observed"], y, equal_nan=True)


@pytest.mark.parametrize("batching", [None, OneByOne()])
def test_what_a_mask_leaves_out_of_a_latent_follows_its_prior(batching):
    """By hand; with a flat density there, as the mask alone would have it, there would be no evidence."""

    def model():
        tau = pyro.sample("tau", dist.LogNormal(0.0, 0.3))
        with pyro.plate("n", 3), poutine.mask(mask=torch.tensor([True, False, True])):
            pyro.sample("x", dist.Normal(0.0, tau))

    density = ModelDensity(model, batching=batching)
    z = torch.randn(4, 4)
    x = normal(z[:, 1:], 0.0, z[:, :1].exp())
    expected = normal(z[:, 0], 0.0, 0.3) + x.sum(1)
    torch.testing.assert_close(density.log_prob(z), expected)
    torch.testing.assert_close(density.log_prior(z), expected)
    assert (x[:, 1].abs() > 1e-3).all()


def test_a_mask_that_is_a_bool_makes_a_prior_flat():
    """Pyro's idiom: there are data that make the posterior proper."""

    def model():
        with poutine.mask(mask=False):
            x = pyro.sample("x", dist.Normal(0.0, 1.0))
        pyro.sample("y", dist.Normal(x, 1.0), obs=torch.tensor(3.0))

    z = torch.tensor([[0.5], [2.0]])
    torch.testing.assert_close(ModelDensity(model).log_prob(z), normal(torch.tensor(3.0), z[:, 0], 1.0))


def whole_vectors(y, seen):
    mu = pyro.sample("mu", dist.Normal(torch.zeros(2), 1.0).to_event(1))
    with pyro.plate("n", 3), poutine.mask(mask=seen):
        pyro.sample("y", dist.MultivariateNormal(mu, torch.eye(2)), obs=y)


def single_numbers(y, seen):
    mu = pyro.sample("mu", dist.Normal(torch.zeros(2), 1.0).to_event(1))
    with pyro.plate("two", 2, dim=-1), pyro.plate("n", 3, dim=-2), poutine.mask(mask=seen[:, None]):
        pyro.sample("y", dist.Normal(mu[..., None, :], 1.0), obs=y)


def inside_a_sum(y, seen):
    mu = pyro.sample("mu", dist.Normal(torch.zeros(2), 1.0).to_event(1))
    with pyro.plate("n", 3), poutine.mask(mask=seen):
        flip = pyro.sample("flip", dist.Bernoulli(0.5), infer={"enumerate": "parallel"})
        pyro.sample("y", dist.MultivariateNormal(mu * (1 - 2 * flip[..., None]), torch.eye(2)), obs=y)


@pytest.mark.parametrize("batching", [None, OneByOne()])
@pytest.mark.parametrize("model", [whole_vectors, single_numbers, inside_a_sum])
def test_placeholders_for_missing_data_do_not_reach_the_score(model, batching):
    y = torch.tensor([[math.nan, 0.3], [0.5, -0.2], [1.0, 2.0]])
    seen = torch.tensor([False, True, True])
    density = ModelDensity(model, (y, seen), batching=batching)
    z = torch.randn(3, 2, requires_grad=True)
    terms = torch.stack([normal(y[seen], sign * z[:, None], 1.0).sum(-1) for sign in (1, -1)])
    likelihood = terms.logsumexp(0) - math.log(2) if model is inside_a_sum else terms[0]
    expected = normal(z, 0.0, 1.0).sum(1) + likelihood.sum(1)
    (expected_score,) = torch.autograd.grad(expected.sum(), z)
    value, score = density.log_prob_and_score(z)
    torch.testing.assert_close(value, expected.detach())
    torch.testing.assert_close(score, expected_score)
    if model is not inside_a_sum:
        assert torch.isfinite(density.log_likelihood(z)["y"]).all()


def test_missing_discrete_data_are_summed_out():
    """A missing coin says nothing, and its sum over both values is one."""

    def model(y, seen):
        p = pyro.sample("p", dist.Beta(2.0, 2.0))
        with pyro.plate("n", 4):
            pyro.sample("y", dist.Bernoulli(p), obs=y, obs_mask=seen)

    y, seen = torch.tensor([1.0, 0.0, 1.0, 0.0]), torch.tensor([True, False, True, True])
    density = ModelDensity(model, (y, seen))
    z = torch.randn(5, 1)
    p = z[:, 0].sigmoid()
    prior = dist.Beta(2.0, 2.0).log_prob(p) + p.log() + (1 - p).log()
    torch.testing.assert_close(density.log_prob(z), prior + 2 * p.log() + (1 - p).log())


def test_many_masked_latents_are_remarked_upon():
    y = torch.randn(40)
    seen = torch.arange(40) != 3  # the values that are there are masked out of "y_unobserved"

    def model(y, seen):
        mu = pyro.sample("mu", dist.Normal(0.0, 2.0))
        with pyro.plate("n", 40):
            pyro.sample("y", dist.Normal(mu, 1.0), obs=y, obs_mask=seen)

    with pytest.warns(PyroSMWarning, match=r"39 values of the latent site 'y_unobserved'.*a site of their own"):
        ModelDensity(model, (y, seen))
    with pytest.warns(PyroSMWarning, match="10 values"):
        ModelDensity(model, (y, torch.arange(40) < 10))
    assert ModelDensity(model, (y, torch.arange(40) < 9)).dim == 41  # without a word


# ---------------------------------------------------------------- read-outs


def test_a_reparametrised_site_is_neither_latent_nor_data():
    kind = reparametrised()
    density = ModelDensity(kind.model, kind.args)
    assert [site.name for site in density.sites] == ["mu", "theta_decentered"]
    assert density.deterministic == ("theta",)
    assert list(density.observed) == ["y"]
    z = torch.randn(3, 4)
    assert list(density.log_likelihood(z)) == ["y"]
    torch.testing.assert_close(density.deterministics(z)["theta"], z[:, :1] + 0.7 * z[:, 1:])
    values = density.posterior_predictive(z)
    torch.testing.assert_close(values["theta"], z[:, :1] + 0.7 * z[:, 1:])


def test_a_point_mass_with_a_density_still_counts():
    def model():
        x = pyro.sample("x", dist.Normal(0.0, 1.0))
        pyro.sample("twice", dist.Delta(2 * x, log_density=-x.square()), obs=2 * x)

    density = ModelDensity(model)
    z = torch.randn(3, 1)
    torch.testing.assert_close(density.log_prob(z), normal(z[:, 0], 0.0, 1.0) - z[:, 0].square())
    assert density.deterministic == ("twice",)


def test_scoped_names():
    def part(y):
        mu = pyro.sample("mu", dist.Normal(0.0, 2.0))
        pyro.sample("y", dist.Normal(mu, 1.0), obs=y)

    def model(y):
        for side, data in zip(("left", "right"), y, strict=True):
            with scope(prefix=side):
                part(data)

    sampler = fitted(model, (torch.tensor([1.0, -2.0]),), budget=512)
    draws = sampler.get_samples(4000)
    assert list(draws) == ["left/mu", "right/mu"]
    for name, mean in (("left/mu", 0.8), ("right/mu", -1.6)):
        assert abs(float(draws[name].mean()) - mean) < 5 * 0.9 * math.sqrt(1 / 4000 + 1 / (16000 * sampler.ess))


def test_an_ode_solver_that_writes_in_place_goes_one_by_one_and_says_so():
    t = torch.linspace(0, 1, 5)

    def model(y):
        rate = pyro.sample("rate", dist.LogNormal(0.0, 0.5))
        start = pyro.sample("start", dist.Normal(1.0, 0.5))
        path = odeint(lambda s, x: -rate * x, start, t, rtol=1e-9, atol=1e-9)
        pyro.sample("y", dist.Normal(path, 0.1).to_event(1), obs=y)

    y = torch.exp(-1.3 * t)
    with pytest.warns(PyroSMWarning, match="one latent at a time"):
        density = ModelDensity(model, (y,))
    z = torch.tensor([[0.2, 0.9], [-0.4, 1.3]])
    path = z[:, 1:] * torch.exp(-z[:, :1].exp() * t)
    expected = normal(z[:, 0], 0.0, 0.5) + normal(z[:, 1], 1.0, 0.5) + normal(y, path, 0.1).sum(1)
    torch.testing.assert_close(density.log_prob(z), expected, rtol=1e-6, atol=1e-6)


# ---------------------------------------------------------------- refused, by name and with a way out


def mean_of(law):
    def model(y):
        mu = pyro.sample("mu", law)
        pyro.sample("y", dist.Normal(mu, 1.0).to_event(getattr(mu, "ndim", 0)), obs=y)

    return model


def plain(y):
    mu = pyro.sample("mu", dist.Normal(0.0, 1.0))
    with pyro.plate("n", len(y)):
        pyro.sample("y", dist.Normal(mu, 1.0), obs=y)


def subsampled(y):
    mu = pyro.sample("mu", dist.Normal(0.0, 1.0))
    with pyro.plate("data", len(y), subsample_size=2):
        pyro.sample("y", dist.Normal(mu, 1.0), obs=pyro.subsample(y, event_dim=0))


def missing_counts(y):
    rate = pyro.sample("rate", dist.Gamma(2.0, 2.0))
    with pyro.plate("n", 4):
        pyro.sample("y", dist.Poisson(rate), obs=y, obs_mask=torch.arange(4) > 0)


def wrong_mask(y):
    mu = pyro.sample("mu", dist.Normal(0.0, 1.0))
    with pyro.plate("n", 4), poutine.mask(mask=torch.ones(3, dtype=torch.bool)):
        pyro.sample("y", dist.Normal(mu, 1.0), obs=y)


def branching(y):
    p = pyro.sample("p", dist.Beta(2.0, 2.0))
    label = pyro.sample("label", dist.Bernoulli(p))
    pyro.sample("y", dist.Normal(1.0 if label == 1 else -1.0, 1.0).expand([4]).to_event(1), obs=y)


@pytest.mark.parametrize(
    ("model", "y", "message"),
    [
        (mean_of(dist.VonMises(0.0, 2.0)), 0.5, r"'mu' \(VonMises\) lives on a circle.*torch.atan2.*pyro.factor"),
        (
            mean_of(dist.SineBivariateVonMises(0.0, 0.0, 1.0, 1.0, 0.2)),
            [0.5, 0.1],
            r"'mu' \(SineBivariateVonMises\) lives on a circle",
        ),
        (mean_of(dist.ProjectedNormal(torch.ones(3))), [0.1, 0.2, 0.3], "'mu'.*on a sphere.*ProjectedNormalReparam"),
        (subsampled, [0.0] * 5, r"plate 'data'.*\(2 of 5\).*need the whole likelihood: leave subsample_size out"),
        (plain, [0.0, math.nan, 1.0], "'y' have 1 NaN: leave them out with poutine.mask.*obs_mask"),
        (plain, np.ones(3), r"'y' are of type ndarray.*torch.as_tensor"),
        (missing_counts, [1.0, 2.0, 0.0, 3.0], "'y_unobserved'.*missing count says nothing, so poutine.mask"),
        (wrong_mask, [0.5] * 4, r"size of tensor a \(\d\) must match"),
        (branching, [0.5] * 4, r"discrete latents \('label'\).*torch.where instead of if"),
    ],
    ids=["circle", "torus", "sphere", "subsample", "NaN", "NumPy", "missing counts", "mask", "branch"],
)
def test_refused(model, y, message):
    data = y if isinstance(y, np.ndarray) else torch.tensor(y)
    with pytest.raises(ModelRefusedError, match=message) as caught:
        DiffusionSampler(model, disable_progbar=True).run(data)
    assert "\n" not in str(caught.value)


# ---------------------------------------------------------------- many latents


def radon_by_quadrature(y, county, floor, uranium, power=2.0):
    """``log Z`` and the mean of ``log τ``: all but τ and σ are normal, and integrated out in closed form."""
    fixed = torch.stack([torch.ones_like(y), uranium[county], floor], 1) * torch.tensor([5.0, 2.0, 2.0])
    member = torch.nn.functional.one_hot(county, 85).to(y)
    between, within = fixed @ fixed.T, member @ member.T

    def log_joint(log_tau, log_sigma):
        rows = []
        for a, b in zip(log_tau.reshape(-1), log_sigma.reshape(-1), strict=True):
            cov = between + (power * a).exp() * within + (2 * b).exp() * torch.eye(len(y))
            rows.append(normal(a, -1.0, 1.0) + normal(b, -0.5, 0.5) + gaussian(y, torch.zeros(1), cov))
        return torch.stack(rows).reshape(log_tau.shape)

    # steps below the posterior's standard deviations (0.19 and 0.036), beyond five of them on either side
    return quadrature(log_joint, lambda a, b: a, torch.linspace(-2.6, -0.3, 18), torch.linspace(-0.5, -0.08, 15))


@pytest.mark.slow
def test_ninety_latents_from_a_gaussian_base():
    """Intercepts of 85 counties, non-centred, from a Batch-and-Match base."""
    model, args, _ = radon(centred=False)
    exact, mean = radon_by_quadrature(*args)
    wrong, _ = radon_by_quadrature(*args, power=1.0)  # τ taken for a variance
    sampler = DiffusionSampler(
        model,
        guide=AutoDiffusion(model, base=BatchAndMatchBase(), num_steps=16, architecture=MLP(width=128, depth=2)),
        objective=ImportanceWeightedScoreMatching(num_particles=1024, steps_per_round=50, population=None),
        stopping=StoppingRule(max_evaluations=20_000),
        disable_progbar=True,
    )
    sampler.run(*args)
    found, se = sampler.evidence
    assert se < 0.08
    assert sampler.khat < 0.7
    assert abs(found - exact) < 5 * se
    assert abs(found - wrong) > 10 * se
    log_tau = sampler.get_samples(4000)["tau"].log()
    assert abs(float(log_tau.mean()) - mean) < 5 * 0.19 * math.sqrt(1 / 4000 + 1 / (16000 * sampler.ess))


def local_level_by_kalman(y):
    """``log Z``: the walk integrated out by the Kalman filter, over a grid of ``log σ`` and ``log noise``."""

    def log_joint(a, b):
        mean, variance, total = (
            torch.full_like(a, -1.0),
            torch.zeros_like(a),
            normal(a, -1.5, 0.5) + normal(b, -0.7, 0.3),
        )
        for x in y:
            variance = variance + (2 * a).exp()
            spread = variance + (2 * b).exp()
            total = total + normal(x, mean, spread.sqrt())
            mean, variance = mean + variance / spread * (x - mean), variance * (1 - variance / spread)
        return total

    return quadrature(log_joint, lambda a, b: a, torch.linspace(-2.2, -1.0, 49), torch.linspace(-0.95, -0.45, 41))[0]


@pytest.mark.slow
def test_a_thousand_latents_are_not_trusted():
    """Weights in so many dimensions are useless, so is the evidence; it is said at once, and by three figures."""
    model, args, _ = local_level(1000)
    sampler = DiffusionSampler(
        model,
        guide=AutoDiffusion(model, num_steps=4, architecture=MLP(width=16, depth=1)),
        objective=ImportanceWeightedScoreMatching(
            num_particles=256, batch_size=128, steps_per_round=2, population=None
        ),
        stopping=StoppingRule(max_evaluations=512),
        disable_progbar=True,
    )
    with pytest.warns(PyroSMWarning, match="a few carry all the weight"):
        sampler.run(*args)
    verdict = sampler.check(probe=None)
    assert abs(sampler.log_evidence - local_level_by_kalman(*args)) > 50
    assert verdict.level is Trust.DISTRUST
    assert sampler.khat > 5
    assert 16000 * sampler.ess < 10
