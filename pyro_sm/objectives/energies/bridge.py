# SPDX-License-Identifier: Apache-2.0
r"""Density estimation that sees the weights of separated modes: the mixture Fisher divergence in three steps.

A *bridge* ``m`` covers the data. With ``0 < β < 1``

1. an energy ``f`` is fitted, by any score-matching loss, to ``βp + (1−β)m``. The bridge connects the modes, so the
   loss sees their relative weight. Data and draws of m are kept apart, with the weights β and 1−β: the score of m is
   known, so its rows need no second derivatives, ``E_m[½‖s‖² + tr∇s] = E_m[½‖s‖² − s·∇log m]``;
2. ``log Z = log ∫ e^f`` comes from importance sampling, draws of m with weights ``e^f/m``: they are of order one,
   and bounded below by ``1−β`` when f fits;
3. the *corrected density* is ``q = [e^f/Z − (1−β)m]₊ / (β C)``; ``C`` is near one, and is what clipping at zero adds.
   Where ``p ≪ m`` the two terms cancel and an error of one per cent in ``f`` decides the sign: instead of at zero,
   the bracket is clipped at a small ``floor · m``, so that ``log q`` stays finite. (The source has ``floor = 0``.)

Densities are per unit of x^D, logarithms in nats.

Source: "Towards Healing the Blindness of Score Matching" https://arxiv.org/abs/2209.07396 .
"""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any, Protocol

import torch
from pyro import poutine
from torch import Tensor

from pyro_sm.base import Arguments
from pyro_sm.density import value_and_score
from pyro_sm.gaussians.gaussian import GaussianDensity
from pyro_sm.model.energy import ModelEnergy
from pyro_sm.objectives.elbo import ScoreObjective
from pyro_sm.objectives.energies.density_estimation import ImplicitScoreMatching
from pyro_sm.objectives.energies.energy_objective import EnergyObjective, checked_data
from pyro_sm.weights import evidence, log_mean_exp, pareto_smooth, resample


class Bridge(Protocol):
    """A normalised density that covers the data, with draws: ``GaussianDensity``, for example."""

    dim: int
    dtype: torch.dtype

    def log_prob(self, z: Tensor) -> Tensor:
        """``log m`` (B,) in nats, normalised, for ``z`` (B, D)."""
        ...

    def sample(self, num_draws: int) -> Tensor:
        """Independent draws of ``m`` itself, (num_draws, D)."""
        ...


def gaussian_bridge(data: Tensor, widen: float = 1.0) -> GaussianDensity:
    """The Gaussian with the mean and covariance of the data (N, D), its standard deviations times ``widen``.

    Raises:
        ValueError: the data are not (N, D), or their covariance is singular.
    """
    if data.ndim != 2 or len(data) < 2:
        raise ValueError(f"expected data of shape (N, D) with N >= 2, found {tuple(data.shape)}")
    covariance = torch.cov(data.T).reshape(data.shape[1], data.shape[1])
    factor, info = torch.linalg.cholesky_ex(covariance)
    if int(info):
        raise ValueError("expected data with a positive definite covariance: some columns are linear in others")
    return GaussianDensity(data.mean(0), factor * widen)


def correction(log_ratio: Tensor, beta: float, floor: float = 0.0) -> Tensor:
    """``log (max(r − (1−β), floor) / β)`` (B,) for ``log r`` (B,), ``r = e^f/(Z m)``."""
    excess = torch.exp(log_ratio) - (1 - beta)
    large = log_ratio + torch.log1p(-torch.exp(math.log1p(-beta) - log_ratio).clamp(max=0.5))
    value = torch.where(log_ratio > math.log(2 * (1 - beta)), large, torch.log(excess.clamp(min=0)))
    if floor > 0:
        value = value.clamp(min=math.log(floor))
    return value - math.log(beta)


