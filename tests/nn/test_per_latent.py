# SPDX-License-Identifier: Apache-2.0
"""Networks of the latents' own, beside the joint one: the formula, who knows whom, and what it is good for."""

import copy

import pyro
import pytest
import torch
from adapting import move, noncentre
from oracles import random_network

from pyro_sm.diffusion.denoiser import Denoiser
from pyro_sm.divergence import Exact
from pyro_sm.examples.improper import factor_model
from pyro_sm.guides import AutoDiffusion, GivenBase
from pyro_sm.nn import per_latent
from pyro_sm.nn.mlp import MLP, NoiseEmbedding, level_features
from pyro_sm.nn.per_latent import PerLatent
from pyro_sm.targets import ManyWell

DOUBLE = {"dtype": torch.float64}
exact = {"rtol": 1e-10, "atol": 1e-10}


def own_network(dim=5, out=2, width=4):
    network = PerLatent(dim, out * dim, width=width, condition_width=3).double()
    for parameter in network.parameters():
        torch.nn.init.normal_(parameter, std=0.7)
    return network


@pytest.mark.parametrize("one_level", [True, False])
def test_the_formula_written_out(one_level):
    torch.manual_seed(0)
    network = own_network()
    x, condition = torch.randn(6, 5, **DOUBLE), torch.randn(1 if one_level else 6, 3, **DOUBLE)
    first, second = (layer(condition).expand(6, 8) for layer in (network.first, network.second))
    silu = torch.nn.functional.silu
    expected = torch.empty(6, 10, **DOUBLE)
    for row in range(6):
        for d in range(5):
            h = network.slope[d] * x[row, d] + network.shift[d]
            h = silu(h * (1 + first[row, :4]) + first[row, 4:])
            h = h + network.hidden.weight @ silu(h * (1 + second[row, :4]) + second[row, 4:]) + network.hidden.bias
            for k in range(2):
                expected[row, d + 5 * k] = network.last[k, d] @ silu(h)
    torch.testing.assert_close(network(x, condition), expected, **exact)


def test_no_latent_knows_another():
    """Unlike in the joint network."""
    torch.manual_seed(0)
    x, condition = torch.randn(5, **DOUBLE), torch.randn(1, 3, **DOUBLE)
    network = own_network()
    jacobian = torch.autograd.functional.jacobian(lambda at: network(at[None], condition)[0], x)
    for half in jacobian.split(5):
        assert bool((half.diagonal() != 0).all())
        assert torch.equal(half, torch.diag(half.diagonal()))
    joint = random_network(5)
    jacobian = torch.autograd.functional.jacobian(lambda at: joint(at[None], torch.zeros(1, **DOUBLE))[0], x)
    assert bool((jacobian[:5] - torch.diag(jacobian[:5].diagonal())).any())


@pytest.mark.parametrize("one_level", [True, False])
def test_pieces_are_the_whole(monkeypatch, one_level):
    network = own_network()
    x, condition = torch.randn(9, 5, **DOUBLE), torch.randn(1 if one_level else 9, 3, **DOUBLE)
    whole = network(x, condition)
    for rows in (1, 4):
        monkeypatch.setattr(per_latent, "_NUMBERS_IN_CACHE", rows * 5 * 4)
        torch.testing.assert_close(network(x, condition), whole, **exact)


def test_many_latents_have_networks_of_their_own():
    assert MLP().build(10, 20, 0).own is None
    assert MLP().build(11, 22, 0).own.slope.shape == (11, 16)
    assert MLP(latent_width=0).build(30, 60, 0).own is None
    assert MLP(latent_width=3).build(2, 4, 0).own.slope.shape == (2, 3)
    with pytest.raises(ValueError, match="latent_width >= 0"):
        MLP(latent_width=-1)


@pytest.mark.parametrize("context_dim", [0, 3])
def test_both_networks_are_added_up(context_dim):
    """Zero at the start, and able to learn; then the joint network and each latent's own."""
    torch.manual_seed(0)
    network = MLP(width=8, depth=1, latent_width=4).build(5, 10, context_dim).double()
    x, c = torch.randn(6, 5, **DOUBLE), torch.randn(6, **DOUBLE)
    context = torch.randn(context_dim, **DOUBLE) if context_dim else None
    start = network(x, c, context)
    assert not start.any()
    start.sum().backward()
    assert bool((network.own.last.grad.abs().sum((0, 2)) > 0).all())
    for parameter in network.parameters():
        torch.nn.init.normal_(parameter, std=0.3)
    whole = network(x, c, context)
    condition = network.condition(level_features(NoiseEmbedding().double(), c, context, context_dim))
    own, network.own = network.own(x, condition), None
    torch.testing.assert_close(whole, network(x, c, context) + own, **exact)


