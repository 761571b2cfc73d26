# SPDX-License-Identifier: Apache-2.0
"""Where the lines lie: what is a little on either side of one is graded differently, and every line has its pair."""

import dataclasses
import math

import pytest

from pyro_sm.base import Evaluations
from pyro_sm.diagnostics import (
    KHAT_THRESHOLD,
    ChainFindings,
    EvidenceDifference,
    Findings,
    ProbeFindings,
    SteinFindings,
    Thresholds,
    TrainingFindings,
    Trust,
    Unknown,
    WeightFindings,
    judge,
)

TRUST, CARE, DISTRUST = Trust

MANY = 10**6  # draws, so that k̂ alone decides


def weights(**changes):
    return Findings(WeightFindings(**changes))


def halves(gap, se):
    return Findings(WeightFindings(halves=EvidenceDifference(gap, se)))


def share(of):
    return weights(ess=of * MANY, num_draws=MANY)


def chains(*args, **changes):
    return Findings(chains=ChainFindings(*args, **changes))


def damped(share):
    return Findings(WeightFindings(num_draws=10_000, ess=share * 10_000), TrainingFindings(0.5))


def probe(particles=700.0, unknown=0.0, se=0.0, not_a_number=0):
    spent = Evaluations(100_000, 100_000, not_a_number)
    return Findings(probe=ProbeFindings("", spent, particles, Unknown(unknown, se), EvidenceDifference(0.0, 0.01)))


# By line: the words of the reason, and what is found on the better side and on the worse, with their grades.
LINES = {
    "khat": ("k̂ is", weights(khat=0.69, num_draws=MANY), TRUST, weights(khat=0.71, num_draws=MANY), DISTRUST),
    "min_ess": ("effective draws", weights(ess=101.0), CARE, weights(ess=99.0), DISTRUST),
    "good_ess": ("effective draws", weights(ess=401.0), TRUST, weights(ess=399.0), CARE),
    "ess_share": ("effective draws", share(0.0051), TRUST, share(0.0049), CARE),
    "undamped": ("was damped", damped(0.31), TRUST, damped(0.29), CARE),
    "deviations": ("of the halves", halves(4.0, 1.0), TRUST, halves(4.1, 1.0), CARE),
    "drift": ("of the halves", halves(-0.049, 0.0), TRUST, halves(-0.051, 0.0), CARE),
    "rhat": ("R̂ is", chains(4, 1.049), CARE, chains(4, 1.051), DISTRUST),
    "good_rhat": ("R̂ is", chains(4, 1.0099), TRUST, chains(4, 1.0101), CARE),
    "acceptance": ("Metropolis", chains(acceptance=0.051), TRUST, chains(acceptance=0.049), CARE),
    "stein_p": ("Stein", Findings(stein=SteinFindings(0.0011)), TRUST, Findings(stein=SteinFindings(0.0009)), CARE),
    "unknown": ("posterior mass", probe(unknown=0.029), CARE, probe(unknown=0.031), DISTRUST),
    "barely_unknown": ("posterior mass", probe(unknown=0.0049), TRUST, probe(unknown=0.0051), CARE),
    "min_particles": ("probe", probe(particles=40.0), TRUST, probe(particles=39.0), CARE),
    "not_a_number": ("was NaN", probe(not_a_number=990), TRUST, probe(not_a_number=1010), CARE),
}  # fmt: skip


def grade(findings, words, thresholds=None):
    (reason,) = (reason for reason in judge(findings, thresholds).reasons if words in reason.finding)
    return reason.level


def test_every_line_has_its_pair():
    assert list(LINES) == [field.name for field in dataclasses.fields(Thresholds)]


@pytest.mark.parametrize("line", LINES)
def test_a_little_on_either_side_of_the_line(line):
    words, better, good, worse, bad = LINES[line]
    assert (grade(better, words), grade(worse, words)) == (good, bad)


@pytest.mark.parametrize("line", LINES)
@pytest.mark.parametrize("factor", [0.5, 2.0])
def test_a_line_moved_by_a_factor_is_seen(line, factor):
    """The companion: with the line elsewhere the same two findings no longer have the same grades."""
    words, better, good, worse, bad = LINES[line]
    moved = Thresholds(**{line: factor * getattr(Thresholds(), line)})
    assert (grade(better, words, moved), grade(worse, words, moved)) != (good, bad)


def test_the_tail_that_so_many_draws_can_bear():
    """``1 − 1/log10 N``, of a thousand draws two thirds; of ten and fewer that of eleven."""
    assert grade(weights(khat=0.66, num_draws=1000), "k̂ is") is TRUST
    assert grade(weights(khat=0.67, num_draws=1000), "k̂ is") is CARE
    least = 1 - 1 / math.log10(11)
    for num_draws in (2, 10, 11):
        assert grade(weights(khat=least - 0.001, num_draws=num_draws), "k̂ is") is TRUST
        assert grade(weights(khat=least + 0.001, num_draws=num_draws), "k̂ is") is CARE


def test_warnings_and_verdicts_draw_the_same_line_of_khat():
    assert Thresholds().khat == KHAT_THRESHOLD == 0.7


def test_a_thousandth_of_damping_is_none():
    full = Findings(training=TrainingFindings(0.9991))
    assert all("damped" not in reason.finding for reason in judge(full).reasons)
    assert grade(Findings(training=TrainingFindings(0.9989)), "damped") is CARE


def test_the_unknown_share_counts_less_twice_its_error():
    assert grade(probe(unknown=0.05, se=0.0099), "posterior mass") is DISTRUST
    assert grade(probe(unknown=0.05, se=0.0101), "posterior mass") is CARE
    assert grade(probe(unknown=0.05, se=0.0224), "posterior mass") is CARE
    assert grade(probe(unknown=0.05, se=0.0226), "posterior mass") is TRUST


@pytest.mark.parametrize(("share", "explained"), [(0.0051, True), (0.0049, False)])
def test_a_gap_is_explained_by_as_much_as_is_worth_a_remark(share, explained):
    found = ProbeFindings("", Evaluations(), 700.0, Unknown(share, 0.0), EvidenceDifference(0.3, 0.01))
    text = str(judge(Findings(probe=found)))
    assert ("in line with what is unknown" in text) is explained
    assert ("do not explain" in text) is not explained


def test_the_drift_holds_for_every_pair_of_evidences():
    for gap, level in ((0.049, TRUST), (0.051, CARE)):
        drifted = Findings(training=TrainingFindings(1.0, EvidenceDifference(-gap, 0.0)))
        assert grade(drifted, "since the last training rounds") is level
        found = ProbeFindings("", Evaluations(), 700.0, Unknown(0.0, 0.001), EvidenceDifference(gap, 0.0))
        assert grade(Findings(probe=found), "log evidence of the probe") is level
