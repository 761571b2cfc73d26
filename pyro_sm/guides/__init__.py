# SPDX-License-Identifier: Apache-2.0
"""Guides: diffusion samplers with the interface of Pyro's automatic guides, and an optimiser-free Gaussian fit."""

from pyro_sm.guides.auto_diffusion import AutoDiffusion
from pyro_sm.guides.bases import BatchAndMatchBase, GivenBase, GuideBase, LaplaceBase, PriorBase
from pyro_sm.guides.gaussian_fit import BatchAndMatch, GaussianFit
from pyro_sm.guides.mixture import AutoGaussianMixture

__all__ = [
    "AutoDiffusion",
    "AutoGaussianMixture",
    "BatchAndMatch",
    "BatchAndMatchBase",
    "GaussianFit",
    "GivenBase",
    "GuideBase",
    "LaplaceBase",
    "PriorBase",
]
