# SPDX-License-Identifier: Apache-2.0
"""Objectives: score divergences with the interface of ``pyro.infer.ELBO``."""

from pyro_sm.objectives.importance_weighted import ImportanceWeightedScoreMatching
from pyro_sm.objectives.score_matching import MarginalWeights, PathWeights

__all__ = ["ImportanceWeightedScoreMatching", "MarginalWeights", "PathWeights"]
