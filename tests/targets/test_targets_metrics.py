# SPDX-License-Identifier: Apache-2.0
"""Metrics against cases that can be done by hand, and their floors."""

import math
import sys
from itertools import pairwise

import pytest
import torch

from pyro_sm.targets import GaussianMixture
from pyro_sm.targets.metrics import (
    aligned_distance,
    aligned_wasserstein2,
    energy_wasserstein,
    kabsch_rotation,
    mode_total_variation,
    wasserstein2,
)

pytestmark = pytest.mark.usefixtures("float64")


def rotation(s, angle=None):
    if s == 2:
        angle = 1.0 if angle is None else angle
        return torch.tensor([[math.cos(angle), -math.sin(angle)], [math.sin(angle), math.cos(angle)]])
    q = torch.linalg.qr(torch.randn(s, s)).Q
    return q * torch.det(q).sign() if s % 2 else q


def test_mode_total_variation():
    weights = torch.tensor([0.5, 0.3, 0.2])
    assert mode_total_variation(torch.tensor([0.5, 0.5, 0.0]), weights) == pytest.approx(0.2)
    assert mode_total_variation(weights, weights) == 0
    with pytest.raises(ValueError, match="expected shares of shape"):
        mode_total_variation(torch.ones(1), weights)


def test_wasserstein_finds_the_best_pairing():
    x = torch.tensor([[0.0, 0.0], [10.0, 0.0]])
    y = torch.tensor([[10.0, 1.0], [0.0, 2.0]])
    assert wasserstein2(x, y) == pytest.approx(math.sqrt((1 + 4) / 2))
    x = torch.randn(60, 3)
    assert wasserstein2(x, x[torch.randperm(60)] + torch.tensor([2.0, 0, 0])) == pytest.approx(2.0)
    line, other = torch.randn(50, 1), torch.randn(50, 1)
    assert wasserstein2(line, other) == pytest.approx(energy_wasserstein(line[:, 0], other[:, 0]))


def test_the_published_floor_of_gmm40():
    """4.34 ± 0.71 between two sets of 1000 exact draws; a set that lost half of the modes is far above."""
    target = GaussianMixture()
    x, y = target.sample(1000), target.sample(1000)
    assert 4.34 - 4 * 0.71 < wasserstein2(x, y) < 4.34 + 4 * 0.71
    lost = x[torch.cdist(x, target.means).argmin(1) < 20]
    assert wasserstein2(lost[torch.randint(len(lost), (1000,))], y) > 4.34 + 5 * 0.71


def test_energy_wasserstein():
    a, b = torch.randn(40), torch.randn(40)
    expected = float((a.sort().values - b.sort().values).square().mean().sqrt())
    assert energy_wasserstein(a, b) == pytest.approx(expected)
    assert energy_wasserstein(torch.tensor([1.0, 0.0]), torch.tensor([1.0, 0.0, 0.0, 1.0])) == pytest.approx(0)
    assert energy_wasserstein(torch.tensor([0.0]), torch.tensor([1.0, 3.0])) == pytest.approx(math.sqrt(5))
    # Levels 0, 1/3, 1/2, 2/3, 1: gaps 0, 1, -1, 0 between (0, 2) and (0, 1, 2).
    found = energy_wasserstein(torch.tensor([0.0, 2.0]), torch.tensor([0.0, 1.0, 2.0]))
    assert found == pytest.approx(math.sqrt(1 / 3))
    for wrong in (torch.zeros(0), torch.zeros(2, 2)):
        with pytest.raises(ValueError, match="two vectors"):
            energy_wasserstein(wrong, a)


@pytest.mark.parametrize("s", [2, 3])
def test_kabsch_finds_the_rotation(s):
    x = torch.randn(4, 7, s)
    turn = rotation(s)
    torch.testing.assert_close(kabsch_rotation(x, x @ turn), turn.expand(4, s, s), rtol=1e-9, atol=1e-9)
    mirror = torch.ones(s)
    mirror[0] = -1
    found = kabsch_rotation(x, x * mirror)
    torch.testing.assert_close(torch.det(found), torch.ones(4))
    assert bool(((x @ found - x * mirror).norm(dim=(1, 2)) > 0.1).all())
    # No rotation nearby does better.
    best = (x @ found - x * mirror).square().sum((1, 2))
    small = torch.linalg.matrix_exp(0.01 * (lambda m: m - m.T)(torch.randn(s, s)))
    assert bool(((x @ found @ small - x * mirror).square().sum((1, 2)) >= best).all())


def test_aligned_distance_forgets_names_place_and_orientation():
    # A chain with steps so unequal that a small turn leaves every particle nearest to its own image.
    points = torch.tensor([[0.0, 0.0], [1.0, 0.2], [4.0, 0.0], [9.0, 1.0]])
    order = torch.tensor([2, 0, 3, 1])
    moved = (points @ rotation(2, 0.1))[order] + 5.0
    x, y = points.flatten()[None], moved.flatten()[None]
    assert float(aligned_distance(x, y, 2)) == pytest.approx(0, abs=1e-6)
    stretched = (1.1 * points).flatten()[None]
    centred = points - points.mean(0)
    assert float(aligned_distance(x, stretched, 2)) == pytest.approx(0.1 * float(centred.norm()))


def test_more_rounds_never_hurt_and_sometimes_help():
    x, y = torch.randn(200, 12), torch.randn(200, 12)
    plain = (x - y).norm(dim=1)
    found = [plain, *(aligned_distance(x, y, 3, rounds) for rounds in (1, 2, 5))]
    for before, after in pairwise(found):
        assert bool((after <= before + 1e-9).all())
        assert float(after.mean()) < float(before.mean())


def test_aligned_wasserstein_against_enumeration():
    x, y = torch.randn(3, 8), torch.randn(3, 8)
    pairs = torch.stack([aligned_distance(x, y[[j]].expand(3, 8), 2) for j in range(3)], 1).square()
    orders = [(0, 1, 2), (0, 2, 1), (1, 0, 2), (1, 2, 0), (2, 0, 1), (2, 1, 0)]
    best = min(sum(float(pairs[i, j]) for i, j in enumerate(order)) / 3 for order in orders)
    assert aligned_wasserstein2(x, y, 2) == pytest.approx(math.sqrt(best))
    assert aligned_wasserstein2(x, x.flip(0), 2) == pytest.approx(0, abs=1e-6)
    assert aligned_wasserstein2(x, y, 2) < wasserstein2(x, y)


def test_arguments():
    x = torch.zeros(2, 6)
    for call in (
        lambda: wasserstein2(x, x[:1]),
        lambda: wasserstein2(x[:0], x[:0]),
        lambda: aligned_distance(x, x, 4),
        lambda: aligned_distance(x, x, 3, 0),
        lambda: aligned_wasserstein2(x, x[:, :3], 3),
    ):
        with pytest.raises(ValueError, match="expected"):
            call()


def test_without_scipy_the_extra_is_named(monkeypatch):
    monkeypatch.setitem(sys.modules, "scipy.optimize", None)
    with pytest.raises(ImportError, match=r"pyro_sm\[bench\]"):
        wasserstein2(torch.zeros(1, 1), torch.zeros(1, 1))
    assert energy_wasserstein(torch.zeros(1), torch.ones(1)) == 1
