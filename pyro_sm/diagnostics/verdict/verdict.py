# SPDX-License-Identifier: Apache-2.0
r"""From numbers to a verdict: trust, use with care, do not trust; with the reasons, and what to do next.

Pure arithmetic: :class:`Findings` are the numbers (``check.py`` and ``probe.py`` measure them), :class:`Thresholds`
the limits, :func:`judge` compares them. The verdict is the worst of its reasons. One rule stands above the others:
good weights cannot say that nothing is missing, for a guide that has lost a mode draws nothing there to be weighted.
Unless something has looked elsewhere (the probe, or independent replicas) the verdict is at most *use with care*.

Sources: "Pareto Smoothed Importance Sampling" https://arxiv.org/abs/1507.02646 ; "Rank-normalization, folding, and
localization: an improved R̂ for assessing convergence of MCMC" https://arxiv.org/abs/1903.08008 .
"""

from __future__ import annotations

import enum
import math
from collections.abc import Iterator
from dataclasses import dataclass, fields
from typing import Any, NamedTuple

from pyro_sm.base import PyroSMWarning


class TrustWarning(PyroSMWarning):
    """A result is handed out that should not be trusted; the message says why, and what to do."""


class Trust(enum.IntEnum):
    """How far a result can be trusted; the larger, the worse."""

    TRUST = 0
    CARE = 1
    DISTRUST = 2

    @property
    def words(self) -> str:
        """In words."""
        return ("trust", "use with care", "do not trust")[self]


class Reason(NamedTuple):
    """What was found, what to do about it (empty where nothing is to be done), and what it does to the verdict."""

    finding: str
    advice: str
    level: Trust


@dataclass(frozen=True)
class Thresholds:
    """Where the lines are drawn. The numbers without a source were set so that exact fits pass; see the tests.

    Args:
        khat: above this Pareto shape no number of draws gives averages one can trust; N draws suffice up to
            ``1 − 1/log10 N`` (both from the paper on Pareto smoothing).
        min_ess: effective draws below which an interval's end is guesswork: a standard error of a tenth of a standard
            deviation.
        good_ess: effective draws of a result to be used as it is: 400, as for MCMC (the paper on R̂).
        ess_share: below this share of the draws the effective number is itself the work of a few weights.
        undamped: effective share of the draws from which on a damped last round is past: the weights judge the guide
            as it is, and ones as good as these would not have been damped.
        deviations: standard errors that two estimates of ``log Z`` may differ by; errors of logs of skewed means are
            too small, so that this is more than the usual two or three.
        drift: nats by which they may differ whatever their errors: 5 % of Z, which no posterior average notices.
        rhat: above this the chains disagree. The classical limit of 1.1 is too high for so few and independent
            chains: one replica of four that has lost a mode with 30 % of the mass gives 1.06.
        good_rhat: below this they agree (1.01: the paper on R̂).
        acceptance: of independent Metropolis, below which its chains hardly move.
        stein_p: below this p-value the slopes of the density do not fit the draws.
        unknown: posterior mass that the guide does not know, less twice its error: 3 %, more than half of what a 95 %
            interval leaves out. Exact fits have a tenth of a percent, heavy tails (k̂ of .6) up to two or three.
        barely_unknown: the same, worth a remark; what a probe of two thousand particles can just tell from zero.
        min_particles: effective particles of the probe (lines of descent), below which it would see an unknown share
            of 10 % less often than it should.
        not_a_number: share of the places that the probe came to where the density may be NaN: now and then a draw of
            a wide prior overflows; more is a model that fails in a part of the space, and is taken to be zero there.
    """

    khat: float = 0.7
    min_ess: float = 100.0
    good_ess: float = 400.0
    ess_share: float = 0.005
    undamped: float = 0.3
    deviations: float = 4.0
    drift: float = 0.05
    rhat: float = 1.05
    good_rhat: float = 1.01
    acceptance: float = 0.05
    stein_p: float = 0.001
    unknown: float = 0.03
    barely_unknown: float = 0.005
    min_particles: float = 40.0
    not_a_number: float = 0.01


