# SPDX-License-Identifier: Apache-2.0
r"""What the weights of a pool of N draws say of themselves: k̂, the effective number of draws, the evidence's error.

* *Shape of the tail.* k̂ is the shape of the Pareto law fitted to the largest weights: averages have a usable error
  below .7, and N draws suffice for k up to ``1 − 1/log₁₀ N``, which is ``N ≥ 10^{1/(1−k)}`` solved for k.
* *Effective number of draws* ``(Σ w)² / Σ w²``: the error of an average is ``sd/√ESS``, if k̂ allows an error at all.
* *Halves.* ``log Ẑ`` of two random halves of the pool must agree within their errors: where they do not, the error
  itself rests on a few draws.

None of them can see a mode in which no draw lies. Draws without weights (MCMC, particles of tempered SMC) have an
effective number and nothing else.

Source: "Pareto Smoothed Importance Sampling" https://arxiv.org/abs/1507.02646 .
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass

import torch
from torch import Tensor

from pyro_sm.diagnostics.verdict.difference import EvidenceDifference
from pyro_sm.diagnostics.verdict.thresholds import Thresholds
from pyro_sm.diagnostics.verdict.trust import TRAIN_LONGER, Reason, Trust
from pyro_sm.weights import effective_sample_size, evidence, pareto_smooth


@dataclass(frozen=True)
class WeightFindings:
    """What was found of a pool's weights; None what was not measured.

    Args:
        num_draws: draws in the pool, N.
        khat: Pareto shape of their weights; None where draws have no weights.
        ess: effective number of draws, a count in [1, N].
        halves: ``log Ẑ`` of one random half of the pool minus that of the other, nats.
    """

    num_draws: int | None = None
    khat: float | None = None
    ess: float | None = None
    halves: EvidenceDifference | None = None

    def reasons(self, limits: Thresholds) -> Iterator[Reason]:
        """Judgement of the tail, of the effective number, of the halves, in this order."""
        if self.khat is not None and self.num_draws is not None:
            yield _judge_khat(self.khat, self.num_draws, limits)
        if self.ess is not None:
            yield _judge_ess(self.ess, self.num_draws, limits)
        if self.halves is not None:
            text = f"log evidence of the halves of the pool differs by {self.halves}"
            if self.halves.matters(limits):
                advice = f"take more draws; or {TRAIN_LONGER}"
                yield Reason(f"{text}: its error is not to be believed", advice, Trust.CARE)
            else:
                yield Reason(text, "", Trust.TRUST)


def measure_weights(log_weight: Tensor) -> WeightFindings:
    """Findings from the log weights (N,) of a pool, nats.

    Raises:
        ValueError: no weight is finite, or one is NaN.
    """
    generator = torch.Generator(device=log_weight.device).manual_seed(0)  # which halves does not matter
    order = torch.randperm(len(log_weight), generator=generator, device=log_weight.device)
    one, other = (evidence(log_weight[half]) for half in order.tensor_split(2))
    return WeightFindings(
        num_draws=len(log_weight),
        khat=float(pareto_smooth(log_weight).khat),
        ess=effective_sample_size(log_weight),
        halves=EvidenceDifference.between(one, other),
    )


def _judge_khat(khat: float, num_draws: int, limits: Thresholds) -> Reason:
    # Up to ten draws ``1 − 1/log10 N`` is not positive: eleven leave the formula a sense, and a limit of .04.
    enough = min(1 - 1 / math.log10(max(num_draws, 11)), limits.khat)
    if not khat <= limits.khat:
        text = f"Pareto k̂ is {khat:.2f}, above {limits.khat}: a few draws carry the weight, averages are not reliable"
        return Reason(text, f"{TRAIN_LONGER}; more draws of this guide hardly help", Trust.DISTRUST)
    if khat > enough:
        text = f"Pareto k̂ is {khat:.2f}: too heavy a tail for {num_draws} draws (limit {enough:.2f})"
        return Reason(text, "take more draws", Trust.CARE)
    return Reason(f"Pareto k̂ is {khat:.2f} (limit {enough:.2f})", "", Trust.TRUST)


def _judge_ess(ess: float, num_draws: int | None, limits: Thresholds) -> Reason:
    of = f" ({ess / num_draws:.1%} of {num_draws})" if num_draws else ""
    text = f"{ess:.0f} effective draws{of}"
    if not ess >= limits.min_ess:
        advice = f"take more draws; or {TRAIN_LONGER}"
        return Reason(f"only {text}; at least {limits.min_ess:.0f} are needed", advice, Trust.DISTRUST)
    if ess < limits.good_ess:
        return Reason(f"only {text}; {limits.good_ess:.0f} make averages stable", "take more draws", Trust.CARE)
    if num_draws and ess < limits.ess_share * num_draws:
        return Reason(f"{text}: so small a share is decided by a few weights", TRAIN_LONGER, Trust.CARE)
    return Reason(text, "", Trust.TRUST)
