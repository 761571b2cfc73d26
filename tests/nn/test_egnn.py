# SPDX-License-Identifier: Apache-2.0
"""The network for particles: what turns with them, what does not care for their order, and what is refused."""

import pyro
import pytest
import torch
from adapting import refit
from oracles import random_network

from pyro_sm.examples.improper import factor_model
from pyro_sm.guides import AutoDiffusion, GivenBase
from pyro_sm.nn.egnn import EGNN, EquivariantNetwork
from pyro_sm.nn.mean_free import MeanFree
from pyro_sm.targets import DoubleWellParticles

CASES = [(4, 2), (5, 3), (2, 1)]


def network(n, s, context_dim=0):
    torch.manual_seed(0)
    dim = (n - 1) * s
    net = EGNN(n, s, width=16, depth=2, num_bumps=8).build(dim, 2 * dim, context_dim).double()
    for parameter in net.parameters():
        torch.nn.init.normal_(parameter, std=0.3)
    return net.requires_grad_(False)


def turned(particles, z):
    """The same configurations, rotated, reflected and reordered."""
    n, s = particles.num_bodies, particles.space_dim
    rotation, _ = torch.linalg.qr(torch.randn(s, s, dtype=torch.float64))
    order = torch.randperm(n)

    def act(latents):
        x = particles.to_positions(latents).unflatten(-1, (n, s))
        return particles.to_latents((x[:, order] @ rotation).flatten(-2))

    return act, act(z)


@pytest.mark.parametrize(("n", "s"), CASES)
def test_the_mean_turns_with_the_particles_and_the_variance_stays(n, s):
    torch.manual_seed(1)
    particles, dim = MeanFree(n, s), (n - 1) * s
    z, c = torch.randn(6, dim, dtype=torch.float64), torch.randn(6, dtype=torch.float64)
    act, moved = turned(particles, z)

    def both(net):
        before, after = net(z, c, None), net(moved, c, None)
        same_mean = torch.allclose(act(before[:, :dim]), after[:, :dim], rtol=1e-9, atol=1e-9)
        return same_mean, torch.allclose(before[:, dim:], after[:, dim:], rtol=1e-9, atol=1e-9)

    assert both(network(n, s)) == (True, True)
    if dim > 1:
        assert both(random_network(dim)) == (False, False)


@pytest.mark.parametrize(("n", "s"), CASES)
def test_one_level_for_all_rows_is_that_level_for_each(n, s):
    net, dim = network(n, s, context_dim=2), (n - 1) * s
    z, context = torch.randn(5, dim, dtype=torch.float64), torch.randn(2, dtype=torch.float64)
    one = torch.tensor([0.3], dtype=torch.float64)
    torch.testing.assert_close(net(z, one, context), net(z, one.expand(5), context.expand(5, 2)))
    assert not torch.allclose(net(z, one, context), net(z, one + 0.1, context))


def written_out(net, particles, z, c):
    """The head of ``egnn.py``, one configuration and one pair at a time."""
    silu, (n, s) = torch.nn.functional.silu, (particles.num_bodies, particles.space_dim)
    x = particles.to_positions(z).unflatten(-1, (n, s))
    came, r = x.clone(), torch.exp(4 * c)
    condition = net.condition(net.embedding(c[None]))[0]
    h = net.start((x * x).sum(-1, keepdim=True))
    v = torch.zeros_like(x)
    for k in range(len(net.message)):
        scale, shift = net.modulation[k](condition).chunk(2)
        gathered, force = torch.zeros_like(h), torch.zeros_like(x)
        for i in range(n):
            for j in set(range(n)) - {i}:
                d = (x[i] - x[j]).norm()
                bumps = torch.exp(-0.5 * ((d - net.centres) / (4 / len(net.centres))) ** 2)
                seen = torch.cat([bumps, d[None], 1 / (d[None] + 0.1)])
                a = net.distance[k](seen) + net.ends[k](h[i] + h[j])
                m = silu(net.message[k](silu((1 + scale) * a + shift)))
                gathered[i] += m / n**0.5
                force[i] += net.pull[k](m) * (x[i] - x[j])
        v, x = v + force, x + r / (1 + r * r).sqrt() * force
        h = h + net.update[k](silu(net.gather[k](torch.cat([h, gathered], -1))))
    skip = net.skip(condition)
    v = v + (net.radial(h) + skip[0]) * came
    log_variance = net.variance(h).mean() + skip[1]
    return torch.cat([particles.to_latents(v.flatten()[None])[0], log_variance.expand(len(z))])


@pytest.mark.parametrize(("n", "s"), CASES)
def test_the_formulas_written_out(n, s):
    net, particles, dim = network(n, s), MeanFree(n, s), (n - 1) * s
    z, c = torch.randn(3, dim, dtype=torch.float64), torch.randn(3, dtype=torch.float64) / 4
    rows = [written_out(net, particles, row, level) for row, level in zip(z, c, strict=True)]
    torch.testing.assert_close(net(z, c), torch.stack(rows), rtol=1e-6, atol=1e-6)


def test_no_subnormal_numbers_slow_it_down():
    """A matrix product with them in it takes fifty times as long."""
    net = network(5, 3)
    far = net._seen(torch.randn(100, 10, 3, dtype=torch.float64) * 5).float()
    assert float(far[far > 0].min()) > 1e-30


def test_pieces_are_the_whole(monkeypatch):
    net = network(4, 2)
    z, c = torch.randn(50, 6, dtype=torch.float64), torch.randn(50, dtype=torch.float64)
    whole, shared = net(z, c), net(z, c[:1])
    monkeypatch.setattr("pyro_sm.nn.egnn._NUMBERS_IN_CACHE", 7 * 6 * 16)
    torch.testing.assert_close(net(z, c), whole)
    torch.testing.assert_close(net(z, c[:1]), shared)


def test_untrained_it_is_zero_and_particles_may_meet():
    net = EGNN(3, 2).build(4, 8, 0)
    assert isinstance(net, EquivariantNetwork)
    z = torch.zeros(2, 4, requires_grad=True)
    found = net(z, torch.zeros(2))
    assert bool((found == 0).all())
    found.sum().backward()
    assert bool(torch.isfinite(z.grad).all())


def test_it_refuses_what_is_not_particles():
    with pytest.raises(ValueError, match="9 mean-free latents, the model has 12"):
        EGNN(4, 3).build(12, 24, 0)
    with pytest.raises(ValueError, match="two particles"):
        EGNN(1, 3)
    with pytest.raises(ValueError, match="context of size 2"):
        network(3, 2, context_dim=2)(torch.zeros(1, 4).double(), torch.zeros(1).double())


def test_a_guide_for_particles_has_one_variance_for_all_latents():
    """But not where a base of one's own has turned one direction into another."""
    target = DoubleWellParticles()
    z = 2 * torch.randn(300, target.dim)
    for scale, same in ((2.0, True), (torch.linspace(1, 2, target.dim), False)):
        pyro.clear_param_store()
        model = factor_model(target.log_prob, target.dim)
        guide = AutoDiffusion(model, base=GivenBase(torch.zeros(target.dim), scale), architecture=EGNN(4, 2))
        guide.bind(model)
        refit(guide, z)
        factor = guide.diffusion().kernels.variance_factor
        assert bool((factor == factor[:, :1]).all()) is same