@dataclass(frozen=True)
class Findings:
    """What was measured; None where it was not.

    Args:
        num_draws: weighted draws in the pool, N.
        khat: Pareto shape of their weights.
        ess: effective number of them (or of the draws of MCMC), a count.
        halves_gap: ``log Ẑ`` of one random half of the pool minus that of the other, nats.
        halves_se: its standard error.
        rounds_gap: ``log Ẑ`` of the pool minus that of the last rounds of training, nats.
        rounds_se: its standard error.
        gamma: damping exponent of the last round of training; below 1 the guide was taught a flattened target.
        num_chains: independent chains or replicas.
        rhat: the largest split-R̂ over them.
        acceptance: of independent Metropolis.
        stein_p: p-value of the kernel Stein test.
        probe_failure: why the probe found nothing, or empty.
        probe_particles: its effective particles.
        unknown: share of the posterior mass that rests on next to no draws of the guide, by the probe's particles.
        unknown_se: its standard error.
        probe_gap: ``log Ẑ`` of the probe minus that of the pool, nats.
        probe_gap_se: its standard error.
        probe_density_evaluations: cost of the probe.
        probe_gradient_evaluations: cost of the probe.
        probe_not_a_number: how many of its densities were NaN, and taken to be zero.
    """

    num_draws: int | None = None
    khat: float | None = None
    ess: float | None = None
    halves_gap: float | None = None
    halves_se: float | None = None
    rounds_gap: float | None = None
    rounds_se: float | None = None
    gamma: float | None = None
    num_chains: int | None = None
    rhat: float | None = None
    acceptance: float | None = None
    stein_p: float | None = None
    probe_failure: str | None = None
    probe_particles: float | None = None
    unknown: float | None = None
    unknown_se: float | None = None
    probe_gap: float | None = None
    probe_gap_se: float | None = None
    probe_density_evaluations: int | None = None
    probe_gradient_evaluations: int | None = None
    probe_not_a_number: int | None = None

    def attributes(self) -> dict[str, str | int | float]:
        """As attributes of a file, ``check_<field>``; what was not measured is left out."""
        values = {f"check_{field.name}": getattr(self, field.name) for field in fields(self)}
        return {name: value for name, value in values.items() if value is not None}

    @classmethod
    def from_attributes(cls, attributes: Any) -> Findings:
        """Read back from a mapping with the attributes of a file."""
        values: dict[str, Any] = {}
        for field in fields(cls):
            value = attributes.get(f"check_{field.name}")
            if value is not None:  # a file gives NumPy's numbers
                values[field.name] = (
                    value if isinstance(value, str) else value.item() if hasattr(value, "item") else value
                )
        return cls(**values)


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
    """The verdict on what was found."""
    limits = thresholds or Thresholds()
    reasons = (
        *_weights(findings, limits), *_evidence(findings, limits), *_chains(findings, limits),
        *_fit(findings, limits), *_elsewhere(findings, limits),
    )  # fmt: skip
    ordered = tuple(sorted(reasons, key=lambda reason: -reason.level))
    level = ordered[0].level if ordered else Trust.CARE
    return Verdict(level, ordered, tuple(_unchecked(findings)), findings)


_TRAIN = "train longer (a larger budget in StoppingRule), use a wider base, or reparametrise the model"
_LOOK = "run check() with its probe, or train replicas: DiffusionSampler(model, num_chains=4)"