class CorrectedDensity:
    """``q = [e^f/Z − (1−β)m]₊ / (β C)``, normalised: to be evaluated and drawn from.

    ``Z`` and ``C`` are estimated once from draws of the bridge, when this is built.

    Args:
        energy: ``f``, (B, D) -> (B,), nats.
        bridge: ``m``.
        beta: β.
        num_draws: draws of the bridge.
        floor: where the bracket would be smaller than this share of ``m``, it is set to it.

    Attributes:
        log_z: ``log Z`` in nats, and log_z_se its standard error.
        khat: Pareto shape of the weights ``e^f/m``; above 0.7 the bridge does not cover the model.
        log_mass: ``log C``; the more it differs from 0, the worse the fit.
        clipped: share of the bridge's mass on which ``q`` is at its floor. Where there are no data, the sign of the
            bracket is noise.

    Raises:
        ValueError: a negative floor; no draw of the bridge has a finite energy, or the correction leaves nothing.
    """

    def __init__(
        self,
        energy: Callable[[Tensor], Tensor],
        bridge: Bridge,
        beta: float,
        *,
        num_draws: int = 20_000,
        floor: float = 1e-3,
    ) -> None:
        if not floor >= 0:
            raise ValueError(f"expected floor >= 0, found {floor}")
        self.floor = floor
        self.energy = energy
        self.bridge = bridge
        self.beta = beta
        self.dim = bridge.dim
        with torch.no_grad():
            draws = bridge.sample(num_draws)
            log_w = self._log_ratio(draws)
            self.log_z, self.log_z_se = evidence(log_w)
            self.khat = pareto_smooth(log_w).khat
            corrected = correction(log_w - self.log_z, beta, floor)
            self.clipped = float((torch.exp(log_w - self.log_z) <= 1 - beta + floor).double().mean())
            self.log_mass = float(log_mean_exp(corrected.double()))
        if not math.isfinite(self.log_z) or not math.isfinite(self.log_mass):
            raise ValueError(
                f"expected draws of the bridge to reach the model, found log Z {self.log_z} and log mass "
                f"{self.log_mass} from {num_draws} draws: widen the bridge, or train longer"
            )

    def _log_ratio(self, x: Tensor) -> Tensor:
        """``f − log m`` (B,) at ``x`` (B, D)."""
        return self.energy(x) - self.bridge.log_prob(x)

    def log_prob(self, x: Tensor) -> Tensor:
        """``log q`` (B,) in nats; ``x``: (B, D)."""
        with torch.no_grad():
            ratio = self._log_ratio(x) - self.log_z
            return correction(ratio, self.beta, self.floor) - self.log_mass + self.bridge.log_prob(x)

    def sample(self, num_draws: int, *, oversample: int = 16) -> Tensor:
        """Draws (num_draws, D) by importance resampling from ``oversample`` times as many of the bridge.

        A draw may come up more than once; more so, the less the bridge looks like the data.
        """
        with torch.no_grad():
            pool = self.bridge.sample(num_draws * oversample)
            log_w = correction(self._log_ratio(pool) - self.log_z, self.beta, self.floor)
            return pool[resample(log_w, num_draws)]


class BridgeDensityEstimation(ScoreObjective):
    r"""Fits an energy model to ``βp_data + (1−β)m`` and corrects it afterwards; see the head of this file.

    ``SVI(energy, no_guide, optim, loss=BridgeDensityEstimation(gaussian_bridge(data)))``; every ``svi.step(data)``
    takes β times the inner loss of the data and 1−β times that of as many fresh draws of the bridge. Then
    ``loss.corrected(energy, data)`` is the density of the data. The energy must be able to express the *mixture*
    ``βp + (1−β)m``.

    The relative weight of two modes is learned where their tails cross the bridge. A larger β moves that outwards,
    where data are few; a smaller one leaves more to subtract.

    Args:
        bridge: m, normalised, with exact draws.
        beta: β in (0, 1): the share of data.
        loss: any of the losses on energy models; by default ``ImplicitScoreMatching()``. A denoising loss fits the
            data blurred by its σ, beside the bridge as it is.

    Raises:
        ValueError: β is not in (0, 1); data and bridge differ in dimension.
        ModelRefusedError: as the inner loss.
    """

    def __init__(self, bridge: Bridge, beta: float = 0.8, loss: EnergyObjective | None = None) -> None:
        if not 0 < beta < 1:
            raise ValueError(f"expected beta in (0, 1), found {beta}")
        self.inner = loss or ImplicitScoreMatching()
        super().__init__(self.inner.num_draws, None, default=1)
        self.bridge = bridge
        self.beta = beta

    def _loss(self, model: Callable[..., Any], guide: Any, arguments: Arguments, *, commit: bool) -> Tensor:
        data, rest = checked_data(arguments)
        if data.shape[1] != self.bridge.dim:
            raise ValueError(
                f"expected data of shape (N, {self.bridge.dim}), as the bridge, found {tuple(data.shape)}"
            )
        energy = self.inner.energy(model, rest, data)
        drawn = self.bridge.sample(len(data) * self.num_draws).to(data)
        _, known = value_and_score(lambda x: self.bridge.log_prob(x.to(self.bridge.dtype)).to(data), drawn)
        own = self.inner.row_losses(energy.log_prob, data.repeat(self.num_draws, 1)).mean()
        return self.beta * own + (1 - self.beta) * self.inner.known_losses(energy.log_prob, drawn, known).mean()

    def corrected(
        self,
        model: Callable[..., Any],
        data: Tensor,
        *args: Any,
        num_draws: int = 20_000,
        floor: float = 1e-3,
        **kwargs: Any,
    ) -> CorrectedDensity:
        """Steps two and three: the density of the data according to the model as it is now.

        Args:
            model: the energy model.
            data: some data (N, D); only its dtype, device and D matter.
            args: further arguments of the model, and ``kwargs``.
            num_draws: draws of the bridge for ``log Z``.
            floor: as in :class:`CorrectedDensity`.
        """
        energy = ModelEnergy(model, Arguments(args, kwargs), data)

        def frozen(x: Tensor) -> Tensor:
            with torch.no_grad(), poutine.block():
                return energy.density.log_prob(x)

        return CorrectedDensity(frozen, self.bridge, self.beta, num_draws=num_draws, floor=floor)

    def _backward(self, loss: Tensor, model: Callable[..., Any], guide: Any) -> None:
        self.inner.add_gradients(loss, model)
