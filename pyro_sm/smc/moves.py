# SPDX-License-Identifier: Apache-2.0
r"""Local moves that leave a density as it is: Hamiltonian Monte Carlo on a whole batch of chains at once.

One move from ``z``: momentum ``v ~ N(0, M)``, ``M = diag(scale)⁻²``, then L leapfrog steps of size ``ε``,

    ``v += ε/2 ∇log p̃(z)``,   ``z += ε M⁻¹ v``,   ``v += ε/2 ∇log p̃(z)``,

accepted with probability ``min(1, p̃(z') N(v'; M) / (p̃(z) N(v; M)))``. With ``L = 1`` this is MALA. Every chain draws
its own ``ε`` from a range around the one given: a fixed ``L ε`` near a period of the motion brings the chain back to
where it was. Following the acceptance (:meth:`HamiltonianMove.adapted`) is exact only in the limit: for exact chains
adapt first, then move with the step size fixed.

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
"""``z`` (N, D) to ``log p̃`` (N,) in nats and its score (N, D), as ``Density.log_prob_and_score``."""


class Chains(NamedTuple):
    """The state of N chains: ``z`` (N, D), ``log_p`` (N,) in nats, ``score`` (N, D)."""

    z: Tensor
    log_p: Tensor
    score: Tensor


class Move(NamedTuple):
    """Where the chains are after a move; ``accepted`` (N,), bool; ``acceptance`` (N,), the probability of it."""

    chains: Chains
    accepted: Tensor
    acceptance: Tensor


def leapfrog(
    evaluate: Evaluate, chains: Chains, momentum: Tensor, step_size: Tensor, scale: Tensor, num_steps: int
) -> tuple[Chains, Tensor]:
    """Chains and momentum (N, D) after ``num_steps`` leapfrog steps; the evaluations of the last are kept.

    The map is its own inverse up to the sign of the momentum, and keeps volume, whatever stands for the score.

    Args:
        evaluate: log density and score; called once per step.
        chains: N of them.
        momentum: ``v`` (N, D).
        step_size: ``ε`` (N,) or ().
        scale: ``M^{-½}`` (D,) or (N, D).
        num_steps: L ≥ 1.
    """
    z, log_p, score = chains
    step = step_size.unsqueeze(-1)
    momentum = momentum + 0.5 * step * _finite(score)
    for k in range(num_steps):
        z = z + step * scale.square() * momentum
        log_p, score = evaluate(z)
        momentum = momentum + (1.0 if k < num_steps - 1 else 0.5) * step * _finite(score)
    return Chains(z, log_p, score), momentum


def log_acceptance(old: Chains, new: Chains, momentum: Tensor, new_momentum: Tensor, scale: Tensor) -> Tensor:
    """``log min(1, p̃(z') N(v'; M) / (p̃(z) N(v; M)))`` (N,); ``-inf`` where the new density is not finite.

    A density of ``+inf`` is refused too: a chain that went there would never leave.
    """
    kinetic = 0.5 * ((momentum * scale).square() - (new_momentum * scale).square()).sum(-1)
    change = torch.where(torch.isfinite(new.log_p), new.log_p - old.log_p + kinetic, -math.inf)
    return torch.nan_to_num(change, nan=-math.inf, posinf=math.inf, neginf=-math.inf).clamp(max=0)


@dataclass(frozen=True)
class HamiltonianMove:
    """How to move.

    Args:
        num_leapfrog: L ≥ 1; 1 is MALA. Each costs one density and one gradient evaluation per chain.
        target_acceptance: what :meth:`adapted` aims at, in (0, 1). .65 is best for trajectories: "Optimal tuning of
            the hybrid Monte Carlo algorithm" https://arxiv.org/abs/1001.4460 ; for MALA .57 is, with a flat optimum.
        jitter: every chain's step size is uniform on ``ε (1 ± jitter)``, in [0, 1): no length of
            trajectory is then a period for all.

    Raises:
        ValueError: an argument out of its range.
    """

    num_leapfrog: int = 1
    target_acceptance: float = 0.65
    jitter: float = 0.2

    def __post_init__(self) -> None:
        if self.num_leapfrog < 1:
            raise ValueError(f"expected num_leapfrog >= 1, found {self.num_leapfrog}")
        if not 0 < self.target_acceptance < 1:
            raise ValueError(f"expected target_acceptance in (0, 1), found {self.target_acceptance}")
        if not 0 <= self.jitter < 1:
            raise ValueError(f"expected jitter in [0, 1), found {self.jitter}")

    def apply(self, evaluate: Evaluate, chains: Chains, step_size: Tensor | float, scale: Tensor) -> Move:
        """One move of every chain.

        Args:
            evaluate: log density and score.
            chains: where they are; their ``log_p`` must be finite.
            step_size: ``ε``, () or (N,), in units of ``scale``.
            scale: (D,) or (N, D), the local widths that the inverse mass matrix is made of.
        """
        uniform = torch.rand_like(chains.log_p)
        step = step_size * (1 + self.jitter * (2 * uniform - 1))
        momentum = torch.randn_like(chains.z) / scale
        new, new_momentum = leapfrog(evaluate, chains, momentum, step, scale, self.num_leapfrog)
        log_accept = log_acceptance(chains, new, momentum, new_momentum, scale)
        accepted = torch.rand_like(log_accept).log() < log_accept
        keep = accepted[:, None]
        z = torch.where(keep, new.z, chains.z)
        log_p = torch.where(accepted, new.log_p, chains.log_p)
        return Move(Chains(z, log_p, torch.where(keep, new.score, chains.score)), accepted, log_accept.exp())

    def adapted(self, step_size: Tensor, acceptance: Tensor, rate: float = 1.0) -> Tensor:
        """Step sizes after moves with this mean acceptance, both () or (T,): ``log ε += rate (mean − target)``."""
        return step_size * torch.exp(rate * (acceptance - self.target_acceptance))


def _finite(score: Tensor) -> Tensor:
    """A score that is NaN or infinite belongs to a point that will be rejected; zero keeps the arithmetic going."""
    return torch.nan_to_num(score, nan=0.0, posinf=0.0, neginf=0.0)