def _weights(f: Findings, t: Thresholds) -> Iterator[Reason]:
    if f.khat is not None and f.num_draws is not None:
        enough = min(1 - 1 / math.log10(max(f.num_draws, 11)), t.khat)
        if not f.khat <= t.khat:
            text = (
                f"Pareto k̂ is {f.khat:.2f}, above {t.khat}: a few draws carry the weight, averages are not reliable"
            )
            yield Reason(text, f"{_TRAIN}; more draws of this guide hardly help", Trust.DISTRUST)
        elif f.khat > enough:
            text = f"Pareto k̂ is {f.khat:.2f}: too heavy a tail for {f.num_draws} draws (limit {enough:.2f})"
            yield Reason(text, "take more draws", Trust.CARE)
        else:
            yield Reason(f"Pareto k̂ is {f.khat:.2f} (limit {enough:.2f})", "", Trust.TRUST)
    if f.ess is None:
        return
    of = f" ({f.ess / f.num_draws:.1%} of {f.num_draws})" if f.num_draws else ""
    text = f"{f.ess:.0f} effective draws{of}"
    if not f.ess >= t.min_ess:
        yield Reason(
            f"only {text}; at least {t.min_ess:.0f} are needed", f"take more draws; or {_TRAIN}", Trust.DISTRUST
        )
    elif f.ess < t.good_ess:
        yield Reason(f"only {text}; {t.good_ess:.0f} make averages stable", "take more draws", Trust.CARE)
    elif f.num_draws and f.ess < t.ess_share * f.num_draws:
        yield Reason(f"{text}: so small a share is decided by a few weights", _TRAIN, Trust.CARE)
    else:
        yield Reason(text, "", Trust.TRUST)


def _differ(gap: float, se: float, t: Thresholds) -> bool:
    return not abs(gap) <= t.drift + t.deviations * se  # NaN differs


def _evidence(f: Findings, t: Thresholds) -> Iterator[Reason]:
    if f.halves_gap is not None and f.halves_se is not None:
        text = f"log evidence of the halves of the pool differs by {f.halves_gap:+.3f} ± {f.halves_se:.3f} nats"
        if _differ(f.halves_gap, f.halves_se, t):
            yield Reason(f"{text}: its error is not to be believed", f"take more draws; or {_TRAIN}", Trust.CARE)
        else:
            yield Reason(text, "", Trust.TRUST)
    if f.rounds_gap is not None and f.rounds_se is not None:
        text = (
            f"log evidence has moved by {f.rounds_gap:+.3f} ± {f.rounds_se:.3f} nats since the last training rounds"
        )
        if _differ(f.rounds_gap, f.rounds_se, t):
            yield Reason(f"{text}: training was not finished", _TRAIN, Trust.CARE)
        else:
            yield Reason(text, "", Trust.TRUST)
    if f.gamma is not None and f.gamma < 0.999:
        text = f"the last round was damped (γ = {f.gamma:.2f}): the guide was taught a flattened posterior"
        if f.ess is not None and f.num_draws and f.ess >= t.undamped * f.num_draws:
            yield Reason(f"{text}; its weights now would need no damping", "", Trust.TRUST)
        else:
            yield Reason(text, _TRAIN, Trust.CARE)


def _chains(f: Findings, t: Thresholds) -> Iterator[Reason]:
    if f.rhat is None:
        return
    text = f"R̂ is {f.rhat:.3f} over {f.num_chains} independent chains"
    if not f.rhat <= t.rhat:
        what = "they disagree, some have lost or overrate part of the posterior"
        yield Reason(
            f"{text}: {what}", "compare the chains; train longer, or from a base that covers all", Trust.DISTRUST
        )
    elif f.rhat > t.good_rhat:
        yield Reason(f"{text}, above {t.good_rhat}", "train longer, or take more draws", Trust.CARE)
    else:
        yield Reason(text, "", Trust.TRUST)


def _fit(f: Findings, t: Thresholds) -> Iterator[Reason]:
    if f.acceptance is not None:
        text = f"independent Metropolis accepts {f.acceptance:.1%} of the guide's draws"
        if not f.acceptance >= t.acceptance:
            yield Reason(f"{text}: its chains hardly move", _TRAIN, Trust.CARE)
        else:
            yield Reason(text, "", Trust.TRUST)
    if f.stein_p is not None:
        text = f"kernel Stein test of the draws: p = {f.stein_p:.3g}"
        if f.stein_p < t.stein_p:
            yield Reason(f"{text}: their shape does not fit the density's slopes", _TRAIN, Trust.CARE)
        else:
            yield Reason(text, "", Trust.TRUST)


