# SPDX-License-Identifier: Apache-2.0
"""When training ends: the stopping rule, the learning-rate schedule that follows from it, and Ctrl-C.

The learning rate is held until the run has converged or half its budget is spent, then goes linearly to zero.
"""

from __future__ import annotations

import signal
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from types import FrameType
from typing import NamedTuple

from pyro_sm.base import RoundInfo


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


@contextmanager
def deferred_interrupt() -> Iterator[Callable[[], bool]]:
    """Ctrl-C is noted and acted upon between two steps; a second one interrupts at once."""
    hit = False

    def note(signum: int, frame: FrameType | None) -> None:
        nonlocal hit
        if hit:
            raise KeyboardInterrupt
        hit = True

    if threading.current_thread() is not threading.main_thread():
        yield lambda: False
        return
    previous = signal.signal(signal.SIGINT, note)
    try:
        yield lambda: hit
    finally:
        signal.signal(signal.SIGINT, previous)
