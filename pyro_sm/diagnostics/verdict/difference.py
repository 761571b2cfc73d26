# SPDX-License-Identifier: Apache-2.0
r"""Do two estimates of ``log Z`` agree? Of ``a ± s_a`` and ``b ± s_b``, independent, all in nats,

    ``gap = a − b``,   ``se = √(s_a² + s_b²)``,   they differ if   ``|gap| > drift + deviations · se``.

The drift is what no posterior average notices, however small the errors; NaN differs from everything.
"""

from __future__ import annotations

import math
from typing import NamedTuple

from pyro_sm.diagnostics.verdict.thresholds import Thresholds
from pyro_sm.weights import Evidence


class EvidenceDifference(NamedTuple):
    """``gap`` between two estimates of ``log Z`` and its standard error ``se``, nats."""

    gap: float
    se: float

    @classmethod
    def between(cls, one: Evidence, other: Evidence) -> EvidenceDifference:
        """``one`` minus ``other``, estimates independent of each other."""
        return cls(one.log_evidence - other.log_evidence, math.hypot(one.log_evidence_se, other.log_evidence_se))

    def matters(self, limits: Thresholds) -> bool:
        """Whether the two differ by more than their errors and the drift allow."""
        return not abs(self.gap) <= limits.drift + limits.deviations * self.se  # NaN differs

    def __str__(self) -> str:
        return f"{self.gap:+.3f} ± {self.se:.3f} nats"
