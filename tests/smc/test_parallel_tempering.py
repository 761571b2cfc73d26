# SPDX-License-Identifier: Apache-2.0
"""Parallel tempering: the rule of swaps, the ladder, the law of the coldest chain, and the measures of mixing."""

import itertools
import math

import arviz as az
import pytest
import torch

from pyro_sm.density import FunctionDensity
from pyro_sm.gaussians.gaussian import GaussianDensity
from pyro_sm.smc import Bridge, HamiltonianMove, ParallelTempering, Power
from pyro_sm.smc import parallel as parallel_module
from pyro_sm.smc.mixing import effective_draws, split_rhat
from pyro_sm.smc.parallel import equal_swaps, first_betas, swap_probability
from pyro_sm.targets import UnequalModes
from pyro_sm.targets.metrics import mode_total_variation

pytestmark = pytest.mark.usefixtures("float64")
PATHS = [Bridge(), Power(0.05)]


def two_modes():
    """``.25 N(−4, .5²) + .75 N(3, 1)`` times ``N(0.2 x, 1)``: two separated modes, correlated."""
    law = torch.distributions.Normal

    def log_prob(z):
        parts = torch.stack([law(-4.0, 0.5).log_prob(z[:, 0]), law(3.0, 1.0).log_prob(z[:, 0])])
        first = torch.logsumexp(parts + torch.tensor([[0.25], [0.75]]).log(), 0)
        return first + law(0.2 * z[:, 0], 1.0).log_prob(z[:, 1]) + 5

    return FunctionDensity(log_prob, 2), GaussianDensity(torch.zeros(2), torch.diag(torch.tensor([4.0, 1.5])))


# ------------------------------------------------------------------------------------- swaps and ladder


def test_swaps_leave_the_product_as_it_is_on_a_finite_space():
    """Two chains on three places: ``π P = π`` for the joint law with every swap written out."""
    gain = torch.tensor([0.0, 1.3, -0.7])
    base = torch.tensor([0.2, -0.4, 0.1])
    beta = torch.tensor([0.3, 1.0])
    law = torch.softmax(base[:, None] + beta * gain[:, None], 0)  # (places, temperatures)
    pairs = list(itertools.product(range(3), repeat=2))
    joint = torch.stack([law[a, 0] * law[b, 1] for a, b in pairs])
    for sign, kept in ((1, True), (-1, False)):
        transition = torch.zeros(9, 9)
        for i, (a, b) in enumerate(pairs):
            p = float(swap_probability(sign * torch.stack([gain[a], gain[b]])[:, None], beta)[0, 0])
            transition[i, pairs.index((b, a))] += p
            transition[i, i] += 1 - p
        found = joint @ transition
        assert (float((found - joint).abs().max()) < 1e-14) is kept


def test_swap_probability_where_a_gain_is_not_finite():
    gain = torch.tensor([[-math.inf, math.nan, math.inf, 0.0], [1.0, 1.0, 1.0, -math.inf]])
    assert swap_probability(gain, torch.tensor([0.0, 1.0])).tolist() == [[0.0] * 4]


def test_first_ladders():
    torch.testing.assert_close(first_betas(3, 0.04), torch.tensor([0.04, 0.2, 1.0]))
    torch.testing.assert_close(first_betas(4, 0.0), torch.tensor([0.0, 0.01, 0.1, 1.0]))
    assert first_betas(2, 0.0).tolist() == [0.0, 1.0]
    assert first_betas(1, 0.0).tolist() == [1.0]


def test_equal_swaps():
    beta = torch.tensor([0.0, 0.2, 0.5, 1.0])
    torch.testing.assert_close(equal_swaps(beta, torch.full((3,), 0.4)), beta)
    # Λ = 0, .6, .75, .9 at the old β: .3 is half of the first step, .6 the end of it.
    torch.testing.assert_close(equal_swaps(beta, torch.tensor([0.6, 0.15, 0.15])), torch.tensor([0, 0.1, 0.2, 1.0]))
    stuck = equal_swaps(beta, torch.tensor([1.0, 0.0, 0.0]))
    assert bool((stuck.diff() > 0).all())
    assert equal_swaps(beta[:2], torch.tensor([0.3])).tolist() == beta[:2].tolist()


@pytest.mark.parametrize("path", PATHS, ids=["bridge", "power"])
def test_adapted_swap_rates_are_equal(path):
    density, start = two_modes()
    ladder = ParallelTempering(60, 5, 160, 40, path=path).run(density, start).ladder
    rates = [rung.swap_rate for rung in ladder[:-1]]
    assert max(rates) - min(rates) < 0.12
    unadapted = ParallelTempering(60, 5, 0, 40, path=path).run(density, start).ladder
    rates = [rung.swap_rate for rung in unadapted[:-1]]
    assert max(rates) - min(rates) > (0.2 if path.hottest == 0 else 0.05)


