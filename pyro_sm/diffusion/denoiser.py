# SPDX-License-Identifier: Apache-2.0
r"""The denoiser: a network made into mean and variance of the clean point, exact for a Gaussian before training.

In whitened space the base is ``N(0, I)`` and ``y = u + r ε``. With ``v = 1 + r²`` and a network that returns two
vectors ``F, h = network(y/√v, ¼ log r)``,

    mean      ``D(y, r) = y/v + (r/√v) F``  estimates ``E[u | y]``,
    variance  ``V(y, r) = (r²/v) exp(h)``   estimates ``Var[u | y]``, one latent at a time.

While the network returns zero these *are* the posterior moments under ``u ~ N(0, I)``: the untrained sampler draws
from its base exactly, and learns only what is missing. The score of the noised density is
``∇ log p_r(y) = (D(y, r) − y)/r²``.

Training regresses ``F`` on ``F* = (u − y/v) √v/r``, which has unit size under the base at every ``r``, and ``h`` on
the squared residual ``e² = (F − F*)²`` by the Gaussian likelihood ``½(h + e² exp(−h))``. A variance that depends on
``y`` matters where the target has several modes: one variance per level is too wide inside them, too narrow between.

With an :class:`~pyro_sm.diffusion.anchor.Anchor`, a mixture that is known beforehand, its moments take the place of
the Gaussian's: what the network returns is added to the ``F`` and ``h`` that they amount to.

Source: "Elucidating the Design Space of Diffusion-Based Generative Models" https://arxiv.org/abs/2206.00364 ;
"Improved Denoising Diffusion Probabilistic Models" https://arxiv.org/abs/2102.09672 (learned variances).
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import NamedTuple

import torch
from torch import Tensor

from pyro_sm.diffusion.anchor import Anchor

Network = Callable[[Tensor, Tensor, Tensor | None], Tensor]

# exp of these is far outside what any fitted posterior needs (factors of 1e-6 and 400); they
# keep a bad step from overflowing.
_LOG_VARIANCE_RANGE = (-14.0, 6.0)


class Regression(NamedTuple):
    """Residual of one denoising regression.

    ``error``: (B, D) ``F − F*``. ``log_variance``: (B, D) ``h``. ``target``: (B, D) minus the error of an untrained
    network: ``F*``, less what an anchor knows of it.
    """

    error: Tensor
    log_variance: Tensor
    target: Tensor


@dataclass(frozen=True)
class Denoiser:
    """``D(y, r)`` and ``V(y, r)`` around a network; see the head of the file.

    Args:
        network: ``(x (B, D), c (B,) or (1,), context or None) -> (B, 2D)``: ``F`` and ``h`` side by side. ``c`` (1,)
            is one noise level for all rows; a network whose rows share it need not compute it for each.
        context: one context for all rows (C,), or (B, C); None for an unconditional sampler.
        anchor: what is known before training; None for ``N(0, I)``.
    """

    network: Network
    context: Tensor | None = None
    anchor: Anchor | None = None

    def field(self, x: Tensor, log_ratio: Tensor) -> tuple[Tensor, Tensor]:
        """``F`` and ``h`` (B, D) at scaled points ``x = y/√v`` (B, D) and ``log r`` (B,) or (1,)."""
        mean, log_variance = self._learned(x, log_ratio)
        if self.anchor is not None:
            known_mean, known_log_variance = self._anchored(self.anchor, x, log_ratio)
            mean, log_variance = mean + known_mean, log_variance + known_log_variance
        return mean, log_variance.clamp(*_LOG_VARIANCE_RANGE)

    def _learned(self, x: Tensor, log_ratio: Tensor) -> tuple[Tensor, Tensor]:
        mean, log_variance = self.network(x, 0.25 * log_ratio, self.context).chunk(2, -1)
        return mean, log_variance

    def _anchored(self, anchor: Anchor, x: Tensor, log_ratio: Tensor) -> tuple[Tensor, Tensor]:
        """``F`` and ``h`` (B, D) that the anchor's moments amount to."""
        r = torch.exp(log_ratio)
        v = (1 + r * r)[:, None]
        root = torch.sqrt(v)
        mean, variance = anchor.moments(x * root, r)
        ratio = r[:, None]
        return (mean - x / root) * root / ratio, torch.log(variance * v / ratio.square())

    def moments(self, y: Tensor, r: Tensor) -> tuple[Tensor, Tensor]:
        """Posterior mean ``D`` and variance ``V``, both (B, D), for ``y`` (B, D) and ``r`` () or (B,)."""
        r = r.reshape(-1, 1)
        v = 1 + r * r
        root = torch.sqrt(v)
        mean, log_variance = self.field(y / root, torch.log(r[:, 0]))
        return torch.addcmul(y / v, r / root, mean), r * r / v * torch.exp(log_variance)

    def score(self, y: Tensor, r: Tensor) -> Tensor:
        """``∇ log p_r(y) = (D − y)/r²``, (B, D)."""
        mean, _ = self.moments(y, r)
        return (mean - y) / r.reshape(-1, 1).square()

    def regression(self, target_mean: Tensor, y: Tensor, r: Tensor) -> Regression:
        """Compare with a target for the posterior mean: a clean point, or a better estimate; all (B, D), r (B,)."""
        r = r[:, None]
        v = 1 + r * r
        x, log_ratio = y / torch.sqrt(v), torch.log(r[:, 0])
        mean, log_variance = self._learned(x, log_ratio)
        target = (target_mean - y / v) * torch.sqrt(v) / r
        if self.anchor is not None:
            known_mean, known_log_variance = self._anchored(self.anchor, x, log_ratio)
            target, log_variance = target - known_mean, log_variance + known_log_variance
        return Regression(mean - target, log_variance.clamp(*_LOG_VARIANCE_RANGE), target)
