# SPDX-License-Identifier: Apache-2.0
"""Answers without training: mode search, Laplace, Batch-and-Match and adaptive importance sampling, with weights."""

from pyro_sm.ladder.adaptive_importance import AdaptiveImportanceSampling
from pyro_sm.ladder.fit import MixtureFit, fit_mixture
from pyro_sm.ladder.mode_mixture import ModeMixture
from pyro_sm.ladder.weighted_mixture import WeightedMixture

__all__ = ["AdaptiveImportanceSampling", "MixtureFit", "ModeMixture", "WeightedMixture", "fit_mixture"]
