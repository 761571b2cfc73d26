# SPDX-License-Identifier: Apache-2.0
"""Small Pyro models shared by the tests: each ``name() -> (model, args, kwargs)``, in the default dtype."""

import pyro
import pyro.distributions as dist
import torch
from pyro.infer import config_enumerate
from pyro.nn import PyroModule, PyroSample
from torch.distributions import constraints

from pyro_sm.bench.batching_models import PROBLEMS


def supports():
    """One latent for each support that needs a transform."""

    def model(y):
        a = pyro.sample("positive", dist.Gamma(2.0, 1.0))
        b = pyro.sample("unit", dist.Beta(2.0, 3.0))
        c = pyro.sample("interval", dist.Uniform(-1.0, 3.0))
        d = pyro.sample("simplex", dist.Dirichlet(torch.ones(3)))
        e = pyro.sample("chol", dist.LKJCholesky(3, 1.5))
        f = pyro.sample(
            "ordered",
            dist.TransformedDistribution(
                dist.Normal(torch.zeros(3), 1.0).to_event(1), dist.transforms.OrderedTransform()
            ),
        )
        g = pyro.sample("improper_positive", dist.ImproperUniform(constraints.positive, (), (2,)))
        h = pyro.sample("definite", dist.ImproperUniform(constraints.positive_definite, (), (2, 2)))
        trace = h[..., 0, 0] + h[..., 1, 1]
        pyro.factor("wishart", 0.5 * torch.linalg.slogdet(h).logabsdet - trace)
        loc = a + b + c + d[..., 0] + e[..., 2, 0] + f[..., 1] + g[..., 0] + h[..., 0, 1]
        pyro.sample("y", dist.Normal(loc, 1.0), obs=y)
        pyro.factor("soft", -0.5 * g.square().sum(-1))

    return model, (torch.tensor(1.5),), {}


def nested_plates():
    y = torch.linspace(-1, 1, 6).reshape(2, 3)

    def model(*, data):
        scale = pyro.sample("scale", dist.LogNormal(0.0, 1.0))
        rows = pyro.plate("rows", 2, dim=-2)
        with pyro.plate("columns", 3, dim=-1):
            column = pyro.sample("column", dist.Normal(0.0, 1.0))
            with rows:
                cell = pyro.sample("cell", dist.Normal(column, scale))
                pyro.sample("y", dist.Normal(cell, 0.5), obs=data)

    return model, (), {"data": y}


def sequential_plate():
    def model(y):
        mu = pyro.sample("mu", dist.Normal(0.0, 1.0))
        for i in pyro.plate("i", 3):
            x = pyro.sample(f"x_{i}", dist.Normal(mu, 1.0))
            pyro.sample(f"y_{i}", dist.Normal(x, 1.0), obs=y[i])

    return model, (torch.tensor([0.5, -1.0, 2.0]),), {}


def masked_and_scaled():
    def model(y, mask):
        mu = pyro.sample("mu", dist.Normal(0.0, 1.0))
        with pyro.plate("n", 4), pyro.poutine.scale(scale=2.5), pyro.poutine.mask(mask=mask):
            pyro.sample("y", dist.Normal(mu, 1.0), obs=y)

    return model, (torch.tensor([0.5, -1.0, 2.0, 9.0]), torch.tensor([True, True, False, True])), {}


def given_subsample():
    def model(y, indices):
        mu = pyro.sample("mu", dist.Normal(0.0, 1.0))
        with pyro.plate("n", 40, subsample=indices):
            pyro.sample("y", dist.Normal(mu, 1.0), obs=y[indices])

    return model, (torch.linspace(-1, 1, 40), torch.tensor([1, 5, 7, 30])), {}


def undeclared_batch():
    """Batch dimensions without a plate, as in many scripts."""

    def model(y):
        theta = pyro.sample("theta", dist.Normal(torch.zeros(4), 1.0))
        pyro.sample("y", dist.Normal(theta, 1.0), obs=y)

    return model, (torch.arange(4.0),), {}


def conditioned():
    def model():
        mu = pyro.sample("mu", dist.Normal(0.0, 1.0))
        x = pyro.sample("x", dist.Normal(mu, 2.0))
        pyro.sample("y", dist.Normal(x, 1.0))

    return pyro.poutine.condition(model, data={"y": torch.tensor(0.7)}), (), {}


class Regression(PyroModule):
    def __init__(self):
        super().__init__()
        self.linear = PyroModule[torch.nn.Linear](2, 1)
        self.linear.weight = PyroSample(lambda m: dist.Normal(torch.zeros(1, 2), 1.0).to_event(2))
        self.linear.bias = PyroSample(lambda m: dist.Normal(torch.zeros(1), 1.0).to_event(1))

    def forward(self, x, y=None):
        mean = self.linear(x).squeeze(-1)
        with pyro.plate("data", len(x)):
            return pyro.sample("y", dist.Normal(mean, 0.5), obs=y)


def pyro_module():
    x = torch.stack([torch.linspace(-1, 1, 5), torch.linspace(0, 1, 5).square()], 1)
    return Regression(), (x,), {"y": x.sum(1)}


def wrapped_enumeration():
    model, args = PROBLEMS["enumerated mixture"]()
    return config_enumerate(model, "sequential"), args, {}


