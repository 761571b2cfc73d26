# SPDX-License-Identifier: Apache-2.0
"""Guides: diffusion samplers with the interface of Pyro's automatic guides."""

from pyro_sm.guides.auto_diffusion import AutoDiffusion
from pyro_sm.guides.bases import BatchAndMatchBase, GivenBase, LaplaceBase, PriorBase
from pyro_sm.guides.mixture import AutoGaussianMixture

__all__ = ["AutoDiffusion", "AutoGaussianMixture", "BatchAndMatchBase", "GivenBase", "LaplaceBase", "PriorBase"]