def test_adapted_acceptance_is_the_one_asked_for():
    density, start = two_modes()
    sampler = ParallelTempering(60, 4, 160, 30, move=HamiltonianMove(3, 0.8))
    ladder = sampler.run(density, start).ladder
    assert math.isnan(ladder[0].acceptance)  # drawn, not moved
    assert math.isnan(ladder[0].step_size)
    assert math.isnan(ladder[-1].swap_rate)
    assert all(abs(rung.acceptance - 0.8) < 0.08 for rung in ladder[1:])


# ------------------------------------------------------------------------------------------- the law


def left_share(run):
    return (run.z[..., 0] < -1).double().mean(1)


@pytest.mark.parametrize("path", PATHS, ids=["bridge", "power"])
def test_two_modes(path):
    density, start = two_modes()
    run = ParallelTempering(200, 5, 120, 120, path=path).run(density, start)
    share = left_share(run)  # independent chains: their spread is the error
    error = float(share.std()) / math.sqrt(200)
    assert error < 0.015
    assert abs(float(share.mean()) - 0.25) < 5 * error
    right = run.z[run.z[..., 0] > -1]
    assert abs(float(right[:, 0].mean()) - 3) < 0.1
    assert float((right[:, 1] - 0.2 * right[:, 0]).std()) == pytest.approx(1, abs=0.05)
    assert float(run.rhat.max()) < 1.1
    value, score = density.log_prob_and_score(run.z.flatten(0, 1))
    torch.testing.assert_close(run.log_p.flatten(), value)
    torch.testing.assert_close(run.score.flatten(0, 1), score)


@pytest.mark.parametrize("wrong", ["one temperature", "no swaps", "swaps of the wrong sign"])
def test_known_wrong_variants_are_seen(wrong, monkeypatch):
    density, start = two_modes()
    sampler = ParallelTempering(200, 1 if wrong == "one temperature" else 5, 80, 80)
    if wrong == "no swaps":
        monkeypatch.setattr(parallel_module, "swap_probability", lambda gain, beta: torch.zeros_like(gain[1:]))
    if wrong == "swaps of the wrong sign":
        right = swap_probability
        monkeypatch.setattr(parallel_module, "swap_probability", lambda gain, beta: right(-gain, beta))
    run = sampler.run(density, start)
    error = abs(float(left_share(run).mean()) - 0.25)
    assert error > 0.08 or float(run.rhat[0]) > 2  # more than five of its largest error, or chains that disagree


@pytest.mark.parametrize("path", PATHS, ids=["bridge", "power"])
def test_unequal_modes(path):
    target = UnequalModes()
    density = FunctionDensity(target.log_prob, target.dim)
    start = GaussianDensity(target.start.loc, torch.diag(target.start.scale))
    run = ParallelTempering(200, 7, 300, 150, path=path).run(density, start)
    shares = torch.stack([target.mode_shares(chain) for chain in run.z])
    error = shares.std(0) / math.sqrt(200)
    weights = target.mode_weights()
    assert bool(((shares.mean(0) - weights).abs() < 5 * error + 2e-3).all())
    assert mode_total_variation(shares.mean(0), weights) < 0.08
    alone = ParallelTempering(200, 1, 80, 80).run(density, start)
    assert mode_total_variation(target.mode_shares(alone.z.flatten(0, 1)), weights) > 0.3


@pytest.mark.parametrize("path", PATHS, ids=["bridge", "power"])
def test_exact_draws_stay_exact(path, monkeypatch):
    """Every temperature begins at its own law; nothing adapts; the coldest chains are where they should be."""
    loc, tril = torch.tensor([1.0, -0.5]), torch.tensor([[1.0, 0.0], [0.6, 0.5]])
    target, start = GaussianDensity(loc, tril), GaussianDensity(torch.zeros(2), 2 * torch.eye(2))
    chains, temperatures = 6000, 3
    begin = parallel_module._Ladders._first_points

    def exactly(ladders):
        points = begin(ladders)
        rows = []
        for beta in first_betas(temperatures, path.hottest):
            precision = beta * torch.linalg.inv(tril @ tril.T) + (path.hottest == 0) * (1 - beta) * torch.eye(2) / 4
            covariance = torch.linalg.inv(precision)
            mean = covariance @ (beta * torch.linalg.inv(tril @ tril.T) @ loc)
            rows.append(mean + torch.randn(chains, 2) @ torch.linalg.cholesky(covariance).T)
        assert points.z.shape == (chains * temperatures, 2)
        return path.points(start, target, torch.cat(rows))

    monkeypatch.setattr(parallel_module._Ladders, "_first_points", exactly)
    run = ParallelTempering(chains, temperatures, 0, 6, move=HamiltonianMove(1), path=path).run(target, start)
    z = run.z[:, -1]
    white = torch.linalg.solve_triangular(tril, (z - loc).T, upper=False).T
    assert float(white.mean(0).abs().max()) < 5 / math.sqrt(chains)
    assert float((white.T.cov() - torch.eye(2)).abs().max()) < 5 * math.sqrt(2 / chains)
    assert all(rung.swap_rate > 0.1 for rung in run.ladder[:-1])


