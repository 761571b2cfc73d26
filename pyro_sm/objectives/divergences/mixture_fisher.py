# SPDX-License-Identifier: Apache-2.0
r"""The mixture Fisher divergence between a guide and a model: a Fisher divergence that sees the weights of modes.

With a covering density ``m`` and ``0 < β < 1``:

    ``q̃ = β q + (1−β) m``,  ``p̃_m = β p + (1−β) m``,  ``MFD = FD(q̃ ‖ p̃_m)``.

The scores are mixed by responsibilities, ``s_q̃ = r_q s_q + (1−r_q) s_m`` with ``r_q = βq / (βq + (1−β)m)``, and the
same for p with

    ``r_p = sigmoid(log p̃ − log Z + log β − log m − log(1−β))``.

So it needs ``log Z``. It cannot be learned as a free scalar along with the guide (it is not identified); here it is
*estimated by importance sampling from q̃*, whose share of ``m`` covers, or given. Every estimate is kept, with its
error, in ``history``: read it, for the weights found can be no better than it is.

β → 1 is the Fisher divergence. Source: "Towards Healing the Blindness of Score Matching"
https://arxiv.org/abs/2209.07396 .
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
from pyro import poutine
from torch import Tensor

from pyro_sm.model.density import ModelDensity
from pyro_sm.model.guide_trace import guide_name
from pyro_sm.objectives.divergences.fisher import squared_norm
from pyro_sm.objectives.divergences.guide_paths import Path
from pyro_sm.objectives.divergences.mixing import Mixing, MixingDensity, PriorMixing
from pyro_sm.objectives.divergences.path_objective import PathObjective
from pyro_sm.objectives.gradients import gradient
from pyro_sm.objectives.metrics import BaseSpace, Metric
from pyro_sm.weights import Evidence, effective_sample_size, evidence, pareto_smooth

# ---------------------------------------------------------------------------------------------- the estimators


def mixed_log_prob(log_prob: Tensor, log_m: Tensor, beta: float) -> Tensor:
    """``log (β e^{log_prob} + (1−β) m)`` (N,); its gradient is the mixed score. All (N,), nats, normalised."""
    # Not logaddexp: its second derivative is NaN where one term is e^88 times the other.
    return torch.logsumexp(torch.stack([math.log(beta) + log_prob, math.log1p(-beta) + log_m]), 0)


def mixture_values(
    log_q: Callable[[Tensor], Tensor],
    log_p: Callable[[Tensor], Tensor],
    mixing: MixingDensity,
    z: Tensor,
    beta: float,
    metric: BaseSpace | Metric,
    *,
    create_graph: bool = True,
) -> Tensor:
    """``‖mᵀ(s_q̃ − s_p̃)‖²`` (N,), nats², at latents ``z`` (N, D) drawn from ``q̃``.

    Args:
        log_q: log density (N,) of the guide at any latents.
        log_p: *normalised* log density (N,) of the target: ``log p̃ − log Z``. Where it is ``-inf``, ``p̃_m`` is m.
        mixing: m.
        z: carrying a path gradient, or not.
        beta: β in (0, 1).
        metric: BaseSpace is the whitened space of m, ``Lᵀ Δ``.
        create_graph: False if only the values are wanted.
    """
    with torch.enable_grad():
        z = z if z.requires_grad else z.detach().requires_grad_(True)
        log_m, log_p_z = mixing.log_prob(z), log_p(z)
        possible = torch.isfinite(log_p_z)
        target = mixed_log_prob(torch.where(possible, log_p_z, 0.0), log_m, beta)
        target = torch.where(possible, target, math.log1p(-beta) + log_m)
        log_ratio = target - mixed_log_prob(log_q(z), log_m, beta)
        difference = -gradient(log_ratio, z, create_graph=create_graph)
        if isinstance(metric, BaseSpace):
            return squared_norm(difference @ mixing.scale_tril)
        return squared_norm(metric(z, difference))


# ------------------------------------------------------------------------------------------- the evidence


@dataclass(frozen=True)
class EstimatedLogZ:
    """``log Z`` by importance sampling from ``q̃``, estimated anew every so many steps and pooled.

    Args:
        num_draws: draws and density evaluations per estimate.
        every: optimiser steps between estimates.

    Raises:
        ValueError: a count that is not positive.
    """

    num_draws: int = 2048
    every: int = 100

    def __post_init__(self) -> None:
        if self.num_draws < 2 or self.every < 1:
            raise ValueError(f"expected num_draws >= 2 and every >= 1, found {self.num_draws} and {self.every}")


class LogZInfo(NamedTuple):
    """One estimate of ``log Z``, and what the losses after it use."""

    step: int
    """Optimiser steps before it."""
    log_evidence: float
    """Of this estimate's draws alone, nats."""
    log_evidence_se: float
    """Its standard error, nats; an error of δ in what is used shifts the weight of a mode by about δ of itself."""
    ess: float
    """Effective share of the draws, in (0, 1]."""
    khat: float
    """Pareto shape of the weights; they are bounded by ``p / (1−β) m``, so it speaks of the mixing density."""
    log_z: float
    """What the losses use: all estimates so far, by inverse variance; nats."""


