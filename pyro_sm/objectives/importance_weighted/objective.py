# SPDX-License-Identifier: Apache-2.0
r"""Importance-weighted score matching as a Pyro objective: rounds of draws, steps of regression in between.

One *round*: N draws from the guide (and a covering component), ``log p̃`` once per draw, path log weights, damping
exponent γ; into the replay buffer; kernel variances refitted. One *step*: a batch of noised points and the loss of
the chosen weighting. A round is due before the first step, then after every ``steps_per_round`` steps.

The objective is the forward KL between path measures, ``KL(P ‖ P_θ) = E_t E_{x_t}[½ g² ‖s_θ − ∇log p_t‖²] + const``:
its value is no bound on the evidence. The evidence is estimated by the weights of every round (``history``).

Source: "Importance Weighted Score Matching for Diffusion Samplers with Enhanced Mode Coverage"
https://arxiv.org/abs/2505.19431 .
"""

from __future__ import annotations

import time
import warnings
from collections.abc import Callable
from typing import Any, NamedTuple

import torch
from pyro import poutine
from torch import Tensor

from pyro_sm.base import Arguments, Bound, Density, DiffusionGuide, Evaluations, PyroSMWarning, RoundInfo, require
from pyro_sm.diffusion.covering import Covering, draw_with_covering
from pyro_sm.objectives.elbo import ScoreObjective
from pyro_sm.objectives.importance_weighted.buffer import Buffer, Round, damped_round, round_statistics
from pyro_sm.objectives.importance_weighted.population import Particles, Population, as_round
from pyro_sm.objectives.importance_weighted.weightings import PathWeights, Weighting, draw_step_noise
from pyro_sm.weights import resample

_POPULATION = Population()
_REFIT_DRAWS = 2048  # resampled draws that moments are fitted to: their error is a few per cent of a scale
_NONCENTRING_ROUNDS = range(2, 13)  # rounds: before, there is little to see; after, too much to lose


class TrainingState(NamedTuple):
    """All that the next step needs and the guide does not hold.

    ``buffer``: the last rounds. ``steps``: optimiser steps since the last round. ``loss_sum``: of those steps.
    ``history``: one entry per round. ``seconds``: of rounds, losses and gradients so far. ``population``: particles
    beside the sampler, if it has any; ``seeding``: the density evaluations that making them took.
    """

    buffer: Buffer = Buffer()
    steps: int = 0
    loss_sum: float = 0.0
    history: tuple[RoundInfo, ...] = ()
    seconds: float = 0.0
    population: Particles | None = None
    seeding: int = 0


class Populated(NamedTuple):
    """``particles``: the population after a round, or None without one; ``evaluations`` that seeding it took."""

    particles: Particles | None
    evaluations: int


