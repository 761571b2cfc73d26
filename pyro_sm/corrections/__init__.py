# SPDX-License-Identifier: Apache-2.0
"""Corrections: from weighted draws of a guide to draws one can use as if they came from the target."""

from pyro_sm.corrections.importance import Correction, DampedResampling, ImportanceResampling, NoCorrection
from pyro_sm.corrections.metropolis import IndependentMetropolis

__all__ = ["Correction", "DampedResampling", "ImportanceResampling", "IndependentMetropolis", "NoCorrection"]
