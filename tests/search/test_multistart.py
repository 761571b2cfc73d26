# SPDX-License-Identifier: Apache-2.0
"""Known modes are found, with who ended where; stages go on, and stop where no list will do."""

from __future__ import annotations

import math

import pytest
import torch

from pyro_sm.density import FunctionDensity
from pyro_sm.gaussians.gaussian import GaussianDensity
from pyro_sm.search import multistart
from pyro_sm.search.modes import distinct_modes
from pyro_sm.search.multistart import MultiStartSearch
from pyro_sm.search.starts import gaussian_start

pytestmark = pytest.mark.usefixtures("float64")


def unit(dim):
    return gaussian_start(torch.zeros(dim), torch.ones(dim))


def at(centres, width=1.0):
    return FunctionDensity(
        lambda z: torch.logsumexp(-0.5 * (torch.cdist(z, centres) / width).square(), 1), centres.shape[1]
    )


def test_modes_and_counts():
    centres = torch.tensor([[0.0, 0.0], [6.0, 0.0], [0.0, -9.0]])
    ends = torch.cat([centres[:1].expand(5, 2), centres[1:2].expand(3, 2), centres[2:].expand(2, 2)])
    ends = ends + 0.01 * torch.randn_like(ends)
    density = at(centres)
    modes = distinct_modes(density, ends, density.log_prob(ends), torch.ones(2))
    assert sorted(modes.hits.tolist()) == [2, 3, 5]
    again = distinct_modes(density, ends[:5], density.log_prob(ends[:5]), torch.ones(2), modes)
    assert sorted(again.hits.tolist()) == [2, 3, 10]
    torch.testing.assert_close(modes.log_mass, torch.full((3,), math.log(2 * math.pi)), rtol=0, atol=1e-3)


def test_ends_half_way_are_not_modes_and_lead_to_the_one():
    scale = torch.tensor([1e-3, 1.0, 1e3])
    density = GaussianDensity(torch.tensor([0.0, 3.0, 4000.0]), torch.diag(scale))
    found = MultiStartSearch(num_starts=64, max_steps=10).run(density, unit(3))
    assert len(found.modes.loc) == 1
    torch.testing.assert_close(found.modes.scale_tril[0], torch.diag(scale), rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize(("apart", "count"), [(1.2, 1), (1.9, 2)])
def test_two_modes_from_two_widths_on(apart, count):
    centres = torch.tensor([[-apart, 0.0], [apart, 0.0]])
    assert len(MultiStartSearch(num_starts=64).run(at(centres), unit(2)).modes.loc) == count


def test_twenty_five_modes_on_a_grid():
    axis = 4.0 * torch.arange(-2.0, 3.0)
    found = MultiStartSearch(num_starts=1024).run(at(torch.cartesian_prod(axis, axis), 0.5), unit(2))
    assert found.completeness.num_places == 25
    assert found.completeness.is_complete


def test_stages_find_what_one_stage_misses():
    """Forty modes in ten dimensions, forty widths about one of them."""
    centres = 80 * torch.rand(40, 10, generator=torch.Generator().manual_seed(0)) - 40
    start = gaussian_start(centres[0], torch.ones(10))
    one = MultiStartSearch(num_starts=1024, max_stages=1).run(at(centres), start).completeness
    assert one.num_places < 36
    assert not one.is_complete
    assert one.missed_places >= 1
    all_of_it = MultiStartSearch(num_starts=1024).run(at(centres), start).completeness
    assert all_of_it.num_places >= 39
    assert all_of_it.is_complete


def test_a_shell_has_no_list():
    density = FunctionDensity(lambda z: -50 * (z.norm(dim=1) - 4).square(), 3)
    found = MultiStartSearch(num_starts=256, max_modes=20).run(density, unit(3))
    assert not found.completeness.is_complete
    assert found.completeness.num_stages == 1


def test_modes_without_mass_do_not_count():
    centres = torch.tensor([[0.0, 0.0], [8.0, 0.0]])

    def log_prob(z):
        return torch.logsumexp(torch.tensor([0.0, -60.0]) - 0.5 * torch.cdist(z, centres).square(), 1)

    assert len(MultiStartSearch(num_starts=256).run(FunctionDensity(log_prob, 2), unit(2)).modes.loc) == 1


def test_dear_values_begin_with_few_starts(monkeypatch):
    density = at(torch.zeros(1, 2))
    monkeypatch.setattr(multistart, "seconds_per_row", lambda *_: 1e-3)
    assert MultiStartSearch().run(density, unit(2)).completeness.num_starts == 64
    monkeypatch.setattr(multistart, "seconds_per_row", lambda *_: 1e-6)
    assert MultiStartSearch().run(density, unit(2)).completeness.num_starts == 1024


def test_the_price_is_measured():
    density = at(torch.zeros(1, 2))
    assert 0 < multistart.seconds_per_row(density, unit(2)) < 1
    assert density.evaluations.scores in (64, 320)


def test_beyond_the_dimensions_of_a_hessian():
    dim = 160
    density = GaussianDensity(torch.ones(dim), torch.eye(dim))
    found = MultiStartSearch(num_starts=32).run(density, unit(dim))
    assert len(found.modes.loc) == 1
    assert density.evaluations.scores < 32 * 81


def test_errors():
    for name in ("num_starts", "max_stages", "max_steps", "max_modes"):
        with pytest.raises(ValueError, match=f"expected {name} >= 1, found 0"):
            MultiStartSearch(**{name: 0})
