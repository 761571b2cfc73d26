# SPDX-License-Identifier: Apache-2.0
r"""Tempered sequential Monte Carlo: particles carried from a start ``b`` to the density ``p̃`` through

    ``p_β(z) ∝ b(z)^{1−β} p̃(z)^β``,   ``0 = β_0 < … < β_T = 1``.

At each temperature the particles are weighted by ``w = (p̃/b)^{β_t − β_{t−1}}``, resampled, and moved by moves that
leave ``p_{β_t}`` as it is. The next β is the largest for which the weights keep an effective share of the particles.
``Π_t mean(w)`` estimates ``Z`` without bias when the schedule is fixed (with the adaptive one, nearly). Only the
density of the *target* is counted: one value and one gradient per particle and leapfrog step.

What it cannot do: carry particles between modes once barriers have risen. The share of a mode is what resampling
left of it, so rare modes are noisy, and lost for good if no particle is near when they separate.

Source: "Sequential Monte Carlo samplers" https://doi.org/10.1111/j.1467-9868.2006.00553.x .
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import NamedTuple, Protocol

import torch
from torch import Tensor

from pyro_sm.base import Density, HasPrior
from pyro_sm.corrections.moves import Chains, HamiltonianMove
from pyro_sm.density import value_and_score
from pyro_sm.weights import damping, log_mean_exp, resample


class Start(Protocol):
    """A normalised density with exact draws, such as ``GaussianDensity``."""

    def sample(self, num_draws: int) -> Tensor:
        """Draws (num_draws, D)."""
        ...

    def log_prob_and_score(self, z: Tensor) -> tuple[Tensor, Tensor]:
        """``log b`` (N,) in nats, and its score (N, D)."""
        ...


class PriorStart:
    """The prior of a density that has one: then ``p_β`` is the prior times the likelihood to the power β.

    Raises:
        TypeError: the density has no prior that can be drawn from and evaluated.
    """

    def __init__(self, density: Density) -> None:
        if not isinstance(density, HasPrior) or not density.has_prior:
            raise TypeError("this density has no prior that can be drawn from and evaluated: start from a Gaussian")
        self._prior: HasPrior = density

    def sample(self, num_draws: int) -> Tensor:
        """Prior draws."""
        return self._prior.prior_draws(num_draws)

    def log_prob_and_score(self, z: Tensor) -> tuple[Tensor, Tensor]:
        """``log`` prior and its score."""
        return value_and_score(self._prior.log_prior, z)


class Temperature(NamedTuple):
    """One step of a run: ``beta``, the share of ``particles`` that the weights left effective, ``acceptance`` of its
    moves, the ``step_size`` they ended with, and the ``log_evidence`` so far, nats."""

    beta: float
    effective_share: float
    acceptance: float
    step_size: float
    log_evidence: float


class TemperedParticles(NamedTuple):
    """What a run leaves: equally weighted ``z`` (N, D) with ``log_p`` (N,) and ``score`` (N, D) of the target.

    ``log_evidence``: estimate of ``log Z``, nats. ``history``: one entry per temperature.
    """

    z: Tensor
    log_p: Tensor
    score: Tensor
    log_evidence: float
    history: tuple[Temperature, ...]


class _State(NamedTuple):
    """Particles with both densities, so that a new β needs no new evaluation."""

    z: Tensor
    log_b: Tensor
    score_b: Tensor
    log_p: Tensor
    score_p: Tensor

    def at(self, index: Tensor) -> _State:
        return _State(*(x[index] for x in self))


class _Tempered:
    """``(1−β) log b + β log p̃`` of whatever was evaluated last, with its parts kept."""

    def __init__(self, start: Start, density: Density, beta: float) -> None:
        self.start, self.density, self.beta = start, density, beta
        self.last: _State | None = None

    def mix(self, state: _State) -> Chains:
        value = (1 - self.beta) * state.log_b + self.beta * state.log_p
        score = (1 - self.beta) * state.score_b + self.beta * state.score_p
        return Chains(state.z, torch.nan_to_num(value, nan=-math.inf, posinf=math.inf, neginf=-math.inf), score)

    def __call__(self, z: Tensor) -> tuple[Tensor, Tensor]:
        self.last = _State(z, *self.start.log_prob_and_score(z), *self.density.log_prob_and_score(z))
        chains = self.mix(self.last)
        return chains.log_p, chains.score


@dataclass(frozen=True)
class TemperedSMC:
    """The sampler; :meth:`run` it on a density.

    Args:
        num_particles: N.
        num_moves: moves at every temperature.
        move: how to move.
        effective_share: what the weights of a temperature step must leave of the particles, in (0, 1).
        max_temperatures: a guard against densities that cannot be reached.

    Raises:
        ValueError: a count that is not positive, or a share outside (0, 1).
    """

    num_particles: int = 4096
    num_moves: int = 10
    move: HamiltonianMove = field(default_factory=HamiltonianMove)
    effective_share: float = 0.5
    max_temperatures: int = 500

    def __post_init__(self) -> None:
        if min(self.num_particles, self.num_moves, self.max_temperatures) < 1:
            raise ValueError("expected positive counts")
        if not 0 < self.effective_share < 1:
            raise ValueError(f"expected effective_share in (0, 1), found {self.effective_share}")

    @torch.no_grad()
    def run(
        self, density: Density, start: Start, *, progress: Callable[[Temperature], None] | None = None
    ) -> TemperedParticles:
        """Carry particles from ``start`` to ``density``; ``progress`` is told of every temperature.

        Raises:
            ValueError: the density is finite at none of the first particles, is ``+inf`` somewhere, or β = 1 is not
                reached within ``max_temperatures``.
        """
        z = start.sample(self.num_particles)
        state = _State(z, *start.log_prob_and_score(z), *density.log_prob_and_score(z))
        beta, log_evidence, step_size = 0.0, 0.0, 1.0
        history: list[Temperature] = []
        while beta < 1:
            if len(history) == self.max_temperatures:
                raise ValueError(f"β = {beta:.3g} after {len(history)} temperatures: start closer to the density")
            ratio = state.log_p - state.log_b
            if not bool(torch.isfinite(ratio).any()) or bool((ratio == math.inf).any()):
                raise ValueError(
                    f"expected a finite density at some of {self.num_particles} particles and +inf at none, found "
                    f"{int(torch.isfinite(ratio).sum())} finite and {int((ratio == math.inf).sum())} +inf"
                )
            increment = min(damping(ratio, self.effective_share), 1 - beta)
            if beta + increment > 1 - 1e-9:
                increment = 1 - beta
            log_w = increment * ratio
            kept = torch.softmax(log_w, 0)
            log_evidence += float(log_mean_exp(log_w.double()))
            beta += increment
            state = state.at(resample(log_w, self.num_particles))
            scale = state.z.std(0).clamp(min=torch.finfo(state.z.dtype).eps)
            accepted = 0.0
            tempered = _Tempered(start, density, beta)
            for _ in range(self.num_moves):
                old = state
                move = self.move.apply(tempered, tempered.mix(old), step_size, scale)
                assert tempered.last is not None
                moved = (move.chains.z == tempered.last.z).all(-1)
                state = _State(
                    *(torch.where(moved.reshape(-1, *[1] * (new.ndim - 1)), new, was) for new, was in
                      zip(tempered.last, old, strict=True))
                )  # fmt: skip
                step_size = self.move.adapted(step_size, move.acceptance)
                accepted += move.acceptance / self.num_moves
            effective = float(1 / kept.double().square().sum()) / self.num_particles
            history.append(Temperature(beta, effective, accepted, step_size, log_evidence))
            if progress is not None:
                progress(history[-1])
        return TemperedParticles(state.z, state.log_p, state.score_p, log_evidence, tuple(history))
