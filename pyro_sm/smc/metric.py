# SPDX-License-Identifier: Apache-2.0
r"""The metric that moves are made in: Fisher information of the particles, ``F = E[s sᵀ]`` with ``s = ∇ log p``.

Of a normal law ``F`` is the precision; of several modes the mean of theirs, where a covariance would be the distance
between them. In ``u = Cᵀ z``, ``F = C Cᵀ``, a narrow ridge is round, and one step size fits all directions; the score
there is ``C⁻¹ s``. With few effective scores ``F`` is drawn towards its diagonal: of ``n`` in ``D`` dimensions
``(n F + D diag F)/(n + D)``.

Source: "Riemann manifold Langevin and Hamiltonian Monte Carlo methods"
https://doi.org/10.1111/j.1467-9868.2010.00765.x (the metric; here one for all particles).
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from pyro_sm.smc.moves import Chains, Evaluate, HamiltonianMove, Move


@dataclass(frozen=True)
class Metric:
    """Coordinates ``u = Cᵀ z``, ``C`` (D, D) lower triangular."""

    factor: Tensor

    def to_white(self, z: Tensor) -> Tensor:
        """``Cᵀ z``; (N, D) to (N, D)."""
        return z @ self.factor

    def to_latent(self, u: Tensor) -> Tensor:
        """``C⁻ᵀ u``; (N, D) to (N, D)."""
        return torch.linalg.solve_triangular(self.factor.T, u.T, upper=True).T

    def white_score(self, score: Tensor) -> Tensor:
        """``C⁻¹ s``; (N, D) to (N, D)."""
        return torch.linalg.solve_triangular(self.factor, score.T, upper=False).T

    def moved(self, move: HamiltonianMove, evaluate: Evaluate, chains: Chains, step_size: Tensor) -> Move:
        """``move`` of every chain, made in these coordinates; chains in and out are latents.

        The log density goes without its constant ``log|det C|``, which no acceptance sees.
        """

        def evaluate_white(u: Tensor) -> tuple[Tensor, Tensor]:
            log_p, score = evaluate(self.to_latent(u))
            return log_p, self.white_score(score)

        white = Chains(self.to_white(chains.z), chains.log_p, self.white_score(chains.score))
        ones = torch.ones_like(self.factor[0])
        made = move.apply(evaluate_white, white, step_size, ones)
        keep = made.accepted.unsqueeze(-1)
        z = torch.where(keep, self.to_latent(made.chains.z), chains.z)
        score = torch.where(keep, made.chains.score @ self.factor.T, chains.score)
        return Move(Chains(z, made.chains.log_p, score), made.accepted, made.acceptance)


def fisher_metric(score: Tensor, weight: Tensor | None = None) -> Metric:
    """The metric of particles with scores (N, D) and weights (N,), which need not sum to 1; equal ones if None.

    Rows without weight do not count, whatever their score, nor does a coordinate without information: its width is 1.
    """
    known = torch.isfinite(score).all(-1)
    if weight is not None:
        known = known & (weight > 0)
    rows = score[known].double()
    share = torch.ones_like(rows[:, 0]) if weight is None else weight[known].double()
    share = share / share.sum().clamp(min=1e-300)
    information = (rows * share.unsqueeze(-1)).T @ rows
    diagonal = information.diagonal()
    width = torch.where((diagonal > 0) & torch.isfinite(diagonal), diagonal.rsqrt(), 1.0)
    # A correlation matrix can be factorised whatever the units are.
    correlation = torch.nan_to_num(information * width * width.unsqueeze(-1), nan=0.0, posinf=0.0, neginf=0.0)
    correlation.diagonal().fill_(1.0)
    dim, effective = len(width), 1 / share.square().sum().clamp(min=1e-300)
    off = effective / (effective + dim)
    shrunk = off * correlation + (1 - off) * torch.eye(dim, dtype=width.dtype, device=width.device)
    factor, bad = torch.linalg.cholesky_ex(shrunk)
    if int(bad):
        factor = torch.eye(dim, dtype=width.dtype, device=width.device)
    return Metric((factor / width.unsqueeze(-1)).to(score))
