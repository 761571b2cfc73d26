# SPDX-License-Identifier: Apache-2.0
"""Independence Metropolis: its acceptance, its law, and its part as a correction."""

import math

import pytest
import torch

from pyro_sm.base import Draws
from pyro_sm.corrections import Correction, IndependentMetropolis, NoCorrection
from pyro_sm.corrections import metropolis as metropolis_module
from pyro_sm.corrections.metropolis import log_acceptance

pytestmark = pytest.mark.usefixtures("float64")


def pool(n, seed=0):
    """Draws of N(0, 1.2²) weighted towards the mixture ``.3 N(−1.5, .4²) + .7 N(1, .5²)``, with log Z = 3."""
    z = 1.2 * torch.randn(n, 1, generator=torch.Generator().manual_seed(seed))
    normal = torch.distributions.Normal
    parts = torch.stack([normal(-1.5, 0.4).log_prob(z[:, 0]), normal(1.0, 0.5).log_prob(z[:, 0])])
    log_p = torch.logsumexp(parts + torch.tensor([[0.3], [0.7]]).log(), 0) + 3
    return Draws(z, log_p, log_p - normal(0.0, 1.2).log_prob(z[:, 0]))


TRUTH = {"mean": 0.25, "left": 0.3, "square": 0.3 * (1.5**2 + 0.4**2) + 0.7 * (1 + 0.5**2)}


def estimates(z):
    z = z[:, 0]
    return {"mean": float(z.mean()), "left": float((z < -0.4).double().mean()), "square": float(z.square().mean())}


def worst(found, error):
    return max(abs(found[name] - truth) for name, truth in TRUTH.items()) / error


def test_the_target_is_left_as_it_is_on_a_finite_space():
    """``π P = π`` with every transition written out, and not if all proposals are accepted."""
    q = torch.tensor([0.1, 0.4, 0.3, 0.2])
    log_w = torch.tensor([1.0, -0.5, 2.0, -math.inf])
    accept = log_acceptance(log_w[:3, None], log_w[None, :]).exp()
    move = accept * q
    stay = 1 - move.sum(1)
    transition = move[:, :3] + torch.diag(stay)  # the last place has no weight and is never reached
    target = (q * log_w.exp())[:3]
    target = target / target.sum()
    torch.testing.assert_close(target @ transition, target, rtol=1e-12, atol=0)
    always = q.expand(3, 4)[:, :3] / q[:3].sum()
    assert float((target @ always - target).abs().max()) > 0.1


def test_acceptance_is_the_smaller_ratio():
    current, proposed = torch.tensor([0.0, 0.0, 1.0]), torch.tensor([-1.0, 2.0, -math.inf])
    torch.testing.assert_close(log_acceptance(current, proposed), torch.tensor([-1.0, 0.0, -math.inf]))


def test_the_walk_agrees_with_a_loop():
    draws = pool(60)
    sampler = IndependentMetropolis(3)
    walk = sampler.walk(draws.log_weight, torch.Generator().manual_seed(4))
    generator = torch.Generator().manual_seed(4)
    order = torch.randperm(60, generator=generator)
    log_u = torch.rand(20, 3, generator=generator).log()
    state = metropolis_module.resample(draws.log_weight, 3, generator).tolist()
    for chain in range(3):
        at, total = state[chain], 0.0
        for step in range(20):
            proposed = int(order[chain * 20 + step])
            ratio = min(1.0, math.exp(float(draws.log_weight[proposed] - draws.log_weight[at])))
            total += ratio / 20
            if math.exp(float(log_u[step, chain])) < ratio:
                at = proposed
            assert int(walk.visited[step, chain]) == at
        assert float(walk.acceptance[chain]) == pytest.approx(total, rel=1e-10)


def test_mean_acceptance_is_that_of_all_pairs():
    """In the long run ``E min(1, w'/w)``, w at a draw of the target and w' at one of the guide."""
    draws = pool(16_000, seed=1)
    some = draws.log_weight[:4000]
    share = torch.softmax(some, 0)
    expected = float(share @ log_acceptance(some[:, None], some[None, :]).exp().mean(1))
    found = IndependentMetropolis(8).walk(draws.log_weight, torch.Generator().manual_seed(2)).acceptance
    assert 0.3 < expected < 0.7
    assert abs(float(found.mean()) - expected) < 0.02
    assert float((found - expected).abs().max()) < 0.06


@pytest.mark.parametrize("num_chains", [2, 16])
def test_the_target_is_recovered_from_a_bad_proposal(num_chains, monkeypatch):
    draws = pool(16_000, seed=3)
    error = math.sqrt(4 / 16_000)  # about four proposals for one independent draw; each quantity has an sd below 1.4
    index = IndependentMetropolis(num_chains).apply(draws, 16_000)
    assert worst(estimates(draws.z[index]), error) < 5
    assert worst(estimates(draws.z[NoCorrection().apply(draws, 16_000)]), error) > 10
    monkeypatch.setattr(metropolis_module, "log_acceptance", lambda current, proposed: torch.zeros_like(proposed))
    always = IndependentMetropolis(num_chains).apply(draws, 16_000)
    assert worst(estimates(draws.z[always]), error) > 10
    monkeypatch.setattr(
        metropolis_module, "log_acceptance", lambda current, proposed: log_acceptance(proposed, current)
    )
    inverted = IndependentMetropolis(num_chains).apply(draws, 16_000)
    assert worst(estimates(draws.z[inverted]), error) > 10


