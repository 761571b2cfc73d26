# SPDX-License-Identifier: Apache-2.0
"""The targets with exact draws against independent forms: torch's distributions, quadrature, printed values."""

import math

import pytest
import torch
from torch.distributions import Categorical, Independent, MixtureSameFamily, Normal

from pyro_sm.targets import Funnel, GaussianMixture, GaussianShells, ManyWell, Rings, UnequalModes
from pyro_sm.targets.grid_law import GridLaw

pytestmark = pytest.mark.usefixtures("float64")


def within(values, expected, sigmas=5):
    """Whether the mean of ``values`` (N,) is within ``sigmas`` standard errors of ``expected``."""
    return abs(float(values.mean()) - expected) < sigmas * float(values.std()) / math.sqrt(len(values))


# ---------------------------------------------------------------------------------------------- grid


def test_a_law_on_a_grid_against_the_normal():
    law = GridLaw(lambda x: -0.5 * ((x - 1) / 2).square(), -19.0, 21.0)
    assert law.log_norm == pytest.approx(math.log(2 * math.sqrt(2 * math.pi)), abs=1e-12)
    assert law.expectation(lambda x: (x - 1).square()) == pytest.approx(4, abs=1e-4)
    x = law.sample((200, 250), torch.float64)
    assert x.shape == (200, 250)
    u = Normal(1.0, 2.0).cdf(x.flatten()).sort().values
    steps = torch.arange(len(u)) / len(u)
    kolmogorov = float((u - steps).abs().max()) * math.sqrt(len(u))
    assert kolmogorov < 1.95  # the law of this statistic has .001 beyond it
    shifted = Normal(1.0, 2.0).cdf(x.flatten() + 0.04).sort().values
    assert float((shifted - steps).abs().max()) * math.sqrt(len(u)) > 1.36


def test_draws_fill_the_cells_of_a_coarse_grid():
    law = GridLaw(torch.zeros_like, 0.0, 1.0, 4)
    torch.testing.assert_close(law.points, torch.tensor([0.125, 0.375, 0.625, 0.875]))
    assert law.log_norm == pytest.approx(0, abs=1e-12)
    x = law.sample((20_000,), torch.float64)
    assert within(x, 0.5)
    assert within((x - 0.5).square(), 1 / 12)
    assert not within(0.25 * (4 * x).floor() + 0.125 - 0.02, 0.5)


def test_a_grid_needs_an_interval_and_cells():
    with pytest.raises(ValueError, match="low < high"):
        GridLaw(torch.zeros_like, 1.0, 1.0)
    with pytest.raises(ValueError, match="num_cells"):
        GridLaw(torch.zeros_like, 0.0, 1.0, 0)


# ----------------------------------------------------------------------------------- Gaussian mixture


@pytest.mark.parametrize("dim", [10, 50])
def test_the_high_dimensional_mixture(dim):
    target = GaussianMixture(40, dim=dim, scale=1.0)
    with torch.random.fork_rng():
        torch.manual_seed(0)
        means = ((torch.rand((40, dim), dtype=torch.float32) - 0.5) * 2 * 40).double()
    assert torch.equal(target.means, means)
    x = target.sample(50)
    for scale in (1.0, 2.0):
        each = Independent(Normal(means, scale * torch.ones(40, dim)), 1)
        expected = MixtureSameFamily(Categorical(torch.ones(40)), each).log_prob(x)
        found = GaussianMixture(40, dim=dim, scale=scale).log_prob(x)
        torch.testing.assert_close(found, expected, rtol=1e-10, atol=1e-10)
    # So far apart that every cell holds one component.
    torch.testing.assert_close(target.mode_weights(), torch.full((40,), 1 / 40), rtol=0, atol=1e-3)


# ------------------------------------------------------------------------------------------ many-well


@pytest.mark.parametrize(
    ("dim", "log_evidence"),
    [(2, 10.29347970707387), (4, 20.58695941414774), (32, 164.6956753131819)],
)
def test_many_well_evidence(dim, log_evidence):
    assert ManyWell(dim).log_evidence == pytest.approx(log_evidence, rel=1e-9)


