# SPDX-License-Identifier: Apache-2.0
r"""Had training ended? Whether the last rounds still moved the evidence, and whether they were still damped.

* *Drift.* The evidence of the last R rounds, ``log (1/R) Σ_r Ẑ_r`` with the error ``√(Σ_r (Ẑ_r se_r)²) / Σ_r Ẑ_r``,
  must agree with the pool's: a guide that still finds mass is not finished. The first round, of the untrained guide,
  is none of them.
* *Damping.* With ``γ < 1`` the last round taught the guide weights ``w^γ``, which is a flattened posterior. If the
  pool's weights are as good as those that would not have been damped, that is past.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from pyro_sm.base import RoundInfo
from pyro_sm.diagnostics.verdict.difference import EvidenceDifference
from pyro_sm.diagnostics.verdict.thresholds import Thresholds
from pyro_sm.diagnostics.verdict.trust import TRAIN_LONGER, Reason, Trust
from pyro_sm.diagnostics.verdict.weights import WeightFindings
from pyro_sm.weights import Evidence, evidence

_LAST_ROUNDS = 3
"""R: one round's evidence is noisy, and many rounds ago the guide was another."""

_FULL = 0.999
"""γ from which on a round counts as undamped: it is found by bisection, and prints as 1.00."""


@dataclass(frozen=True)
class TrainingFindings:
    """What was found of the end of training.

    Args:
        gamma: damping exponent of the last round, in (0, 1].
        drift: ``log Ẑ`` of the pool minus that of the last rounds, nats; None after a single round.
    """

    gamma: float
    drift: EvidenceDifference | None = None

    def reasons(self, limits: Thresholds, weights: WeightFindings | None) -> Iterator[Reason]:
        """Judgement of the drift, then of the damping; ``weights`` are those of the pool drawn after training."""
        if self.drift is not None:
            text = f"log evidence has moved by {self.drift} since the last training rounds"
            if self.drift.matters(limits):
                yield Reason(f"{text}: training was not finished", TRAIN_LONGER, Trust.CARE)
            else:
                yield Reason(text, "", Trust.TRUST)
        if self.gamma < _FULL:
            text = f"the last round was damped (γ = {self.gamma:.2f}): the guide was taught a flattened posterior"
            if _undamped(weights, limits):
                yield Reason(f"{text}; its weights now would need no damping", "", Trust.TRUST)
            else:
                yield Reason(text, TRAIN_LONGER, Trust.CARE)


def _undamped(weights: WeightFindings | None, limits: Thresholds) -> bool:
    """Whether weights such as these are good enough to be used without damping."""
    if weights is None or weights.ess is None or not weights.num_draws:
        return False
    return weights.ess >= limits.undamped * weights.num_draws


def measure_training(log_weight: Tensor, history: Sequence[RoundInfo]) -> TrainingFindings | None:
    """Findings from the log weights (N,) of the pool, nats, and the rounds of training; None without a round."""
    if not history:
        return None
    gamma = history[-1].gamma
    last = history[1:][-_LAST_ROUNDS:]
    if not last:
        return TrainingFindings(gamma)
    log_z = torch.tensor([info.log_evidence for info in last], dtype=torch.float64)
    se = torch.tensor([info.log_evidence_se for info in last], dtype=torch.float64)
    share = torch.softmax(log_z, 0)
    rounds = float(torch.logsumexp(log_z, 0)) - math.log(len(last))
    error = float((share * se).square().sum().sqrt())
    return TrainingFindings(gamma, EvidenceDifference.between(evidence(log_weight), Evidence(rounds, error)))
