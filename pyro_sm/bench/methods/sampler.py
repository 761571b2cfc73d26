# SPDX-License-Identifier: Apache-2.0
r"""``DiffusionSampler``: at its defaults on a model, and by several objectives on targets.

Source: "Importance Weighted Score Matching for Diffusion Samplers with Enhanced Mode Coverage"
https://arxiv.org/abs/2505.19431 .
"""

from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch

from pyro_sm.base import Evaluations
from pyro_sm.bench.methods import start
from pyro_sm.bench.methods.fit import Budget, Cost, Fit, Meter, begin, resampled
from pyro_sm.bench.problem import Problem, by_site
from pyro_sm.corrections import DampedResampling
from pyro_sm.guides.bases import Base
from pyro_sm.model.density import ModelDensity
from pyro_sm.objectives import ImportanceWeightedScoreMatching, PathWeights
from pyro_sm.objectives.importance_weighted.population import Population
from pyro_sm.objectives.importance_weighted.weightings import Weighting
from pyro_sm.sampler import DiffusionSampler, StoppingRule
from pyro_sm.smc import HamiltonianMove, LocalMoves
from pyro_sm.smc.tempered import TemperedSMC
from pyro_sm.targets import LennardJones, Target
from pyro_sm.weights import effective_sample_size

_STEPS = 100  # per round: the package's default
# Messages between particles are dear beside their energies: more steps to a round, more moves of the population.
_PARTICLE_STEPS = 300
_DROPLET_MOVES = 10
# Of large clusters less of everything, or one round takes an hour.
_LARGE_DRAWS, _LARGE_BATCH, _LARGE_POPULATION, _LARGE_STEPS = 256, 64, 512, 600
_LARGE_SHARE = 0.7  # effective, of tempered SMC with 512 particles: of so few, more have to live on at each step
_DAMPING_OFF = 1e-9  # an effective share so small that γ = 1 always
_MOST_DRAWS, _FEWEST_DRAWS = 2048, 64  # of a round: the package's default, and a batch's worth


def sampler_within(
    model: Callable[..., Any], seed: int, evaluations: int, *, base: Base | None = None, bar: bool = False
) -> DiffusionSampler:
    """``DiffusionSampler(model)``, everything at its default but the seed, the budget and perhaps the base."""
    stopping = StoppingRule(max_evaluations=evaluations)
    return DiffusionSampler(model, base=base, seed=seed, stopping=stopping, disable_progbar=not bar)


def fit_by_sampler(problem: Problem, seed: int, budget: Budget) -> Fit:
    """``DiffusionSampler(model).run(data)``, everything at its default but the budget; with its verdict."""
    started = time.process_time()
    sampler = sampler_within(problem.model, seed, budget.evaluations)
    sampler.run(*problem.args)
    training = time.process_time() - started
    spent = sampler.objective.evaluations
    values, scores = spent.values, spent.scores
    draws = sampler.draws(budget.pool)
    usable = int(effective_sample_size(draws.log_weight))
    # Of the usable draws wanted; a pool whose effective size is more would have been drawn in less.
    drawing = (time.process_time() - started - training) * min(1.0, budget.draws / max(usable, 1))
    z = resampled(draws, budget.draws, seed)
    verdict = sampler.check()
    result = sampler.probe_result
    return Fit(
        by_site(problem.density(torch.float64), z),
        Cost(values, scores, training),
        Cost(budget.pool, 0, drawing),
        draws.log_weight,
        verdict=verdict.level.words,
        probe=0 if result is None else result.evaluations.values,
        note=f"{len(sampler.history)} rounds",
    )


# ------------------------------------------------------------------------------------------- objectives on targets


ObjectiveFor = Callable[[Target, int], ImportanceWeightedScoreMatching]
"""A fresh objective for a budget of evaluations."""


