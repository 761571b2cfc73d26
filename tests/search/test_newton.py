# SPDX-License-Identifier: Apache-2.0
"""Newton arrives whatever the units are, in several dampings at once, and says how far it was from arriving."""

from __future__ import annotations

import math

import torch

from pyro_sm.density import FunctionDensity
from pyro_sm.gaussians.gaussian import GaussianDensity
from pyro_sm.search.newton import climbed

RAW = torch.tensor([1e-3, 1.0, 1e3], dtype=torch.float64)
TRIL = RAW[:, None] * torch.tensor([[1.0, 0.0, 0.0], [0.9, 0.4, 0.0], [-0.5, 0.3, 0.8]], dtype=torch.float64)
LOC = torch.tensor([5.0, -3.0, 2000.0], dtype=torch.float64)


def test_a_normal_law_in_raw_units():
    density = GaussianDensity(LOC, TRIL)
    z = torch.randn(4, 3, dtype=torch.float64)
    peaks = climbed(density, z, torch.ones(3, dtype=torch.float64))
    torch.testing.assert_close((peaks.loc - LOC) / RAW, torch.zeros_like(z), rtol=0, atol=1e-4)
    torch.testing.assert_close(peaks.scale_tril, TRIL.expand(4, 3, 3), rtol=1e-6, atol=1e-9)
    torch.testing.assert_close(peaks.log_p, density.log_prob(peaks.loc))
    assert float(peaks.gain.max()) < 1e-6
    assert density.evaluations.scores < 4 * 6 * 6  # a few passes


def test_dampings_climb_where_the_plain_step_would_fall():
    """``−log cosh``: from 3 widths away a plain Newton step lands at −100 and beyond."""
    density = FunctionDensity(lambda z: -torch.log(torch.cosh(z)).sum(-1), 2, dtype=torch.float64)
    z = torch.tensor([[3.0, -2.5], [0.1, 4.0]], dtype=torch.float64)
    plain = z[0, 0] - torch.tanh(z[0, 0]) * torch.cosh(z[0, 0]).square()
    assert float(plain) < -90
    peaks = climbed(density, z, torch.ones(2, dtype=torch.float64))
    assert float(peaks.loc.abs().max()) < 0.05
    torch.testing.assert_close(
        peaks.scale_tril, torch.eye(2, dtype=torch.float64).expand(2, 2, 2), rtol=1e-3, atol=1e-3
    )


def test_a_saddle_is_left_and_convex_directions_are_climbed():
    density = FunctionDensity(lambda z: z.square().sum(-1) - 0.25 * z.pow(4).sum(-1), 2, dtype=torch.float64)
    peaks = climbed(density, torch.tensor([[0.05, -0.04]], dtype=torch.float64), torch.ones(2, dtype=torch.float64))
    torch.testing.assert_close(
        peaks.loc.abs(), torch.full((1, 2), math.sqrt(2), dtype=torch.float64), rtol=0, atol=0.03
    )


def test_rows_do_not_depend_on_each_other():
    density = GaussianDensity(LOC, TRIL)
    z = torch.randn(3, 3, dtype=torch.float64)
    together = climbed(density, z, RAW)
    alone = [climbed(density, row[None], RAW) for row in z]
    torch.testing.assert_close(together.loc, torch.cat([peak.loc for peak in alone]), rtol=1e-10, atol=1e-10)


def test_no_curvature_no_peak():
    nowhere = FunctionDensity(lambda z: torch.where(z[:, 0] == 0.5, 0 * z[:, 0], math.nan), 1, dtype=torch.float64)
    peaks = climbed(
        nowhere, torch.tensor([[0.5]], dtype=torch.float64), torch.ones(1, dtype=torch.float64), num_steps=5
    )
    assert float(peaks.gain) == math.inf


def test_numbers_beyond_all_bounds_are_no_peak():
    density = FunctionDensity(lambda z: 1e300 * torch.sin(1e6 * z).sum(-1), 2, dtype=torch.float64)
    peaks = climbed(
        density, torch.tensor([[0.3, 0.4]], dtype=torch.float64), torch.full((2,), 1e5).double(), num_steps=4
    )
    assert bool(torch.isfinite(peaks.loc).all())


def test_beside_an_edge_there_is_no_peak():
    """Up to a wall: three passes closer and closer, and the end is given up."""
    wall = FunctionDensity(lambda z: torch.where(z[:, 0] < 1, z[:, 0], -math.inf), 1, dtype=torch.float64)
    peaks = climbed(wall, torch.tensor([[1 - 1e-9]], dtype=torch.float64), torch.ones(1, dtype=torch.float64))
    assert float(peaks.gain) > 0.1
    assert wall.evaluations.scores == 2 * 4


def test_a_slope_without_a_top_is_no_peak():
    slope = FunctionDensity(lambda z: z.sum(-1), 2, dtype=torch.float64)
    peaks = climbed(slope, torch.zeros(1, 2, dtype=torch.float64), torch.ones(2, dtype=torch.float64), num_steps=10)
    assert float(peaks.gain) > 1
