# SPDX-License-Identifier: Apache-2.0
r"""Local moves that leave a density as it is: Hamiltonian Monte Carlo on a whole batch of chains at once.

One move from ``z``: momentum ``v ~ N(0, M)``, ``M = diag(scale)⁻²``, then L leapfrog steps of size ``ε``,

    ``v += ε/2 ∇log p̃(z)``,   ``z += ε M⁻¹ v``,   ``v += ε/2 ∇log p̃(z)``,

accepted with probability ``min(1, p̃(z') N(v'; M) / (p̃(z) N(v; M)))``. With ``L = 1`` this is MALA. One step size
serves all chains; it follows the acceptance of the batch while :func:`moved` is told to adapt it, which is exact only
in the limit: for exact chains adapt first, then move with it fixed.

Sources: "MCMC using Hamiltonian dynamics" https://arxiv.org/abs/1206.1901 ; "Exponential convergence of Langevin
distributions and their discrete approximations" https://doi.org/10.2307/3318418 .
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import NamedTuple

import torch
from torch import Tensor

Evaluate = Callable[[Tensor], tuple[Tensor, Tensor]]
"""``z`` (N, D) to ``log p̃`` (N,) and its score (N, D), as ``Density.log_prob_and_score``."""


class Chains(NamedTuple):
    """The state of N chains: ``z`` (N, D), ``log_p`` (N,), ``score`` (N, D)."""

    z: Tensor
    log_p: Tensor
    score: Tensor


class Move(NamedTuple):
    """Where the chains are after a move, and ``acceptance``, the mean acceptance probability."""

    chains: Chains
    acceptance: float


@dataclass(frozen=True)
class HamiltonianMove:
    """How to move.

    Args:
        num_leapfrog: L ≥ 1; 1 is MALA. Each costs one density and one gradient evaluation per chain.
        target_acceptance: what :meth:`adapted` aims at, in (0, 1).

    Raises:
        ValueError: an argument out of its range.
    """

    num_leapfrog: int = 1
    target_acceptance: float = 0.65

    def __post_init__(self) -> None:
        if self.num_leapfrog < 1:
            raise ValueError(f"expected num_leapfrog >= 1, found {self.num_leapfrog}")
        if not 0 < self.target_acceptance < 1:
            raise ValueError(f"expected target_acceptance in (0, 1), found {self.target_acceptance}")

    def apply(self, evaluate: Evaluate, chains: Chains, step_size: float, scale: Tensor) -> Move:
        """One move of every chain.

        Args:
            evaluate: log density and score.
            chains: where they are; their ``log_p`` must be finite.
            step_size: ε, in units of ``scale``.
            scale: (D,) the standard deviations that the inverse mass matrix is made of.
        """
        start = torch.randn_like(chains.z) / scale
        momentum = start + 0.5 * step_size * _finite(chains.score)
        z = chains.z
        for step in range(self.num_leapfrog):
            z = z + step_size * scale.square() * momentum
            log_p, score = evaluate(z)
            factor = 1.0 if step < self.num_leapfrog - 1 else 0.5
            momentum = momentum + factor * step_size * _finite(score)
        kinetic = 0.5 * ((start * scale).square() - (momentum * scale).square()).sum(-1)
        log_accept = torch.nan_to_num(log_p - chains.log_p + kinetic, nan=-math.inf).clamp(max=0)
        accepted = torch.rand_like(log_accept).log() < log_accept
        keep = accepted[:, None]
        new = Chains(
            torch.where(keep, z, chains.z),
            torch.where(accepted, log_p, chains.log_p),
            torch.where(keep, score, chains.score),
        )
        return Move(new, float(log_accept.exp().mean()))

    def adapted(self, step_size: float, acceptance: float, rate: float = 1.0) -> float:
        """The step size after a move with this acceptance: ``log ε += rate (acceptance − target)``."""
        return step_size * math.exp(rate * (acceptance - self.target_acceptance))


def _finite(score: Tensor) -> Tensor:
    """A score that is NaN or infinite belongs to a point that will be rejected; zero keeps the arithmetic going."""
    return torch.nan_to_num(score, nan=0.0, posinf=0.0, neginf=0.0)