def test_many_well_energy_and_published_constants():
    target = ManyWell(4)
    x = torch.randn(7, 4)
    energy = sum(-0.5 * x[:, i] - 6 * x[:, i] ** 2 + x[:, i] ** 4 + 0.5 * x[:, i + 1] ** 2 for i in (0, 2))
    torch.testing.assert_close(target.log_prob(x), -energy, rtol=1e-12, atol=1e-12)
    assert math.exp(target.x1_law.log_norm) == pytest.approx(11784.50927, abs=1e-4)
    # The cell edge at zero is one of the grid's, so the split is exact but for O(δ²).
    assert target.right_weight == pytest.approx(0.8443070962, abs=1e-6)
    mean = target.x1_law.expectation(lambda x1: x1)
    sd = math.sqrt(target.x1_law.expectation(lambda x1: (x1 - mean).square()))
    assert mean == pytest.approx(1.187960983, abs=1e-6)
    assert sd == pytest.approx(1.244409415, abs=1e-6)


def test_many_well_counts():
    target = ManyWell(6)
    x = torch.tensor([[1.0, 0, -1, 0, 1, 0], [1, 0, 1, 0, 1, 0], [-1, 0, -1, 0, -1, 0], [1, 0, -1, 0, 1, 5]])
    torch.testing.assert_close(target.right_shares(x), torch.tensor([0.75, 0.25, 0.75]))
    assert target.minority_share(x) == pytest.approx(5 / 12)
    expected = torch.zeros(8)
    expected[0b101], expected[0b111], expected[0b000] = 0.5, 0.25, 0.25
    torch.testing.assert_close(target.mode_shares(x), expected)
    w = target.right_weight
    assert float(target.mode_weights()[0b101]) == pytest.approx(w * w * (1 - w))
    assert float(target.mode_weights()[0b001]) == pytest.approx(w * (1 - w) ** 2)


def test_many_well_draws_carry_the_minority():
    target = ManyWell(200)
    n = 2000
    found = target.minority_share(target.sample(n))
    error = math.sqrt(target.right_weight * (1 - target.right_weight) / (100 * n))
    assert abs(found - (1 - target.right_weight)) < 5 * error
    assert abs(found - 0.5) > 5 * error


# -------------------------------------------------------------------------------------- unequal modes


def test_unequal_modes_against_torch():
    target = UnequalModes()
    x = 3 * torch.randn(9, 8)
    pair = MixtureSameFamily(Categorical(torch.tensor([0.8, 0.2])), Normal(torch.tensor([3.0, -3.0]), 0.5))
    expected = pair.log_prob(x[:, :4]).sum(1) + Normal(0.0, 1.0).log_prob(x[:, 4:]).sum(1)
    torch.testing.assert_close(target.log_prob(x), expected, rtol=1e-12, atol=1e-12)


def test_unequal_weights():
    weights = UnequalModes().mode_weights()
    assert weights.shape == (16,)
    assert float(weights[0b1111]) == pytest.approx(0.8**4)
    assert float(weights[0b0100]) == pytest.approx(0.8 * 0.2**3)
    x = torch.full((2, 8), 3.0)
    x[1, 2] = -3.0
    shares = UnequalModes().mode_shares(x)
    assert float(shares[0b1111]) == float(shares[0b1011]) == 0.5


# --------------------------------------------------------------------------------------------- funnel


def test_funnel_against_torch():
    target = Funnel()
    x = 2 * torch.randn(9, 10)
    v = x[:, 0]
    expected = Normal(0.0, 3.0).log_prob(v) + Normal(0.0, (v / 2).exp()[:, None]).log_prob(x[:, 1:]).sum(1)
    torch.testing.assert_close(target.log_prob(x), expected, rtol=1e-11, atol=1e-11)