def pooled(estimates: Sequence[Evidence]) -> float:
    """Mean of independent estimates of ``log Z``, weighted by ``1 / se²``, nats; an exact one counts alone."""
    best = min(e.log_evidence_se for e in estimates)
    if best == 0 or not math.isfinite(best):
        return next(e.log_evidence for e in estimates if e.log_evidence_se == best)
    shares = [(best / e.log_evidence_se) ** 2 for e in estimates]
    return sum(w * e.log_evidence for w, e in zip(shares, estimates, strict=True)) / sum(shares)


class MixtureState(NamedTuple):
    """All that the next step needs and the guide does not hold."""

    mixing: MixingDensity
    steps: int = 0
    history: tuple[LogZInfo, ...] = ()


# ------------------------------------------------------------------------------------------- speaking to Pyro


class MixtureFisherDivergence(PathObjective):
    r"""``FD(βq + (1−β)m ‖ βp + (1−β)m)``, nats², with path gradients: sees the weights of separated modes.

    For a guide whose log density can be had at any latent. Draws are stratified: a share β of them is the guide's,
    the rest those of m. **It needs log Z**: estimated by importance sampling from the same mixture, or given.

    Args:
        num_draws: N, draws per loss, those of m included; at least 2, 64 by default.
        mixing: the covering density m: ``PriorMixing()`` (default) or ``GivenMixing(loc, scale)``.
        beta: β in (0, 1), the share of guide and target.
        log_z: :class:`EstimatedLogZ` (default), or the evidence in nats where it is known (0 if normalised).
        metric: as in :class:`~pyro_sm.objectives.FisherDivergence`, but ``BaseSpace()`` (default) is the whitened
            space of m: a constant matrix, which makes the loss invariant to affine maps of the latents.
        num_particles: Pyro's word for ``num_draws``.
        max_plate_nesting: as in ``ELBO``; used by ``_get_trace`` only.

    Attributes:
        state: the :class:`MixtureState`; replaced, never mutated. ``None`` before the first step.

    Raises:
        TypeError: at the first call, as ``FisherDivergence``; or the guide has no log density at a given latent.
        ValueError: β outside of (0, 1), too few draws; at the first call, as ``FisherDivergence``, or if the
            prior is improper and no mixing density was given.
        ModelRefusedError: the model cannot be evaluated in batches (at the first call).

    Source: "Towards Healing the Blindness of Score Matching" https://arxiv.org/abs/2209.07396 .
    """

    def __init__(
        self,
        num_draws: int | None = None,
        *,
        mixing: Mixing | None = None,
        beta: float = 0.5,
        log_z: EstimatedLogZ | float | None = None,
        metric: BaseSpace | Metric | None = None,
        num_particles: int | None = None,
        max_plate_nesting: float = float("inf"),
    ) -> None:
        if not 0 < beta < 1:
            raise ValueError(f"expected beta in (0, 1), found {beta}")
        super().__init__(num_draws, num_particles, default=64, least=2, max_plate_nesting=max_plate_nesting)
        self.mixing = mixing or PriorMixing()
        self.beta = beta
        self.log_z = EstimatedLogZ() if log_z is None else log_z
        self.metric = metric or BaseSpace()
        self.state: MixtureState | None = None
        self._bound: tuple[object, object] | None = None

    @property
    def history(self) -> tuple[LogZInfo, ...]:
        """The estimates of ``log Z`` so far, oldest first; empty if it was given."""
        return () if self.state is None else self.state.history

    def _needs(self, path: Path, guide: Any) -> None:
        if path.log_q is None:
            raise TypeError(
                f"{guide_name(guide)} has auxiliary sites, so its log density at a given latent, which "
                "MixtureFisherDivergence needs, is not known; use FisherDivergence(sobolev=...)"
            )

    def _draw_mixture(self, path: Path, mixing: MixingDensity, num_draws: int) -> tuple[Tensor, Tensor]:
        """Stratified draws ``z`` (N, D) of ``q̃`` and their weights (N,), which sum to one."""
        num_guide = min(max(1, round(self.beta * num_draws)), num_draws - 1)
        dtype, device = mixing.loc.dtype, mixing.loc.device
        own = path.draw(torch.randn(num_guide, path.noise_dim, dtype=dtype, device=device))
        wide = mixing.draw(torch.randn(num_draws - num_guide, mixing.loc.shape[0], dtype=dtype, device=device))
        share = own.weight.new_full((num_draws - num_guide,), (1 - self.beta) / (num_draws - num_guide))
        return torch.cat([own.z, wide]), torch.cat([self.beta * own.weight, share])

    def _estimate(self, path: Path, density: ModelDensity, state: MixtureState, num_draws: int) -> LogZInfo:
        """``log Z`` from fresh draws of the mixture, pooled with the estimates before it."""
        with torch.no_grad(), poutine.block():
            z, weight = self._draw_mixture(path, state.mixing, num_draws)
            log_q = self._log_q(path)(z)
            log_w = density.log_prob(z) - mixed_log_prob(log_q, state.mixing.log_prob(z), self.beta)
            log_w = log_w + torch.log(weight * num_draws)
        found = evidence(log_w)
        if not math.isfinite(found.log_evidence):
            raise ValueError(
                f"log p̃ is -inf at all of {num_draws} draws of guide and mixing density: give a mixing density that "
                "covers the posterior, mixing=GivenMixing(loc, scale)"
            )
        khat = pareto_smooth(log_w).khat
        earlier = [Evidence(info.log_evidence, info.log_evidence_se) for info in state.history]
        ess = effective_sample_size(log_w) / num_draws
        return LogZInfo(state.steps, *found, ess, khat, pooled([*earlier, found]))

    def _log_q(self, path: Path) -> Callable[[Tensor], Tensor]:
        if path.log_q is None:
            raise TypeError("the guide has no log density at a given latent")
        return path.log_q

    def _state_for(self, guide: Any, density: ModelDensity) -> MixtureState:
        """The state so far; for another guide or other data, a fresh one."""
        held = self.state
        if held is not None and self._bound is not None and self._bound[0] is guide and self._bound[1] is density:
            return held
        return MixtureState(self.mixing.fit(density))

    def _divergence(self, path: Path, density: ModelDensity, guide: Any, *, commit: bool) -> Tensor:
        # Drawn first, so that a step has the same noise whether or not an estimate of log Z precedes it.
        state = self._state_for(guide, density)
        z, weight = self._draw_mixture(path, state.mixing, self.num_draws)
        if isinstance(self.log_z, EstimatedLogZ):
            if not state.history or state.steps - state.history[-1].step >= self.log_z.every:
                info = self._estimate(path, density, state, self.log_z.num_draws)
                state = state._replace(history=(*state.history, info))
            log_z = state.history[-1].log_z
        else:
            log_z = float(self.log_z)
        values = mixture_values(
            self._log_q(path),
            lambda at: density.log_prob(at) - log_z,
            state.mixing,
            z,
            self.beta,
            self.metric,
            create_graph=commit,
        )
        if commit:
            self._bound, self.state = (guide, density), state._replace(steps=state.steps + 1)
        return (weight * values).sum()
