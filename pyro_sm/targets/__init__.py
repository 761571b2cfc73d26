# SPDX-License-Identifier: Apache-2.0
"""Problems with known answers, in plain torch; what each offers is described in :mod:`pyro_sm.targets.target`."""

from pyro_sm.targets.double_well_particles import DoubleWellParticles
from pyro_sm.targets.funnel import Funnel
from pyro_sm.targets.gaussian_mixture import GaussianMixture
from pyro_sm.targets.gaussian_shells import GaussianShells
from pyro_sm.targets.lennard_jones import LennardJones
from pyro_sm.targets.many_well import ManyWell
from pyro_sm.targets.phi_four import PhiFour
from pyro_sm.targets.rings import Rings
from pyro_sm.targets.sensor_network import SensorNetwork
from pyro_sm.targets.target import CoveringGaussian, HasDraws, HasModes, Target
from pyro_sm.targets.unequal_modes import UnequalModes

__all__ = [
    "CoveringGaussian",
    "DoubleWellParticles",
    "Funnel",
    "GaussianMixture",
    "GaussianShells",
    "HasDraws",
    "HasModes",
    "LennardJones",
    "ManyWell",
    "PhiFour",
    "Rings",
    "SensorNetwork",
    "Target",
    "UnequalModes",
]
