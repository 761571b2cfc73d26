# SPDX-License-Identifier: Apache-2.0
r"""What the probe's particles say of the guide: the mass it does not know, and the evidence it has missed.

The weights of a guide cannot tell that a mode is missing, for no draw lies there. The probe (``probe.py``) has come
to the posterior another way, with M particles ``z_j``. At each the guide is asked for the log weight it would have
given, ``log w_j = log p̃(z_j) − log q(z_j)`` (for a diffusion that of a path noised forward from ``z_j``, in the same
mixture with the covering component as in the pool).

*Is the mass known?* Let c be three times the tenth largest weight of the pool of N draws. Of places with ``w > c``
the pool has fewer than ten draws, and the posterior mass that rests on so few is the *unknown share*

    ``u = P_p(w > c) ≈ (1/M) Σ_j 1{w_j > c}``.

It is about ``10/N`` for bounded weights, whatever the guide's shares of the modes, and the mass of a lost mode if one
is lost. (The pool's own estimate, ``Σ_i w_i 1{w_i > c} / Σ_i w_i``, sees it only if a draw of the covering component
has chanced upon it.) Below c nothing is compared: after resampling the particles' shares of the modes are noisy, and
a guide that has them wrong but knows all places is put right by its weights.

*Error.* Particles of one line of descent are counted as one: ``1/M_eff = s² + 1/M`` with ``s`` the genealogical
standard error of ``Ẑ``; then ``var(u) ≈ (u (1−u) + 1/M_eff) / M_eff``, not zero for ``u = 0``.

*Evidence.* ``log Ẑ`` of the probe against the pool's: mass that was not found is missing in the one or the other.

*Judgement.* The unknown share counts less twice its error. A probe that failed, or missed what the guide found, has
not looked elsewhere: the verdict is then at most *use with care*, unless independent chains have looked.

Source: "Variance estimation in the particle filter" https://arxiv.org/abs/1509.00394 .
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from typing import NamedTuple

import torch
from torch import Tensor

from pyro_sm.base import Evaluations
from pyro_sm.diagnostics.verdict.difference import EvidenceDifference
from pyro_sm.diagnostics.verdict.probe import ProbeResult
from pyro_sm.diagnostics.verdict.thresholds import Thresholds
from pyro_sm.diagnostics.verdict.trust import TRAIN_LONGER, Reason, Trust
from pyro_sm.weights import Evidence, evidence

_RANK = 10
"""The pool's weight of this rank is the last of which it can be said that there are some like it: ten draws have a
relative error of ``1/√10``. A smaller rank would call places known by one lucky draw; a larger one raises the floor
``_RANK/N`` that even an exact fit has."""

_MARGIN = math.log(3.0)
"""Nats beyond it: particles that are not quite at rest have weights a little above those of exact draws. A mode that
is really lost has weights that are larger by orders of magnitude, so that the margin hides nothing."""

_ERRORS = 2.0
"""Standard errors taken off the unknown share: if it were no larger than the line, one probe in forty would exceed it
by chance."""

_LOOK = "run check() with its probe, or train replicas: DiffusionSampler(model, num_chains=4)"
_REPEAT = "with more particles or moves (Probe), or train replicas"


class Unknown(NamedTuple):
    """The share of the posterior mass that rests on next to no draws of the guide, and its standard error."""

    share: float
    se: float

    @property
    def at_least(self) -> float:
        """The share that is there almost surely: less twice its error."""
        return self.share - _ERRORS * self.se


@dataclass(frozen=True)
class ProbeFindings:
    """What the probe found.

    Args:
        failure: why it found nothing, or empty.
        evaluations: its cost, and how many of its densities were NaN and taken to be zero.
        particles: its effective particles, M_eff.
        unknown: share of the posterior mass that rests on next to no draws of the guide; None where the guide's
            density at the particles is not known.
        gap: ``log Ẑ`` of the probe minus that of the pool, nats.
    """

    failure: str
    evaluations: Evaluations = field(default_factory=Evaluations)
    particles: float | None = None
    unknown: Unknown | None = None
    gap: EvidenceDifference | None = None

    def reasons(self, limits: Thresholds, *, compared: bool) -> Iterator[Reason]:
        """Judgement of NaN, of the unknown share, and of the probe itself or the evidence it found.

        ``compared``: whether independent chains have looked elsewhere, so that a probe that failed is no loss.
        """
        instead = Trust.TRUST if compared else Trust.CARE
        if self.evaluations.not_a_number:
            yield _judge_not_a_number(self.evaluations, limits)
        if self.unknown is not None:
            yield _judge_unknown(self.unknown, limits)
        failure = self.failure
        if not failure and not (self.particles or 0) >= limits.min_particles:
            failure = f"its particles descend from too few lines (worth {self.particles or 0:.0f} independent ones)"
        if failure:
            yield Reason(f"the probe that looks elsewhere failed: {failure}", f"repeat it {_REPEAT}", instead)
        elif self.gap is not None:
            yield _judge_gap(self.gap, self.unknown, instead, limits)


def reasons_without_probe(*, compared: bool) -> Iterator[Reason]:
    """Judgement where no probe was run: ``compared`` chains are a look elsewhere, too."""
    if not compared:
        text = "nothing has looked elsewhere: neither k̂ nor the effective number of draws can see a lost mode"
        yield Reason(text, _LOOK, Trust.CARE)


def measure_probe(pool: Tensor, result: ProbeResult, log_weights: Sequence[Tensor]) -> ProbeFindings:
    """What the particles say of a guide, or of several replicas.

    Args:
        pool: log weights (N,) of the guide's draws, nats; those of equally long replicas one after the other.
        result: the particles.
        log_weights: the log weights (M,) that the guide, or each replica, gives them; empty if they are not known.
            The worst counts.
    """
    if result.failure:
        return ProbeFindings(result.failure, result.evaluations)
    gap = EvidenceDifference.between(Evidence(result.log_evidence, result.log_evidence_se), evidence(pool))
    worst = None
    if log_weights:
        parts = pool.tensor_split(len(log_weights))
        worst = max(unknown_share(part, result, own) for part, own in zip(parts, log_weights, strict=True))
    return ProbeFindings("", result.evaluations, effective_particles(result), worst, gap)


def effective_particles(result: ProbeResult) -> float:
    """``M_eff``, the particles counted by lines of descent."""
    return 1 / min(result.log_evidence_se**2 + 1 / max(len(result.z), 1), 1.0)


def unknown_share(pool: Tensor, result: ProbeResult, log_weight: Tensor) -> Unknown:
    """The unknown share, as at the head of this file.

    Args:
        pool: log weights (N,) of the guide's draws, nats, at least ten.
        result: the particles.
        log_weight: (M,) the log weights that the guide gives them.
    """
    cut = torch.topk(pool.double(), min(_RANK, len(pool))).values[-1] + _MARGIN
    # A guide that is zero where the posterior is not gives +inf, or NaN after its own arithmetic.
    share = float((torch.nan_to_num(log_weight.double(), nan=math.inf) > cut).double().mean())
    m = effective_particles(result)
    return Unknown(share, math.sqrt((share * (1 - share) + 1 / m) / m))


def _judge_not_a_number(spent: Evaluations, limits: Thresholds) -> Reason:
    count = spent.not_a_number
    share = count / max(spent.values, count)
    text = f"the log density was NaN at {count} places where the probe looked ({share:.1%}), taken to be impossible"
    if share > limits.not_a_number:
        return Reason(text, "if the model should be finite there the posterior is wrong: see to it", Trust.CARE)
    return Reason(text, "", Trust.TRUST)


def _judge_unknown(unknown: Unknown, limits: Thresholds) -> Reason:
    found = f"{unknown.share:.1%} (± {unknown.se:.1%})"
    text = f"{found} of the posterior mass found by tempered SMC is (nearly) unknown to the guide"
    advice = "start from a base that reaches it, or seed the training: Population(min_khat=-math.inf)"
    if not unknown.at_least <= limits.unknown:
        return Reason(f"{text}: a mode or a tail is lost", advice, Trust.DISTRUST)
    if unknown.at_least > limits.barely_unknown:
        return Reason(text, advice, Trust.CARE)
    return Reason(text, "", Trust.TRUST)


def _judge_gap(gap: EvidenceDifference, unknown: Unknown | None, instead: Trust, limits: Thresholds) -> Reason:
    text = f"log evidence of the probe minus the guide's: {gap}"
    if not gap.matters(limits):
        return Reason(text, "", Trust.TRUST)
    if gap.gap < 0:
        # Weights of the guide are right on average: so it is the probe that has missed something.
        missed = f"{text}: the probe has missed part of what the guide found"
        return Reason(missed, f"repeat the probe {_REPEAT}", instead)
    if unknown is None:  # the guide's density at the particles is not known, and this is all there is
        return Reason(f"{text}: the guide misses part of the posterior", TRAIN_LONGER, Trust.DISTRUST)
    if unknown.at_least > limits.barely_unknown:
        return Reason(f"{text}, in line with what is unknown to it", "", Trust.CARE)
    # The guide knows all places of the particles: then the probe may be off by more than it knows.
    unexplained = f"{text}, which the weights at its particles do not explain"
    return Reason(unexplained, f"repeat the probe {_REPEAT}", Trust.CARE)
