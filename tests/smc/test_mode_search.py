# SPDX-License-Identifier: Apache-2.0
"""The search finds the modes of mixtures, its start is a normalised density, and it steps aside where none fits."""

from __future__ import annotations

import math

import pytest
import torch

from pyro_sm.density import FunctionDensity
from pyro_sm.gaussians.gaussian import GaussianDensity
from pyro_sm.search.ascent import ascended
from pyro_sm.smc.mixture_start import MixtureStart
from pyro_sm.smc.mode_search import ModeSearch, curvature_at
from pyro_sm.smc.tempered import TemperedSMC
from pyro_sm.targets import Funnel, GaussianMixture, ManyWell

TRIL = torch.tensor([[[0.5, 0.0], [0.3, 0.4]], [[1.5, 0.0], [-0.8, 0.6]]], dtype=torch.float64)
LOC = torch.tensor([[-3.0, 1.0], [4.0, -2.0]], dtype=torch.float64)
WEIGHT = torch.tensor([0.3, 0.7], dtype=torch.float64)


def wide(dim=2, scale=6.0, dtype=torch.float64):
    return GaussianDensity(torch.zeros(dim, dtype=dtype), scale * torch.eye(dim, dtype=dtype))


def log_prob(z):
    """Two correlated normal laws with weights .3 and .7, and ``log Z = 2``."""
    parts = [
        torch.distributions.MultivariateNormal(m, scale_tril=t).log_prob(z) + w.log()
        for m, t, w in zip(LOC, TRIL, WEIGHT, strict=True)
    ]
    return torch.logsumexp(torch.stack(parts), 0) + 2


def test_ascent_climbs_and_arrives():
    torch.manual_seed(3)
    density = FunctionDensity(log_prob, 2, dtype=torch.float64)
    begin = wide().sample(64)
    z, log_p = ascended(density, begin, torch.full((2,), 6.0, dtype=torch.float64), 60)
    assert bool((log_p >= density.log_prob(begin)).all())
    nearest = torch.cdist(z, LOC).min(1).values
    assert float((nearest < 0.1).double().mean()) > 0.95
    assert density.evaluations.values < 64 * 40  # it stops when all have arrived


def test_ascent_of_a_badly_scaled_normal_law():
    """Condition number 10⁶: plain gradient steps that are stable along the narrow axis do not get along the other."""
    scale = torch.tensor([1e-3, 1.0], dtype=torch.float64)
    density = FunctionDensity(lambda z: -0.5 * (z / scale).square().sum(-1), 2, dtype=torch.float64)
    begin = torch.tensor([[0.5, 2.0], [-1.0, -0.7]], dtype=torch.float64)
    _, log_p = ascended(density, begin, torch.ones(2, dtype=torch.float64), 60)
    assert float(log_p.min()) > -0.01
    plain = begin
    for _ in range(60):
        plain = plain - scale.min().square() * plain / scale.square()
    assert float(density.log_prob(plain).min()) < -0.1


def test_ascent_leaves_what_cannot_be_evaluated():
    density = FunctionDensity(lambda z: torch.where(z[:, 0] > 0, -z[:, 0], math.nan), 1)
    z, log_p = ascended(density, torch.tensor([[-1.0], [2.0]]), torch.ones(1), 20)
    assert float(z[0]) == -1
    assert float(log_p[0]) == -math.inf
    assert 0 < float(z[1]) < 2


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_precision_of_a_normal_law(dtype):
    tril = (TRIL[0] * torch.tensor([[1.0], [0.01]])).to(dtype)
    density, scale = GaussianDensity(torch.zeros(2, dtype=dtype), tril), torch.tensor([2.0, 3.0], dtype=dtype)
    found = curvature_at(density, torch.zeros(2, dtype=dtype), scale)
    expected = scale.double()[:, None] * torch.linalg.inv(tril.double() @ tril.double().T) * scale.double()
    torch.testing.assert_close(found.precision, expected, rtol=1e-2, atol=1e-2)
    assert found.gain < 1e-3
    away = tril @ torch.tensor([0.6, -0.8], dtype=dtype)
    assert curvature_at(density, away, scale).gain == pytest.approx(0.5, rel=2e-2)


def test_flat_and_convex_directions_have_the_width_of_the_start():
    density = FunctionDensity(lambda z: -z[:, 0].square() + z[:, 1].square(), 3, dtype=torch.float64)
    found = curvature_at(density, torch.zeros(3, dtype=torch.float64), torch.full((3,), 5.0, dtype=torch.float64))
    torch.testing.assert_close(found.precision, torch.diag(torch.tensor([50.0, 1.0, 1.0], dtype=torch.float64)))
    nowhere = FunctionDensity(lambda z: (-z[:, 0].abs()).sqrt(), 1)
    assert curvature_at(nowhere, torch.zeros(1), torch.ones(1)) is None


