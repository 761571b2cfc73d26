# SPDX-License-Identifier: Apache-2.0
r"""What a fit is worth: figures of its draws against the truth, their floors, and figures of its weights.

Figures of targets, all of equally weighted draws (weighted pools are resampled first):

* *modes*: cells that got more than a tenth of their probability; *mode TV*: ``½ Σ_k |ŵ_k − w_k|``;
* *W2*: exact optimal transport between 1000 draws and 1000 exact draws (mixtures of Gaussians);
* *v sd error*: ``|sd(v) − 3|`` (funnel); *minority error*: error of the mean share in the lighter well (Many-Well);
* *configuration error*: worst error of a configuration's weight; *mean error*: worst error of a marginal mean, in
  reference standard deviations (sensor network);
* *virial error*: ``|E[z · ∇E]/D − 1|``; *aligned W2* and *energy W2*: to reference draws (particles).

Their *floor* is the mean of the same figure over sets of exact draws (or reference draws) as large as the method's;
there is none where neither are known.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from pyro_sm.bench.methods.fit import Fit
from pyro_sm.bench.problem import Particles, some
from pyro_sm.density import value_and_score
from pyro_sm.targets import Funnel, GaussianMixture, HasDraws, HasModes, ManyWell, SensorNetwork, Target
from pyro_sm.targets.metrics import (
    aligned_wasserstein2,
    energy_wasserstein,
    mode_total_variation,
    wasserstein2,
)
from pyro_sm.weights import effective_sample_size, evidence, pareto_smooth

FOUND_SHARE = 0.1  # of its probability makes a mode found: of 10,000 draws a mode of weight 1/1000 has ten then
_MOST_MODES = 1024  # of a list of weights: Many-Well has 2^(D/2), and says so by its minority share
_TRANSPORTED = 1000  # draws in exact transport, whose time grows with their cube
_FLOOR_SETS = 3  # whose mean has half the noise of one, at a cost below any method's
_EXACT_SEED = 2  # of the exact draws that distances are taken to; floors have the seeds above
_VIRIAL_CHUNK = 2000  # scores at once: 55 bodies have 1485 pairs each


# ------------------------------------------------------------------------------------------------------- weights


def weight_figures(fit: Fit, log_evidence: float | None) -> dict[str, float]:
    """``log Z error`` (nats, of a known one), ``log Z se``, ``khat``, the effective share ``ESS``; what there is."""
    found: dict[str, float] = {}
    estimate = fit.evidence
    if estimate is None and fit.log_weight is not None:
        estimate = evidence(fit.log_weight)
    if estimate is not None:
        if log_evidence is not None:
            found["log Z error"] = estimate.log_evidence - log_evidence
        found["log Z se"] = estimate.log_evidence_se
    if fit.log_weight is not None:
        found["khat"] = pareto_smooth(fit.log_weight).khat
        found["ESS"] = effective_sample_size(fit.log_weight) / fit.log_weight.shape[0]
    return found


# ------------------------------------------------------------------------------------------------------- figures


class Truth(NamedTuple):
    """What draws are compared with.

    ``target``: the target. ``reference``: (M, D) draws from elsewhere, for targets without exact ones, or None.
    ``particle_draws``: how many draws the distances of particles use, at most half of the reference; time grows with
    their square.
    """

    target: Target
    reference: Tensor | None = None
    particle_draws: int = 2000

    def exact(self, num_draws: int, which: int) -> Tensor | None:
        """The ``which``-th independent set of exact or reference draws (num_draws, D); None if there is none."""
        if isinstance(self.target, HasDraws):
            return self.target.sample(num_draws, torch.Generator().manual_seed(_EXACT_SEED + which))
        if self.reference is None or (which + 1) * num_draws > len(self.reference):
            return None
        return self.reference[which * num_draws : (which + 1) * num_draws]


def modes_found(shares: Tensor, weights: Tensor) -> int:
    """How many modes (K,) have more than a tenth of their weight (K,)."""
    return int((shares > FOUND_SHARE * weights.to(shares)).sum())


def _mode_figures(target: HasModes, x: Tensor) -> dict[str, float]:
    try:
        weights = target.mode_weights()
    except ValueError:  # too many to list
        return {}
    if len(weights) > _MOST_MODES:
        return {}
    shares = target.mode_shares(x)
    return {"modes": modes_found(shares, weights), "mode TV": mode_total_variation(shares, weights)}


def _virial_error(target: Target, x: Tensor) -> float:
    products = [(z * value_and_score(target.log_prob, z)[1]).sum(-1) for z in x.split(_VIRIAL_CHUNK)]
    return abs(-float(torch.cat(products).double().mean()) / target.dim - 1)


def _particle_figures(target: Particles, x: Tensor, truth: Truth) -> dict[str, float]:
    found = {"virial error": _virial_error(target, x)}
    if truth.reference is not None:
        # Half at most, so that the floor can be of as many.
        x = some(x, min(truth.particle_draws, len(truth.reference) // 2))
        exact = truth.reference[: len(x)]
        first, second = target.particles.to_positions(x), target.particles.to_positions(exact.to(x))
        found["aligned W2"] = aligned_wasserstein2(first, second, target.particles.space_dim)
        found["energy W2"] = energy_wasserstein(target.energy(first), target.energy(second))
    return found


def figures(truth: Truth, x: Tensor) -> dict[str, float]:
    """The figures of draws ``x`` (N, D) that this target has; see the head of this file."""
    target = truth.target
    found = _mode_figures(target, x) if isinstance(target, HasModes) else {}
    if isinstance(target, GaussianMixture):
        chosen = some(x, _TRANSPORTED)
        exact = truth.exact(len(chosen), 0)
        if exact is not None:
            found["W2"] = wasserstein2(chosen, exact)
    if isinstance(target, Funnel):
        found["v sd error"] = abs(target.found_v_sd(x) - target.v_sd)
    if isinstance(target, ManyWell):
        found["minority error"] = abs(target.minority_share(x) - (1 - target.right_weight))
    if isinstance(target, SensorNetwork):
        weights = target.mode_weights()
        found["configuration error"] = float((target.mode_shares(x) - weights.to(x)).abs().max())
        off = (x.mean(0) - target.reference_mean.to(x)) / target.reference_sd.to(x)
        found["mean error"] = float(off.abs().max())
    if isinstance(target, Particles):
        found |= _particle_figures(target, x, truth)
    return found


def floor(truth: Truth, num_draws: int) -> dict[str, float]:
    """Mean :func:`figures` of sets of ``num_draws`` exact draws; empty if there are none.

    Three sets where draws are exact; of reference draws one, of half of them if they are no more than twice as many.
    """
    sets = _FLOOR_SETS if isinstance(truth.target, HasDraws) else 1
    if truth.reference is not None:
        num_draws = min(num_draws, len(truth.reference) // 2)
    drawn = [truth.exact(num_draws, 1 + i) for i in range(sets)]
    rows = [figures(truth, x) for x in drawn if x is not None]
    return {key: sum(row[key] for row in rows) / len(rows) for key in (rows[0] if rows else ())}
