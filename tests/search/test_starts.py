# SPDX-License-Identifier: Apache-2.0
"""Starts lie where they should: near, far out, and far out in one coordinate; later ones around what was found."""

from __future__ import annotations

import math

import pytest
import torch

from pyro_sm.gaussians.gaussian import GaussianDensity
from pyro_sm.search.starts import (
    far_out,
    gaussian_start,
    one_far_out,
    start_from_draws,
    start_of,
    starts,
    starts_around,
)

LOC = torch.tensor([5.0, -300.0, 0.0], dtype=torch.float64)
SCALE = torch.tensor([0.1, 100.0, 1.0], dtype=torch.float64)


def test_radii_are_log_uniform():
    z = far_out(4000, gaussian_start(LOC, SCALE))
    radius = ((z - LOC) / SCALE).norm(dim=1) / math.sqrt(3)
    share = (radius / 0.5).log() / math.log(128)
    assert float(share.min()) >= 0
    assert float(share.max()) <= 1
    assert float(share.mean()) == pytest.approx(0.5, abs=5 * math.sqrt(1 / 12 / 4000))
    assert float(share.square().mean()) == pytest.approx(1 / 3, abs=5 * math.sqrt(4 / 45 / 4000))


def test_one_coordinate_is_far_and_the_others_are_as_they_were():
    z = torch.randn(3000, 3, dtype=torch.float64)
    moved = one_far_out(z, LOC, SCALE)
    changed = moved != z
    assert bool((changed.sum(1) == 1).all())
    offset = ((moved - LOC) / SCALE)[changed]
    assert float(offset.abs().max()) <= 100 + 1e-9
    assert float((offset.abs() < 1).double().mean()) == pytest.approx(0.5, abs=5 * math.sqrt(0.25 / 3000))
    assert bool((changed.double().mean(0) - 1 / 3 < 5 * math.sqrt(2 / 9 / 3000)).all())


def test_shares_of_a_first_stage():
    own = 7e6
    start = gaussian_start(LOC, SCALE)._replace(sample=lambda n: torch.full((n, 3), own, dtype=torch.float64))
    z = starts(1024, start)
    assert z.shape == (1024, 3)
    count = (z == own).sum(1)
    assert [int((count == k).sum()) for k in (0, 2, 3)] == [384, 384, 256]


def test_later_stages_reach_beyond_the_modes():
    modes = torch.tensor([[0.0, 0.0], [10.0, 40.0]], dtype=torch.float64)
    start = gaussian_start(torch.zeros(2, dtype=torch.float64), torch.ones(2, dtype=torch.float64))
    z = starts_around(256, start, modes)
    assert z.shape == (256, 2)
    box = z[-43:]
    centre, half = torch.tensor([5.0, 20.0]), torch.tensor([8.5, 31.0])
    assert bool(((box - centre).abs() <= half + 1e-9).all())
    assert float(box[:, 1].max()) > 42
    assert bool(torch.isfinite(starts_around(10, start, modes[:1])).all())


def test_a_start_from_draws_has_their_quartiles():
    z = LOC + SCALE * torch.randn(20_000, 3, dtype=torch.float64)
    start = start_from_draws(z)
    assert bool(((start.loc - LOC).abs() < 0.05 * SCALE).all())
    torch.testing.assert_close(start.scale, SCALE, rtol=0.05, atol=0)
    drawn = start.sample(20_000)
    torch.testing.assert_close(drawn.std(0), math.sqrt(1.09) * SCALE, rtol=0.05, atol=0)


def test_a_latent_that_does_not_vary_has_width_one():
    z = torch.randn(50, 2)
    z[:, 1] = 3.0
    assert start_from_draws(z).scale[1] == 1


def test_a_density_without_a_prior_begins_at_a_standard_normal_law():
    density = GaussianDensity(torch.zeros(2), torch.eye(2))
    start = start_of(density)
    assert start.loc.tolist() == [0, 0]
    assert start.scale.tolist() == [1, 1]
    assert start.sample(5).shape == (5, 2)


def test_errors():
    with pytest.raises(ValueError, match="one shape"):
        gaussian_start(LOC, SCALE[:2])
    with pytest.raises(ValueError, match="positive, finite scale"):
        gaussian_start(LOC, -SCALE)
    with pytest.raises(ValueError, match="at least two draws, found 1"):
        start_from_draws(LOC[None])