@dataclass(frozen=True)
class PathObjective:
    """Path weights, at the package's defaults or without what it adds to them.

    Args:
        plain: forward KL by raw weights: no damping, no population, clean points as targets.
    """

    plain: bool = False

    def __call__(self, target: Target, evaluations: int) -> ImportanceWeightedScoreMatching:
        """The objective, whatever the budget; with more steps to a round for particles."""
        steps = _PARTICLE_STEPS if start.are_particles(target) else _STEPS
        if self.plain:
            return ImportanceWeightedScoreMatching(
                effective_share=_DAMPING_OFF,
                population=None,
                weighting=PathWeights(target_score=False),
                steps_per_round=steps,
            )
        if start.are_many_particles(target):
            move = HamiltonianMove(start.LEAPFROG)
            seeding = TemperedSMC(_LARGE_POPULATION, _DROPLET_MOVES, move, effective_share=_LARGE_SHARE)
            return ImportanceWeightedScoreMatching(
                _LARGE_DRAWS,
                batch_size=_LARGE_BATCH,
                steps_per_round=_LARGE_STEPS,
                population=Population(_LARGE_POPULATION, _DROPLET_MOVES, move, seeding),
            )
        population = Population(num_moves=_DROPLET_MOVES) if isinstance(target, LennardJones) else Population()
        return ImportanceWeightedScoreMatching(steps_per_round=steps, population=population)


@dataclass(frozen=True)
class InnerObjective:
    """A form that evaluates the density in every step; batches and rounds are cut so that the budget lasts.

    Args:
        weighting: with K inner draws.
        batch_size: rows per step.
        num_rounds: rounds to aim at; with fewer than 100 steps each if the budget is small.
    """

    weighting: Weighting
    batch_size: int = 64
    num_rounds: int = 16

    def __call__(self, target: Target, evaluations: int) -> ImportanceWeightedScoreMatching:
        """The objective for this budget."""
        per_round = max(evaluations // self.num_rounds, 1)
        most = _LARGE_DRAWS if start.are_many_particles(target) else _MOST_DRAWS
        # A quarter of a round's evaluations, the rest for its steps.
        num_particles = max(min(most, per_round // 4), _FEWEST_DRAWS)
        step = self.batch_size * self.weighting.num_inner
        return ImportanceWeightedScoreMatching(
            num_particles,
            weighting=self.weighting,
            batch_size=self.batch_size,
            steps_per_round=min(max((per_round - num_particles) // step, 1), _STEPS),
        )


@dataclass(frozen=True)
class Sampler:
    """``DiffusionSampler(model, base=GivenBase(start))`` with its defaults and a budget.

    Args:
        name: of the method.
        objective: what it trains by.
        moves: of the draws, which are then chosen by damped weights; None for draws as their weights say.
        compile: whether to compile the network.
    """

    name: str
    objective: ObjectiveFor
    moves: LocalMoves | None = None
    compile: bool = False

    def fit(self, target: Target, seed: int, budget: Budget) -> Fit:
        """Train and draw; stops early if the effective sample size has stopped rising."""
        begin(seed)
        meter = Meter()
        model = start.model(target)
        sampler = DiffusionSampler(
            model,
            guide=start.guide_at(target, model, compile=self.compile),
            objective=self.objective(target, budget.evaluations),
            stopping=StoppingRule(max_evaluations=budget.evaluations),
            seed=seed,
            disable_progbar=True,
        )
        sampler.run()
        spent = sampler.objective.evaluations
        training = meter.look(spent)
        draws = sampler.draws(budget.pool)
        note = f"{len(sampler.history)} rounds"
        # The sampler counts its final draws apart from training: one value each.
        drawn = Evaluations(draws.z.shape[0])
        if self.moves is None:
            x = resampled(draws, budget.draws, seed)
        else:
            generator = torch.Generator().manual_seed(seed)
            moving = ModelDensity(model, ())
            moved = self.moves.run(moving, draws.z[DampedResampling().apply(draws, budget.draws, generator)])
            x, moves = moved.z, moving.evaluations
            drawn = Evaluations(drawn.values + moves.values, moves.scores)
            note += f", {self.moves.num_moves} moves of every draw, acceptance {moved.acceptance:.2f}"
        drawing = meter.look(spent)._replace(values=drawn.values, scores=drawn.scores)
        return Fit({"x": x}, training, drawing, draws.log_weight, note=note)
