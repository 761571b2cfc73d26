# SPDX-License-Identifier: Apache-2.0
r"""Paths of densities ``p_β`` from an easy one to ``p̃``, which is ``β = 1``.

* :class:`Bridge`: ``log p_β = (1−β) log b + β log p̃`` from a normalised start ``b`` at ``β = 0``;
* :class:`Power`: ``log p_β = β log p̃``, the target at the temperature ``1/β``; it has no normalised end.

Both are linear in β with the slope ``ℓ``, the *gain*: ``log p̃ − log b``, or ``log p̃``. What is known at a point
(values and scores of ``b`` and ``p̃``) gives every ``p_β`` there without a new evaluation.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import NamedTuple, Protocol

import torch
from torch import Tensor

from pyro_sm.base import Density, HasPrior
from pyro_sm.density import value_and_score
from pyro_sm.smc.moves import Chains


class Start(Protocol):
    """A normalised density with exact draws, such as ``GaussianDensity``."""

    def sample(self, num_draws: int) -> Tensor:
        """Exact draws (num_draws, D) of the normalised density."""
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
        """Prior draws (num_draws, D)."""
        return self._prior.prior_draws(num_draws)

    def log_prob_and_score(self, z: Tensor) -> tuple[Tensor, Tensor]:
        """``log`` prior (N,) in nats, and its score (N, D)."""
        return value_and_score(self._prior.log_prior, z)


class Points(NamedTuple):
    """``z`` (N, D) with values (N,) in nats and scores (N, D) of both ends of a path; zero for an end not used."""

    z: Tensor
    log_b: Tensor
    score_b: Tensor
    log_p: Tensor
    score_p: Tensor

    def at(self, index: Tensor | slice) -> Points:
        """Those of the given rows."""
        return Points(*(x[index] for x in self))

    def where(self, keep: Tensor, other: Points) -> Points:
        """Row by row: these where ``keep`` (N,), else the others."""
        column = keep.unsqueeze(-1)
        pairs = zip(self, other, strict=True)
        return Points(*(torch.where(keep if a.ndim == 1 else column, a, b) for a, b in pairs))


class AnnealingPath(Protocol):
    """A path; β is a tensor that goes with (N,)."""

    @property
    def hottest(self) -> float:
        """The smallest β it has, in [0, 1]; draws of the start are exact at 0."""
        ...

    def points(self, start: Start, density: Density, z: Tensor) -> Points:
        """Evaluate both ends at ``z`` (N, D)."""
        ...

    def gain(self, points: Points) -> Tensor:
        """``ℓ = d log p_β / dβ`` (N,), nats."""
        ...

    def chains(self, points: Points, beta: Tensor) -> Chains:
        """``log p_β`` and its score, for β () or (N,)."""
        ...


@dataclass(frozen=True)
class Bridge:
    """``(1−β) log b + β log p̃``."""

    @property
    def hottest(self) -> float:
        """0: the path begins at the start itself."""
        return 0.0

    def points(self, start: Start, density: Density, z: Tensor) -> Points:
        """Evaluate start and density at ``z`` (N, D)."""
        return Points(z, *start.log_prob_and_score(z), *density.log_prob_and_score(z))

    def gain(self, points: Points) -> Tensor:
        """``log p̃ − log b`` (N,), nats."""
        return points.log_p - points.log_b

    def chains(self, points: Points, beta: Tensor) -> Chains:
        """``log p_β`` and its score, for β () or (N,)."""
        column = beta.unsqueeze(-1)
        value = (1 - beta) * points.log_b + beta * points.log_p
        score = (1 - column) * points.score_b + column * points.score_p
        return Chains(points.z, torch.nan_to_num(value, nan=-math.inf, posinf=math.inf, neginf=-math.inf), score)


@dataclass(frozen=True)
class Power:
    """``β log p̃``, ``β ≥ hottest``; the start only says where chains begin and is not evaluated.

    Raises:
        ValueError: ``hottest`` outside (0, 1].
    """

    hottest: float = 0.1

    def __post_init__(self) -> None:
        if not 0 < self.hottest <= 1:
            raise ValueError(f"expected hottest in (0, 1], found {self.hottest}")

    def points(self, start: Start, density: Density, z: Tensor) -> Points:
        """Evaluate the density at ``z`` (N, D)."""
        log_p, score = density.log_prob_and_score(z)
        return Points(z, torch.zeros_like(log_p), torch.zeros_like(score), log_p, score)

    def gain(self, points: Points) -> Tensor:
        """``log p̃`` (N,), nats."""
        return points.log_p

    def chains(self, points: Points, beta: Tensor) -> Chains:
        """``log p_β`` and its score, for β () or (N,)."""
        return Chains(points.z, beta * points.log_p, beta.unsqueeze(-1) * points.score_p)


class OnPath:
    """``z -> (log p_β, score)`` for moves, with the last points kept for every other β.

    Args:
        path: which densities.
        start: one end.
        density: the other.
        beta: () or (N,), one per row.
    """

    def __init__(self, path: AnnealingPath, start: Start, density: Density, beta: Tensor) -> None:
        self.path, self.start, self.density, self.beta = path, start, density, beta
        self.last: Points

    def __call__(self, z: Tensor) -> tuple[Tensor, Tensor]:
        """``log p_β`` (N,) and its score (N, D)."""
        self.last = self.path.points(self.start, self.density, z)
        chains = self.path.chains(self.last, self.beta)
        return chains.log_p, chains.score


def width(information: Tensor) -> Tensor:
    """``(E (∂_i log p)²)^{−½}``, elementwise: the width of a Gaussian with this Fisher information; 1 where it is 0.

    It is the width of the modes, where the standard deviation is the distance between them.
    """
    return torch.where(information > 0, information.rsqrt(), 1.0)
