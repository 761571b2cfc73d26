# SPDX-License-Identifier: Apache-2.0
"""Hamiltonian moves: arithmetic, reversibility, and a density that they leave as it is."""

import math

import pytest
import torch

from pyro_sm.density import FunctionDensity
from pyro_sm.smc.moves import Chains, HamiltonianMove, leapfrog, log_acceptance

pytestmark = pytest.mark.usefixtures("float64")
SCALE = torch.tensor([1.3, 0.6], dtype=torch.float64)


def banana():
    """``z_1 ~ N(0.5, 1)``, ``z_2 | z_1 ~ N(0.5 z_1², 0.7²)``: bent, asymmetric, with exact draws."""

    def log_prob(z):
        return -0.5 * ((z[:, 0] - 0.5).square() + ((z[:, 1] - 0.5 * z[:, 0].square()) / 0.7).square())

    return FunctionDensity(log_prob, 2)


def exact_draws(n):
    z1 = 0.5 + torch.randn(n)
    return torch.stack([z1, 0.5 * z1.square() + 0.7 * torch.randn(n)], 1)


def at(density, z):
    return Chains(z, *density.log_prob_and_score(z))


MOMENTS = {
    "z1": (lambda z: z[:, 0], 0.5),
    "z1²": (lambda z: z[:, 0].square(), 1.25),
    "z2": (lambda z: z[:, 1], 0.625),
    "residual²": (lambda z: (z[:, 1] - 0.5 * z[:, 0].square()).square(), 0.49),
    "z1 · residual": (lambda z: z[:, 0] * (z[:, 1] - 0.5 * z[:, 0].square()), 0.0),
}


def worst(z):
    """The largest error of a moment, in the standard errors of exact draws; infinite draws are infinitely wrong."""
    exact, errors = exact_draws(len(z)), []
    for function, truth in MOMENTS.values():
        error = abs(float(function(z).mean()) - truth) / (float(function(exact).std()) / math.sqrt(len(z)))
        errors.append(math.inf if math.isnan(error) else error)
    return max(errors)


# ------------------------------------------------------------------------------------------ exact


def test_leapfrog_written_out():
    density = banana()
    start = at(density, exact_draws(4))
    momentum, step = torch.randn(4, 2), torch.tensor([0.1, 0.2, 0.3, 0.05])
    found, found_momentum = leapfrog(density.log_prob_and_score, start, momentum, step, SCALE, 3)
    for i in range(4):
        z, v = start.z[i : i + 1], momentum[i]
        for _ in range(3):
            v = v + 0.5 * step[i] * density.log_prob_and_score(z)[1][0]
            z = z + step[i] * v * SCALE**2
            v = v + 0.5 * step[i] * density.log_prob_and_score(z)[1][0]
        torch.testing.assert_close(found.z[i : i + 1], z, rtol=1e-12, atol=1e-12)
        torch.testing.assert_close(found_momentum[i], v, rtol=1e-12, atol=1e-12)
        torch.testing.assert_close(found.log_p[i : i + 1], density.log_prob(z))
        torch.testing.assert_close(found.score[i : i + 1], density.log_prob_and_score(z)[1])


def test_leapfrog_is_reversible_and_keeps_volume():
    density = banana()
    step = torch.tensor(0.2)
    start = at(density, exact_draws(20))
    momentum = torch.randn(20, 2)
    there, turned = leapfrog(density.log_prob_and_score, start, momentum, step, SCALE, 7)
    assert float((there.z - start.z).abs().min()) > 1e-4
    back, again = leapfrog(density.log_prob_and_score, there, -turned, step, SCALE, 7)
    torch.testing.assert_close(back.z, start.z, rtol=1e-11, atol=1e-11)
    torch.testing.assert_close(-again, momentum, rtol=1e-11, atol=1e-11)

    def flow(both):
        new, v = leapfrog(density.log_prob_and_score, at(density, both[None, :2]), both[None, 2:], step, SCALE, 7)
        return torch.cat([new.z, v], 1)[0]

    both, h = torch.cat([start.z[0], momentum[0]]), 1e-6
    columns = [(flow(both + h * e) - flow(both - h * e)) / (2 * h) for e in torch.eye(4)]
    assert float(torch.stack(columns, 1).det()) == pytest.approx(1, abs=1e-7)


