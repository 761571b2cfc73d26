# SPDX-License-Identifier: Apache-2.0
r"""Do the slopes of the density fit the draws? The p-value of the kernel Stein test, on resampled draws.

The test (``diagnostics/goodness_of_fit.py``) takes independent draws without weights. A pool of effective number
ESS is resampled for them, and each draw tested once, as many as the weights are good for: an eighth of ESS at the
most, so that draws repeat little and the pool's own error stays below the test's.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

from torch import Tensor

from pyro_sm.diagnostics.goodness_of_fit import stein_p_value
from pyro_sm.diagnostics.verdict.thresholds import Thresholds
from pyro_sm.diagnostics.verdict.trust import TRAIN_LONGER, Reason, Trust
from pyro_sm.model.density import ModelDensity
from pyro_sm.weights import effective_sample_size, resample

_ESS_PER_DRAW = 8
"""Effective draws of the pool for each draw that is tested: the pool's variance is then an eighth of the test's."""

_FEWEST = 50
"""Draws below which the test is left out: it would see next to nothing, and a pass would be taken for praise."""


@dataclass(frozen=True)
class SteinFindings:
    """What the kernel Stein test found.

    Args:
        p_value: its p-value, in (0, 1]; small means a bad fit.
    """

    p_value: float

    def reasons(self, limits: Thresholds) -> Iterator[Reason]:
        """Judgement of the p-value."""
        text = f"kernel Stein test of the draws: p = {self.p_value:.3g}"
        if self.p_value < limits.stein_p:
            yield Reason(f"{text}: their shape does not fit the density's slopes", TRAIN_LONGER, Trust.CARE)
        else:
            yield Reason(text, "", Trust.TRUST)


def measure_stein(density: ModelDensity, z: Tensor, log_weight: Tensor, num_draws: int) -> SteinFindings | None:
    """The test on draws (N, D) with log weights (N,), nats; None where it is not made.

    Up to ``num_draws`` are tested, a gradient evaluation each; none if it is zero, or if the weights are good for
    fewer than fifty (or than ``num_draws``, if that is less).
    """
    count = min(num_draws, int(effective_sample_size(log_weight) / _ESS_PER_DRAW))
    if count < min(num_draws, _FEWEST) or num_draws == 0:
        return None
    chosen = resample(log_weight, count).unique()
    return SteinFindings(stein_p_value(density, z[chosen]))
