# SPDX-License-Identifier: Apache-2.0
"""When training ends: the stopping rule, and the learning-rate schedule that follows from it, as pure functions.

The learning rate is held until the run has converged or half its budget is spent, then goes linearly to zero.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import NamedTuple

from pyro_sm.base import RoundInfo

# A long run is annealed for a third of its rounds: a rate that falls faster than the network has learned loses ESS.
_ANNEALED_SHARE = 3


@dataclass(frozen=True)
class StoppingRule:
    """When training ends.

    Args:
        max_evaluations: budget of density evaluations for training; the learning rate reaches zero there. What
            seeding a population takes comes on top (and is counted in the history).
        patience: rounds over which the effective sample size must still rise.
        min_rise: relative rise of its mean over ``patience`` rounds that counts as one.
        anneal_rounds: fewest rounds over which the learning rate goes to zero.

    Raises:
        ValueError: a number that is not positive.
    """

    max_evaluations: int = 100_000
    patience: int = 5
    min_rise: float = 0.05
    anneal_rounds: int = 8

    def __post_init__(self) -> None:
        for name in ("max_evaluations", "patience", "anneal_rounds"):
            if getattr(self, name) < 1:
                raise ValueError(f"expected {name} >= 1, found {getattr(self, name)}")

    def converged(self, history: tuple[RoundInfo, ...]) -> bool:
        """γ = 1 throughout the last ``patience`` rounds, and ESS no longer rising over them."""
        if len(history) < 2 * self.patience:
            return False
        last, before = history[-self.patience :], history[-2 * self.patience : -self.patience]
        rise = sum(info.ess for info in last) / max(sum(info.ess for info in before), 1e-12)
        return all(info.gamma > 0.999 for info in last) and rise < 1 + self.min_rise


class Schedule(NamedTuple):
    """Where the run stands. ``anneal_start``: first round of annealing, or −1; ``anneal_end``: the round to stop at.

    ``finished``: training has ended; ``run`` then only binds the data.
    """

    anneal_start: int = -1
    anneal_end: int = -1
    finished: bool = False

    def after_round(self, stopping: StoppingRule, history: tuple[RoundInfo, ...], last: int) -> Schedule:
        """Decide, once per round, whether to anneal; ``last``: the round at which the budget is spent."""
        done = len(history)
        last = max(last, done)
        if self.anneal_start >= 0:
            return self
        if stopping.converged(history):
            length = max(stopping.anneal_rounds, done // _ANNEALED_SHARE)
            return Schedule(done, min(done + length, last))
        if done >= (last + 1) // 2:
            return Schedule(done, last)
        return self

    def rate(self, rounds: float) -> float:
        """The learning rate of the step to come, as a share of the first; ``rounds``: done, with the part of one."""
        if self.anneal_start < 0:
            return 1.0
        return max(1 - (rounds - self.anneal_start) / (self.anneal_end - self.anneal_start + 1), 0.0)

    def ends_at(self, last: int) -> int:
        """The round after which training ends; ``last``: the one at which the budget is spent."""
        return min(last, self.anneal_end) if self.anneal_start >= 0 else last

    def reopened(self, stopping: StoppingRule, history: tuple[RoundInfo, ...], last: int) -> Schedule:
        """Training goes on if it was the budget that ended it, and this has grown; ``last``: as above."""
        # As it stood when annealing began: annealing itself lifts the effective sample size again.
        ended_by_budget = not stopping.converged(history[: self.anneal_start])
        return Schedule() if self.finished and ended_by_budget and self.anneal_end < last else self


def last_round(
    stopping: StoppingRule,
    history: tuple[RoundInfo, ...],
    *,
    num_draws: int,
    evaluations_per_round: int,
    seeding: int,
) -> int:
    """The round at which the budget is spent; the base comes out of it, the seeding of a population on top.

    Args:
        stopping: the budget.
        history: what the rounds have measured.
        num_draws: of one round.
        evaluations_per_round: of a round and the steps that follow it.
        seeding: evaluations that a population's first particles took.
    """
    base = history[0].density_evaluations - num_draws - seeding if history else 0
    return max((stopping.max_evaluations - base) // evaluations_per_round, 1)
