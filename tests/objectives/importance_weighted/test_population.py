# SPDX-License-Identifier: Apache-2.0
"""The population: exchange is exact whatever the sampler, moves keep the target, and the state can be saved."""

from __future__ import annotations

import math
import signal

import pytest
import torch

from pyro_sm import AutoDiffusion, DiffusionSampler, GivenBase, ImportanceWeightedScoreMatching, StoppingRule
from pyro_sm.base import Draws
from pyro_sm.density import FunctionDensity
from pyro_sm.diffusion.covering import WideCovering, draw_with_covering
from pyro_sm.examples.improper import factor_model
from pyro_sm.nn.mlp import MLP
from pyro_sm.objectives import MarginalWeights, PathWeights
from pyro_sm.objectives.importance_weighted.buffer import Buffer, Round
from pyro_sm.objectives.importance_weighted.population import Particles, Population, as_round
from pyro_sm.smc.tempered import TemperedSMC

LEFT = 0.2


def log_prob(x):
    """Modes at −2 and 2 in the first latent, of weights .2 and .8; standard normal in the second; ``log Z = 1``."""
    parts = torch.stack([-0.5 * (x[..., 0] + 2).square() / 0.25, -0.5 * (x[..., 0] - 2).square() / 0.25])
    weight = torch.tensor([LEFT, 1 - LEFT], dtype=x.dtype).log().reshape(2, *[1] * (x.ndim - 1))
    norm = math.log(2 * math.pi) + math.log(0.5)
    return torch.logsumexp(parts + weight, 0) - 0.5 * x[..., 1].square() - norm + 1


def exact(count):
    side = torch.where(torch.rand(count) < LEFT, -2.0, 2.0)
    return torch.stack([side + 0.5 * torch.randn(count), torch.randn(count)], 1)


def settings(count=64, **changes):
    smc = TemperedSMC(num_particles=count, num_moves=2)
    return Population(num_particles=count, seeding=smc, **{"min_khat": -math.inf, **changes})


def untrained():
    """A sampler that is a Gaussian, too wide and off centre."""
    guide = AutoDiffusion(
        factor_model(log_prob, 2), base=GivenBase(0.5, 2.5), architecture=MLP(width=16, depth=1), num_steps=8
    )
    guide.bind(factor_model(log_prob, 2))
    return guide.diffusion()


def particles_at(z):
    density = FunctionDensity(log_prob, 2)
    log_p, score = density.log_prob_and_score(z)
    return density, Particles(z, log_p, score, torch.tensor(0.5), torch.tensor(0.0))


# -------------------------------------------------------------------------------------------------- is it exact?


@torch.no_grad()
def test_exchange_and_moves_keep_the_target():
    torch.manual_seed(0)
    density, particles = particles_at(exact(8000))
    # A large share of a lopsided component: weights that forget it would favour one of the modes.
    population, process, wide = settings(8000), untrained(), WideCovering(share=0.6, scale=0.4)
    rates = []
    for _ in range(6):
        draws, num_guide = draw_with_covering(process, density, wide, 8000)
        particles, rate = population.exchanged(particles, draws, process, density, wide, 1 - num_guide / 8000)
        particles = population.moved(particles, density)
        rates.append(rate)
    assert min(rates) > 0.1
    z = particles.z
    assert abs(float((z[:, 0] < 0).float().mean()) - LEFT) < 4 * math.sqrt(LEFT * (1 - LEFT) / 8000)
    assert abs(float(z[:, 1].var()) - 1) < 4 * math.sqrt(2 / 8000)
    inside = z[z[:, 0] > 0, 0]
    assert abs(float(inside.var()) - 0.25) < 0.02
    log_p, score = density.log_prob_and_score(z)
    assert torch.allclose(log_p, particles.log_p, atol=1e-5)
    assert torch.allclose(score, particles.score, atol=1e-4)


@torch.no_grad()
def test_exchange_repairs_the_shares_of_modes_and_taking_everything_does_not():
    torch.manual_seed(1)
    wrong = exact(4000)
    wrong[:, 0] = wrong[:, 0].abs() * torch.where(torch.rand(4000) < 0.7, -1.0, 1.0)
    population, process, wide = settings(4000), untrained(), WideCovering()
    density, particles = particles_at(wrong)
    careless = particles
    for _ in range(20):
        draws, num_guide = draw_with_covering(process, density, wide, 4000)
        share = 1 - num_guide / 4000
        particles, _ = population.exchanged(particles, draws, process, density, wide, share)
        flat = draws._replace(log_weight=torch.full_like(draws.log_weight, math.inf))
        careless, rate = population.exchanged(careless, flat, process, density, wide, share)
        assert rate == 1
    assert abs(float((particles.z[:, 0] < 0).float().mean()) - LEFT) < 0.03
    assert abs(float((careless.z[:, 0] < 0).float().mean()) - LEFT) > 0.1


