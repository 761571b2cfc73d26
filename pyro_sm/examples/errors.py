# SPDX-License-Identifier: Apache-2.0
"""How far draws are from a reference: worst error of a mean and of a standard deviation, in reference sds."""

from __future__ import annotations

from typing import NamedTuple

from torch import Tensor


class Errors(NamedTuple):
    """Worst error of the means and of the standard deviations, in reference standard deviations."""

    mean: float
    sd: float


def worst_errors(draws: Tensor, mean: Tensor, sd: Tensor) -> Errors:
    """Compare the columns of ``draws`` (N, K) with reference means (K,) and standard deviations (K,)."""
    return Errors(
        float(((draws.mean(0) - mean).abs() / sd).max()),
        float(((draws.std(0) - sd).abs() / sd).max()),
    )
