# SPDX-License-Identifier: Apache-2.0
"""From numbers to a verdict: every number has its say, nothing is trusted that has not looked elsewhere.

Findings are written here as files have them, flat and by the names of their attributes.
"""

import dataclasses
import math

import numpy as np
import pytest

from pyro_sm import PyroSMWarning, Trust, TrustWarning
from pyro_sm.base import Evaluations
from pyro_sm.diagnostics import (
    ChainFindings,
    EvidenceDifference,
    Findings,
    ProbeFindings,
    SteinFindings,
    Thresholds,
    TrainingFindings,
    Unknown,
    WeightFindings,
    judge,
)

GOOD = {
    "num_draws": 16_000,
    "khat": 0.3,
    "ess": 8000.0,
    "halves_gap": 0.01,
    "halves_se": 0.01,
    "rounds_gap": -0.02,
    "rounds_se": 0.01,
    "gamma": 1.0,
    "probe_failure": "",
    "probe_particles": 700.0,
    "unknown": 0.0,
    "unknown_se": 0.0015,
    "probe_gap": 0.02,
    "probe_gap_se": 0.03,
    "probe_density_evaluations": 30_000,
    "probe_gradient_evaluations": 30_000,
}
REPLICAS = {"num_chains": 4, "rhat": 1.002}
NO_PROBE = {name: None for name in GOOD if name.startswith(("probe_", "unknown"))}
FAILED = {**NO_PROBE, "probe_failure": "β = 0.1 after 200 temperatures"}


def found_by(values):
    return Findings.from_attributes({f"check_{name}": value for name, value in values.items() if value is not None})


def verdict(**changes):
    return judge(found_by({**GOOD, **changes}))


def test_a_good_result_is_trusted():
    found = verdict()
    assert found.level is Trust.TRUST
    assert all(reason.level is Trust.TRUST and not reason.advice for reason in found.reasons)


@pytest.mark.parametrize(
    ("changes", "level", "words"),
    [
        ({"khat": 0.71}, Trust.DISTRUST, "k̂"),
        ({"khat": math.inf}, Trust.DISTRUST, "k̂"),
        ({"khat": math.nan}, Trust.DISTRUST, "k̂"),
        ({"khat": -math.inf}, Trust.TRUST, "k̂"),  # weights that are all equal
        ({"khat": 0.6, "num_draws": 200, "ess": 150.0}, Trust.CARE, "k̂"),
        ({"ess": 99.0}, Trust.DISTRUST, "effective draws"),
        ({"ess": math.nan}, Trust.DISTRUST, "effective draws"),
        ({"ess": 399.0}, Trust.CARE, "effective draws"),
        ({"ess": 450.0, "num_draws": 100_000}, Trust.CARE, "share"),
        ({"halves_gap": 0.2}, Trust.CARE, "halves"),
        ({"halves_gap": math.nan}, Trust.CARE, "halves"),
        ({"rounds_gap": 0.2}, Trust.CARE, "training was not finished"),
        ({"rounds_gap": -0.2}, Trust.CARE, "training was not finished"),
        ({"rounds_gap": -0.2, "rounds_se": 0.1}, Trust.TRUST, "last training rounds"),
        ({"gamma": 0.8, "ess": 4700.0}, Trust.CARE, "damped"),
        ({"gamma": 0.8, "ess": None}, Trust.CARE, "damped"),
        ({"gamma": 0.0}, Trust.TRUST, "would need no damping"),
        ({**REPLICAS, "rhat": 1.06}, Trust.DISTRUST, "R̂"),
        ({**REPLICAS, "rhat": math.nan}, Trust.DISTRUST, "R̂"),
        ({**REPLICAS, "rhat": 1.04}, Trust.CARE, "R̂"),
        ({**REPLICAS}, Trust.TRUST, "R̂"),
        ({"acceptance": 0.01}, Trust.CARE, "Metropolis"),
        ({"acceptance": 0.4}, Trust.TRUST, "Metropolis"),
        ({"stein_p": 0.0005}, Trust.CARE, "Stein"),
        ({"stein_p": 0.01}, Trust.TRUST, "Stein"),
        ({"unknown": 0.08, "unknown_se": 0.01}, Trust.DISTRUST, "8.0% (± 1.0%) of the posterior mass"),
        ({"unknown": 0.08, "unknown_se": 0.03}, Trust.CARE, "posterior mass"),  # few lines of descent
        ({"unknown": 0.02, "unknown_se": 0.004}, Trust.CARE, "posterior mass"),
        ({"unknown": 0.002, "unknown_se": 0.002}, Trust.TRUST, "posterior mass"),
        ({"probe_gap": 0.4}, Trust.CARE, "log evidence of the probe"),
        ({"probe_gap": 0.4, "unknown": None, "unknown_se": None}, Trust.DISTRUST, "misses part"),
        ({"probe_gap": -0.4}, Trust.CARE, "the probe has missed"),
        ({"probe_gap": -0.4, **REPLICAS}, Trust.TRUST, "the probe has missed"),
        ({"probe_not_a_number": 300}, Trust.TRUST, "NaN at 300 places where the probe looked (1.0%)"),
        ({"probe_not_a_number": 301}, Trust.CARE, "NaN"),
        ({"probe_not_a_number": 301, **REPLICAS}, Trust.CARE, "NaN"),
        ({**FAILED, "probe_not_a_number": 1}, Trust.CARE, "NaN"),  # of how many is not known
        ({"probe_particles": 12.0}, Trust.CARE, "too few lines"),
        (NO_PROBE, Trust.CARE, "nothing has looked elsewhere"),
        ({**NO_PROBE, **REPLICAS}, Trust.TRUST, "R̂"),
        (FAILED, Trust.CARE, "β = 0.1"),
        ({**FAILED, **REPLICAS}, Trust.TRUST, "β = 0.1"),
    ],
)
def test_every_number_has_its_say(changes, level, words):
    found = verdict(**changes)
    assert found.level is level
    about = [reason for reason in found.reasons if words in reason.finding]
    assert any(reason.level is level for reason in about)
    if level is not Trust.TRUST:
        assert any(reason.advice or "in line" in reason.finding for reason in about)


