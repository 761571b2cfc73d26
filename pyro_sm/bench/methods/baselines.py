# SPDX-License-Identifier: Apache-2.0
r"""Objectives of other papers in this package's terms, so that only the objective differs in a comparison.

* :class:`UnitWeights`: the regression on estimated scores with every weight one (iterated denoising energy matching);
* :class:`PathLogVariance`: the variance of path log weights;
* :class:`BoundedOutput`: a network that cannot run away, for objectives that follow whole paths from the first step.

Sources: "Iterated Denoising Energy Matching" https://arxiv.org/abs/2402.06121 ; "Improved sampling via learned
diffusions" https://arxiv.org/abs/2307.01198 .
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from pyro import poutine
from torch import Tensor, nn

from pyro_sm.base import Arguments, Density, DiffusionGuide, DiffusionProcess, require
from pyro_sm.diffusion.covering import Covering, WideCovering
from pyro_sm.nn.mlp import Architecture
from pyro_sm.objectives.elbo import ScoreObjective
from pyro_sm.objectives.importance_weighted.buffer import Buffer
from pyro_sm.objectives.importance_weighted.weightings import StepNoise, marginal_estimate


@dataclass(frozen=True)
class UnitWeights:
    """:class:`~pyro_sm.MarginalWeights` with every weight one: iterated denoising energy matching.

    Without the weight the ratio bias of the score estimate stays, and points are taught as often as they are drawn.
    Nor is there one to make little of scores without measure, which the published code clips, too.

    Args:
        num_inner: K, inner draws per row.
        max_score_norm: of the estimated score of a row, whitened.
    """

    num_inner: int = 16
    max_score_norm: float = 70.0

    @property
    def needs_score(self) -> bool:
        """No: the inner draws have theirs."""
        return False

    def default_covering(self, density: Density) -> Covering:
        """As the weighted form has it."""
        return WideCovering()

    def loss(
        self, process: DiffusionProcess, density: Density, covering: Covering, buffer: Buffer, step: StepNoise
    ) -> Tensor:
        """``λ (‖s − Ŝ‖² − ‖s_0 − Ŝ‖²)/D`` per row (B,), ``λ = r²``, ``s_0`` the untrained score, ``Ŝ`` clipped."""
        with torch.no_grad():
            latents = buffer.latents()
            u = process.to_white(latents[buffer.pick(torch.ones_like(latents[:, 0]), step.pick)])
            y = u + step.level[:, None] * step.noise
            estimate = marginal_estimate(process, density, y, step.level, step.inner)
            square_ratio = step.level.square()[:, None]
            # By its largest entry first: the square of 10²⁰ is infinite in float32.
            largest = estimate.score.abs().amax(-1, keepdim=True).clamp(min=1e-30)
            norm = largest * (estimate.score / largest).norm(dim=-1, keepdim=True)
            target = y + square_ratio * estimate.score * (self.max_score_norm / norm).clamp(max=1)
        error, log_variance, start = process.regression(target, y, step.level)
        square = (error.square() - start.square()) / (1 + square_ratio)
        return square.mean(-1) + 1e-2 * log_variance.square().mean(-1)


class PathLogVariance(ScoreObjective):
    r"""``Var(log p̃(z) + R)`` over draws ``z`` of the guide, held fixed, each noised forward to a path.

    The log weight of every path is the same, ``log Z``, if and only if the guide's path law is the target's; any law
    of paths will do for the variance, so the draws need no gradient, nor does the density.

    Args:
        num_draws: N ≥ 2, paths and density evaluations per step.
        num_particles: Pyro's word for ``num_draws``.
    """

    def __init__(self, num_draws: int | None = None, *, num_particles: int | None = None) -> None:
        super().__init__(num_draws, num_particles, default=64, least=2)

    def _loss(self, model: Callable[..., Any], guide: Any, arguments: Arguments, *, commit: bool) -> Tensor:
        diffusion_guide: DiffusionGuide = require(self, guide, DiffusionGuide)
        bound = diffusion_guide.bind(model, *arguments.args, **arguments.kwargs)
        process = bound.diffusion()
        with torch.no_grad(), poutine.block():
            z, _ = process.draw(self.num_draws)
            log_p = bound.density.log_prob(z)
        seen = torch.isfinite(log_p)
        if int(seen.sum()) < 2:  # nothing to learn from: a NaN would end the training for good
            return torch.zeros((), dtype=z.dtype, device=z.device, requires_grad=True)
        return (log_p[seen] + process.path_log_ratio(z[seen])).var()


class _Bounded(nn.Module):
    """See :class:`BoundedOutput`."""

    def __init__(self, network: nn.Module, most: float) -> None:
        super().__init__()
        self.network, self.most = network, most

    def forward(self, x: Tensor, c: Tensor, context: Tensor | None = None) -> Tensor:
        """``(x (B, D), c (B,) or (1,), context) -> (B, 2D)``."""
        mean, log_variance = self.network(x, c, context).chunk(2, -1)
        mean = mean / torch.sqrt(1 + mean.square().mean(-1, keepdim=True) / self.most**2)
        return torch.cat([mean, self.most * torch.tanh(log_variance / self.most)], -1)


@dataclass(frozen=True)
class BoundedOutput:
    """``architecture`` with ``F / √(1 + mean(F²)/b²)`` for the mean and ``b tanh(h/b)`` for the log variance.

    A message between particles grows with their distance: where a draw is pushed outwards, each kernel pushes it
    further, and the path is beyond all numbers before its gradient could say so. Regression on noised points never
    follows a path; reverse KL and log-variance do nothing else. Under the base ``F`` has unit size. Equivariant if
    the network is.

    Args:
        architecture: of the network.
        most: b.
    """

    architecture: Architecture
    most: float = 3.0

    @property
    def isotropic(self) -> bool:
        """As without bounds."""
        return self.architecture.isotropic

    def build(self, dim: int, out_dim: int, context_dim: int) -> nn.Module:
        """The network, bounded."""
        return _Bounded(self.architecture.build(dim, out_dim, context_dim), self.most)
