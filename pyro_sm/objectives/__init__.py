# SPDX-License-Identifier: Apache-2.0
"""Objectives: score divergences with the interface of ``pyro.infer.ELBO``."""

from pyro_sm.objectives.diffusion_matrices import ContinuousFlow, RiemannianMetric
from pyro_sm.objectives.divergences.fisher import FisherDivergence
from pyro_sm.objectives.divergences.mixing import GivenMixing, PriorMixing
from pyro_sm.objectives.divergences.mixture_fisher import EstimatedLogZ, MixtureFisherDivergence
from pyro_sm.objectives.divergences.stein import SteinDiscrepancy
from pyro_sm.objectives.energies.bridge import BridgeDensityEstimation, CorrectedDensity, gaussian_bridge
from pyro_sm.objectives.energies.density_estimation import (
    DenoisingScoreMatching,
    DiffusionScoreMatching,
    ImplicitScoreMatching,
)
from pyro_sm.objectives.energies.energy_objective import no_guide
from pyro_sm.objectives.energies.score_estimation import estimated_information, gaussian_information
from pyro_sm.objectives.flows import AsinhFlow, fit_flow
from pyro_sm.objectives.importance_weighted.draws import DrawsScoreMatching
from pyro_sm.objectives.importance_weighted.objective import ImportanceWeightedScoreMatching
from pyro_sm.objectives.importance_weighted.weightings import MarginalWeights, PathWeights
from pyro_sm.objectives.metrics import BaseSpace, FlowMetric, Identity, MatrixMetric

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
