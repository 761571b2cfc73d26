# SPDX-License-Identifier: Apache-2.0
r"""Importance resampling: unequal weights become equal ones.

Draws ``z_i ~ q`` with log weights ``log w_i = log p̃(z_i) − log q(z_i)`` (N,) turn into ``num_samples``
indices, index ``i`` expected ``num_samples · w_i / Σ w`` times. The chosen draws are used without weights.

What resampling cannot do: it repeats draws, so ``num_samples`` chosen draws are worth at most the effective
sample size of the *pool*, and a mode in which no draw lies stays empty.

Source: "Pareto Smoothed Importance Sampling" https://arxiv.org/abs/1507.02646
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Protocol, runtime_checkable

import torch
from torch import Tensor

from pyro_sm.base import Draws
from pyro_sm.weights import damping, normalised, pareto_smooth, resample


@runtime_checkable
class Correction(Protocol):
    """A way to choose draws that can be used as they are."""

    @property
    def name(self) -> str:
        """What was done, in words; exported results carry it."""
        ...

    def apply(self, draws: Draws, num_samples: int, generator: torch.Generator | None = None) -> Tensor:
        """Indices (num_samples,) into ``draws``.

        Raises:
            ValueError: these draws cannot be corrected; the message says why.
        """
        ...


def _check_pool(draws: Draws, num_samples: int) -> None:
    if num_samples < 1:
        raise ValueError(f"expected num_samples of at least 1, found {num_samples}")
    pool = draws.z.shape[0]
    if pool < num_samples:
        raise ValueError(
            f"expected at least num_samples={num_samples} draws to choose from, found {pool}: "
            "draw more from the guide, or ask for fewer samples"
        )


@dataclass(frozen=True)
class ImportanceResampling:
    """Systematic resampling in proportion to ``w``, the largest weights Pareto-smoothed first.

    Smoothing trades a little bias for much less variance when a few weights are very large. Draws of weight
    zero (``log w = -inf``) are never chosen. ``smooth=False`` leaves the weights as they are.
    """

    smooth: bool = True

    @property
    def name(self) -> str:
        """What was done, in words."""
        return "Pareto-smoothed importance resampling" if self.smooth else "importance resampling"

    def apply(self, draws: Draws, num_samples: int, generator: torch.Generator | None = None) -> Tensor:
        """Indices (num_samples,) into ``draws``, in random order.

        Raises:
            ValueError: fewer draws than ``num_samples``; a log weight NaN or ``+inf``; none finite.
        """
        _check_pool(draws, num_samples)
        normalised(draws.log_weight)  # its errors name the bad weights; smoothing would hide them
        log_w = pareto_smooth(draws.log_weight).log_w if self.smooth else draws.log_weight
        return resample(log_w, num_samples, generator)


@dataclass(frozen=True)
class DampedResampling:
    r"""Systematic resampling in proportion to ``w^γ``, γ ≤ 1 the largest that leaves an effective share of τ.

    Where a handful of draws has all the weight, many different ones are chosen, of a law between the guide's and the
    target's: starting points for :class:`~pyro_sm.smc.LocalMoves`, not draws to take averages over. γ is 1,
    and nothing is damped, where the weights are good enough.

    Args:
        effective_share: τ in (0, 1).

    Raises:
        ValueError: τ outside (0, 1).

    Source: "Trust-region constrained annealing" https://arxiv.org/abs/2508.12511 .
    """

    effective_share: float = 0.3

    def __post_init__(self) -> None:
        if not 0 < self.effective_share < 1:
            raise ValueError(f"expected effective_share in (0, 1), found {self.effective_share}")

    @property
    def name(self) -> str:
        """What was done, in words."""
        return f"resampling by damped weights (effective share {self.effective_share})"

    def apply(self, draws: Draws, num_samples: int, generator: torch.Generator | None = None) -> Tensor:
        """Indices (num_samples,) into ``draws``, in random order.

        Raises:
            ValueError: fewer draws than ``num_samples``; a log weight NaN or ``+inf``; none finite.
        """
        _check_pool(draws, num_samples)
        normalised(draws.log_weight)
        return resample(damping(draws.log_weight, self.effective_share) * draws.log_weight, num_samples, generator)


@dataclass(frozen=True)
class NoCorrection:
    """No correction: the first ``num_samples`` draws, whatever their weights."""

    @property
    def name(self) -> str:
        """What was done, in words."""
        return "none (raw draws of the guide)"

    def apply(self, draws: Draws, num_samples: int, generator: torch.Generator | None = None) -> Tensor:
        """Indices ``0 … num_samples − 1``.

        Raises:
            ValueError: fewer draws than ``num_samples``.
        """
        _check_pool(draws, num_samples)
        return torch.arange(num_samples, device=draws.z.device)