def test_weights_that_are_right_on_average_are_enough():
    """Pseudo-marginal: noise on the weights with mean one leaves the law as it is, and lowers the acceptance."""
    draws = pool(16_000, seed=5)
    noise = 0.8 * torch.randn(16_000) - 0.5 * 0.8**2
    noisy = draws._replace(log_weight=draws.log_weight + noise)
    error = math.sqrt(8 / 16_000)
    sampler = IndependentMetropolis(16)
    assert worst(estimates(draws.z[sampler.apply(noisy, 16_000)]), error) < 5
    assert float(sampler.walk(noisy.log_weight).acceptance.mean()) < float(
        sampler.walk(draws.log_weight).acceptance.mean()
    )


def test_it_is_a_correction():
    sampler = IndependentMetropolis()
    assert isinstance(sampler, Correction)
    assert sampler.name == "independence Metropolis (4 chains)"
    assert IndependentMetropolis(1).name == "independence Metropolis (1 chain)"
    draws = pool(1000)
    index = sampler.apply(draws, 300, torch.Generator().manual_seed(1))
    assert index.shape == (300,)
    assert index.dtype == torch.int64
    assert torch.equal(index, sampler.apply(draws, 300, torch.Generator().manual_seed(1)))
    assert not torch.equal(index, sampler.apply(draws, 300, torch.Generator().manual_seed(2)))
    assert not torch.equal(index, index.sort().values)


def test_components_one_after_the_other_are_seen_by_every_chain():
    """As defensive draws come: nine tenths on the left mode first, the rest wide, weighted as of the mixture.

    A chain that walks through one of them alone has the law of its weights there, which is not the target.
    """
    left, wide = torch.distributions.Normal(-1.5, 0.4), torch.distributions.Normal(0.0, 2.0)
    z = torch.cat([left.sample((36_000,)), wide.sample((4000,))])
    normal = torch.distributions.Normal
    log_p = torch.logaddexp(
        normal(-1.5, 0.4).log_prob(z) + math.log(0.3), normal(1.0, 0.5).log_prob(z) + math.log(0.7)
    )
    log_q = torch.logaddexp(left.log_prob(z) + math.log(0.9), wide.log_prob(z) + math.log(0.1))
    draws = Draws(z[:, None], log_p, log_p - log_q)
    chains = IndependentMetropolis(10)
    share = (z[chains.walk(draws.log_weight).visited] < -0.4).double().mean(0)
    error = float(share.std()) / math.sqrt(10)
    assert error < 0.03
    assert abs(float(share.mean()) - 0.3) < 5 * error
    first = torch.softmax(draws.log_weight[:36_000], 0)  # what the first nine chains would have, in the old order
    assert float(first[z[:36_000] < -0.4].sum()) > 0.99


def test_all_of_the_chains_is_used():
    """Equal weights: every proposal is accepted, and the samples are spread over the whole pool."""
    draws = Draws(torch.zeros(100, 1), torch.zeros(100), torch.zeros(100))
    index = IndependentMetropolis(4).apply(draws, 20, torch.Generator().manual_seed(3))
    visited = IndependentMetropolis(4).walk(draws.log_weight, torch.Generator().manual_seed(3)).visited
    assert sorted(index.tolist()) == sorted(visited.T.flatten()[4::5].tolist())
    assert sorted(IndependentMetropolis(4).apply(draws, 100).tolist()) == list(range(100))


def test_draws_of_weight_zero_are_never_visited():
    draws = pool(400)
    draws.log_weight[::2] = -math.inf
    assert bool((IndependentMetropolis(2).walk(draws.log_weight).visited % 2 == 1).all())


def test_float32():
    draws = pool(500)
    draws = Draws(draws.z.float(), draws.log_p.float(), draws.log_weight.float())
    assert IndependentMetropolis().apply(draws, 100).shape == (100,)


def test_refusals():
    with pytest.raises(ValueError, match="num_chains >= 1, found 0"):
        IndependentMetropolis(0)
    draws = pool(10)
    with pytest.raises(ValueError, match="at least num_samples=11 draws to choose from, found 10"):
        IndependentMetropolis(2).apply(draws, 11)
    with pytest.raises(ValueError, match="at most 8 samples from 4 chains of equal length through 10 draws"):
        IndependentMetropolis(4).apply(draws, 10)
    with pytest.raises(ValueError, match="at least num_chains=20 draws, found 10"):
        IndependentMetropolis(20).apply(draws, 5)


@pytest.mark.parametrize(("bad", "message"), [(math.nan, "found 1 NaN"), (math.inf, "found 1 NaN or .inf among 10")])
def test_weights_that_are_no_weights(bad, message):
    draws = pool(10)
    draws.log_weight[3] = bad
    with pytest.raises(ValueError, match=message):
        IndependentMetropolis(2).apply(draws, 5)
    draws.log_weight[:] = -math.inf
    with pytest.raises(ValueError, match="at least one finite log weight"):
        IndependentMetropolis(2).apply(draws, 5)
