# SPDX-License-Identifier: Apache-2.0
"""Diffusion samplers and score-based objectives for Pyro: two changed lines in an SVI script."""

from pyro_sm._version import __version__ as __version__
from pyro_sm.base import CheckpointError, Draws, ModelRefusedError, PyroSMWarning
from pyro_sm.corrections import ImportanceResampling, NoCorrection
from pyro_sm.diagnostics import (
    Probe,
    Trust,
    TrustWarning,
    Verdict,
    check,
    check_guide,
    compare_evidence,
    stein_goodness_of_fit,
    to_arviz,
)
from pyro_sm.diffusion.covering import PriorCovering, WideCovering
from pyro_sm.diffusion.noise_range import NoiseRange
from pyro_sm.diffusion.tails import HeavyTails
from pyro_sm.guides import (
    AutoDiffusion,
    BatchAndMatch,
    BatchAndMatchBase,
    GivenBase,
    GuideBase,
    LaplaceBase,
    PriorBase,
)
from pyro_sm.model.density import ModelDensity
from pyro_sm.objectives import (
    BridgeDensityEstimation,
    DenoisingScoreMatching,
    DiffusionScoreMatching,
    DrawsScoreMatching,
    FisherDivergence,
    ImplicitScoreMatching,
    ImportanceWeightedScoreMatching,
    MarginalWeights,
    MixtureFisherDivergence,
    PathWeights,
    SteinDiscrepancy,
)
from pyro_sm.objectives.importance_weighted.population import Population
from pyro_sm.refine import TemperedPosterior, nuts_from_guide, temper_guide
from pyro_sm.sampler import DiffusionSampler, StoppingRule

__all__ = [
    "AutoDiffusion",
    "BatchAndMatch",
    "BatchAndMatchBase",
    "BridgeDensityEstimation",
    "CheckpointError",
    "DenoisingScoreMatching",
    "DiffusionSampler",
    "DiffusionScoreMatching",
    "Draws",
    "DrawsScoreMatching",
    "FisherDivergence",
    "GivenBase",
    "GuideBase",
    "HeavyTails",
    "ImplicitScoreMatching",
    "ImportanceResampling",
    "ImportanceWeightedScoreMatching",
    "LaplaceBase",
    "MarginalWeights",
    "MixtureFisherDivergence",
    "ModelDensity",
    "ModelRefusedError",
    "NoCorrection",
    "NoiseRange",
    "PathWeights",
    "Population",
    "PriorBase",
    "PriorCovering",
    "Probe",
    "PyroSMWarning",
    "SteinDiscrepancy",
    "StoppingRule",
    "TemperedPosterior",
    "Trust",
    "TrustWarning",
    "Verdict",
    "WideCovering",
    "check",
    "check_guide",
    "compare_evidence",
    "nuts_from_guide",
    "stein_goodness_of_fit",
    "temper_guide",
    "to_arviz",
]