def test_where_an_ascent_was_cut_off_is_no_mode():
    torch.manual_seed(5)
    density = FunctionDensity(log_prob, 2, dtype=torch.float64)
    short = ModeSearch(num_ascents=256, max_steps=3).find(density, wide()).modes
    ends, _ = ascended(density, wide().sample(256), torch.full((2,), 6.0, dtype=torch.float64), 3)
    assert float(torch.cdist(ends, LOC).min(1).values.max()) > 2
    assert short is None or float(torch.cdist(short.loc, LOC).min(1).values.max()) < 0.5


@pytest.mark.parametrize(("apart", "count"), [(1.2, 1), (1.4, 2), (1.9, 2)])
def test_modes_are_two_where_they_are_two_of_their_own_widths_apart(apart, count):
    """Of two normal laws of unit width at ``±apart``: where these overlap, the modes are wider than that."""

    def overlapping(z):
        sides = torch.stack([-0.5 * (z[..., 0] - apart).square(), -0.5 * (z[..., 0] + apart).square() - 0.2])
        return torch.logsumexp(sides, 0) - 0.5 * z[..., 1].square()

    modes = ModeSearch(num_ascents=64).find(FunctionDensity(overlapping, 2), wide(dtype=torch.float32)).modes
    assert len(modes.loc) == count


def test_modes_of_a_mixture_are_found_and_fit():
    torch.manual_seed(4)
    density = FunctionDensity(log_prob, 2, dtype=torch.float64)
    calls = []
    start = ModeSearch(num_ascents=128).run(density, wide(), progress=lambda: calls.append(0))
    assert isinstance(start, MixtureStart)
    assert start.laws.loc.shape == (2, 2)
    assert len(calls) >= 4
    order = start.laws.loc[:, 0].argsort()
    torch.testing.assert_close(start.laws.loc[order], LOC, rtol=0, atol=0.1)
    covariance = start.laws.scale_tril @ start.laws.scale_tril.mT
    torch.testing.assert_close(covariance[order], TRIL @ TRIL.mT, rtol=0.05, atol=0.02)
    torch.testing.assert_close(start.laws.log_weight[order].exp(), 0.5 * WEIGHT + 0.25, rtol=0, atol=0.03)


@pytest.mark.parametrize(
    ("target", "scale", "settings"),
    [
        (ManyWell(32), 3.0, ModeSearch()),
        (Funnel(), 3.0, ModeSearch()),
        (GaussianMixture(), 25.0, ModeSearch(max_modes=3)),
        (GaussianMixture(), 25.0, ModeSearch(min_effective_share=1.0)),
    ],
    ids=["too many modes", "no normal modes", "more than asked", "no fit is good enough"],
)
def test_the_start_stays_where_modes_do_not_help(target, scale, settings):
    torch.manual_seed(5)
    start = wide(target.dim, scale, torch.float32)
    assert settings.run(FunctionDensity(target.log_prob, target.dim), start) is start


def test_with_too_many_latents_nothing_is_searched_or_spent():
    density, start = FunctionDensity(log_prob, 2, dtype=torch.float64), wide()
    calls = []
    found = ModeSearch(max_dim=1).find(density, start, go_on=lambda: calls.append(0) or True)
    assert found.start is start
    assert found.modes is None
    assert (density.evaluations.values, density.evaluations.scores, calls) == (0, 0, [])
    assert ModeSearch(num_ascents=64, max_dim=2).find(density, start).modes is not None


def test_the_start_stays_where_nothing_is_finite():
    start = wide(1, 1.0, torch.float32)
    assert ModeSearch().run(FunctionDensity(lambda z: z[:, 0] - math.inf, 1), start) is start


def test_forty_modes_in_fifty_dimensions():
    """Tempering from the wide start alone loses most of them: they all but vanish half-way."""
    torch.manual_seed(6)
    target = GaussianMixture(40, dim=50, scale=1.0)
    weights, found = target.mode_weights(), []
    density, start = FunctionDensity(target.log_prob, 50), wide(50, 25.0, torch.float32)
    for begin in (ModeSearch().run(density, start), start):
        z = TemperedSMC(num_particles=1024, num_moves=2, effective_share=0.5).run(density, begin).z
        found.append(target.mode_shares(z))
    assert int((found[0] > 0.1 * weights).sum()) == 40
    assert float((found[0] - weights).abs().sum()) / 2 < 0.1
    assert int((found[1] > 0.1 * weights).sum()) < 30


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        ({"num_ascents": 0}, "num_ascents >= 1"),
        ({"max_steps": 0}, "max_steps >= 1"),
        ({"max_modes": 0}, "max_modes >= 1"),
        ({"max_dim": 0}, "max_dim >= 1"),
        ({"widening": 0.0}, "positive widening"),
        ({"start_share": 1.0}, "start_share"),
        ({"min_effective_share": 1.5}, "min_effective_share"),
    ],
)
def test_bad_settings(arguments, words):
    with pytest.raises(ValueError, match=words):
        ModeSearch(**arguments)
