# SPDX-License-Identifier: Apache-2.0
"""Objectives: score divergences with the interface of ``pyro.infer.ELBO``."""

from pyro_sm.objectives.bridge import BridgeDensityEstimation, CorrectedDensity, gaussian_bridge
from pyro_sm.objectives.density_estimation import (
    DenoisingScoreMatching,
    DiffusionScoreMatching,
    ImplicitScoreMatching,
    no_guide,
)
from pyro_sm.objectives.importance_weighted import ImportanceWeightedScoreMatching
from pyro_sm.objectives.score_matching import MarginalWeights, PathWeights
from pyro_sm.objectives.stein import SteinDiscrepancy

__all__ = [
    "BridgeDensityEstimation",
    "CorrectedDensity",
    "DenoisingScoreMatching",
    "DiffusionScoreMatching",
    "ImplicitScoreMatching",
    "ImportanceWeightedScoreMatching",
    "MarginalWeights",
    "PathWeights",
    "SteinDiscrepancy",
    "gaussian_bridge",
    "no_guide",
]
