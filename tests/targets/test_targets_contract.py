# SPDX-License-Identifier: Apache-2.0
"""What every benchmark target promises: shapes, dtypes, vmap, draws that fit the density, and use as a Pyro model."""

import math

import pytest
import torch

from pyro_sm.density import value_and_score
from pyro_sm.examples.improper import factor_model
from pyro_sm.gaussians.gaussian import given_gaussian
from pyro_sm.model.density import ModelDensity
from pyro_sm.targets import (
    DoubleWellParticles,
    Funnel,
    GaussianMixture,
    GaussianShells,
    HasDraws,
    HasModes,
    LennardJones,
    ManyWell,
    PhiFour,
    Rings,
    SensorNetwork,
    Target,
    UnequalModes,
)

TARGETS = {
    "gmm40": GaussianMixture,
    "gmm40-10": lambda dtype: GaussianMixture(40, dtype, dim=10, scale=1.0),
    "gmm40-50": lambda dtype: GaussianMixture(40, dtype, dim=50, scale=1.0),
    "many-well": lambda dtype: ManyWell(8, dtype=dtype),
    "many-well-200": lambda dtype: ManyWell(200, dtype=dtype),
    "unequal": UnequalModes,
    "funnel": Funnel,
    "rings": Rings,
    "shells": GaussianShells,
    "shells-10": lambda dtype: GaussianShells(10, dtype=dtype),
    "phi-four": lambda dtype: PhiFour(16, 0.05, dtype=dtype),
    "sensors": SensorNetwork,
    "dw4": DoubleWellParticles,
    "lj13": LennardJones,
    "lj55": lambda dtype: LennardJones(55, dtype=dtype),
}
DRAWN = [name for name in TARGETS if name not in ("sensors", "dw4", "lj13", "lj55")]
LISTED = [name for name in DRAWN if name not in ("many-well-200", "funnel")]


def make(name, dtype=torch.float64):
    factory = TARGETS[name]
    return factory(40, dtype) if factory is GaussianMixture else factory(dtype=dtype)


def places(target, count=6):
    """Points near the target, away from the places where it has no slope."""
    if isinstance(target, HasDraws):
        return target.sample(count)
    return target.start.loc + target.start.scale * torch.randn(count, target.dim, dtype=target.start.loc.dtype)


@pytest.mark.parametrize("name", TARGETS)
def test_a_target_is_what_it_says(name):
    target = make(name)
    assert isinstance(target, Target)
    assert isinstance(target, HasDraws) == (name in DRAWN)
    assert target.name
    assert target.log_evidence is None or math.isfinite(target.log_evidence)
    assert target.start.loc.shape == target.start.scale.shape == (target.dim,)