def hidden_markov():
    def model(y):
        rows = pyro.sample("rows", dist.Dirichlet(torch.ones(2, 2)).to_event(1))
        locs = pyro.sample("locs", dist.Normal(torch.tensor([-1.0, 1.0]), 1.0).to_event(1))
        state = 0
        for t in pyro.markov(range(len(y))):
            probs = rows[..., 0, :] if t == 0 else pyro.ops.indexing.Vindex(rows)[..., state, :]
            state = pyro.sample(f"s_{t}", dist.Categorical(probs), infer={"enumerate": "parallel"})
            loc = pyro.ops.indexing.Vindex(locs)[..., state]
            pyro.sample(f"y_{t}", dist.Normal(loc, 0.7), obs=y[t])

    return model, (torch.tensor([-1.0, -0.8, 1.2, 0.9, -1.1]),), {}


def in_place():
    """An in-place write that vmap cannot do, after a sum that an outer plate gets wrong."""

    def model(y):
        theta = pyro.sample("theta", dist.Normal(torch.zeros(2), 1.0).to_event(1))
        buffer = torch.zeros(2)
        buffer[0] = theta.sum()
        pyro.sample("y", dist.Normal(buffer[0], 1.0), obs=y)

    return model, (torch.tensor(0.3),), {}


def mixing_sum():
    """The two-line model on which an unverified outer plate is silently wrong."""

    def model(y):
        theta = pyro.sample("theta", dist.Normal(torch.zeros(2), 1.0).to_event(1))
        pyro.sample("y", dist.Normal(theta.sum(), 1.0), obs=y)

    return model, (torch.tensor(0.3),), {}


def radon(*, centred):
    """A regression with 85 varying intercepts, 459 measurements; simulated. Latents: 5 + 85."""
    generator = torch.Generator().manual_seed(85)

    def normal(*shape):
        return torch.randn(*shape, generator=generator, dtype=torch.float64).to(torch.get_default_dtype())

    county = torch.arange(459) * 17 % 91 % 85  # between 5 and 11 houses each
    floor = (torch.arange(459) % 6 == 0).to(torch.get_default_dtype())
    uranium = 0.4 * normal(85)
    y = (1.4 + 0.7 * uranium + 0.3 * normal(85))[county] - 0.7 * floor + 0.75 * normal(459)

    def model(y, county, floor, uranium):
        mu = pyro.sample("mu", dist.Normal(0.0, 5.0))
        gamma = pyro.sample("gamma", dist.Normal(0.0, 2.0))
        beta = pyro.sample("beta", dist.Normal(0.0, 2.0))
        tau = pyro.sample("tau", dist.LogNormal(-1.0, 1.0))
        sigma = pyro.sample("sigma", dist.LogNormal(-0.5, 0.5))
        with pyro.plate("county", 85):
            if centred:
                alpha = pyro.sample("alpha", dist.Normal(mu + gamma * uranium, tau))
            else:
                alpha = pyro.deterministic(
                    "alpha", mu + gamma * uranium + tau * pyro.sample("eta", dist.Normal(0.0, 1.0))
                )
        with pyro.plate("house", 459):
            pyro.sample("y", dist.Normal(alpha[..., county] + beta * floor, sigma), obs=y)

    return model, (y, county, floor, uranium), {}


def _walk(steps, generator):
    return 0.2 * torch.randn(steps, generator=generator, dtype=torch.float64).cumsum(0) - 1.0


def stochastic_volatility(steps):
    """Returns whose log variance is a random walk, non-centred; simulated. Latents: 2 + ``steps``."""
    generator = torch.Generator().manual_seed(steps)
    h = _walk(steps, generator)
    y = (h / 2).exp() * torch.randn(steps, generator=generator, dtype=torch.float64)

    def model(y):
        level = pyro.sample("level", dist.Normal(-1.0, 1.0))
        sigma = pyro.sample("sigma", dist.LogNormal(-1.5, 0.5))
        eps = pyro.sample("eps", dist.Normal(torch.zeros(steps), 1.0).to_event(1))
        h = level[..., None] + sigma[..., None] * eps.cumsum(-1)
        pyro.sample("y", dist.Normal(0.0, (h / 2).exp()).to_event(1), obs=y)

    return model, (y.to(torch.get_default_dtype()),), {}


def local_level(steps):
    """The same walk seen through normal noise, so that all but two latents can be integrated out exactly."""
    generator = torch.Generator().manual_seed(steps)
    y = _walk(steps, generator) + 0.5 * torch.randn(steps, generator=generator, dtype=torch.float64)

    def model(y):
        sigma = pyro.sample("sigma", dist.LogNormal(-1.5, 0.5))
        noise = pyro.sample("noise", dist.LogNormal(-0.7, 0.3))
        eps = pyro.sample("eps", dist.Normal(torch.zeros(steps), 1.0).to_event(1))
        h = -1.0 + sigma[..., None] * eps.cumsum(-1)
        pyro.sample("y", dist.Normal(h, noise[..., None]).to_event(1), obs=y)

    return model, (y.to(torch.get_default_dtype()),), {}


def _problem(name):
    def make():
        model, args = PROBLEMS[name]()
        return model, args, {}

    return make


ZOO = {
    **{name: _problem(name) for name in PROBLEMS},
    "supports": supports,
    "nested plates": nested_plates,
    "sequential plate": sequential_plate,
    "masked and scaled": masked_and_scaled,
    "given subsample": given_subsample,
    "undeclared batch": undeclared_batch,
    "conditioned": conditioned,
    "PyroModule": pyro_module,
    "wrapped enumeration": wrapped_enumeration,
    "hidden Markov": hidden_markov,
    "mixing sum": mixing_sum,
}
