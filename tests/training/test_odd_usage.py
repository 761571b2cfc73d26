# SPDX-License-Identifier: Apache-2.0
"""What is passed by mistake is named, with what is expected; data as Python has them, and calls without gradients."""

import pyro
import pyro.distributions as dist
import pytest
import torch
from samplers import DATA, assert_equal, hierarchy, make, trained

from pyro_sm import DiffusionSampler, LaplaceBase, StoppingRule, compare_evidence
from pyro_sm.base import ModelRefusedError
from pyro_sm.guides.auto_diffusion import AutoDiffusion
from pyro_sm.model.density import ModelDensity


@pytest.mark.parametrize(
    ("make", "words"),
    [
        (lambda: DiffusionSampler(3), r"expected model to be callable: a Pyro model, found 3 \(int\)"),
        (lambda: AutoDiffusion("model"), r"expected model to be callable: a Pyro model, found 'model' \(str\)"),
        (lambda: DiffusionSampler(hierarchy, base="laplace"), r"base to be .*LaplaceBase.*, found 'laplace'"),
        (lambda: DiffusionSampler(hierarchy, base=LaplaceBase), "base to be .*, found the class LaplaceBase"),
        (lambda: DiffusionSampler(hierarchy, stopping=10_000), "stopping to be .*StoppingRule.*, found 10000"),
        (lambda: DiffusionSampler(hierarchy, stopping=StoppingRule), "found the class StoppingRule"),
        (lambda: DiffusionSampler(hierarchy, num_chains=2.0), r"num_chains to be an integer, found 2.0 \(float\)"),
        (lambda: compare_evidence([(0.0, 0.1), (1.0, 0.1)]), r"models to be a dictionary by name.*, found \["),
    ],
)  # fmt: skip
def test_other_kinds_are_named(make, words):
    with pytest.raises(TypeError, match=words):
        make()


def test_the_number_of_samples_is_an_integer():
    sampler = trained(budget=64)
    with pytest.raises(TypeError, match=r"num_samples to be an integer, found 2.5 \(float\)"):
        sampler.get_samples(2.5)


def normal(y):
    mu = pyro.sample("mu", dist.Normal(0.0, 2.0))
    pyro.sample("y", dist.Normal(mu, 1.0), obs=y)


def coin(y):
    p = pyro.sample("p", dist.Beta(2.0, 3.0))
    with pyro.plate("n", 3):
        pyro.sample("y", dist.Bernoulli(p).mask(True), obs=y)


def counts(y):
    p = pyro.sample("p", dist.Beta(2.0, 3.0))
    pyro.sample("y", dist.Binomial(4, p), obs=y)


BOOLEANS = torch.tensor([True, False, True])


@pytest.mark.parametrize(
    ("model", "given", "plain"),
    [
        (normal, 0.5, torch.tensor(0.5)),
        (normal, 2, torch.tensor(2.0)),
        (counts, 3, torch.tensor(3.0)),
        (counts, True, torch.tensor(1.0)),
        (coin, BOOLEANS, BOOLEANS.float()),
    ],
)
def test_numbers_and_booleans_are_data(model, given, plain):
    z = torch.linspace(-1, 1, 5)[:, None]
    found, expected = ModelDensity(model, (given,)), ModelDensity(model, (plain,))
    torch.testing.assert_close(found.log_prob(z), expected.log_prob(z))
    torch.testing.assert_close(found.log_likelihood(z)["y"], expected.log_likelihood(z)["y"])
    assert found.observed["y"].shape == plain.shape


def test_no_rows():
    with pytest.raises(ModelRefusedError, match="a plate of the model after site 'mu' has the size 0: do the data"):
        ModelDensity(hierarchy, (DATA[:0],))


def test_another_division_by_zero_is_the_models_own():
    with pytest.raises(ModelRefusedError, match="the model failed ZeroDivisionError: division by zero"):
        ModelDensity(lambda y: normal(y / 0), (1,))


@pytest.mark.parametrize("mode", [torch.no_grad, torch.inference_mode])
def test_training_where_gradients_are_off(mode):
    sampler = make()
    with mode():
        sampler.run(DATA)
        assert not torch.is_grad_enabled()
        sampler.get_samples(50)
    assert_equal(sampler, trained())
