# SPDX-License-Identifier: Apache-2.0
"""Problems with known answers, and ways to break a run on them, for ``bench assurance``."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import NamedTuple

import torch
from torch import Tensor

from pyro_sm.bench.problem import Problem, Samples, from_posterior, from_target, named
from pyro_sm.examples.errors import worst_errors
from pyro_sm.examples.posteriors import Posterior, posteriors
from pyro_sm.gaussians.gaussian import LocScale
from pyro_sm.guides import GivenBase, LaplaceBase, PriorBase
from pyro_sm.guides.bases import Base
from pyro_sm.model.density import ModelDensity
from pyro_sm.targets import Funnel, GaussianMixture, HasDraws, HasModes, UnequalModes

_EXACT = 200_000  # draws behind the moments of a target: their error is a hundredth of what is called wrong


@dataclass(frozen=True)
class Moved:
    """A base made worse: its location shifted by ``shift`` of its scales, its scale multiplied by ``factor``."""

    base: Base
    shift: float = 0.0
    factor: float = 1.0

    def fit(self, density: ModelDensity) -> LocScale:
        """The base, moved."""
        loc, tril = self.base.fit(density)
        return LocScale(loc + self.shift * tril.diagonal(), self.factor * tril)


class Broken(NamedTuple):
    """What can be broken: a ``problem``; ``base``: that covers it; ``corner``: one on one of its modes or flanks."""

    problem: Problem
    base: Base
    corner: Base


def _target(target: HasDraws, corner: tuple[Tensor, float], columns: slice = slice(None)) -> Broken:
    """A target; moments are judged in ``columns``."""
    exact = target.sample(_EXACT, torch.Generator().manual_seed(1)).double()[:, columns]
    mean, sd = exact.mean(0), exact.std(0)

    def judged(samples: Samples) -> dict[str, float]:
        x = samples["x"]
        errors = named(worst_errors(x.double()[:, columns], mean, sd))
        shares = math.nan
        if isinstance(target, HasModes):
            shares = 0.5 * float((target.mode_shares(x) - target.mode_weights()).abs().sum())
        return {**errors, "shares error": shares}

    problem = replace(from_target(target), errors=judged)
    return Broken(problem, GivenBase(*target.start), GivenBase(*corner))


def _posterior(posterior: Posterior) -> Broken:
    problem = from_posterior(posterior)

    def errors(samples: Samples) -> dict[str, float]:
        return {**problem.judged(samples), "shares error": math.nan}

    # A scale to the left and a fifth as wide: on one flank of whatever mode Laplace's method finds.
    return Broken(replace(problem, errors=errors), PriorBase(), Moved(LaplaceBase(), -1.0, 0.2))


def _on_one_mode(target: UnequalModes) -> Tensor:
    half = target.dim // 2
    return torch.cat([torch.full((half,), target.place), torch.zeros(target.dim - half)])


def _mixture() -> Broken:
    target = GaussianMixture(40)
    return _target(target, (target.means[0], 1.0))


def _unequal() -> Broken:
    target = UnequalModes(8)
    return _target(target, (_on_one_mode(target), 1.0))


def _funnel() -> Broken:
    return _target(Funnel(10), (torch.zeros(10), 1.0), slice(0, 1))


def cases() -> dict[str, Callable[[], Broken]]:
    """By name; made in the default dtype of the moment."""
    known = posteriors()
    return {
        "gmm40": _mixture,
        "unequal-8": _unequal,
        "funnel": _funnel,
        "eight_schools_centered": lambda: _posterior(known["eight_schools-eight_schools_centered"]),
        "kidscore_momiq": lambda: _posterior(known["kidiq-kidscore_momiq"]),
        "low_dim_gauss_mix": lambda: _posterior(known["low_dim_gauss_mix-low_dim_gauss_mix"]),
    }


@dataclass(frozen=True)
class Break:
    """How a run is broken.

    Args:
        base: from the case, None for the guide's own default.
        budget: share of the evaluations.
        num_steps: reverse kernels.
        width: of the network.
        learning_rate: of training.
        wide_share: of the covering component, None for the default one.
        population: whether there may be one.
    """

    base: Callable[[Broken], Base] | None = None
    budget: float = 1.0
    num_steps: int = 48
    width: int = 128
    learning_rate: float = 2e-3
    wide_share: float | None = None
    population: bool = False


BREAKS: dict[str, Break] = {
    "none": Break(population=True),
    "a tenth of the budget": Break(budget=0.1, population=True),
    "a tenth of the budget, no population": Break(lambda case: case.base, budget=0.1),
    "base shifted by 10 sd": Break(lambda case: Moved(case.base, shift=10.0)),
    "base on one mode or flank": Break(lambda case: case.corner),
    "the same, hardly any wide draws": Break(lambda case: case.corner, wide_share=0.005),
    "base 20 times too narrow": Break(lambda case: Moved(case.base, factor=0.05)),
    "base 30 times too wide": Break(lambda case: Moved(case.base, factor=30.0)),
    "three kernels": Break(lambda case: case.base, num_steps=3),
    "network of width 2": Break(lambda case: case.base, width=2),
    "learning rate of 0.3": Break(lambda case: case.base, learning_rate=0.3),
}
"""By name; "none" leaves the sampler as it comes. Sizes are such that most of the answers are wrong."""
