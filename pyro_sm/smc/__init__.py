# SPDX-License-Identifier: Apache-2.0
"""Sequential and parallel tempering: paths between densities, moves, crossover, starts, and the search for modes.

They need no guide: they seed one, look where it has not looked, and serve as its yardstick.
"""

from pyro_sm.smc.crossover import Crossover
from pyro_sm.smc.local_moves import LocalMoves, MovedDraws
from pyro_sm.smc.mixture_start import MixtureStart
from pyro_sm.smc.mode_search import ModeSearch
from pyro_sm.smc.moves import HamiltonianMove
from pyro_sm.smc.parallel import ParallelTempering, TemperedChains
from pyro_sm.smc.path import Bridge, Power, PriorStart
from pyro_sm.smc.tempered import TemperedParticles, TemperedSMC

__all__ = [
    "Bridge",
    "Crossover",
    "HamiltonianMove",
    "LocalMoves",
    "MixtureStart",
    "ModeSearch",
    "MovedDraws",
    "ParallelTempering",
    "Power",
    "PriorStart",
    "TemperedChains",
    "TemperedParticles",
    "TemperedSMC",
]
