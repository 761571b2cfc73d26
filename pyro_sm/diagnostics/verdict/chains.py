# SPDX-License-Identifier: Apache-2.0
r"""Do independent chains agree, and do they move? R̂ of replicas or of MCMC, acceptance of independent Metropolis.

* R̂ is the largest split-R̂ of any scalar (``smc/mixing.py``) over C > 1 chains, be they guides trained apart or
  Markov chains. Independent chains are a look elsewhere: what one has lost another may have.
* An independent Metropolis chain keeps a state ``1/acceptance`` steps on average.
* Markov chains have no weights: their effective number of draws is the smallest ESS of any scalar.

Source: "Rank-normalization, folding, and localization: an improved R̂ for assessing convergence of MCMC"
https://arxiv.org/abs/1903.08008 .
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from pyro_sm.diagnostics.verdict.thresholds import Thresholds
from pyro_sm.diagnostics.verdict.trust import TRAIN_LONGER, Reason, Trust
from pyro_sm.smc.mixing import effective_draws, split_rhat

_MIN_LENGTH = 8
"""Draws of a chain, below which ``smc/mixing.py`` refuses it: a half needs four for a variance."""


@dataclass(frozen=True)
class ChainFindings:
    """What was found of chains; None what was not measured.

    Args:
        num_chains: independent chains or replicas, C.
        rhat: the largest split-R̂ over them; None of a single chain, or where everything is constant.
        acceptance: mean acceptance of independent Metropolis, in [0, 1].
    """

    num_chains: int | None = None
    rhat: float | None = None
    acceptance: float | None = None

    @property
    def compared(self) -> bool:
        """Whether several chains have been held against each other, which is a look elsewhere."""
        return self.rhat is not None and (self.num_chains or 0) > 1

    def reasons(self, limits: Thresholds) -> Iterator[Reason]:
        """Judgement of R̂, then of the acceptance."""
        if self.rhat is not None:
            yield _judge_rhat(self.rhat, self.num_chains, limits)
        if self.acceptance is not None:
            text = f"independent Metropolis accepts {self.acceptance:.1%} of the guide's draws"
            if not self.acceptance >= limits.acceptance:
                yield Reason(f"{text}: its chains hardly move", TRAIN_LONGER, Trust.CARE)
            else:
                yield Reason(text, "", Trust.TRUST)


def _judge_rhat(rhat: float, num_chains: int | None, limits: Thresholds) -> Reason:
    text = f"R̂ is {rhat:.3f} over {num_chains} independent chains"
    if not rhat <= limits.rhat:
        what = "they disagree, some have lost or overrate part of the posterior"
        advice = "compare the chains; train longer, or from a base that covers all"
        return Reason(f"{text}: {what}", advice, Trust.DISTRUST)
    if rhat > limits.good_rhat:
        return Reason(f"{text}, above {limits.good_rhat}", "train longer, or take more draws", Trust.CARE)
    return Reason(text, "", Trust.TRUST)


def measure_chains(chains: Sequence[Tensor], acceptance: float | None = None) -> ChainFindings | None:
    """Findings from chains, each of the tensors (C, S, ...) with the same C and S; None if there is nothing to see.

    Args:
        chains: draws of independent chains; those of fewer than eight draws, and empty ones, are passed over.
        acceptance: of independent Metropolis, if that is how draws are made.
    """
    flat = _scalars(chains)
    if flat is None:
        return None if acceptance is None else ChainFindings(acceptance=acceptance)
    count = flat.shape[0]
    rhat = split_rhat(flat)
    varies = flat.amax((0, 1)) > flat.amin((0, 1))  # a constant has no R̂; chains stuck at different places have inf
    if count > 1 and bool(varies.any()):
        found = float(torch.nan_to_num(rhat[varies], nan=math.inf, posinf=math.inf).max())
        return ChainFindings(count, found, acceptance)
    return ChainFindings(count, None, acceptance)


def markov_ess(chains: Sequence[Tensor]) -> float | None:
    """The smallest effective number of draws of any scalar of Markov chains (C, S, ...); None if none has one."""
    flat = _scalars(chains)
    if flat is None:
        return None
    ess = effective_draws(flat)
    return float(ess[torch.isfinite(ess)].min()) if bool(torch.isfinite(ess).any()) else None


def _scalars(chains: Sequence[Tensor]) -> Tensor | None:
    """All scalars of all tensors (C, S, K), float64."""
    usable = [x.double().reshape(*x.shape[:2], -1) for x in chains if x.shape[1] >= _MIN_LENGTH and x[0, 0].numel()]
    return torch.cat(usable, -1) if usable else None
