# SPDX-License-Identifier: Apache-2.0
"""Diagnostics: export to ArviZ, and plots. ArviZ and matplotlib are imported when first needed."""

from pyro_sm.diagnostics.export import KHAT_THRESHOLD, Provenance, draws_to_arviz, to_arviz
from pyro_sm.diagnostics.guide_draws import WeightedGuide, draw_from_guide
from pyro_sm.diagnostics.plots import plot_khat, plot_raw_vs_weighted, plot_training
from pyro_sm.diagnostics.summary import summary_table

__all__ = [
    "KHAT_THRESHOLD",
    "Provenance",
    "WeightedGuide",
    "draw_from_guide",
    "draws_to_arviz",
    "plot_khat",
    "plot_raw_vs_weighted",
    "plot_training",
    "summary_table",
    "to_arviz",
]
