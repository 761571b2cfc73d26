# SPDX-License-Identifier: Apache-2.0
"""Corrections: from draws of a guide to draws one can use as if they came from the target."""

from pyro_sm.corrections.importance import Correction, ImportanceResampling, Raw

__all__ = ["Correction", "ImportanceResampling", "Raw"]