def _elsewhere(f: Findings, t: Thresholds) -> Iterator[Reason]:
    """What the probe found; and whether anything has looked elsewhere at all."""
    replicas = f.rhat is not None and (f.num_chains or 0) > 1
    instead = Trust.TRUST if replicas else Trust.CARE
    if f.probe_failure is None:
        if not replicas:
            text = "nothing has looked elsewhere: neither k̂ nor the effective number of draws can see a lost mode"
            yield Reason(text, _LOOK, Trust.CARE)
        return
    if f.probe_not_a_number:
        yield _not_a_number(f.probe_not_a_number, f.probe_density_evaluations or 0, t)
    if f.unknown is not None and f.unknown_se is not None:
        yield _unknown(f.unknown, f.unknown_se, t)
    failure = f.probe_failure
    if not failure and not (f.probe_particles or 0) >= t.min_particles:
        failure = f"its particles descend from too few lines (worth {f.probe_particles or 0:.0f} independent ones)"
    if failure:
        advice = "repeat it with more particles or moves (Probe), or train replicas"
        yield Reason(f"the probe that looks elsewhere failed: {failure}", advice, instead)
    elif f.probe_gap is not None and f.probe_gap_se is not None:
        yield _probe_gap(f, f.probe_gap, f.probe_gap_se, instead, t)


def _not_a_number(count: int, of: int, t: Thresholds) -> Reason:
    share = count / max(of, count)
    text = f"the log density was NaN at {count} places where the probe looked ({share:.1%}), taken to be impossible"
    if share > t.not_a_number:
        return Reason(text, "if the model should be finite there the posterior is wrong: see to it", Trust.CARE)
    return Reason(text, "", Trust.TRUST)


def _unknown(share: float, se: float, t: Thresholds) -> Reason:
    text = f"{share:.1%} (± {se:.1%}) of the posterior mass found by tempered SMC is (nearly) unknown to the guide"
    advice = "start from a base that reaches it, or seed the training: Population(min_khat=-math.inf)"
    if not share - 2 * se <= t.unknown:
        return Reason(f"{text}: a mode or a tail is lost", advice, Trust.DISTRUST)
    if share - 2 * se > t.barely_unknown:
        return Reason(text, advice, Trust.CARE)
    return Reason(text, "", Trust.TRUST)


def _probe_gap(f: Findings, gap: float, se: float, instead: Trust, t: Thresholds) -> Reason:
    text = f"log evidence of the probe minus the guide's: {gap:+.3f} ± {se:.3f} nats"
    repeat = "repeat the probe with more particles or moves (Probe), or train replicas"
    if not _differ(gap, se, t):
        return Reason(text, "", Trust.TRUST)
    if gap < 0:
        # Weights of the guide are right on average: so it is the probe that has missed something.
        return Reason(f"{text}: the probe has missed part of what the guide found", repeat, instead)
    if f.unknown is not None and f.unknown_se is not None and f.unknown - 2 * f.unknown_se > t.barely_unknown:
        return Reason(f"{text}, in line with what is unknown to it", "", Trust.CARE)
    if f.unknown is None:  # the guide's density at the particles is not known, and this is all there is
        return Reason(f"{text}: the guide misses part of the posterior", _TRAIN, Trust.DISTRUST)
    # The guide knows all places of the particles: then the probe may be off by more than it knows.
    return Reason(f"{text}, which the weights at its particles do not explain", repeat, Trust.CARE)


def _unchecked(f: Findings) -> Iterator[str]:
    if f.khat is None:
        yield "Pareto k̂ (no weighted draws)"
    if f.rhat is None:
        yield "R̂ (no independent chains)"
    if f.probe_failure is None:
        yield "lost modes (no probe was run)"
    elif not f.probe_failure and f.unknown is None:
        yield "the guide's weights at the probe's particles (its density there is not known)"
