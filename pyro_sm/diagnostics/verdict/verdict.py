# SPDX-License-Identifier: Apache-2.0
r"""From findings to a verdict: trust, use with care, do not trust; with the reasons, and what to do next.

Pure arithmetic: every group of :class:`~pyro_sm.diagnostics.verdict.findings.Findings` judges itself by the
:class:`~pyro_sm.diagnostics.verdict.thresholds.Thresholds`, :func:`judge` collects. The verdict is the worst of its
reasons. One rule stands above the others: good weights cannot say that nothing is missing, for a guide that has lost
a mode draws nothing there to be weighted. Unless something has looked elsewhere (the probe, or independent replicas)
the verdict is at most *use with care*.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

from pyro_sm.diagnostics.verdict.findings import Findings
from pyro_sm.diagnostics.verdict.probe_findings import reasons_without_probe
from pyro_sm.diagnostics.verdict.thresholds import Thresholds
from pyro_sm.diagnostics.verdict.trust import Reason, Trust


@dataclass(frozen=True)
class Verdict:
    """``level``, the ``reasons`` for it (worst first), what was ``unchecked``, and the ``findings`` behind it.

    ``print(verdict)`` says it in words.
    """

    level: Trust
    reasons: tuple[Reason, ...]
    unchecked: tuple[str, ...]
    findings: Findings

    def __str__(self) -> str:
        lines = [f"Verdict: {self.level.words}"]
        for reason in self.reasons:
            lines.append(f"  {'+?-'[reason.level]} {reason.finding}")
            if reason.advice:
                lines.append(f"      next: {reason.advice}")
        if self.unchecked:
            lines.append(f"  not checked: {'; '.join(self.unchecked)}")
        return "\n".join(lines)


def judge(findings: Findings, thresholds: Thresholds | None = None) -> Verdict:
    """The verdict on what was found; by the default :class:`Thresholds` if none are given."""
    reasons = sorted(_reasons(findings, thresholds or Thresholds()), key=lambda reason: -reason.level)
    level = reasons[0].level if reasons else Trust.CARE
    return Verdict(level, tuple(reasons), tuple(_unchecked(findings)), findings)


def _reasons(found: Findings, limits: Thresholds) -> Iterator[Reason]:
    """In the order in which equally grave ones are printed."""
    if found.weights is not None:
        yield from found.weights.reasons(limits)
    if found.training is not None:
        yield from found.training.reasons(limits, found.weights)
    if found.chains is not None:
        yield from found.chains.reasons(limits)
    if found.stein is not None:
        yield from found.stein.reasons(limits)
    compared = found.chains is not None and found.chains.compared
    if found.probe is not None:
        yield from found.probe.reasons(limits, compared=compared)
    else:
        yield from reasons_without_probe(compared=compared)


def _unchecked(found: Findings) -> Iterator[str]:
    if found.weights is None or found.weights.khat is None:
        yield "Pareto k̂ (no weighted draws)"
    if found.chains is None or found.chains.rhat is None:
        yield "R̂ (no independent chains)"
    if found.probe is None:
        yield "lost modes (no probe was run)"
    elif not found.probe.failure and found.probe.unknown is None:
        yield "the guide's weights at the probe's particles (its density there is not known)"
