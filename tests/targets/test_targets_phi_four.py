# SPDX-License-Identifier: Apache-2.0
"""The φ⁴ chain: published form, transfer matrices against quadrature and tabulated values, draws."""

import math
from itertools import pairwise

import pytest
import torch

from pyro_sm.targets import PhiFour, phi_four

pytestmark = pytest.mark.usefixtures("float64")


def written_out(phi, h, a, beta, ends):
    """The energy of one configuration, term by term, with the given values beyond the ends."""
    n = len(phi)
    chain = [ends[0], *phi.tolist(), ends[1]]
    bonds = sum((right - left) ** 2 for left, right in pairwise(chain))
    wells = sum((1 - p**2) ** 2 / (4 * a * n) - h * p / n for p in phi.tolist())
    return beta * (a * n / 2 * bonds + wells)


def test_the_definition():
    target = PhiFour(5, 0.3, a=0.2, beta=3.0)
    x = torch.randn(4, 5)
    expected = [-written_out(phi, 0.3, 0.2, 3.0, (0.0, 0.0)) for phi in x]
    torch.testing.assert_close(target.log_prob(x), torch.tensor(expected), rtol=1e-12, atol=1e-12)
    periodic = [-written_out(phi, 0.3, 0.2, 3.0, (float(phi[-1]), float(phi[0]))) for phi in x]
    assert float((target.log_prob(x) - torch.tensor(periodic)).abs().min()) > 0.1


@pytest.mark.parametrize(
    ("n", "h", "log_evidence", "mean", "sd", "abs_mean", "positive"),
    [
        (16, 0.0, -33.5380197501724, 0.0, 0.9791741340881274, 0.9703192022837865, 0.5),
        (32, 0.0, -59.495457680807476, 0.0, 0.9776869116525628, 0.9682568686074247, 0.5),
        (64, 0.0, -119.87021423787303, 0.0, 0.9770465750583197, 0.9674474477257863, 0.5),
        (
            32,
            0.02,
            -59.4447989442589,
            0.30090808689180976,
            0.9305970294530935,
            0.9686157875303856,
            0.6547837742144991,
        ),
        (100, 0.0, -196.91222080548124, 0.0, 0.976836954909853, 0.9672008317608382, 0.5),
    ],
)
def test_tabulated_values(n, h, log_evidence, mean, sd, abs_mean, positive):
    """From another transfer matrix, on a finer grid."""
    target = PhiFour(n, h)
    assert target.log_evidence == pytest.approx(log_evidence, rel=1e-10)
    law = target.site_law(target.mid_site)
    # A step function is what a grid resolves worst: O(δ) where it falls within a cell, O(δ²) on an edge.
    assert law == pytest.approx((mean, sd, abs_mean, positive), abs=2e-5)
    assert float(target.mode_weights()[1]) == pytest.approx(positive, abs=2e-5)


@pytest.mark.parametrize("h", [0.0, 0.5])
def test_transfer_matrix_against_quadrature(h):
    """Three sites on a full grid, from ``log_prob`` alone; without the last bond to zero Z would be another."""
    target = PhiFour(3, h, beta=4.0)
    axis = torch.arange(-3.5, 3.5, 0.07) + 0.035
    phi = torch.cartesian_prod(axis, axis, axis)
    value = target.log_prob(phi)
    assert float(torch.logsumexp(value, 0)) + 3 * math.log(0.07) == pytest.approx(target.log_evidence, abs=1e-8)
    mass = torch.softmax(value, 0)
    for site in range(3):
        law = target.site_law(site)
        assert float(mass @ phi[:, site]) == pytest.approx(law.mean, abs=1e-7)
        assert float(mass @ phi[:, site].square()) == pytest.approx(law.sd**2 + law.mean**2, abs=1e-7)
    free = value + 0.5 * 4.0 * 0.1 * 3 * phi[:, -1].square()
    assert abs(float(torch.logsumexp(free, 0)) + 3 * math.log(0.07) - target.log_evidence) > 0.1


def test_draws_have_the_law_of_every_site_and_bond():
    target = PhiFour(12, 0.1)
    n = 8000
    x = target.sample(n)
    assert x.shape == (n, 12)
    for site in range(12):
        law = target.site_law(site)
        assert abs(float(x[:, site].mean()) - law.mean) < 5 * law.sd / math.sqrt(n)
        assert abs(float(x[:, site].abs().mean()) - law.abs_mean) < 5 * law.sd / math.sqrt(n)
    # Site by site from their own laws the marginals would be as right, and the bonds far too stretched.
    bond = -target._log_bond(x[:, 1:] - x[:, :-1]).sum(1)
    shuffled = torch.stack([x[torch.randperm(n), site] for site in range(12)], 1)
    assert float((-target._log_bond(shuffled[:, 1:] - shuffled[:, :-1])).sum(1).mean()) > 3 * float(bond.mean())


def test_draws_lie_evenly_around_the_points_of_a_grid(monkeypatch):
    """On a coarse grid, where half a cell would show: without a field the mean of every site is zero."""
    monkeypatch.setattr(phi_four, "_NUM_CELLS", 40)
    x = PhiFour(6).sample(8000)
    assert bool((x.mean(0).abs() < 5 * x.std(0) / math.sqrt(8000)).all())
    shifted = x + 0.5 * 6 / 40
    assert not bool((shifted.mean(0).abs() < 5 * x.std(0) / math.sqrt(8000)).all())


def test_shares_read_the_middle_site():
    target = PhiFour(4)
    x = torch.tensor([[1.0, 1, -1, 1], [1, 1, 1, 1], [-1, -1, 1, -1], [0, 0, 2, 0]])
    torch.testing.assert_close(target.mode_shares(x), torch.tensor([0.25, 0.75]))
