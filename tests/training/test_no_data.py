# SPDX-License-Identifier: Apache-2.0
"""A model without data is warned of before it is trained, and no other."""

import warnings

import pyro
import pyro.distributions as dist
import pytest
import torch
from pyro import poutine
from pyro.infer.reparam import LocScaleReparam
from pyro.nn import PyroModule, PyroSample
from samplers import DATA, bimodal, hierarchy, make
from torch.distributions import constraints

from pyro_sm.base import PyroSMWarning


class Module(PyroModule):
    def __init__(self):
        super().__init__()
        self.mu = PyroSample(dist.Normal(0.0, 1.0))

    def forward(self, y=None):
        return pyro.sample("y", dist.Normal(self.mu, 1.0), obs=y)


def forgotten(y):
    with pyro.plate("n", len(y)):
        pyro.sample("t", dist.Normal(0.0, 1.0))


def discrete(y=None):
    group = pyro.sample("group", dist.Bernoulli(0.5), infer={"enumerate": "parallel"})
    pyro.sample("y", dist.Normal(group, 1.0), obs=y)


def improper():
    x = pyro.sample("x", dist.ImproperUniform(constraints.real, (), ()))
    pyro.factor("density", -(x**2))


def reparametrised(y=None):
    mu = pyro.sample("mu", dist.Normal(0.0, 1.0))
    t = pyro.sample("t", dist.Normal(mu, 1.0))
    pyro.sample("y", dist.Normal(t, 1.0), obs=y)


def begun(model, *args):
    sampler = make(model=model, budget=64)
    sampler.run(*args)
    return sampler


REPARAMETRISED = poutine.reparam(reparametrised, {"t": LocScaleReparam(0.0)})


@pytest.mark.parametrize(
    ("model", "args", "sites"),
    [
        (Module(), (), "'mu', 'y'"),
        (forgotten, (DATA,), "'t'"),
        (discrete, (), "'y'"),
        (REPARAMETRISED, (), "'mu', 't_decentered', 'y'"),
        (poutine.uncondition(reparametrised), (torch.tensor(1.0),), "'mu', 't', 'y'"),
    ],
)
def test_no_data_are_warned_of(model, args, sites):
    with pytest.warns(PyroSMWarning, match="no site of the model is observed") as seen:
        sampler = begun(model, *args)
    ours = [warning for warning in seen if "observed" in str(warning.message)]
    assert len(ours) == 1
    assert f"the posterior of {sites} is the prior" in str(ours[0].message)
    assert ours[0].filename == __file__
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        sampler.run(*args)  # nothing to train


@pytest.mark.filterwarnings("ignore:site 'x' has an improper prior")
@pytest.mark.parametrize(
    ("model", "args"),
    [
        (Module(), (torch.tensor(1.0),)),
        (hierarchy, (DATA,)),
        (poutine.condition(hierarchy, data={"t": DATA}), (DATA,)),
        (bimodal, ()),
        (improper, ()),
        (REPARAMETRISED, (torch.tensor(1.0),)),
        (poutine.condition(reparametrised, data={"y": torch.tensor(1.0)}), ()),
    ],
)
def test_data_and_factors_are_data(model, args):
    begun(model, *args)
