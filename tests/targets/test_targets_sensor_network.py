# SPDX-License-Identifier: Apache-2.0
"""Sensor network: the density written out, and its reference by importance sampling on the observed distances."""

import math

import pytest
import torch

from pyro_sm.targets import SensorNetwork

pytestmark = pytest.mark.usefixtures("float64")
KNOWN = torch.tensor([[0.5, 0.3], [0.3, 0.7]], dtype=torch.float64)
SEEN = {
    (2, 3): 0.297, (1, 4): 0.9266, (2, 4): 0.8524, (1, 5): 0.6103, (3, 5): 0.2995, (1, 6): 0.3631, (3, 6): 0.5656,
}  # fmt: skip


def normal(value, mean, sd):
    return -0.5 * ((value - mean) / sd) ** 2 - math.log(sd * math.sqrt(2 * math.pi))


def written_out(x, missed=True):
    places = [*x.reshape(4, 2).tolist(), *KNOWN.tolist()]
    total = sum(normal(c, 0.0, 10.0) for c in x.tolist())
    for i in range(1, 7):
        for j in range(i + 1, 7):
            d = math.dist(places[i - 1], places[j - 1])
            seen = math.exp(-(d**2) / (2 * 0.3**2))
            if (i, j) in SEEN:
                total += math.log(seen) + normal(SEEN[i, j], d, 0.02)
            elif i <= 4 and missed:
                total += math.log(1 - seen)
    return total


def test_the_density_written_out():
    x = 0.5 + 0.4 * torch.randn(6, 8)
    expected = torch.tensor([written_out(one) for one in x])
    torch.testing.assert_close(SensorNetwork().log_prob(x), expected, rtol=1e-10, atol=1e-10)


def crossing(a, ra, b, rb):
    """Either point (N, 2) at distance ``ra`` of ``a`` and ``rb`` of ``b``, ``|∂(ra, rb)/∂x|``, and if it exists."""
    d = (b - a).norm(dim=-1)
    along = (ra**2 - rb**2 + d**2) / (2 * d)
    square = ra**2 - along**2
    up = square.clamp(min=1e-300).sqrt() * torch.where(torch.rand_like(d) < 0.5, 1.0, -1.0)
    u = (b - a) / d[:, None]
    point = a + along[:, None] * u + up[:, None] * torch.stack([-u[:, 1], u[:, 0]], 1)
    to_a, to_b = (point - a) / ra[:, None], (point - b) / rb[:, None]
    return point, (to_a[:, 0] * to_b[:, 1] - to_a[:, 1] * to_b[:, 0]).abs(), square > 0


def importance_draws(n):
    """Draws (n, 8) that have the observed distances, noise and all, and their log proposal density (n,)."""
    r = {pair: y + 0.02 * torch.randn(n) for pair, y in SEEN.items()}
    log_q = sum(normal(r[pair], y, 0.02) for pair, y in SEEN.items())
    start, end = (point.expand(n, 2) for point in KNOWN)
    x1, jac1, ok1 = crossing(start, r[1, 5], end, r[1, 6])
    x3, jac3, ok3 = crossing(start, r[3, 5], end, r[3, 6])
    angle = 2 * math.pi * torch.rand(n)
    x2 = x3 + r[2, 3][:, None] * torch.stack([angle.cos(), angle.sin()], 1)
    x4, jac4, ok4 = crossing(x1, r[1, 4], x2, r[2, 4])
    log_q = log_q + (jac1 * jac3 * jac4).log() - 3 * math.log(2) - (2 * math.pi * r[2, 3]).log()
    return torch.cat([x1, x2, x3, x4], 1), log_q, ok1 & ok3 & ok4


def test_the_reference_by_importance_sampling():
    target = SensorNetwork()
    n = 200_000
    x, log_q, ok = importance_draws(n)
    log_w = torch.where(ok, target.log_prob(x) - log_q, -math.inf).nan_to_num(nan=-math.inf)
    w = (log_w - target.log_evidence).exp()
    error = float(w.std()) / math.sqrt(n)
    assert abs(float(w.mean()) - 1) < 5 * (error + target.log_evidence_se)
    w = w / w.sum()
    assert float(1 / w.square().sum()) > n / 2

    def close(function, expected):
        value = float(w @ function)
        return abs(value - expected) < 5 * float((w * (function - value)).norm())

    x = x.nan_to_num(nan=0.0)
    for i in range(8):
        assert close(x[:, i], float(target.reference_mean[i]))
        second = float(target.reference_sd[i]) ** 2
        assert close((x[:, i] - target.reference_mean[i]).square(), second)
        assert close((target.configurations(x) == i).double(), float(target.mode_weights()[i]))
    # Without what the unobserved pairs say, the evidence would be far off.
    few = slice(0, 200)
    loose = torch.tensor([written_out(one, missed=False) for one in x[few]])
    assert float((loose - target.log_prob(x[few]))[ok[few]].mean()) > 1


def test_configurations_are_sides():
    target = SensorNetwork()
    assert float(target.mode_weights().sum()) == pytest.approx(1, abs=1e-9)
    # Left of the line (.5, .3) → (.3, .7) is the origin's side; the line x_1 → x_2 runs along the x axis.
    left, right = [0.0, 0.0], [1.0, 1.0]
    x = torch.tensor(
        [
            [*left, 9.0, 0.0, *right, 5.0, 1.0],
            [*left, 9.0, 0.0, *left, 5.0, -1.0],
            [*right, 9.0, 1.0, *right, 5.0, 0.0],
        ]
    )
    assert target.configurations(x).tolist() == [0b101, 0b110, 0b000]
    expected = torch.zeros(8)
    expected[[0, 5, 6]] = 1 / 3
    torch.testing.assert_close(target.configuration_shares(x), expected)
    assert torch.equal(target.mode_shares(x), expected)
