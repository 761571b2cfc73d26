# SPDX-License-Identifier: Apache-2.0
"""Objectives: score divergences with the interface of ``pyro.infer.ELBO``."""

from pyro_sm.objectives.bridge import BridgeDensityEstimation, CorrectedDensity, gaussian_bridge
from pyro_sm.objectives.density_estimation import (
    DenoisingScoreMatching,
    DiffusionScoreMatching,
    ImplicitScoreMatching,
    no_guide,
)
from pyro_sm.objectives.diffusion_matrices import ContinuousFlow, RiemannianMetric
from pyro_sm.objectives.draws import DrawsScoreMatching
from pyro_sm.objectives.fisher import FisherDivergence
from pyro_sm.objectives.fisher_metrics import BaseSpace, FlowMetric, Identity, MatrixMetric
from pyro_sm.objectives.importance_weighted import ImportanceWeightedScoreMatching
from pyro_sm.objectives.learned_flow import AsinhFlow, fit_flow
from pyro_sm.objectives.mixture_fisher import EstimatedLogZ, GivenMixing, MixtureFisherDivergence, PriorMixing
from pyro_sm.objectives.score_estimation import estimated_information, gaussian_information
from pyro_sm.objectives.score_matching import MarginalWeights, PathWeights
from pyro_sm.objectives.stein import SteinDiscrepancy

__all__ = [
    "AsinhFlow",
    "BaseSpace",
    "BridgeDensityEstimation",
    "ContinuousFlow",
    "CorrectedDensity",
    "DenoisingScoreMatching",
    "DiffusionScoreMatching",
    "DrawsScoreMatching",
    "EstimatedLogZ",
    "FisherDivergence",
    "FlowMetric",
    "GivenMixing",
    "Identity",
    "ImplicitScoreMatching",
    "ImportanceWeightedScoreMatching",
    "MarginalWeights",
    "MatrixMetric",
    "MixtureFisherDivergence",
    "PathWeights",
    "PriorMixing",
    "RiemannianMetric",
    "SteinDiscrepancy",
    "estimated_information",
    "fit_flow",
    "gaussian_bridge",
    "gaussian_information",
    "no_guide",
]