def test_seeds_are_draws_of_the_target_and_counted():
    torch.manual_seed(2)
    density = FunctionDensity(log_prob, 2)
    particles, mode = settings(4000).seeded(untrained(), density)
    # Here the list of modes is that of the two sides.
    assert sorted({tuple(row) for row in torch.stack([mode, (particles.z[:, 0] < 0).long()], 1).tolist()}) in (
        [(0, 0), (1, 1)],
        [(0, 1), (1, 0)],
    )
    assert abs(float((particles.z[:, 0] < 0).float().mean()) - LEFT) < 0.08
    assert density.evaluations.values >= 4000 * 3
    assert torch.allclose(density.log_prob(particles.z), particles.log_p, atol=1e-5)


# ------------------------------------------------------------------------------------------------- in the rounds


def test_the_population_counts_like_a_round_and_a_silent_round_not_at_all():
    draws = Draws(torch.zeros(4, 2), torch.zeros(4), torch.zeros(4))
    silent = Round(draws, torch.zeros(4), 0.1, 4)
    particles = Particles(torch.ones(2, 2), torch.zeros(2), torch.zeros(2, 2), torch.tensor(1.0), torch.tensor(0.0))
    buffer = Buffer((silent, as_round(particles)))
    assert torch.equal(buffer.weights(), torch.tensor([0.0, 0, 0, 0, 0.5, 0.5]))
    assert int(buffer.pick(buffer.weights(), torch.tensor([0.0]))) == 4


def sampler(population, budget=3000, disable_progbar=True, **changes):
    objective = ImportanceWeightedScoreMatching(
        256, steps_per_round=5, batch_size=64, buffer_rounds=2, population=population, **changes
    )
    guide = AutoDiffusion(
        factor_model(log_prob, 2), base=GivenBase(0.0, 2.0), architecture=MLP(width=16, depth=1), num_steps=8,
        name="population",
    )  # fmt: skip
    return DiffusionSampler(
        factor_model(log_prob, 2), guide=guide, objective=objective, stopping=StoppingRule(max_evaluations=budget),
        disable_progbar=disable_progbar,
    )  # fmt: skip


def test_weights_beyond_use_bring_one_and_others_do_not():
    for population, expected in ((settings(), True), (settings(min_khat=math.inf), False), (None, False)):
        run = sampler(population)
        run.run()
        assert (run.objective.state.population is not None) is expected
        assert run.objective.evaluations_per_round == 256 + (64 if expected else 0)
        seeding = run.objective.state.seeding
        assert (seeding > 0) is expected
        assert run.history[-1].density_evaluations - seeding <= 3000 + (len(run.history) * 64 if expected else 0)
        run.guide.release()
    marginal = ImportanceWeightedScoreMatching(weighting=MarginalWeights(), population=settings())
    assert marginal.population is None


@pytest.mark.parametrize("move_base", [True, False])
def test_the_first_step_already_sees_where_the_guide_has_moved(move_base):
    """The base is far too wide: it moves in the first round, and the two modes become an anchor."""
    seen = []

    class Watching(PathWeights):
        def loss(self, process, density, wide, buffer, step):
            seen.append(process)
            return super().loss(process, density, wide, buffer, step)

    guide = AutoDiffusion(
        factor_model(log_prob, 2), base=GivenBase(0.0, 60.0), architecture=MLP(width=16, depth=1), num_steps=8,
        name="far",
    )  # fmt: skip
    population = settings(256, move_base=move_base)
    objective = ImportanceWeightedScoreMatching(256, batch_size=64, population=population, weighting=Watching())
    objective.loss_and_grads(factor_model(log_prob, 2), guide)
    (process,) = seen
    assert (float(process.base_scale_tril.detach().diagonal().max()) < 10) is move_base
    assert (process.denoiser.anchor is not None) is move_base


def test_evaluations_are_counted():
    run = sampler(settings())
    run.run()
    first, last = run.history[0], run.history[-1]
    rounds = last.round - first.round
    exchanged = last.density_evaluations - first.density_evaluations - rounds * (256 + 64)
    assert 0 <= exchanged <= rounds * 64


