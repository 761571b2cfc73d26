# SPDX-License-Identifier: Apache-2.0
r"""Tempered sequential Monte Carlo: particles carried from a start ``b`` to the density ``p̃`` through

    ``p_β(z) ∝ b(z)^{1−β} p̃(z)^β``,   ``0 = β_0 < … < β_T = 1``.

At each temperature the particles are weighted by ``w = (p̃/b)^{β_t − β_{t−1}}``, resampled, and moved by moves that
leave ``p_{β_t}`` as it is, in the metric of their scores (``metric.py``); they may exchange latents, too
(``crossover.py``). The next β is the largest for which the weights keep an effective share of the particles.
``Π_t mean(w)`` estimates ``Z`` without bias when the schedule is fixed (with the adaptive one, nearly). Only the
density of the *target* is counted: one value and one gradient per particle and leapfrog step.

Its error comes from the genealogy. With ``W_e`` the share of the last weights that descends from the first particle
``e``, ``var(Ẑ)/Z² ≈ (Σ_e W_e² − 1/N) N/(N−1)``. With one temperature this is the error of importance sampling. Few
surviving lines mean an error that cannot be told; with one there is no estimate. It takes the moves to mix at every
temperature: where they do not, it is too small. A particle that has taken latents over is counted as a descendant of
its own line all the same.

What it cannot do: carry particles between modes once barriers have risen. The share of a mode is what resampling
left of it, so rare modes are noisy, and lost for good if no particle is near when they separate; no estimate of the
error sees a mode that was lost.

Sources: "Sequential Monte Carlo samplers" https://doi.org/10.1111/j.1467-9868.2006.00553.x ; "Variance estimation in
the particle filter" https://arxiv.org/abs/1509.00394 ; "A general theory of particle filters in hidden Markov models
and some applications" https://arxiv.org/abs/1312.5114 .
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import NamedTuple

import torch
from torch import Tensor

from pyro_sm.base import Density
from pyro_sm.smc.crossover import Crossover
from pyro_sm.smc.metric import Metric, fisher_metric
from pyro_sm.smc.moves import HamiltonianMove
from pyro_sm.smc.path import Bridge, OnPath, Points, Start
from pyro_sm.weights import damping, effective_sample_size, log_mean_exp, resample


class Temperature(NamedTuple):
    """One step of a run: ``beta``; ``effective_share`` of the particles under the weights that led to it, in (0, 1];
    mean ``acceptance`` of its moves and the ``step_size`` they ended with; ``log_evidence`` so far in nats, and the
    number of first particles that have descendants, ``lines``."""

    beta: float
    effective_share: float
    acceptance: float
    step_size: float
    log_evidence: float
    lines: int


class TemperedParticles(NamedTuple):
    """What a run leaves: equally weighted ``z`` (N, D) with ``log_p`` (N,) and ``score`` (N, D) of the target.

    ``log_evidence``: estimate of ``log Z``; ``log_evidence_se``: its standard error, ``inf`` if all particles descend
    from one; both in nats. ``history``: one entry per temperature.
    """

    z: Tensor
    log_p: Tensor
    score: Tensor
    log_evidence: float
    log_evidence_se: float
    history: tuple[Temperature, ...]


class TemperedState(NamedTuple):
    """What the next temperature needs.

    ``points``: the particles with start and density at them. ``ancestor`` (N,): the first particle that each descends
    from. ``step_size`` (): of the moves. ``beta``, ``log_evidence``, ``error``: reached so far; ``crossing``: whether
    particles still exchange latents; ``history``: one entry per temperature.
    """

    points: Points
    ancestor: Tensor
    step_size: Tensor
    beta: float
    log_evidence: float
    error: float
    crossing: bool
    history: tuple[Temperature, ...]

    def particles(self) -> TemperedParticles:
        """The particles as a result; draws of the density once β = 1."""
        points = self.points
        return TemperedParticles(points.z, points.log_p, points.score_p, self.log_evidence, self.error, self.history)


def genealogical_error(log_w: Tensor, ancestor: Tensor) -> float:
    """``√((Σ_e W_e² − 1/N) N/(N−1))``, the relative standard error of ``Ẑ``; ``inf`` if one line is left.

    Args:
        log_w: the last weights (N,), nats.
        ancestor: (N,) the first particle, 0 … N−1, that each descends from.
    """
    n = log_w.shape[0]
    share = torch.zeros(n, dtype=torch.float64, device=log_w.device)
    share = share.index_add(0, ancestor, torch.softmax(log_w.double(), 0))
    if int((share > 0).sum()) < 2:
        return math.inf
    return math.sqrt(max(float(share.square().sum()) - 1 / n, 0.0) * n / (n - 1))


@dataclass(frozen=True)
class TemperedSMC:
    """The sampler; :meth:`run` it on a density.

    Args:
        num_particles: N.
        num_moves: moves at every temperature.
        move: how to move.
        effective_share: what the weights of a temperature step must leave of the particles, in (0, 1). A half, as in
            "Sequential Monte Carlo samplers": a step adds at most 1/N to the variance of log Z.
        max_temperatures: a guard against densities that cannot be reached; far more than a path takes.
        crossover: when particles exchange latents, once at every temperature; None for never.

    Raises:
        ValueError: a count that is not positive, or a share outside (0, 1).
    """

    num_particles: int = 4096
    num_moves: int = 10
    move: HamiltonianMove = field(default_factory=HamiltonianMove)
    effective_share: float = 0.5
    max_temperatures: int = 500
    crossover: Crossover | None = None

    def __post_init__(self) -> None:
        for name in ("num_particles", "num_moves", "max_temperatures"):
            if getattr(self, name) < 1:
                raise ValueError(f"expected {name} >= 1, found {getattr(self, name)}")
        if not 0 < self.effective_share < 1:
            raise ValueError(f"expected effective_share in (0, 1), found {self.effective_share}")

    @torch.no_grad()
    def begin(self, density: Density, start: Start) -> TemperedState:
        """Particles of the ``start``, at β = 0."""
        points = Bridge().points(start, density, start.sample(self.num_particles))
        ancestor = torch.arange(self.num_particles, device=points.z.device)
        step_size = torch.ones((), dtype=points.z.dtype, device=points.z.device)
        crossing = self.crossover is not None and self.crossover.begins(*points.z.shape)
        return TemperedState(points, ancestor, step_size, 0.0, 0.0, 0.0, crossing, ())

    @torch.no_grad()
    def step(self, density: Density, start: Start, state: TemperedState) -> TemperedState:
        """One temperature farther: weigh, resample, move, exchange.

        Raises:
            ValueError: the density is finite at none of the particles, is ``+inf`` somewhere, or ``max_temperatures``
                are spent.
        """
        if len(state.history) == self.max_temperatures:
            raise ValueError(
                f"β = {state.beta:.3g} after {len(state.history)} temperatures: start closer to the density"
            )
        path, n, points = Bridge(), self.num_particles, state.points
        gain = _checked(path.gain(points))
        increment = min(damping(gain, self.effective_share), 1 - state.beta)
        # The last increment may fall short of 1 by rounding.
        last = state.beta + increment > 1 - 1e-9
        beta, increment = (1.0, 1 - state.beta) if last else (state.beta + increment, increment)
        log_w = increment * gain.double()
        log_evidence = state.log_evidence + float(log_mean_exp(log_w))
        error = genealogical_error(log_w, state.ancestor)
        on_path = OnPath(path, start, density, torch.full_like(points.log_p, beta))
        share = torch.softmax(log_w, 0).to(points.z)
        metric = fisher_metric(path.chains(points, on_path.beta).score, share)
        index = resample(log_w, n)
        points, ancestor = points.at(index), state.ancestor[index]
        points, step_size, acceptance = self._moved(on_path, points, state.step_size, metric)
        crossing = state.crossing
        if crossing and self.crossover is not None:
            exchange = self.crossover.apply(on_path, path.chains(points, on_path.beta))
            points = on_path.last.where(exchange.accepted, points)
            crossing = self.crossover.goes_on(exchange.acceptance.mean())
        effective, lines = effective_sample_size(log_w) / n, len(ancestor.unique())
        done = Temperature(beta, effective, acceptance, float(step_size), log_evidence, lines)
        history = (*state.history, done)
        return TemperedState(points, ancestor, step_size, beta, log_evidence, error, crossing, history)

    def run(
        self, density: Density, start: Start, *, progress: Callable[[Temperature], None] | None = None
    ) -> TemperedParticles:
        """Carry particles from ``start`` to ``density``; ``progress`` is told of every temperature.

        Raises:
            ValueError: the density is finite at none of the first particles, is ``+inf`` somewhere, or β = 1 is not
                reached within ``max_temperatures``.
        """
        state = self.begin(density, start)
        while state.beta < 1:
            state = self.step(density, start, state)
            if progress is not None:
                progress(state.history[-1])
        return state.particles()

    def _moved(
        self, on_path: OnPath, points: Points, step_size: Tensor, metric: Metric
    ) -> tuple[Points, Tensor, float]:
        """Points and step size after the moves of one temperature, and their mean acceptance."""
        mean = torch.zeros_like(step_size)
        for _ in range(self.num_moves):
            move = metric.moved(self.move, on_path, on_path.path.chains(points, on_path.beta), step_size)
            points = on_path.last.where(move.accepted, points)
            step_size = self.move.adapted(step_size, move.acceptance.mean())
            mean = mean + move.acceptance.mean() / self.num_moves
        return points, step_size, float(mean)


def _checked(gain: Tensor) -> Tensor:
    finite, infinite = int(torch.isfinite(gain).sum()), int((gain == math.inf).sum())
    if not finite or infinite:
        raise ValueError(
            f"expected a finite density at some of {gain.shape[0]} particles and +inf at none, found {finite} finite "
            f"and {infinite} +inf"
        )
    return torch.nan_to_num(gain, nan=-math.inf, neginf=-math.inf)