@pytest.mark.parametrize("name", TARGETS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_log_prob_takes_any_batch_in_its_own_dtype(name, dtype):
    target = make(name, dtype)
    x = places(target)
    assert x.dtype == target.start.loc.dtype == target.start.scale.dtype == dtype
    value, score = value_and_score(target.log_prob, x)
    assert value.dtype == score.dtype == dtype
    assert bool(torch.isfinite(value).all() & torch.isfinite(score).all())
    for shape in ((), (2, 3)):
        found = target.log_prob(x[0] if shape == () else x.reshape(2, 3, -1))
        assert found.shape == shape
        torch.testing.assert_close(found, value[0] if shape == () else value.reshape(2, 3), rtol=1e-4, atol=1e-3)


@pytest.mark.parametrize("name", TARGETS)
def test_log_prob_follows_its_argument(name):
    """In another dtype than the target's, and on another device: the meta device refuses to meet any other."""
    target = make(name)
    x = places(target, 3)
    assert target.log_prob(x.float()).dtype == torch.float32
    assert target.log_prob(x.to("meta")).device.type == "meta"


@pytest.mark.parametrize("name", TARGETS)
def test_value_and_score_under_vmap_and_by_differences(name):
    target = make(name)
    x = places(target)
    value, score = value_and_score(target.log_prob, x)
    found, slope = torch.func.vmap(lambda one: (target.log_prob(one), torch.func.grad(target.log_prob)(one)))(x)
    torch.testing.assert_close(found, value, rtol=1e-10, atol=1e-10)
    torch.testing.assert_close(slope, score, rtol=1e-8, atol=1e-8)
    way = torch.randn_like(x)
    step = 1e-6
    difference = (target.log_prob(x + step * way) - target.log_prob(x - step * way)) / (2 * step)
    torch.testing.assert_close(difference, (score * way).sum(1), rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("name", TARGETS)
def test_the_score_is_finite_where_there_is_no_slope(name):
    """At the origin particles meet, sensors meet and rings have their centre."""
    for dtype in (torch.float32, torch.float64):
        target = make(name, dtype)
        x = torch.zeros(2, target.dim, dtype=dtype)
        if name.startswith("shells"):
            x[0, 0], x[1, 0] = -3.5, 3.5
        value, score = value_and_score(target.log_prob, x)
        assert bool(torch.isfinite(value).all())
        assert bool(torch.isfinite(score).all())


def worst_stein_error(target, x):
    """Largest of ``|E[x_i ∂_i log p] + 1|`` in standard errors, which integration by parts makes zero."""
    _, score = value_and_score(target.log_prob, x)
    off = x * score + 1
    return float((off.mean(0).abs() / (off.std(0) / math.sqrt(x.shape[0]))).max())


@pytest.mark.parametrize("name", DRAWN)
def test_draws_fit_the_density(name):
    target = make(name)
    x = target.sample(6000 if name in ("phi-four", "many-well-200") else 20_000)
    assert x.dtype == torch.float64
    assert worst_stein_error(target, x) < 5
    assert worst_stein_error(target, 1.1 * x) > 10


@pytest.mark.parametrize("name", DRAWN)
def test_draws_follow_their_generator_and_nothing_else(name):
    target = make(name)
    before = torch.get_rng_state()
    a, b, c = (target.sample(5, torch.Generator().manual_seed(seed)) for seed in (4, 4, 5))
    assert torch.equal(before, torch.get_rng_state())
    assert torch.equal(a, b)
    assert not torch.equal(a, c)


@pytest.mark.parametrize("name", LISTED)
def test_mode_shares_of_draws(name):
    target = make(name)
    assert isinstance(target, HasModes)
    n = 20_000
    weights, shares = target.mode_weights(), target.mode_shares(target.sample(n))
    assert shares.shape == weights.shape
    assert float(weights.sum()) == pytest.approx(1, abs=1e-6)
    assert float(shares.sum()) == pytest.approx(1, abs=1e-6)
    error = (weights * (1 - weights) / n).sqrt() + 1e-3 / math.sqrt(n)
    assert bool(((shares - weights).abs() < 5 * error).all())
    if float(weights.std()) > 0.01:
        assert not bool(((shares - weights.flip(0)).abs() < 5 * error).all())


@pytest.mark.parametrize(
    "name", ["gmm40-10", "many-well", "unequal", "funnel", "rings", "shells", "phi-four", "sensors", "dw4", "lj13"]
)
def test_as_an_ordinary_pyro_model(name, float64):
    target = make(name)
    density = ModelDensity(factor_model(target.log_prob, target.dim))
    assert "one" not in density.batching_method.lower(), density.batching_reasons
    given_gaussian(*target.start, density)
    x = places(target)
    value, score = density.log_prob_and_score(x)
    expected, slope = value_and_score(target.log_prob, x)
    torch.testing.assert_close(value, expected, rtol=1e-10, atol=1e-10)
    torch.testing.assert_close(score, slope, rtol=1e-9, atol=1e-9)


@pytest.mark.parametrize(
    "wrong",
    [
        lambda: GaussianMixture(0),
        lambda: GaussianMixture(40, dim=0),
        lambda: GaussianMixture(40, scale=0.0),
        lambda: ManyWell(3),
        lambda: ManyWell(0),
        lambda: ManyWell(34).mode_weights(),
        lambda: ManyWell(34).mode_shares(torch.zeros(1, 34)),
        lambda: UnequalModes(7),
        lambda: UnequalModes(34),
        lambda: Funnel(1),
        lambda: GaussianShells(1),
        lambda: Rings((2.0, 1.0), (0.5, 0.5)),
        lambda: Rings((-1.0, 1.0), (0.5, 0.5)),
        lambda: Rings((1.0, 2.0), (0.5, 0.6)),
        lambda: Rings((1.0, 2.0), (1.5, -0.5)),
        lambda: Rings((1.0, 2.0), (1.0,)),
        lambda: Rings((), ()),
        lambda: Rings(width=0.0),
        lambda: PhiFour(1),
        lambda: PhiFour(8, a=0.0),
        lambda: PhiFour(8, beta=-1.0),
        lambda: PhiFour(3000),
        lambda: PhiFour(8).site_law(8),
        lambda: LennardJones(1),
        lambda: DoubleWellParticles(4, 0),
    ],
)
def test_arguments_out_of_range(wrong):
    with pytest.raises(ValueError, match="expected"):
        wrong()
