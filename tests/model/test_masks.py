# SPDX-License-Identifier: Apache-2.0
"""Masks without dimensions, on sites of every shape: the density by hand."""

import math

import pyro
import pyro.distributions as dist
import pytest
import torch
from pyro import poutine

from pyro_sm.model.density import ModelDensity, OneByOne, OuterPlate, VMap

Z = torch.tensor([[0.3], [-1.0], [2.0]], dtype=torch.float64)


def prior():
    return dist.Normal(torch.zeros(()), 1.0)


@pytest.fixture(autouse=True)
def double(float64):
    return None


def observed(mask, y, event_dim=0):
    def model():
        x = pyro.sample("x", prior())
        loc = x.reshape(x.shape + (1,) * event_dim) + torch.zeros(y.shape)
        with poutine.mask(mask=mask):
            pyro.sample("y", dist.Normal(loc, 1.0).to_event(event_dim), obs=y)

    return model


def value_and_score(y, mask):
    """By hand, (3,) and (3, 1); ``mask``: like ``y``."""
    error = torch.where(mask, y.reshape(1, -1) - Z, 0.0)
    normaliser = 0.5 * math.log(2 * math.pi) * int(mask.sum())
    return prior().log_prob(Z[:, 0]) - 0.5 * error.square().sum(1) - normaliser, error.sum(1, keepdim=True) - Z


@pytest.mark.parametrize("way", [OneByOne(), OuterPlate(), VMap(), None])
@pytest.mark.parametrize(("shape", "event_dim"), [((), 0), ((4,), 1), ((1,), 1), ((2, 2), 2), ((1, 1), 2)])
@pytest.mark.parametrize("kept", [True, False])
def test_a_mask_of_no_dimensions(way, shape, event_dim, kept):
    y = torch.arange(math.prod(shape), dtype=torch.float64).reshape(shape) - 0.5
    density = ModelDensity(observed(torch.tensor(kept), y, event_dim), batching=way)
    value, score = density.log_prob_and_score(Z)
    expected = value_and_score(y, torch.full((y.numel(),), kept))
    torch.testing.assert_close(value, expected[0])
    torch.testing.assert_close(score, expected[1])
    assert torch.isfinite(density.log_likelihood(Z)["y"]).all()


@pytest.mark.parametrize("mask", [torch.tensor(True), torch.tensor([True])])
@pytest.mark.parametrize("way", [OneByOne(), OuterPlate(), VMap(), None])
def test_inside_a_plate(mask, way):
    y = torch.tensor([0.5, -1.0, 2.0])

    def model():
        x = pyro.sample("x", prior())
        with pyro.plate("n", 3), poutine.mask(mask=mask):
            pyro.sample("y", dist.Normal(x, 1.0), obs=y)

    density = ModelDensity(model, batching=way)
    torch.testing.assert_close(density.log_prob(Z), value_and_score(y, torch.ones(3, dtype=torch.bool))[0])


@pytest.mark.parametrize("kept", [True, False])
def test_a_latent_and_a_discrete_one(kept):
    """What a mask leaves out of the latents follows its prior; of what is enumerated, too."""
    mask = torch.tensor(kept)

    def model():
        with poutine.mask(mask=mask):
            x = pyro.sample("x", prior())
            k = pyro.sample("k", dist.Bernoulli(0.25))
            pyro.sample("y", dist.Normal(x + 2 * k, 1.0), obs=torch.tensor(0.3))
        pyro.sample("seen", dist.Normal(x, 1.0), obs=torch.tensor(1.0))

    density = ModelDensity(model)
    x = Z[:, 0]
    terms = [w * dist.Normal(x + 2 * k, 1.0).log_prob(torch.tensor(0.3)).exp() for k, w in ((0, 0.75), (1, 0.25))]
    likelihood = torch.stack(terms).sum(0).log() if kept else 0.0
    seen = dist.Normal(x, 1.0).log_prob(torch.tensor(1.0))
    torch.testing.assert_close(density.log_prob(Z), prior().log_prob(x) + seen + likelihood)
    assert density.prior_draws(5).shape == (5, 1)
    assert density._structure.masked == {"x": 0 if kept else 1}