def test_the_worst_reason_decides_and_comes_first():
    found = verdict(gamma=0.5, khat=0.9)
    assert found.level is Trust.DISTRUST
    assert [reason.level for reason in found.reasons] == sorted([r.level for r in found.reasons], reverse=True)


def test_an_evidence_gap_that_is_explained_is_no_second_advice():
    found = verdict(unknown=0.3, unknown_se=0.01, probe_gap=0.4)
    assert next(r for r in found.reasons if "log evidence of the probe" in r.finding).advice == ""


def test_nothing_measured_is_not_trusted():
    found = judge(Findings())
    assert found.level is Trust.CARE
    assert len(found.unchecked) == 3


def test_nan_that_were_not_met_are_no_reason():
    assert verdict(probe_not_a_number=0).reasons == verdict().reasons


def test_printed():
    text = str(verdict(khat=0.9))
    assert text.splitlines()[0] == "Verdict: do not trust"
    assert "\n  - Pareto k̂ is 0.90" in text
    assert "\n      next: train longer" in text
    assert "\n  not checked: R̂ (no independent chains)" in text
    assert [level.words for level in Trust] == ["trust", "use with care", "do not trust"]


def test_thresholds_are_a_choice():
    assert judge(found_by(GOOD), Thresholds(khat=0.2)).level is Trust.DISTRUST
    assert judge(found_by(GOOD), Thresholds(good_ess=9000)).level is Trust.CARE


EVERYTHING = Findings(
    WeightFindings(16_000, 0.3, 8000.0, EvidenceDifference(0.01, 0.02)),
    TrainingFindings(0.9, EvidenceDifference(-0.02, 0.03)),
    ChainFindings(4, 1.002, 0.4),
    SteinFindings(0.5),
    ProbeFindings("", Evaluations(30, 20, 1), 700.0, Unknown(0.001, 0.002), EvidenceDifference(0.02, 0.04)),
)


@pytest.mark.parametrize(
    "findings",
    [
        EVERYTHING,
        Findings(),
        Findings(WeightFindings(ess=30.0), TrainingFindings(0.5), ChainFindings(acceptance=0.1)),
        dataclasses.replace(EVERYTHING, probe=ProbeFindings("why", Evaluations(3, 2))),
    ],
)
def test_attributes_come_back(findings):
    attributes = findings.attributes()
    assert all(isinstance(value, str | int | float) for value in attributes.values())
    numpy = {name: v if isinstance(v, str) else np.asarray(v)[()] for name, v in attributes.items()}
    assert Findings.from_attributes({**numpy, "pareto_khat": 3.0}) == findings


def test_names_of_attributes_are_those_of_earlier_files():
    assert EVERYTHING.attributes() == {
        "check_num_draws": 16_000, "check_khat": 0.3, "check_ess": 8000.0,
        "check_halves_gap": 0.01, "check_halves_se": 0.02,
        "check_rounds_gap": -0.02, "check_rounds_se": 0.03, "check_gamma": 0.9,
        "check_num_chains": 4, "check_rhat": 1.002, "check_acceptance": 0.4, "check_stein_p": 0.5,
        "check_probe_failure": "", "check_probe_particles": 700.0,
        "check_unknown": 0.001, "check_unknown_se": 0.002, "check_probe_gap": 0.02, "check_probe_gap_se": 0.04,
        "check_probe_density_evaluations": 30, "check_probe_gradient_evaluations": 20, "check_probe_not_a_number": 1,
    }  # fmt: skip


def test_a_file_that_counted_no_nan_is_read():
    attributes = EVERYTHING.attributes()
    del attributes["check_probe_not_a_number"]
    assert Findings.from_attributes(attributes).probe.evaluations == Evaluations(30, 20, 0)


def test_the_warning_is_one_of_ours():
    assert issubclass(TrustWarning, PyroSMWarning)
