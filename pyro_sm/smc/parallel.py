# SPDX-License-Identifier: Apache-2.0
r"""Parallel tempering: chains at all temperatures at once, that exchange their places.

C independent ladders of T temperatures ``β_0 < … < β_{T−1} = 1`` on a path ``p_β``
(:mod:`pyro_sm.smc.path`). A sweep moves every chain, all in one batch, and then offers a swap to
the neighbours (t, t+1) with t even, in the next sweep to those with t odd; it is accepted with probability

    ``min(1, exp((β_{t+1} − β_t)(ℓ_t − ℓ_{t+1})))``,   ``ℓ`` the gain of the two chains, nats.

Where the path begins with a density that has exact draws (β = 0), the hottest chain is drawn anew every sweep.

Warm-up, in windows that double: the step size of every temperature follows its acceptance; after a window the widths
of every temperature are those its scores had, and the temperatures move to where, by the rejections ``r_t`` found,
``Λ(β_t) = Σ_{s<t} r_s`` rises by equal amounts, so that all swaps are as likely. From half of the warm-up on only the
step sizes change, and after it nothing does: the draws are those of a Markov chain that leaves the target as it is.

Source: "Non-Reversible Parallel Tempering: a Scalable Highly Parallel MCMC Scheme" https://arxiv.org/abs/1905.02939 .
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import NamedTuple

import torch
from torch import Tensor

from pyro_sm.base import Density
from pyro_sm.smc.mixing import effective_draws, split_rhat
from pyro_sm.smc.moves import HamiltonianMove
from pyro_sm.smc.path import AnnealingPath, Bridge, OnPath, Points, Start, width

_FIRST_BETA = 0.01  # of a ladder that begins at 0, geometric from here on, before it is adapted
_SMALLEST_REJECTION = 1e-3  # keeps Λ rising where no swap was refused; one in a thousand sweeps is not seen anyway


class Rung(NamedTuple):
    """One temperature, over the sweeps after warm-up.

    ``beta``; mean ``acceptance`` of its moves, and their ``step_size`` (NaN where draws are exact); ``swap_rate``,
    the mean probability of a swap with the next (NaN for the last).
    """

    beta: float
    acceptance: float
    step_size: float
    swap_rate: float


class TemperedChains(NamedTuple):
    """The chains at β = 1: ``z`` (C, S, D) with ``log_p`` (C, S) in nats and ``score`` (C, S, D) of the target.

    ``ladder``: one entry per temperature, hottest first. ``density_evaluations``: values of ``log p̃`` in all, warm-up
    included; each came with a gradient.
    """

    z: Tensor
    log_p: Tensor
    score: Tensor
    ladder: tuple[Rung, ...]
    density_evaluations: int

    @property
    def rhat(self) -> Tensor:
        """Split-R̂ of every latent (D,)."""
        return split_rhat(self.z)

    @property
    def effective_draws(self) -> Tensor:
        """Effective number of draws for the mean of every latent (D,)."""
        return effective_draws(self.z)


class _Ladders:
    """The state of a run. Rows are temperature-major: row ``t C + c``; ``fixed`` rows are not moved but drawn."""

    def __init__(self, sampler: ParallelTempering, density: Density, start: Start) -> None:
        self.density, self.start, self.sampler = density, start, sampler
        self.path, self.num_chains = sampler.path, sampler.num_chains
        self.points = self._first_points()
        self.beta = first_betas(sampler.num_temperatures, self.path.hottest).to(self.points.z)
        self.fixed = int(self.path.hottest == 0 and sampler.num_temperatures > 1)
        spread = self.points.z.std(0).clamp(min=torch.finfo(self.points.z.dtype).tiny)
        self.scale = spread.repeat(sampler.num_temperatures, 1)
        self.step_size = torch.ones_like(self.beta)
        self.sweeps = 0
        self.start_window()

    def _first_points(self) -> Points:
        count = self.num_chains * self.sampler.num_temperatures
        points = self.path.points(self.start, self.density, self.start.sample(count))
        possible = torch.isfinite(points.log_p).nonzero()[:, 0]
        if len(possible) < 2:
            raise ValueError(f"expected a finite density at some of {count} starts, found {len(possible)}")
        spare = possible[torch.randint(len(possible), (count,), device=possible.device)]
        return points.where(torch.isfinite(points.log_p), points.at(spare))

    def start_window(self) -> None:
        """Forget what was measured."""
        self.measured = 0
        self.acceptance = torch.zeros_like(self.beta)
        self.swap_sum = torch.zeros_like(self.beta[1:])
        self.information = torch.zeros_like(self.scale)

    def sweep(self, adapt: bool) -> None:
        """Move every chain and offer swaps to every other pair of neighbours; ``adapt`` in warm-up."""
        first = self.fixed * self.num_chains
        cold = self.points.at(slice(first, None))
        beta = self._per_row(self.beta)[first:]
        on_path = OnPath(self.path, self.start, self.density, beta)
        chains = self.path.chains(cold, beta)
        step_size, scale = self._per_row(self.step_size)[first:], self._per_row(self.scale)[first:]
        move = self.sampler.move.apply(on_path, chains, step_size, scale)
        parts = [on_path.last.where(move.accepted, cold)]
        if self.fixed:
            parts.insert(0, self.path.points(self.start, self.density, self.start.sample(self.num_chains)))
        self.points = Points(*(torch.cat(both) for both in zip(*parts, strict=True)))
        accepted = move.acceptance.unflatten(0, (-1, self.num_chains)).mean(1)
        self.acceptance[self.fixed :] += accepted
        if adapt:
            self._adapt(accepted)
        self._swap()
        self.sweeps += 1
        self.measured += 1

    def _swap(self) -> None:
        gain = self.path.gain(self.points).unflatten(0, (-1, self.num_chains))
        probability = swap_probability(gain, self.beta)
        self.swap_sum += probability.mean(1)
        offered = torch.arange(len(self.beta) - 1, device=gain.device) % 2 == self.sweeps % 2
        swapped = (torch.rand_like(probability) < probability) & offered[:, None]
        row = torch.arange(gain.numel(), device=gain.device).reshape(gain.shape)
        row[:-1] += swapped * self.num_chains
        row[1:] -= swapped * self.num_chains
        self.points = self.points.at(row.flatten())

    def _adapt(self, accepted: Tensor) -> None:
        """Follow the acceptance (T − fixed,) of this sweep, ever more slowly within a window; measure the widths."""
        moved = self.step_size[self.fixed :]
        self.step_size[self.fixed :] = self.sampler.move.adapted(moved, accepted, (self.measured + 1) ** -0.5)
        score = self.path.chains(self.points, self._per_row(self.beta)).score.nan_to_num(0.0, 0.0, 0.0)
        self.information += score.square().unflatten(0, (-1, self.num_chains)).mean(1)

    def end_window(self) -> None:
        """Widths and temperatures from what was measured."""
        if self.measured:
            self.scale = width(self.information / self.measured)
            self.beta = equal_swaps(self.beta, 1 - self.swap_sum / self.measured)
        self.start_window()

    def rungs(self) -> tuple[Rung, ...]:
        """What was measured since the window began."""
        acceptance, step_size = self.acceptance / self.measured, self.step_size.clone()
        acceptance[: self.fixed] = step_size[: self.fixed] = math.nan
        swap_rate = [*(self.swap_sum / self.measured).tolist(), math.nan]
        columns = (self.beta.tolist(), acceptance.tolist(), step_size.tolist(), swap_rate)
        return tuple(Rung(*row) for row in zip(*columns, strict=True))

    def _per_row(self, x: Tensor) -> Tensor:
        return x.repeat_interleave(self.num_chains, 0)


@dataclass(frozen=True)
class ParallelTempering:
    """The sampler; :meth:`run` it on a density.

    Args:
        num_chains: C independent ladders.
        num_temperatures: T; 1 is Hamiltonian Monte Carlo without tempering.
        num_warmup: sweeps that adapt and are thrown away.
        num_draws: S, draws kept of each chain.
        thin: sweeps per draw.
        move: how to move within a temperature.
        path: the densities between; :class:`Bridge` from the start, or :class:`Power` of the target.

    Raises:
        ValueError: a count out of its range.
    """

    num_chains: int = 4
    num_temperatures: int = 8
    num_warmup: int = 1000
    num_draws: int = 1000
    thin: int = 1
    move: HamiltonianMove = field(default_factory=lambda: HamiltonianMove(5))
    path: AnnealingPath = field(default_factory=Bridge)

    def __post_init__(self) -> None:
        for name in ("num_chains", "num_temperatures", "num_draws", "thin"):
            if getattr(self, name) < 1:
                raise ValueError(f"expected {name} >= 1, found {getattr(self, name)}")
        if self.num_warmup < 0:
            raise ValueError(f"expected num_warmup >= 0, found {self.num_warmup}")

    @torch.no_grad()
    def run(
        self, density: Density, start: Start, *, progress: Callable[[int, int], None] | None = None
    ) -> TemperedChains:
        """Run all chains; ``progress`` is told the sweeps done and to do.

        One sweep costs ``C (T − 1) L + C`` evaluations on a path from β = 0, ``C T L`` on others.

        Raises:
            ValueError: the density is finite at fewer than two of the ``C T`` first places.
        """
        before = density.evaluations.values
        ladders = _Ladders(self, density, start)
        windows = {self.num_warmup >> k for k in range(1, 6)}
        kept: list[Points] = []
        total = self.num_warmup + self.num_draws * self.thin
        for done in range(1, total + 1):
            warming = done <= self.num_warmup
            ladders.sweep(adapt=warming)
            if done in windows:
                ladders.end_window()
            elif done == self.num_warmup:
                ladders.start_window()
            elif not warming and (done - self.num_warmup) % self.thin == 0:
                kept.append(ladders.points.at(slice(-self.num_chains, None)))
            if progress is not None:
                progress(done, total)
        return TemperedChains(
            torch.stack([points.z for points in kept], 1),
            torch.stack([points.log_p for points in kept], 1),
            torch.stack([points.score_p for points in kept], 1),
            ladders.rungs(),
            density.evaluations.values - before,
        )


def swap_probability(gain: Tensor, beta: Tensor) -> Tensor:
    """``min(1, exp((β_{t+1} − β_t)(ℓ_t − ℓ_{t+1})))`` (T−1, C); 0 where a gain is not finite.

    Args:
        gain: ``ℓ`` (T, C), nats.
        beta: (T,).
    """
    change = beta.diff()[:, None] * (gain[:-1] - gain[1:])
    return torch.where(torch.isfinite(change), change.clamp(max=0).exp(), 0)


def first_betas(num_temperatures: int, hottest: float) -> Tensor:
    """A geometric ladder (T,) from ``hottest``, or from 0 and then 0.01, to 1; float64."""
    if num_temperatures == 1:
        return torch.ones(1, dtype=torch.float64)
    if hottest > 0:
        return torch.logspace(math.log10(hottest), 0, num_temperatures, dtype=torch.float64)
    rest = torch.logspace(math.log10(_FIRST_BETA), 0, num_temperatures - 1, dtype=torch.float64)
    rest[-1] = 1
    return torch.cat([torch.zeros(1, dtype=torch.float64), rest])


def equal_swaps(beta: Tensor, rejection: Tensor) -> Tensor:
    """The ladder (T,) on which ``Λ``, linear between the old β, rises by equal amounts; the ends stay.

    Args:
        beta: (T,), rising.
        rejection: ``r`` (T−1,), mean probability that a swap of (t, t+1) is refused.
    """
    if len(beta) < 3:
        return beta
    barrier = torch.cat([torch.zeros_like(beta[:1]), rejection.clamp(min=_SMALLEST_REJECTION).cumsum(0)])
    level = torch.linspace(0, 1, len(beta), dtype=beta.dtype, device=beta.device)[1:-1] * barrier[-1]
    right = torch.searchsorted(barrier, level).clamp(1, len(beta) - 1)
    share = (level - barrier[right - 1]) / (barrier[right] - barrier[right - 1])
    inner = torch.lerp(beta[right - 1], beta[right], share)
    return torch.cat([beta[:1], inner, beta[-1:]])
