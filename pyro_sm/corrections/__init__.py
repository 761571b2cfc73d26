# SPDX-License-Identifier: Apache-2.0
"""Corrections: from draws of a guide to draws one can use as if they came from the target.

Beside them, samplers that need no guide and serve as its yardstick: tempered sequential Monte Carlo and parallel
tempering.
"""

from pyro_sm.corrections.annealing_path import Bridge, Power, PriorStart
from pyro_sm.corrections.crossover import Crossover
from pyro_sm.corrections.importance import Correction, DampedResampling, ImportanceResampling, Raw
from pyro_sm.corrections.local_moves import LocalMoves, Moved
from pyro_sm.corrections.metropolis import IndependentMetropolis
from pyro_sm.corrections.mixture_start import MixtureStart
from pyro_sm.corrections.mode_search import ModeSearch
from pyro_sm.corrections.moves import HamiltonianMove
from pyro_sm.corrections.parallel import ParallelTempering, TemperedChains
from pyro_sm.corrections.tempered import TemperedParticles, TemperedSMC

__all__ = [
    "Bridge",
    "Correction",
    "Crossover",
    "DampedResampling",
    "HamiltonianMove",
    "ImportanceResampling",
    "IndependentMetropolis",
    "LocalMoves",
    "MixtureStart",
    "ModeSearch",
    "Moved",
    "ParallelTempering",
    "Power",
    "PriorStart",
    "Raw",
    "TemperedChains",
    "TemperedParticles",
    "TemperedSMC",
]
