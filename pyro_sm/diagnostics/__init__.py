# SPDX-License-Identifier: Apache-2.0
"""Diagnostics: export to ArviZ, goodness of fit, and plots. ArviZ and matplotlib are imported when first needed."""

from pyro_sm.diagnostics.calibration.rank_uniformity import simultaneous_band, uniformity
from pyro_sm.diagnostics.calibration.simulation import (
    Calibration,
    Fitted,
    Simulated,
    simulation_based_calibration,
)
from pyro_sm.diagnostics.evidence import (
    ComparedModel,
    EvidenceComparison,
    LogBayesFactor,
    compare_evidence,
)
from pyro_sm.diagnostics.export import Provenance, draws_to_arviz, to_arviz
from pyro_sm.diagnostics.goodness_of_fit import GoodnessOfFit, stein_goodness_of_fit
from pyro_sm.diagnostics.guide_draws import WeightedGuide, draw_from_guide, guide_log_weight
from pyro_sm.diagnostics.plots.benchmark import (
    plot_against_dimension,
    plot_energies,
    plot_error_against_evaluations,
    plot_samples_over_contours,
)
from pyro_sm.diagnostics.plots.calibration import plot_calibration
from pyro_sm.diagnostics.plots.draws import plot_khat, plot_raw_vs_weighted, plot_training
from pyro_sm.diagnostics.summary import summary_table
from pyro_sm.diagnostics.verdict.chains import ChainFindings
from pyro_sm.diagnostics.verdict.check import check, check_guide
from pyro_sm.diagnostics.verdict.difference import EvidenceDifference
from pyro_sm.diagnostics.verdict.findings import Findings
from pyro_sm.diagnostics.verdict.probe import Probe, ProbeResult
from pyro_sm.diagnostics.verdict.probe_findings import ProbeFindings, Unknown
from pyro_sm.diagnostics.verdict.stein import SteinFindings
from pyro_sm.diagnostics.verdict.thresholds import KHAT_THRESHOLD, Thresholds
from pyro_sm.diagnostics.verdict.training import TrainingFindings
from pyro_sm.diagnostics.verdict.trust import Reason, Trust, TrustWarning
from pyro_sm.diagnostics.verdict.verdict import Verdict, judge
from pyro_sm.diagnostics.verdict.weights import WeightFindings

__all__ = [
    "KHAT_THRESHOLD",
    "Calibration",
    "ChainFindings",
    "ComparedModel",
    "EvidenceComparison",
    "EvidenceDifference",
    "Findings",
    "Fitted",
    "GoodnessOfFit",
    "LogBayesFactor",
    "Probe",
    "ProbeFindings",
    "ProbeResult",
    "Provenance",
    "Reason",
    "Simulated",
    "SteinFindings",
    "Thresholds",
    "TrainingFindings",
    "Trust",
    "TrustWarning",
    "Unknown",
    "Verdict",
    "WeightFindings",
    "WeightedGuide",
    "check",
    "check_guide",
    "compare_evidence",
    "draw_from_guide",
    "draws_to_arviz",
    "guide_log_weight",
    "judge",
    "plot_against_dimension",
    "plot_calibration",
    "plot_energies",
    "plot_error_against_evaluations",
    "plot_khat",
    "plot_raw_vs_weighted",
    "plot_samples_over_contours",
    "plot_training",
    "simulation_based_calibration",
    "simultaneous_band",
    "stein_goodness_of_fit",
    "summary_table",
    "to_arviz",
    "uniformity",
]
