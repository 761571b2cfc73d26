# SPDX-License-Identifier: Apache-2.0
r"""Are ranks uniform on ``0, …, L``? An exact test, a simultaneous band, and χ².

N ranks give ``R_i = #{n : r_n < i}``, i = 1, …, L, with ``R_i ~ Binomial(N, i/(L+1))`` where they are
uniform. The level of a trajectory is its smallest pointwise two-sided p-value,

    ``γ = min_i 2 min{P(Bin ≤ R_i), P(Bin ≥ R_i)}``,

and ``P(γ > g)`` is the probability of staying between the binomial quantiles at all L points. It is computed exactly:
the counts of the L + 1 cells are independent Poisson variables given their sum, so one product of a vector with a
Poisson matrix per point, rows outside of the quantiles struck out, gives it. That yields the p-value ``P(γ ≤ γ_obs)``
and the simultaneous band, with no simulation and no asymptotics; a trajectory leaves the band of level α exactly if
its p-value is at most α. A χ² test over bins of equal width stands beside it.

Source: "Graphical Test for Discrete Uniformity and its Applications in Goodness of Fit Evaluation and Multiple Sample
Comparison" https://arxiv.org/abs/2103.10522 .
"""

from __future__ import annotations

import math
from typing import Any, NamedTuple

import numpy as np
import torch

_PER_BIN, _MOST_BINS = 5, 20
"""χ² is asymptotic, and five expected counts a bin are the usual least (Cochran's rule); more than twenty bins would
spread a smooth departure over so many degrees of freedom that the test no longer sees it."""


class Band(NamedTuple):
    """Where all of ``R_i/N − i/(L+1)`` lie at once with the probability asked for.

    ``at``: (L,) the points ``i/(L+1)``. ``lower``, ``upper``: (L,), the ends included.
    """

    at: np.ndarray
    lower: np.ndarray
    upper: np.ndarray


class Uniformity(NamedTuple):
    """``p_value``: of the ECDF's largest excursion, exact. ``chi_square``: p-value of the χ² test, asymptotic."""

    p_value: float
    chi_square: float


def _pointwise(num_ranks: int, num_draws: int) -> np.ndarray:
    """Two-sided p-values ``2 min{P(Bin ≤ k), P(Bin ≥ k)}`` (L, N+1) of ``R_i = k``."""
    k = np.arange(num_ranks + 1)
    log_factorial = np.concatenate([[0.0], np.cumsum(np.log(np.arange(1, num_ranks + 1)))])
    at = (np.arange(1, num_draws + 1) / (num_draws + 1))[:, None]
    log_choose = log_factorial[-1] - log_factorial - log_factorial[::-1]
    below = np.exp(log_choose + k * np.log(at) + (num_ranks - k) * np.log1p(-at)).cumsum(1)
    # The mirror image, rather than a sum from above: what is equal by symmetry then is so to the last digit.
    return 2 * np.minimum(below, below[::-1, ::-1])


def _stays(inside: np.ndarray) -> float:
    """Probability that uniform ranks have ``inside[i, R_i]`` for all i; ``inside``: (L, N+1)."""
    num_points, n = inside.shape[0], inside.shape[1] - 1
    mean = n / (num_points + 1)
    k = np.arange(n + 1)
    log_factorial = np.concatenate([[0.0], np.cumsum(np.log(k[1:]))])
    poisson = np.exp(k * math.log(mean) - mean - log_factorial)
    step = k[None, :] - k[:, None]
    kernel = np.where(step >= 0, poisson[np.maximum(step, 0)], 0.0)
    reached = (k == 0).astype(float)
    for row in inside:
        reached = (reached @ kernel) * row
    total = math.exp(n * math.log(n) - n - log_factorial[-1])
    return float(np.clip((reached @ kernel)[n] / total, 0.0, 1.0))


def _counts_below(ranks: np.ndarray, num_draws: int) -> np.ndarray:
    """``R_i`` (L,)."""
    return np.bincount(ranks, minlength=num_draws + 1).cumsum()[:-1]


def _checked(ranks: Any, num_draws: int) -> np.ndarray:
    found = np.asarray(ranks)
    if found.ndim != 1 or not len(found) or not np.issubdtype(found.dtype, np.integer):
        raise ValueError(f"expected whole ranks (N,), N >= 1, found {found.dtype} of shape {found.shape}")
    if num_draws < 1 or found.min() < 0 or found.max() > num_draws:
        raise ValueError(f"expected ranks in 0..{num_draws}, found {found.min()}..{found.max()}")
    return found


def ecdf_difference(ranks: Any, num_draws: int) -> np.ndarray:
    """``R_i/N − i/(L+1)`` (L,) of ranks (N,) in ``0, …, L = num_draws``; positive where ranks are too small.

    Raises:
        ValueError: no ranks, or one that is not a whole number in that range.
    """
    found = _checked(ranks, num_draws)
    return _counts_below(found, num_draws) / len(found) - np.arange(1, num_draws + 1) / (num_draws + 1)


def simultaneous_band(num_ranks: int, num_draws: int, level: float = 0.95) -> Band:
    """The narrowest band between binomial quantiles of one level that holds with probability ``level`` or more.

    Args:
        num_ranks: N, data sets.
        num_draws: L, so that ranks are in ``0, …, L``.
        level: the probability that uniform ranks stay inside at all points, in (0, 1).

    Raises:
        ValueError: a number out of range.
    """
    if num_ranks < 1 or num_draws < 1 or not 0 < level < 1:
        raise ValueError(
            f"expected num_ranks >= 1, num_draws >= 1, level in (0, 1), found {num_ranks}, {num_draws}, {level}"
        )
    pointwise = _pointwise(num_ranks, num_draws)
    # The band shrinks as the pointwise level rises: find the last that still holds.
    levels = np.unique(pointwise[pointwise <= 1.0])
    low, high = 0, len(levels)
    while high - low > 1:
        middle = (low + high) // 2
        low, high = (middle, high) if _stays(pointwise >= levels[middle]) >= level else (low, middle)
    inside = pointwise >= levels[low]
    at = np.arange(1, num_draws + 1) / (num_draws + 1)
    lower, upper = inside.argmax(1), num_ranks - inside[:, ::-1].argmax(1)
    return Band(at, lower / num_ranks - at, upper / num_ranks - at)


def uniformity(ranks: Any, num_draws: int) -> Uniformity:
    """Test that ranks (N,) are uniform on ``0, …, L = num_draws``; see the head.

    The χ² test has as many bins, at most 20, as leave five ranks in each on average (p-value 1 below ten).

    Raises:
        ValueError: no ranks, or one that is not a whole number in that range.
    """
    found = _checked(ranks, num_draws)
    pointwise = _pointwise(len(found), num_draws)
    observed = pointwise[np.arange(num_draws), _counts_below(found, num_draws)].min()
    return Uniformity(1.0 - _stays(pointwise > observed), _chi_square(found, num_draws))


def _chi_square(ranks: np.ndarray, num_draws: int) -> float:
    num_bins = min(_MOST_BINS, len(ranks) // _PER_BIN, num_draws + 1)
    if num_bins < 2:
        return 1.0
    width = np.bincount(np.arange(num_draws + 1) * num_bins // (num_draws + 1))  # in ranks; not all the same
    expected = len(ranks) * width / (num_draws + 1)
    found = np.bincount(ranks * num_bins // (num_draws + 1), minlength=num_bins)
    statistic = ((found - expected) ** 2 / expected).sum()
    half = torch.tensor([(num_bins - 1) / 2, statistic / 2], dtype=torch.float64)
    return float(torch.special.gammaincc(half[0], half[1]))
