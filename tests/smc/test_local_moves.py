# SPDX-License-Identifier: Apache-2.0
"""Local moves of chosen draws: what they keep, what they mend, what they cannot, and how a sampler offers them."""

import math

import pyro
import pyro.distributions as dist
import pytest
import torch

from pyro_sm import DiffusionSampler, StoppingRule
from pyro_sm.corrections import DampedResampling
from pyro_sm.density import FunctionDensity
from pyro_sm.smc import HamiltonianMove, LocalMoves

pytestmark = pytest.mark.usefixtures("float64")


def ridge():
    """``z_1 ~ N(1, 3²)``, ``z_2 | z_1 ~ N(z_1, 0.1²)``: hardly wider than its own length is long."""

    def log_prob(z):
        return -0.5 * (((z[:, 0] - 1) / 3).square() + ((z[:, 1] - z[:, 0]) / 0.1).square())

    return FunctionDensity(log_prob, 2)


def on_the_ridge(n):
    first = 1 + 3 * torch.randn(n)
    return torch.stack([first, first + 0.1 * torch.randn(n)], 1)


def errors(z):
    """Of four moments, in standard errors of as many independent draws."""
    first, across = (z[:, 0] - 1) / 3, (z[:, 1] - z[:, 0]) / 0.1
    found = [first.mean(), across.mean(), (first.square().mean() - 1) / math.sqrt(2), across.square().mean() - 1]
    return torch.stack(found).abs() * math.sqrt(len(z)) / torch.tensor([1, 1, 1, math.sqrt(2)])


class AlwaysAccepts(HamiltonianMove):
    """A known wrong variant: Langevin dynamics without the accept step, at the same step size."""

    def apply(self, evaluate, chains, step_size, scale):
        made = super().apply(evaluate, chains, step_size, scale)
        momentum = torch.randn_like(chains.z) / scale
        z = chains.z + step_size * scale.square() * (momentum + 0.5 * step_size * chains.score)
        return made._replace(chains=chains._replace(z=z, log_p=evaluate(z)[0], score=evaluate(z)[1]))


@pytest.mark.parametrize(("move", "right"), [(HamiltonianMove(), True), (AlwaysAccepts(), False)])
def test_exact_draws_stay_exact(move, right):
    torch.manual_seed(0)
    moved = LocalMoves(60, move).run(ridge(), on_the_ridge(20_000))
    assert bool((errors(moved.z) < 5).all()) == right
    if right:
        assert abs(moved.acceptance - HamiltonianMove().target_acceptance) < 0.1


def test_repeats_part():
    torch.manual_seed(1)
    z = on_the_ridge(500).repeat(20, 1)
    moved = LocalMoves(30).run(ridge(), z).z
    assert len(moved.unique(dim=0)) > 0.99 * len(z)
    across = (moved[:, 1] - moved[:, 0]).unflatten(0, (20, 500))
    # Of 20 copies of one draw no more is left across the ridge than chance: mean variance within is that of all.
    assert float(across.var(0).mean()) == pytest.approx(0.01, rel=0.05)


def test_what_is_wrong_in_the_small_is_mended():
    torch.manual_seed(2)
    z = on_the_ridge(5000)
    wrong = z + torch.stack([torch.zeros(5000), 0.5 * torch.randn(5000)], 1)
    assert float(errors(wrong)[3]) > 100
    assert float(errors(LocalMoves(60).run(ridge(), wrong).z)[3]) < 5


def test_the_metric_follows_the_draws():
    """Begun far across the ridge their scores say that it is hundreds of times narrower than it is."""
    torch.manual_seed(2)
    z = on_the_ridge(2000)
    far = z + torch.stack([torch.zeros(2000), 30 * torch.randn(2000)], 1)
    moved = LocalMoves(200).run(ridge(), far)
    assert float(errors(moved.z)[3]) < 5
    assert 0.3 < moved.step_size < 3  # widths of the metric are those of the ridge by now


def test_shares_of_modes_stay_as_they_are():
    def log_prob(z):
        left, right = (-0.5 * (z - at).square().sum(-1) for at in (-6.0, 6.0))
        return torch.logsumexp(torch.stack([left, right]), 0)

    torch.manual_seed(3)
    z = torch.randn(1000, 2) + torch.where(torch.arange(1000) < 700, -6.0, 6.0)[:, None]
    moved = LocalMoves(50).run(FunctionDensity(log_prob, 2), z).z
    assert bool(((moved[:, 0] < 0) == (z[:, 0] < 0)).all())


def test_evaluations_are_counted():
    density = ridge()
    LocalMoves(7, HamiltonianMove(num_leapfrog=3)).run(density, on_the_ridge(11))
    assert density.evaluations.scores == 11 * (1 + 7 * 3)


def test_float32_stays_float32():
    moved = LocalMoves(4).run(ridge(), on_the_ridge(50).float())
    assert moved.z.dtype == moved.log_p.dtype == moved.score.dtype == torch.float32


def test_refusals():
    with pytest.raises(ValueError, match="expected num_moves >= 2, one to adapt and one to keep, found 1"):
        LocalMoves(1)

    def half(z):
        return torch.where(z[:, 0] > 0, -z.square().sum(-1), -math.inf)

    with pytest.raises(ValueError, match="found 3 of 5 without: resample first"):
        LocalMoves().run(FunctionDensity(half, 1), torch.tensor([[1.0], [-1.0], [2.0], [-2.0], [-3.0]]))


def test_a_sampler_moves_what_it_has_chosen():
    def model():
        mean = pyro.sample("mean", dist.Normal(0, 3))
        pyro.sample("scale", dist.LogNormal(0, 1))
        pyro.sample("obs", dist.Normal(mean, 0.5), obs=torch.tensor(1.0))

    sampler = DiffusionSampler(model, stopping=StoppingRule(max_evaluations=6000), disable_progbar=True)
    sampler.run()
    state = torch.get_rng_state()
    sampler._pool(1000)
    spent = sampler._replicas.counted()
    still = sampler.get_samples(1000, correction=DampedResampling())
    assert sampler._replicas.counted() == spent
    moved = sampler.get_samples(1000, correction=DampedResampling(), moves=LocalMoves(20))
    again = sampler.get_samples(1000, correction=DampedResampling(), moves=LocalMoves(20))
    assert torch.equal(state, torch.get_rng_state())
    assert sampler._replicas.counted().scores == spent.scores + 2 * 1000 * 21
    assert set(moved) == {"mean", "scale"}
    assert bool((moved["scale"] > 0).all())
    assert not torch.equal(still["mean"], moved["mean"])
    assert torch.equal(moved["mean"], again["mean"])
    precision = 1 / 9 + 4
    assert abs(float(moved["mean"].mean()) - 4 / precision) < 5 / math.sqrt(precision * 500)