def test_under_forward_mode_products():
    """As the probability flow uses the network: ``vmap`` over ``jvp``."""
    network = MLP(width=8, depth=1, latent_width=4).build(3, 6, 0).double().requires_grad_(False)
    for parameter in network.parameters():
        torch.nn.init.normal_(parameter, std=0.3)
    x, level, divergence = torch.randn(7, 3, **DOUBLE), torch.tensor([0.2], **DOUBLE), Exact()
    jacobians = [torch.autograd.functional.jacobian(lambda at: network(at[None], level)[0, :3], row) for row in x]
    value, trace = divergence(lambda at: network(at, level)[:, :3], x, divergence.probes(x))
    torch.testing.assert_close(value, network(x, level)[:, :3], **exact)
    torch.testing.assert_close(trace, torch.stack([j.trace() for j in jacobians]), **exact)


@pytest.mark.slow
def test_independent_latents_are_learned_by_networks_of_their_own():
    """The same draws of sixteen wells, the same steps: the error left of the conditional mean, by quadrature."""
    target = ManyWell(32, dtype=torch.float32)
    u = target.sample(4096, torch.Generator().manual_seed(0)) / 2
    grid = torch.linspace(-3, 3, 1201)
    log_law = target._log_well(2 * grid)

    def error(latent_width):
        torch.manual_seed(0)
        network = MLP(latent_width=latent_width).build(32, 64, 0)
        optimiser = torch.optim.Adam(network.parameters(), lr=2e-3)
        denoiser = Denoiser(network)
        for _ in range(300):
            some = u[torch.randint(len(u), (512,))]
            r = torch.exp(torch.empty(512).uniform_(-2.5, 1.5))
            found = denoiser.regression(some, some + r[:, None] * torch.randn_like(some), r)
            optimiser.zero_grad()
            found.error.square().mean().backward()
            optimiser.step()
        fresh = target.sample(1000, torch.Generator().manual_seed(1)) / 2
        r = torch.tensor(0.5)
        y = fresh + r * torch.randn(fresh.shape, generator=torch.Generator().manual_seed(2))
        # Of the odd latents, the first of each pair, the law is known on a grid.
        at = y[:, ::2, None]
        share = torch.softmax(log_law - 0.5 * ((at - grid) / r).square(), -1)
        with torch.no_grad():
            mean, _ = denoiser.moments(y, r)
        return float((mean[:, ::2] - (share * grid).sum(-1)).square().mean())

    assert error(16) < 0.35 * error(0)


def widths(guide):
    """The widths of the latents' own network, or None; by the number of weights and by the skeleton alike."""
    own = guide._network.module.own
    assert guide.network_weights.numel() == sum(p.numel() for p in guide._network.module.parameters())
    return None if own is None else own.slope.shape


@pytest.mark.parametrize(("tilt", "expected"), [(0.0, (12, 16)), (0.1, None)])
def test_a_base_that_mixes_the_latents_leaves_them_nothing_of_their_own(tilt, expected):
    """And so it stays when the base moves, in a copy, and in a guide made from the state alone."""
    pyro.clear_param_store()
    tril = torch.eye(12)
    tril[3, 1] = tilt
    model = factor_model(lambda x: -0.5 * x.square().sum(-1), 12)
    guide = AutoDiffusion(model, base=GivenBase(torch.zeros(12), tril), num_steps=4)
    guide.bind(model)
    assert widths(guide) == expected
    state = {name: value.detach().clone() for name, value in guide.state_dict().items()}
    assert move(guide, 3 * torch.randn(400, 12) @ torch.randn(12, 12))
    assert widths(guide) == widths(copy.deepcopy(guide)) == expected
    moved = {name: value.detach().clone() for name, value in guide.state_dict().items()}
    for content in (state, moved):
        pyro.clear_param_store()
        loaded = AutoDiffusion(model, num_steps=4)
        loaded.load_state_dict(content)
        assert widths(loaded) == expected
    pyro.clear_param_store()
    asked = AutoDiffusion(
        model, base=GivenBase(torch.zeros(12), tril), num_steps=4, architecture=MLP(8, 1, latent_width=3)
    )
    asked.bind(model)
    assert widths(asked) == (12, 3)
    with pytest.raises(ValueError, match="construct the guide with the architecture"):
        AutoDiffusion(model, num_steps=4, architecture=MLP(256)).load_state_dict(state)


@pytest.mark.parametrize(("tilt", "expected"), [(0.0, (12, 16)), (0.1, None)])
def test_a_network_that_begins_anew_is_of_the_same_kind(tilt, expected):
    pyro.clear_param_store()
    torch.manual_seed(0)
    tril = torch.eye(12)
    tril[3, 1] = tilt
    model = factor_model(lambda x: -0.5 * x.square().sum(-1), 12)
    guide = AutoDiffusion(model, base=GivenBase(torch.zeros(12), tril), num_steps=4)
    guide.bind(model)
    v = 3 * torch.randn(2000, 1)
    assert noncentre(guide, torch.cat([v, torch.exp(v / 2) * torch.randn(2000, 11)], 1))
    assert widths(guide) == expected
