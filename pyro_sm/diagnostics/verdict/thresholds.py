# SPDX-License-Identifier: Apache-2.0
"""Where the lines between the grades are drawn, each with its reason.

Lines have a source, or the price of an error on either side; those with neither were set so that exact fits pass and
the failures of ``bench assurance`` do not. Every line is pinned by ``tests/diagnostics/verdict/test_thresholds.py``:
a finding on either side of it is graded differently. Whoever moves one gives the reason here, and runs that benchmark
again, which counts verdicts that were wrong.

Sources: "Pareto Smoothed Importance Sampling" https://arxiv.org/abs/1507.02646 ; "Rank-normalization, folding, and
localization: an improved R̂ for assessing convergence of MCMC" https://arxiv.org/abs/1903.08008 .
"""

from __future__ import annotations

from dataclasses import dataclass

KHAT_THRESHOLD = 0.7
"""Above this Pareto shape, averages over the weighted draws cannot be trusted: 2,200 draws are needed at .7, already
100,000 at .8 (``N ≥ 10^{1/(1−k)}``: the paper on Pareto smoothing, which draws the line here too)."""


@dataclass(frozen=True)
class Thresholds:
    """Lines between *trust*, *use with care* and *do not trust*; every one can be moved by its name.

    Args:
        khat: Pareto shape of the weights, above which they are not trusted.
        min_ess: effective draws below which a result is not trusted.
        good_ess: effective draws from which on a result is used as it is.
        ess_share: share of the draws below which the effective number is itself the work of a few weights.
        undamped: effective share of the draws from which on a damped last round is past.
        deviations: standard errors that two estimates of ``log Z`` may differ by.
        drift: nats by which they may differ whatever their errors.
        rhat: R̂ above which the chains disagree.
        good_rhat: R̂ below which they agree.
        acceptance: of independent Metropolis, below which its chains hardly move.
        stein_p: p-value below which the slopes of the density do not fit the draws.
        unknown: posterior mass that the guide does not know, less twice its error, above which it is not trusted.
        barely_unknown: the same, worth a remark.
        min_particles: effective particles of the probe (lines of descent), below which it has failed.
        not_a_number: share of the places that the probe came to where the density may be NaN.
    """

    khat: float = KHAT_THRESHOLD

    # An interval's end is guesswork below it: the standard error of a mean is a tenth of a standard deviation.
    min_ess: float = 100.0

    # As for MCMC: below, estimates of the error are themselves unstable (the paper on R̂).
    good_ess: float = 400.0

    # It speaks only of pools above good_ess / ess_share = 80,000 draws: of 200 draws the weights then leave one. A
    # smaller share would let any guide pass that is drawn from for long enough.
    ess_share: float = 0.005

    # The effective share that damping leaves each round (ImportanceWeightedScoreMatching(effective_share=.3)): the
    # weights judge the guide as it is, and ones as good as these would not have been damped.
    undamped: float = 0.3

    # Errors of logs of skewed means are too small, so that this is more than the usual two or three: 4 errors are
    # exceeded by 6 in 100,000 right estimates, and by a few in a thousand where the error is a quarter too small.
    deviations: float = 4.0

    # e^.05: 5 % of Z, which no posterior average notices. Were as much of the mass missing, one standard deviation
    # away, a mean would move by a twentieth of one: half of what min_ess lets pass as error.
    drift: float = 0.05

    # The classical limit of 1.1 is too high for so few and independent chains: one replica of four that has lost a
    # mode with 30 % of the mass gives 1.06.
    rhat: float = 1.05

    # The paper on R̂.
    good_rhat: float = 1.01

    # A state is then kept for 1/.05 = 20 steps on average, and a thousand steps are worth some fifty draws.
    acceptance: float = 0.05

    # The share of exact fits that may be blamed by chance. It lies below what the test resolves: of its 500 resamples
    # p is never under 1/501, so that check() alone does not reach this line.
    stein_p: float = 0.001

    # More than half of what a 95 % interval leaves out. Exact fits have a tenth of a percent, heavy tails (k̂ of .6)
    # up to two or three percent.
    unknown: float = 0.03

    # What a probe of two thousand particles, with its few hundred lines, can just tell from zero: 2/M_eff.
    barely_unknown: float = 0.005

    # Of 40 independent lines none is in a place with a tenth of the mass with probability .9^40 = 1.5 %; of 20, 12 %.
    min_particles: float = 40.0

    # Now and then a draw of a wide prior overflows. More is a model that fails in a part of the space, and is taken
    # to be zero there.
    not_a_number: float = 0.01