class ImportanceWeightedScoreMatching(ScoreObjective):
    r"""Trains a diffusion guide on an unnormalised model by importance-weighted score matching.

    Used like ``Trace_ELBO``: ``SVI(model, guide, optim, loss=ImportanceWeightedScoreMatching())``. One ``svi.step``
    is one optimiser step; every ``steps_per_round``-th also draws from the guide and evaluates the model. The
    returned number is the regression loss less that of the untrained guide on the same batch: it starts at 0 and
    falls as the guide learns; it does not bound the evidence.

    Args:
        num_draws: N, draws and density evaluations per round; 2048 by default.
        weighting: :class:`~pyro_sm.objectives.importance_weighted.weightings.PathWeights` (default) or
            :class:`~pyro_sm.objectives.importance_weighted.weightings.MarginalWeights` (the paper's form).
        covering: the component that keeps looking elsewhere; by default the weighting's choice: the model's prior
            (:class:`~pyro_sm.PriorCovering`) or a widened base (:class:`~pyro_sm.WideCovering`).
        effective_share: τ: damping leaves each round an effective share of at least τ.
        buffer_rounds: rounds kept for replay.
        steps_per_round: optimiser steps between rounds.
        batch_size: noised points per step.
        population: the particles that teach the sampler where the first round's weights leave nothing to learn from
            (see :class:`~pyro_sm.Population`), or None to go without them. Not used by ``MarginalWeights``.
        num_particles: Pyro's word for ``num_draws``.
        max_plate_nesting: as in ``ELBO``; used by ``_get_trace`` only.

    Attributes:
        state: the :class:`TrainingState`; replaced once per step, never mutated.

    Raises:
        TypeError: the guide is not a diffusion guide (at the first call).
        ValueError: a count that is not positive; a round without a finite density.
        ModelRefusedError: the model cannot be evaluated in batches (at the first call).
    """

    def __init__(
        self,
        num_draws: int | None = None,
        *,
        weighting: Weighting | None = None,
        covering: Covering | None = None,
        effective_share: float = 0.3,
        buffer_rounds: int = 4,
        steps_per_round: int = 100,
        batch_size: int = 1024,
        population: Population | None = _POPULATION,
        num_particles: int | None = None,
        max_plate_nesting: float = float("inf"),
    ) -> None:
        for name, value in (
            ("buffer_rounds", buffer_rounds),
            ("steps_per_round", steps_per_round),
            ("batch_size", batch_size),
        ):
            if value < 1:
                raise ValueError(f"expected {name} >= 1, found {value}")
        if not 0 < effective_share < 1:
            raise ValueError(f"expected effective_share in (0, 1), found {effective_share}")
        super().__init__(num_draws, num_particles, default=2048, max_plate_nesting=max_plate_nesting)
        self.weighting = weighting or PathWeights()
        self.covering = covering
        self.effective_share = effective_share
        self.buffer_rounds = buffer_rounds
        self.steps_per_round = steps_per_round
        self.batch_size = batch_size
        self.population = population if self.weighting.num_inner == 0 else None
        self.state = TrainingState()
        self._bound: tuple[object, Density] | None = None

    @property
    def evaluations_per_round(self) -> int:
        """Density evaluations of a round and the steps that follow it."""
        own = self.num_draws + self.steps_per_round * self.batch_size * self.weighting.num_inner
        settings, particles = self.population, self.state.population
        return own + (settings.evaluations_of(particles) if settings is not None and particles is not None else 0)

    @property
    def evaluations(self) -> Evaluations:
        """Density and gradient evaluations so far, of the density now trained on."""
        return Evaluations() if self._bound is None else self._bound[1].evaluations

    @property
    def history(self) -> tuple[RoundInfo, ...]:
        """What each round measured, oldest first."""
        return self.state.history

    # -- rounds ------------------------------------------------------------------------------------------------

    def round_due(self) -> bool:
        """Whether the next step begins with a round."""
        return not self.state.buffer.rounds or self.state.steps >= self.steps_per_round

    def covering_for(self, density: Density) -> Covering:
        """The covering component in use for this density."""
        return self.covering if self.covering is not None else self.weighting.default_covering(density)

    def _collect(self, bound: Bound) -> Round:
        """Weighted draws of the guide as it is, damped."""
        with torch.no_grad(), poutine.block():
            draws, num_guide = draw_with_covering(
                bound.diffusion(),
                bound.density,
                self.covering_for(bound.density),
                self.num_draws,
                with_score=self.weighting.needs_score,
            )
            return damped_round(draws, num_guide, self.effective_share)

    def refit(self, bound: Bound) -> None:
        """Refit the guide's coordinates and kernels to the buffer, resampled by its weights.

        A funnel is non-centred if the first rounds show one, and followed from then on.
        """
        buffer, rounds = self.state.buffer, len(self.state.history)
        if buffer.rounds:
            with torch.no_grad(), poutine.block():
                index = resample(buffer.weights().log(), min(_REFIT_DRAWS, self.num_draws * len(buffer.rounds)))
                z = buffer.latents()[index]
                noncentred = bound.diffusion().noncentred(z, begin=rounds in _NONCENTRING_ROUNDS)
                if noncentred is not None:
                    bound.adapt(noncentred)
                bound.adapt(bound.diffusion().refitted(z))

    def _populate(self, bound: Bound, new: Round, go_on: Callable[[float], bool] | None) -> Populated | None:
        """The population after this round; the first round decides whether there is one. None if it was stopped."""
        settings, particles, density = self.population, self.state.population, bound.density
        first = not self.state.buffer.rounds
        if settings is None or (
            particles is None and not (first and settings.needed(new.draws.log_weight, density.dim))
        ):
            return Populated(None, 0)
        with torch.no_grad(), poutine.block():
            process = bound.diffusion()
            if particles is None:
                before = density.evaluations.values
                seeds = settings.seeded(process, density, go_on)
                if seeds is None:
                    return None
                particles, mode = seeds
                if settings.move_base and not process.is_trained(particles.z):
                    bound.adapt(process.moved_to(particles.z, mode))
                return Populated(particles, density.evaluations.values - before)
            share = 1 - new.num_guide / len(new.draws.z)
            particles, _ = settings.exchanged(
                particles, new.draws, process, density, self.covering_for(density), share
            )
            return Populated(settings.moved(particles, density), 0)

    def _round(self, bound: Bound, go_on: Callable[[float], bool] | None) -> TrainingState | None:
        """The state after a round; None if seeding a population was stopped."""
        self.refit(bound)
        new = self._collect(bound)
        populated = self._populate(bound, new, go_on)
        if populated is None:
            return None
        state = self.state._replace(seeding=self.state.seeding + populated.evaluations)
        return self._after_round(state, new, bound.density, populated.particles)

    def _warn_of_many_latents(self, info: RoundInfo, dim: int) -> None:
        """After the first round: said at once, and not by the verdict after minutes of training."""
        settings = self.population or _POPULATION
        # One who always wants a population has not said that every base is hopeless.
        if dim > settings.max_dim and info.khat >= max(settings.min_khat, _POPULATION.min_khat):
            warnings.warn(
                f"the base is too far from the posterior to learn from: of {self.num_draws} weighted draws in "
                f"{dim} latents a few carry all the weight (Pareto k̂ {info.khat:.1f}), and beyond "
                f"{settings.max_dim} latents no population of particles helps out. Training goes on, but will most "
                "likely take long and arrive nowhere. Start from a Gaussian that fits, base=BatchAndMatchBase() or "
                "base=GuideBase(a Gaussian guide that you have fitted), or use NUTS",
                PyroSMWarning,
                stacklevel=2,
            )

    def _after_round(
        self, state: TrainingState, new: Round, density: Density, particles: Particles | None
    ) -> TrainingState:
        stats = round_statistics(new.draws.log_weight)
        info = RoundInfo(
            round=len(state.history) + 1,
            gamma=new.gamma,
            ess=stats.ess,
            khat=stats.khat,
            log_evidence=stats.log_evidence,
            log_evidence_se=stats.log_evidence_se,
            loss=state.loss_sum / state.steps if state.steps else float("nan"),
            density_evaluations=density.evaluations.values,
            gradient_evaluations=density.evaluations.scores,
            seconds=state.seconds,
        )
        if not state.history:
            self._warn_of_many_latents(info, density.dim)
        if particles is None or self.population is None:
            buffer = state.buffer.push(new, self.buffer_rounds)
        else:
            learned_from = (
                new if new.gamma >= self.population.min_gamma else new._replace(weight=torch.zeros_like(new.weight))
            )
            keep = 2 * self.buffer_rounds
            buffer = state.buffer.push(learned_from, keep).push(as_round(particles), keep)
        history = (*state.history, info)
        return state._replace(buffer=buffer, steps=0, loss_sum=0.0, history=history, population=particles)

    def bind(self, guide: object, density: Density) -> None:
        """Start afresh for another guide; keep the history but not the draws for other data."""
        if self._bound is None:
            self._bound = (guide, density)
            return
        if self._bound[0] is not guide:
            self.state = TrainingState()
        elif self._bound[1] is not density:
            self.state = self.state._replace(buffer=Buffer(), steps=0, loss_sum=0.0, population=None)
        self._bound = (guide, density)

    # -- steps -------------------------------------------------------------------------------------------------

    def step_loss(
        self, guide: object, bound: Bound, *, go_on: Callable[[float], bool] | None = None
    ) -> Tensor | None:
        """The loss of one training step, a scalar, and the round before it if one is due; the state moves on.

        Args:
            guide: whose state this is.
            bound: the same on its data.
            go_on: told of every inverse temperature β reached while a population is seeded, and of 0 while modes are
                sought; where it returns False the step ends there, with ``state`` as it was before.

        Returns:
            None if the step was ended by ``go_on``.
        """
        started = time.monotonic()
        process, density = bound.diffusion(), bound.density
        # Drawn before the round, so that a step has the same noise whether or not a round precedes it.
        noise = draw_step_noise(process.ratios, self.batch_size, process.dim, self.weighting.num_inner)
        self.bind(guide, density)
        state = self.state
        if self.round_due():
            after = self._round(bound, go_on)
            if after is None:
                return None
            state, process = after, bound.diffusion()  # what was refitted is not in the old one
        loss = self.weighting.loss(process, density, self.covering_for(density), state.buffer, noise).mean()
        self.state = state._replace(
            steps=state.steps + 1,
            loss_sum=state.loss_sum + float(loss.detach()),
            seconds=state.seconds + time.monotonic() - started,
        )
        return loss

    def _look(self, guide: object, bound: Bound) -> Tensor:
        """The loss of one batch of what the rounds have left, or of fresh draws; nothing is changed."""
        process, density, buffer = bound.diffusion(), bound.density, self.state.buffer
        noise = draw_step_noise(process.ratios, self.batch_size, process.dim, self.weighting.num_inner)
        if self._bound is not None and (self._bound[0] is not guide or self._bound[1] is not density):
            buffer = Buffer()  # a look at another guide or other data, which the rounds say nothing about
        if not buffer.rounds:
            buffer = Buffer((self._collect(bound),))
        return self.weighting.loss(process, density, self.covering_for(density), buffer, noise).mean()

    # -- the ELBO interface ------------------------------------------------------------------------------------

    def _loss(self, model: Callable[..., Any], guide: Any, arguments: Arguments, *, commit: bool) -> Tensor:
        diffusion_guide: DiffusionGuide = require(self, guide, DiffusionGuide)
        bound = diffusion_guide.bind(model, *arguments.args, **arguments.kwargs)
        if not commit:
            return self._look(guide, bound)
        loss = self.step_loss(guide, bound)
        assert loss is not None  # nobody has stopped it
        return loss

    def backward(self, loss: Tensor) -> None:
        """Add the gradients of a step's loss to the guide's parameters, and count their seconds."""
        started = time.monotonic()
        loss.backward()
        self.state = self.state._replace(seconds=self.state.seconds + time.monotonic() - started)

    def _backward(self, loss: Tensor, model: Callable[..., Any], guide: Any) -> None:
        self.backward(loss)
