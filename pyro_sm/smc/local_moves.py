# SPDX-License-Identifier: Apache-2.0
r"""Local moves of draws that are chosen already: repeats part, and what is slightly wrong is put right.

Draws of the target stay draws of the target under moves that leave it as it is (``moves.py``): those that resampling
has chosen more than once become different ones, and draws from a law that is right in the large and wrong in the
small (atoms a little too near each other) are near the target after a few. Moves do not carry mass between modes: the
shares of modes stay those of the draws.

For the first half of the moves step size and metric follow the draws, which is exact only in the limit; then both
are fixed.

Source: "Following a moving target: Monte Carlo inference for dynamic Bayesian models"
https://doi.org/10.1111/1467-9868.00280 (resample, then move).
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import NamedTuple

import torch
from torch import Tensor

from pyro_sm.base import Density
from pyro_sm.smc.metric import fisher_metric
from pyro_sm.smc.moves import Chains, HamiltonianMove

_RATE = 0.5  # of the step size's pursuit of its acceptance: one that is off by .3 changes it by a sixth a move


class MovedDraws(NamedTuple):
    """Draws ``z`` (N, D) after their moves, ``log_p`` (N,), nats, ``score`` (N, D).

    ``acceptance``: mean probability of it in the moves with a fixed step size. ``step_size``: that one, in units of
    the metric.
    """

    z: Tensor
    log_p: Tensor
    score: Tensor
    acceptance: float
    step_size: float


@dataclass(frozen=True)
class LocalMoves:
    """Move every draw ``num_moves`` times; costs ``1 + num_moves · move.num_leapfrog`` evaluations a draw.

    Args:
        num_moves: of every draw; the first half of them, rounded up, adapts.
        move: how to move.

    Raises:
        ValueError: ``num_moves`` < 2.
    """

    num_moves: int = 50
    move: HamiltonianMove = field(default_factory=HamiltonianMove)

    def __post_init__(self) -> None:
        if self.num_moves < 2:
            raise ValueError(f"expected num_moves >= 2, one to adapt and one to keep, found {self.num_moves}")

    def run(self, density: Density, z: Tensor) -> MovedDraws:
        """Draws ``z`` (N, D), latents, after their moves.

        Raises:
            ValueError: the density of a draw is not finite.
        """
        log_p, score = density.log_prob_and_score(z)
        lost = int((~torch.isfinite(log_p)).sum())
        if lost:
            raise ValueError(
                f"expected draws with a finite density, found {lost} of {len(z)} without: resample first"
            )
        chains = Chains(z, log_p, score)
        step = torch.ones((), dtype=z.dtype, device=z.device)
        adapting = -(-self.num_moves // 2)
        accepted = 0.0
        metric = fisher_metric(score)
        for count in range(self.num_moves):
            if count < adapting:
                metric = fisher_metric(chains.score)
            made = metric.moved(self.move, density.log_prob_and_score, chains, step)
            chains = made.chains
            if count < adapting:
                step = self.move.adapted(step, made.acceptance.mean(), _RATE)
            else:
                accepted += float(made.acceptance.mean())
        return MovedDraws(*chains, accepted / (self.num_moves - adapting), float(step))