def test_acceptance_is_the_change_of_the_total_energy():
    density = banana()
    old, new = at(density, exact_draws(50)), at(density, exact_draws(50))
    v, w = torch.randn(50, 2) / SCALE, torch.randn(50, 2) / SCALE
    law = torch.distributions.Normal(0.0, 1 / SCALE)
    expected = new.log_p + law.log_prob(w).sum(1) - old.log_p - law.log_prob(v).sum(1)
    torch.testing.assert_close(log_acceptance(old, new, v, w, SCALE), expected.clamp(max=0))


def test_energy_error_is_of_second_order():
    """At a fixed length ``L ε`` the mean change of the total energy falls as ε²."""
    density = banana()
    start = at(density, exact_draws(200))
    momentum = torch.randn(200, 2) / SCALE
    errors = []
    for halving in range(5):
        steps = 4 * 2**halving
        new, v = leapfrog(density.log_prob_and_score, start, momentum, torch.tensor(0.6 / steps), SCALE, steps)
        kinetic = 0.5 * ((v * SCALE).square() - (momentum * SCALE).square()).sum(1)
        errors.append(float((new.log_p - start.log_p - kinetic).abs().mean()))
    slopes = -torch.tensor(errors).log2().diff()
    torch.testing.assert_close(slopes, torch.full_like(slopes, 2.0), rtol=0, atol=0.15)


def test_adapted():
    move = HamiltonianMove(target_acceptance=0.7)
    found = move.adapted(torch.tensor([1.0, 2.0]), torch.tensor([0.7, 0.2]), 0.5)
    torch.testing.assert_close(found, torch.tensor([1.0, 2 * math.exp(-0.25)]))


# ---------------------------------------------------------------------------------- the whole move


@pytest.mark.parametrize("num_leapfrog", [1, 5], ids=["MALA", "HMC"])
def test_exact_draws_stay_exact(num_leapfrog):
    n = 60_000
    density, move = banana(), HamiltonianMove(num_leapfrog)
    chains = at(density, exact_draws(n))
    began = chains.z
    accepted = 0.0
    for _ in range(12):
        chains, moved, probability = move.apply(density.log_prob_and_score, chains, 0.5, SCALE)
        assert abs(float(moved.double().mean() - probability.mean())) < 5 * 0.5 / math.sqrt(n)
        accepted += float(moved.double().mean()) / 12
    assert 0.3 < accepted < 0.9  # else the companion below says nothing
    assert float(torch.corrcoef(torch.stack([began[:, 0], chains.z[:, 0]]))[0, 1]) < 0.5  # they did move
    assert worst(chains.z) < 5
    torch.testing.assert_close(chains.log_p, density.log_prob(chains.z))
    torch.testing.assert_close(chains.score, density.log_prob_and_score(chains.z)[1])


@pytest.mark.parametrize("wrong", ["no accept step", "kinetic energy forgotten", "mass for its inverse"])
def test_known_wrong_variants_are_seen(wrong):
    n = 60_000
    density = banana()
    chains = at(density, exact_draws(n))
    for _ in range(12):
        momentum = torch.randn(n, 2) / SCALE
        new, v = leapfrog(density.log_prob_and_score, chains, momentum, torch.tensor(0.5), SCALE, 1)
        if wrong == "no accept step":
            log_accept = torch.zeros(n)
        elif wrong == "kinetic energy forgotten":
            log_accept = log_acceptance(chains, new, momentum, momentum, SCALE)
        else:
            log_accept = log_acceptance(chains, new, momentum, v, 1 / SCALE)
        keep = torch.rand(n).log() < log_accept
        pairs = zip(new, chains, strict=True)
        chains = Chains(*(torch.where(keep if a.ndim == 1 else keep[:, None], a, b) for a, b in pairs))
    assert worst(chains.z) > 10


