# SPDX-License-Identifier: Apache-2.0
"""The methods of ``bench targets``, by name: ours first, then what it is compared with.

Learning rates were chosen by hand, one for each loss on all targets; none is tuned target by target.
"""

from __future__ import annotations

from pyro_sm.bench.methods import start
from pyro_sm.bench.methods.baselines import UnitWeights
from pyro_sm.bench.methods.chains import Chains
from pyro_sm.bench.methods.fit import Method
from pyro_sm.bench.methods.sampler import InnerObjective, PathObjective, Sampler
from pyro_sm.bench.methods.svi import (
    ElboLoss,
    InverseFlowGuide,
    LogVarianceLoss,
    Variational,
    diffusion_guide,
    normal_guide,
)
from pyro_sm.bench.methods.tempered import Tempered
from pyro_sm.objectives import MarginalWeights
from pyro_sm.smc import HamiltonianMove, LocalMoves

_METHODS: tuple[Method, ...] = (
    Sampler("iwsm", PathObjective()),
    Sampler("iwsm-compiled", PathObjective(), compile=True),
    Sampler("iwsm-moves", PathObjective(), LocalMoves(100, HamiltonianMove(start.LEAPFROG))),
    Sampler("iwsm-marginal", InnerObjective(MarginalWeights())),
    Tempered(),
    Chains(),
    Variational("auto-normal", normal_guide, ElboLoss(), learning_rate=1e-2),
    Variational("auto-iaf", InverseFlowGuide(), ElboLoss(), learning_rate=2e-3),
    Sampler("idem", InnerObjective(UnitWeights())),
    Sampler("forward-kl", PathObjective(plain=True)),
    Variational("reverse-kl", diffusion_guide, ElboLoss(), learning_rate=2e-3),
    Variational("log-variance", diffusion_guide, LogVarianceLoss(), learning_rate=5e-4),
)
METHODS: dict[str, Method] = {method.name: method for method in _METHODS}
"""The methods by the names of the command line."""
TRAINED = ("iwsm", "iwsm-compiled", "iwsm-moves", "iwsm-marginal")
"""Those that leave a sampler behind whose weights are worth the name."""
