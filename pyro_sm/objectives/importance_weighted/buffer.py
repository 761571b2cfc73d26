# SPDX-License-Identifier: Apache-2.0
r"""Rounds of weighted draws, and the replay buffer they go into.

A round's draws come from ``diffusion/covering.py`` with weights ``w``, ``E[w] = Z``. They are used for training
with damped weights ``w^γ``: γ is as large as a trust region on the effective sample size allows, and reaches 1 when
the sampler fits.

Source: "Trust-region constrained annealing" https://arxiv.org/abs/2508.12511 .
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any, NamedTuple, TypeVar

import torch
from torch import Tensor

from pyro_sm.base import Draws
from pyro_sm.weights import damping, effective_sample_size, evidence, normalised, pareto_smooth

T = TypeVar("T")


class Round(NamedTuple):
    """One round. ``draws``: N of them, the covering component's last. ``weight``: (N,) training weights, sum 1.

    ``gamma``: the damping that made ``weight``. ``num_guide``: how many came from the guide's own paths.
    """

    draws: Draws
    weight: Tensor
    gamma: float
    num_guide: int


def damped_round(draws: Draws, num_guide: int, effective_share: float) -> Round:
    """A round with weights ``w^γ``, γ as large as an effective share τ of the draws allows.

    Raises:
        ValueError: a density is ``+inf``, or none is finite: nothing can be learned from this round.
    """
    if bool((draws.log_p == math.inf).any()):
        raise ValueError(
            f"the log density is +inf at {int((draws.log_p == math.inf).sum())} of {draws.z.shape[0]} draws: the "
            "posterior cannot be normalised as written. Look for a scale that can shrink to zero onto a data point, "
            "or a factor without a bound, and give it a prior that keeps it away"
        )
    if not bool(torch.isfinite(draws.log_weight).any()):
        raise ValueError(
            f"none of {draws.z.shape[0]} draws has a finite density: the guide's base lies outside the model's "
            "support, or the likelihood returns NaN there. Give a base near the posterior, or check the model"
        )
    gamma = damping(draws.log_weight, effective_share)
    return Round(draws, normalised(gamma * draws.log_weight), gamma, num_guide)


class RoundStatistics(NamedTuple):
    """What the undamped weights of a round say; see ``pyro_sm.base.RoundInfo``."""

    ess: float
    khat: float
    log_evidence: float
    log_evidence_se: float


def round_statistics(log_weight: Tensor) -> RoundStatistics:
    """Effective share, Pareto shape, evidence and its error of log weights (N,)."""
    estimate = evidence(log_weight)
    return RoundStatistics(
        effective_sample_size(log_weight) / log_weight.shape[0],
        pareto_smooth(log_weight).khat,
        estimate.log_evidence,
        estimate.log_evidence_se,
    )


@dataclass(frozen=True)
class Buffer:
    """The last few rounds, oldest first; each counts alike, whatever its size, or not at all if its weights are 0.

    It never changes, so that what every training step needs of all its latents need be made once only (:meth:`once`).
    """

    rounds: tuple[Round, ...] = ()
    _made: dict[str, Any] = field(default_factory=dict, init=False, repr=False, compare=False)

    def push(self, new: Round, keep: int) -> Buffer:
        """The buffer with ``new`` in it and all but the last ``keep`` rounds forgotten."""
        return Buffer((*self.rounds, new)[-keep:])

    def latents(self) -> Tensor:
        """All latents (M, D)."""
        return torch.cat([r.draws.z for r in self.rounds])

    def scores(self) -> Tensor:
        """Scores at all latents (M, D); NaN where a round has none."""
        return torch.cat(
            [torch.full_like(r.draws.z, math.nan) if r.draws.score is None else r.draws.score for r in self.rounds]
        )

    def weights(self) -> Tensor:
        """Training weights (M,), summing to 1."""
        weight = torch.cat([r.weight for r in self.rounds])
        return weight / weight.sum()

    def once(self, key: tuple[object, ...], make: Callable[[], T]) -> T:
        """What ``make`` makes of this buffer; made anew only where ``key``, what else it depends on, has changed."""
        if self._made.get("key") != key:
            self._made.update(key=key, value=make())
        value: T = self._made["value"]
        return value

    def pick(self, weight: Tensor, uniform: Tensor) -> Tensor:
        """Indices (B,) into the buffer in proportion to ``weight`` (M,), by inverting its cumulative sum."""
        cumulative = torch.cumsum(weight.double(), 0)
        position = uniform.double() * cumulative[-1]
        last = int(weight.nonzero()[-1])  # a position may round to the whole sum
        return torch.searchsorted(cumulative, position, right=True).clamp(max=last)