def test_a_saved_run_goes_on_bit_for_bit(tmp_path):
    path = tmp_path / "run.ckpt"
    whole = sampler(settings(), budget=6000)
    whole.run()
    whole.guide.release()
    part = sampler(settings(), budget=6000)
    # Stop between two rounds, as Ctrl-C does.
    trainer = part.replicas[0]
    step, calls = trainer.step, iter(range(1000))

    def interrupted(*args):
        if next(calls) == 23:
            raise KeyboardInterrupt
        step(*args)

    trainer.step = interrupted
    with pytest.raises(KeyboardInterrupt):
        part.run()
    part.save(path)
    part.guide.release()
    rest = sampler(settings(), budget=6000)
    rest.load(path)
    rest.run()
    assert [tuple(a)[:8] for a in rest.history[1:]] == [tuple(a)[:8] for a in whole.history[1:]]
    assert torch.equal(rest.objective.state.population.z, whole.objective.state.population.z)


def test_the_rule_follows_the_tail_of_the_first_weights():
    torch.manual_seed(3)
    population = Population()
    spread = torch.randn(2048)
    assert population.needed(40 * spread, 2)
    assert population.needed(torch.where(torch.arange(2048) < 3, spread, -math.inf), 2)
    # Heavy tails that are worth weighting: a few effective draws say little, k̂ says enough.
    assert not population.needed(2 * spread, 2)
    assert not population.needed(torch.zeros(2048), 2)
    assert settings().needed(torch.zeros(2048), 2)


def test_with_too_many_latents_there_is_none():
    assert settings(max_dim=2).needed(torch.zeros(2048), 2)
    assert not settings(max_dim=1).needed(torch.zeros(2048), 2)
    spent = []
    for population in (settings(max_dim=1), None):
        run = sampler(population, budget=1500)
        run.run()
        assert run.objective.state.population is None
        spent.append(run.objective.evaluations)
        run.guide.release()
    assert spent[0] == spent[1]
    with pytest.raises(ValueError, match="positive counts"):
        Population(max_dim=0)


def test_only_the_first_round_decides():
    run = sampler(settings(min_khat=math.inf), budget=1500)
    run.run()
    run.objective.population = settings()
    assert run.objective.state.population is None
    run.stopping = StoppingRule(max_evaluations=3000)
    run.run()
    assert run.objective.state.population is None
    run.guide.release()


def test_progress_of_the_seeding_is_told():
    torch.manual_seed(4)
    told = []
    settings(256).seeded(untrained(), FunctionDensity(log_prob, 2), lambda beta: told.append(beta) or True)
    assert told[0] == 0
    assert told == sorted(told)
    assert told[-1] == 1


def test_the_bar_shows_the_seeding(capsys):
    run = sampler(settings(), disable_progbar=False)
    run.run()
    shown = capsys.readouterr().err
    assert "seeding, looking for modes" in shown
    assert "seeding, β=1:" in shown
    assert "training:" in shown
    run.guide.release()


@pytest.mark.parametrize("presses", [1, 2])
def test_interrupting_the_seeding_leaves_a_state_to_go_on_from(tmp_path, monkeypatch, presses):
    """Once: noticed at the next temperature. Twice: at once, from the middle of it."""
    path = tmp_path / "run.ckpt"
    whole = sampler(settings())
    whole.run()
    whole.guide.release()
    part = sampler(settings())
    seeded = Population.seeded

    def interrupted(self, process, density, progress=None):
        def press(beta):
            if beta > 0:
                for _ in range(presses):
                    signal.raise_signal(signal.SIGINT)
            return progress(beta)

        return seeded(self, process, density, press)

    with monkeypatch.context() as patch:
        patch.setattr(Population, "seeded", interrupted)
        with pytest.raises(KeyboardInterrupt):
            part.run()
    assert part.objective.state.population is None
    assert not part.history
    part.save(path)
    part.run()
    part.guide.release()
    rest = sampler(settings())
    rest.load(path)
    rest.run()
    for run in (part, rest):
        assert [tuple(a)[:8] for a in run.history[1:]] == [tuple(a)[:8] for a in whole.history[1:]]
        assert torch.equal(run.objective.state.population.z, whole.objective.state.population.z)
        assert run.objective.state.seeding == whole.objective.state.seeding


@pytest.mark.parametrize(
    ("make", "words"),
    [
        (lambda: Population(num_moves=0), "positive counts"),
        (lambda: Population(min_gamma=1.5), "min_gamma"),
        (lambda: Population(min_khat=math.nan), "min_khat"),
        (lambda: Population(num_particles=100), "as many particles"),
    ],
)
def test_bad_settings(make, words):
    with pytest.raises(ValueError, match=words):
        make()