# ------------------------------------------------------------------------------- the course of a run


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("path", PATHS, ids=["bridge", "power"])
def test_shapes_counts_and_seed(path, dtype):
    density = FunctionDensity(lambda z: -z.square().square().sum(1), 3, dtype=dtype)
    start = GaussianDensity(torch.zeros(3, dtype=dtype), torch.eye(3, dtype=dtype))
    told, runs = [], []
    for seed in (1, 1, 2):
        torch.manual_seed(seed)
        sampler = ParallelTempering(5, 4, 7, 10, 3, HamiltonianMove(2), path)
        runs.append(sampler.run(density, start, progress=lambda done, total: told.append((done, total))))
    run = runs[0]
    assert run.z.shape == run.score.shape == (5, 10, 3)
    assert run.log_p.shape == (5, 10)
    assert run.z.dtype == run.log_p.dtype == run.score.dtype == dtype
    assert len(run.ladder) == 4
    assert run.ladder[-1].beta == 1
    assert run.ladder[0].beta == pytest.approx(path.hottest)
    per_sweep = 5 * 3 * 2 + 5 if path.hottest == 0 else 5 * 4 * 2
    assert run.density_evaluations == 20 + 37 * per_sweep
    assert density.evaluations.values == 3 * run.density_evaluations
    assert told[:37] == [(i, 37) for i in range(1, 38)]
    assert torch.equal(run.z, runs[1].z)
    assert not torch.equal(run.z, runs[2].z)
    assert torch.is_grad_enabled()


def test_one_chain_and_one_temperature():
    density, start = two_modes()
    run = ParallelTempering(1, 2, 10, 8).run(density, start)
    assert run.effective_draws.shape == run.rhat.shape == (2,)
    assert ParallelTempering(3, 1, 10, 8, path=Power()).run(density, start).ladder[0].beta == 1


def test_it_begins_where_the_density_is_finite():
    start = GaussianDensity(torch.full((1,), -1.0), torch.eye(1))
    density = FunctionDensity(lambda z: torch.where(z[:, 0] > 0, -z[:, 0], -math.inf), 1)
    run = ParallelTempering(100, 4, 60, 20).run(density, start)
    assert float(run.z.min()) > 0
    assert abs(float(run.z.mean()) - 1) < 0.15
    nowhere = FunctionDensity(lambda z: 0 * z[:, 0] - math.inf, 1)
    with pytest.raises(ValueError, match="finite density at some of 8 starts, found 0"):
        ParallelTempering(2, 4).run(nowhere, start)


@pytest.mark.parametrize("name", ["num_chains", "num_temperatures", "num_draws", "thin"])
def test_counts(name):
    with pytest.raises(ValueError, match=f"{name} >= 1, found 0"):
        ParallelTempering(**{name: 0})
    with pytest.raises(ValueError, match="num_warmup >= 0, found -1"):
        ParallelTempering(num_warmup=-1)


# ----------------------------------------------------------------------------------------- mixing


def autoregressive(chains, size, rho):
    x = torch.randn(chains, size, 2)
    for i in range(1, size):
        x[:, i] = rho * x[:, i - 1] + math.sqrt(1 - rho**2) * x[:, i]
    return x


@pytest.mark.parametrize("rho", [-0.5, 0.0, 0.9])
@pytest.mark.parametrize("size", [200, 201])
def test_mixing_agrees_with_arviz(rho, size):
    x = autoregressive(4, size, rho) + torch.tensor([0.0, 1.0]) * torch.arange(4)[:, None, None]
    for i in range(2):
        one = x[..., i].numpy()
        assert float(split_rhat(x)[i]) == pytest.approx(float(az.rhat(one, method="split")), rel=1e-6)
        assert float(effective_draws(x)[i]) == pytest.approx(float(az.ess(one, method="mean")), rel=0.05)


def test_effective_draws_of_a_known_process():
    x = autoregressive(50, 2000, 0.8)
    expected = 100_000 * (1 - 0.8) / (1 + 0.8)
    torch.testing.assert_close(effective_draws(x), torch.full((2,), expected), rtol=0.1, atol=0)
    assert float(split_rhat(x).max()) < 1.01


def test_mixing_of_constants_and_refusals():
    assert bool(torch.isnan(effective_draws(torch.ones(2, 10))))
    assert bool(torch.isnan(split_rhat(torch.ones(2, 10))))
    for shape in ((10,), (2, 7), (0, 10)):
        with pytest.raises(ValueError, match="at least 8 draws"):
            split_rhat(torch.zeros(shape))
