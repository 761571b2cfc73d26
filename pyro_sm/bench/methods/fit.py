# SPDX-License-Identifier: Apache-2.0
"""What a way of fitting may spend, what it leaves, and how its cost is counted.

Evaluations are counted in latents: a score is one gradient, and the value that comes with it one value.
"""

from __future__ import annotations

import time
from collections.abc import Mapping
from typing import NamedTuple, Protocol

import pyro
import torch
from torch import Tensor

from pyro_sm.base import Draws, Evaluations
from pyro_sm.corrections import ImportanceResampling
from pyro_sm.targets import Target
from pyro_sm.weights import Evidence


class Budget(NamedTuple):
    """``evaluations`` to spend on training, and the number of usable ``draws`` wanted of the result.

    Methods with weights draw a ``pool`` four times as large and resample it; its evaluations are not of the budget.
    """

    evaluations: int
    draws: int = 10_000

    @property
    def pool(self) -> int:
        """Weighted draws: an effective share of a quarter is enough for as many usable ones as are wanted."""
        return 4 * self.draws


class Cost(NamedTuple):
    """Evaluations of ``values`` of the density and of its ``scores``, and CPU ``seconds`` of the process."""

    values: int
    scores: int
    seconds: float

    def row(self) -> dict[str, float]:
        """As rows have it."""
        return {"density": self.values, "gradient": self.scores, "seconds": self.seconds}


class Fit(NamedTuple):
    """What a way leaves.

    ``samples``: equally weighted, by site (n, ...); a target's site is ``x``. ``log_weight``: (N,) of the pool they
    were resampled from; None if the way has no weights. ``evidence``: where it comes from elsewhere than the weights.
    ``probe``: values that a ``verdict`` took, apart from the rest. ``note``: what the way chose by itself, in words.
    """

    samples: Mapping[str, Tensor]
    training: Cost
    drawing: Cost
    log_weight: Tensor | None = None
    evidence: Evidence | None = None
    verdict: str = ""
    probe: int = 0
    note: str = ""


class Method(Protocol):
    """A way to sample a target."""

    @property
    def name(self) -> str:
        """As the command line calls it."""
        ...

    def fit(self, target: Target, seed: int, budget: Budget) -> Fit:
        """Train, draw, and count. Leaves the param store cleared.

        Raises:
            Exception: whatever goes wrong; it becomes a row of the results.
        """
        ...


class Meter:
    """Differences of counted evaluations and of CPU time since the last look."""

    def __init__(self) -> None:
        self._seen = Evaluations()
        self._started = time.process_time()

    def look(self, evaluations: Evaluations) -> Cost:
        """What was spent since the last look."""
        now = time.process_time()
        cost = Cost(
            evaluations.values - self._seen.values, evaluations.scores - self._seen.scores, now - self._started
        )
        self._seen = Evaluations(evaluations.values, evaluations.scores)
        self._started = now
        return cost


def begin(seed: int) -> None:
    """An empty param store, and the seed."""
    pyro.clear_param_store()
    pyro.set_rng_seed(seed)


def resampled(draws: Draws, count: int, seed: int) -> Tensor:
    """``count`` latents (count, D) of a weighted pool, by importance resampling."""
    return draws.z[ImportanceResampling().apply(draws, count, torch.Generator().manual_seed(seed))]
