# SPDX-License-Identifier: Apache-2.0
"""Diffusion samplers and score-based objectives for Pyro: two changed lines in an SVI script."""

__version__ = "0.1.0.dev0"

from pyro_sm.base import CheckpointError, Draws, ModelRefusedError, PyroSMWarning
from pyro_sm.corrections import ImportanceResampling, Raw
from pyro_sm.diagnostics import to_arviz
from pyro_sm.guides import AutoDiffusion, BatchAndMatchBase, GivenBase, LaplaceBase, PriorBase
from pyro_sm.model import ModelDensity
from pyro_sm.objectives import (
    ImportanceWeightedScoreMatching,
    MarginalWeights,
    PathWeights,
)
from pyro_sm.sampler import DiffusionSampler, StoppingRule
from pyro_sm.sampling.defensive import PriorComponent, WideComponent

__all__ = [
    "AutoDiffusion",
    "BatchAndMatchBase",
    "CheckpointError",
    "DiffusionSampler",
    "Draws",
    "GivenBase",
    "ImportanceResampling",
    "ImportanceWeightedScoreMatching",
    "LaplaceBase",
    "MarginalWeights",
    "ModelDensity",
    "ModelRefusedError",
    "PathWeights",
    "PriorBase",
    "PriorComponent",
    "PyroSMWarning",
    "Raw",
    "StoppingRule",
    "WideComponent",
    "to_arviz",
]