def test_funnel_draws():
    target = Funnel()
    x = target.sample(50_000)
    assert within(x[:, 0].square(), 9.0)
    assert abs(target.found_v_sd(x) - 3) < 5 * 3 / math.sqrt(2 * 50_000)
    white = x[:, 1:] * torch.exp(-0.5 * x[:, :1])
    assert within(white.square().flatten(), 1.0)
    wrong = x[:, 1:] * torch.exp(-x[:, :1])  # a variance of e^{2v}
    assert not within(wrong.square().flatten(), 1.0)


# ---------------------------------------------------------------------------------------------- rings


def test_rings_are_normalised():
    target = Rings()
    axis = torch.arange(-8, 8, 0.04)
    value = target.log_prob(torch.cartesian_prod(axis, axis))
    assert float(torch.logsumexp(value, 0)) + 2 * math.log(0.04) == pytest.approx(0, abs=1e-8)
    one = Rings((0.3,), (1.0,), 0.2)  # so small that the origin is inside the ring
    axis = torch.arange(-2.5, 2.5, 0.005)
    value = one.log_prob(torch.cartesian_prod(axis, axis))
    assert float(torch.logsumexp(value, 0)) + 2 * math.log(0.005) == pytest.approx(0, abs=1e-5)


def test_ring_weights_by_quadrature():
    target = Rings((1.0, 3.0), (0.7, 0.3), 0.3)
    axis = torch.arange(-6, 6, 0.02)
    grid = torch.cartesian_prod(axis, axis)
    mass = target.log_prob(grid).exp() * 0.02**2
    inner = float(mass[grid.norm(dim=1) < 2].sum())
    assert float(target.mode_weights()[0]) == pytest.approx(inner, abs=2e-5)
    torch.testing.assert_close(Rings().mode_weights(), torch.tensor([0.2, 0.3, 0.5]), rtol=0, atol=1e-5)


def test_radii_of_draws_are_those_of_the_plane():
    """A wide ring, against its mean radius by quadrature in the plane; a normal radius would be seen."""
    target = Rings((1.0,), (1.0,), 0.5)
    axis = torch.arange(-5, 5, 0.02) + 0.01
    grid = torch.cartesian_prod(axis, axis)
    mean = float((target.log_prob(grid).exp() * grid.norm(dim=1)).sum()) * 0.02**2
    r = target.sample(20_000).norm(dim=1)
    assert within(r, mean)
    assert not within((1 + 0.5 * torch.randn(20_000)).abs(), mean)


def test_ring_shares():
    x = torch.tensor([[0.0, 2.1], [3.9, 0.0], [0.0, 7.0], [0.0, -5.1]])
    torch.testing.assert_close(Rings().mode_shares(x), torch.tensor([0.25, 0.25, 0.5]))


# --------------------------------------------------------------------------------------------- shells


@pytest.mark.parametrize(
    ("dim", "log_evidence"), [(2, -1.7456418720402125), (5, -5.673601236193663), (10, -14.59049107437862)]
)
def test_shell_evidence(dim, log_evidence):
    assert GaussianShells(dim).log_evidence == pytest.approx(log_evidence, abs=1e-9)


def test_shells_against_the_definition():
    target = GaussianShells(3)
    x = target.sample(6)
    centre = torch.tensor([3.5, 0, 0])
    shell = [Normal(2.0, 0.1).log_prob((x + sign * centre).norm(dim=1)) for sign in (1, -1)]
    torch.testing.assert_close(target.log_prob(x), torch.logaddexp(*shell) - 3 * math.log(12), rtol=1e-9, atol=1e-9)


def test_the_box_is_not_missed():
    """The evidence in the box [−6, 6]², by quadrature, is that without the box."""
    axis = -6 + 0.02 * (torch.arange(600) + 0.5)
    value = GaussianShells().log_prob(torch.cartesian_prod(axis, axis))
    log_evidence = float(torch.logsumexp(value, 0)) + 2 * math.log(0.02)
    assert log_evidence == pytest.approx(GaussianShells().log_evidence, abs=1e-6)