def test_chains_have_their_own_step_sizes_and_scales():
    density = banana()
    chains = at(density, exact_draws(2000))
    step = torch.cat([torch.full((1000,), 0.05), torch.full((1000,), 2.5)])
    scale = SCALE.expand(2000, 2).clone()
    acceptance = HamiltonianMove(2).apply(density.log_prob_and_score, chains, step, scale).acceptance
    assert float(acceptance[:1000].mean()) > 0.99
    assert float(acceptance[1000:].mean()) < 0.6
    scale[:1000] *= 50
    acceptance = HamiltonianMove(2).apply(density.log_prob_and_score, chains, step, scale).acceptance
    assert float(acceptance[:1000].mean()) < 0.6


def test_jitter_breaks_a_period():
    """Over half a period of a Gaussian every chain comes to ``−z``, at any energy: ``z²`` would never change."""
    density = FunctionDensity(lambda z: -0.5 * z.square().sum(1), 1)
    chains = at(density, torch.randn(4000, 1))
    kept = {}
    for jitter in (0.0, 0.3):
        move = HamiltonianMove(20, jitter=jitter)
        new = move.apply(density.log_prob_and_score, chains, math.pi / 20, torch.ones(1)).chains
        kept[jitter] = float(torch.corrcoef(torch.stack([chains.z[:, 0] ** 2, new.z[:, 0] ** 2]))[0, 1])
    assert kept[0.0] > 0.99
    assert kept[0.3] < 0.9


def test_evaluations_are_counted():
    density = banana()
    chains = at(density, exact_draws(11))
    HamiltonianMove(4).apply(density.log_prob_and_score, chains, 0.1, SCALE)
    assert density.evaluations.values == density.evaluations.scores == 11 + 4 * 11


@pytest.mark.parametrize("value", [math.nan, math.inf, -math.inf])
def test_places_without_a_finite_density_are_refused(value):
    def evaluate(z):
        bad = z[:, 0] > 0.2
        log_p = torch.where(bad, value, -0.5 * z.square().sum(1))
        return log_p, torch.where(bad[:, None], math.nan, -z)

    z = torch.randn(500, 2)
    z[:, 0] = -z[:, 0].abs()
    chains = Chains(z, *evaluate(z))
    moved = 0
    for num_leapfrog in (1, 3):
        move = HamiltonianMove(num_leapfrog).apply(evaluate, chains, 0.8, torch.ones(2))
        moved += int(move.accepted.sum())
        chains = move.chains
        assert bool(torch.isfinite(chains.z).all() & torch.isfinite(chains.log_p).all())
        assert bool(torch.isfinite(chains.score).all() & torch.isfinite(move.acceptance).all())
        assert float(chains.z[:, 0].max()) <= 0.2
        assert float(move.acceptance.min()) == 0
    assert moved > 400


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_dtype_and_seed(dtype):
    density = FunctionDensity(lambda z: -z.square().square().sum(1), 3, dtype=dtype)
    chains = at(density, torch.randn(5, 3, dtype=dtype))
    runs = []
    for _ in range(2):
        torch.manual_seed(3)
        move = HamiltonianMove(2).apply(density.log_prob_and_score, chains, 0.3, torch.ones(3, dtype=dtype))
        runs.append(move.chains.z)
        assert {x.dtype for x in move.chains} == {dtype}
        assert move.acceptance.dtype == dtype
    assert torch.equal(*runs)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"num_leapfrog": 0}, "num_leapfrog >= 1, found 0"),
        ({"target_acceptance": 1.0}, r"target_acceptance in \(0, 1\), found 1.0"),
        ({"jitter": 1.0}, r"jitter in \[0, 1\), found 1.0"),
    ],
)
def test_bad_arguments(arguments, message):
    with pytest.raises(ValueError, match=message):
        HamiltonianMove(**arguments)


@pytest.mark.parametrize(("acceptance", "factor"), [(0.65, 1.0), (1.0, math.exp(0.35)), (0.0, math.exp(-0.65))])
def test_step_sizes_rest_where_sixty_five_percent_are_accepted(acceptance, factor):
    found = HamiltonianMove().adapted(torch.tensor(0.3, dtype=torch.float64), torch.tensor(acceptance))
    assert float(found) == pytest.approx(0.3 * factor, rel=1e-6)
