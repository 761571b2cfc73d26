# SPDX-License-Identifier: Apache-2.0
r"""Independence Metropolis: the guide's draws as proposals of a Markov chain with the target as its law.

The chain at a draw with log weight ``log w`` goes to the next proposal, with ``log w'``, with probability

    ``min(1, w'/w)``,   else it stays: the draw it is at is repeated.

The draws visited have the target's law as the pool grows, without smoothing or truncation of weights. It holds for
the path weights of a diffusion guide too: a weight that is right on average for given ``z`` is enough (the chain is
then one on paths). The price of a bad guide is a chain that stays: one draw of weight ``w`` is repeated about
``w / mean(w)`` times, and its acceptance, not its length, says what it is worth.

Sources: "Markov chains for exploring posterior distributions" https://doi.org/10.1214/aos/1176325750 ; "The
pseudo-marginal approach for efficient Monte Carlo computations" https://doi.org/10.1214/07-AOS574 .
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import NamedTuple

import torch
from torch import Tensor

from pyro_sm.base import Draws
from pyro_sm.corrections.importance import _check_pool
from pyro_sm.weights import normalised, resample


class Walk(NamedTuple):
    """``visited`` (S, C): the draw at which each of C chains was after each of its S proposals.

    ``acceptance`` (C,): the mean of ``min(1, w'/w)``.
    """

    visited: Tensor
    acceptance: Tensor


def log_acceptance(current: Tensor, proposed: Tensor) -> Tensor:
    """``min(0, log w' − log w)``, elementwise; ``current`` must be finite."""
    return (proposed - current).clamp(max=0)


@dataclass(frozen=True)
class IndependentMetropolis:
    """Chains that walk through the pool, each through its own part of it, chosen at random.

    They begin at draws resampled by weight, so that no beginning has to be thrown away.

    Args:
        num_chains: C; the pool is split among them. More are faster, but each must be long against the number of
            proposals its heaviest draw holds it for.

    Raises:
        ValueError: ``num_chains`` < 1.
    """

    num_chains: int = 4

    def __post_init__(self) -> None:
        if self.num_chains < 1:
            raise ValueError(f"expected num_chains >= 1, found {self.num_chains}")

    @property
    def name(self) -> str:
        """What was done, in words."""
        return f"independence Metropolis ({self.num_chains} chain{'s' if self.num_chains > 1 else ''})"

    def walk(self, log_weight: Tensor, generator: torch.Generator | None = None) -> Walk:
        """Walk through all of a pool (N,), but for ``N mod C`` draws that are not proposed.

        Raises:
            ValueError: fewer draws than chains; a log weight NaN or ``+inf``; none finite.
        """
        length = log_weight.shape[0] // self.num_chains
        if length < 1:
            raise ValueError(f"expected at least num_chains={self.num_chains} draws, found {log_weight.shape[0]}")
        normalised(log_weight)  # its errors name the bad weights
        log_w = log_weight.double()
        # In random order: a pool may have its components one after the other, and each chain must see them all.
        order = torch.randperm(len(log_w), generator=generator, device=log_w.device)
        proposal = order[: length * self.num_chains].reshape(self.num_chains, length).T
        log_u = torch.rand(proposal.shape, generator=generator, dtype=log_w.dtype, device=log_w.device).log()
        state = resample(log_w, self.num_chains, generator)
        visited, acceptance = [], torch.zeros_like(log_u[0])
        for proposed, threshold in zip(proposal, log_u, strict=True):
            log_accept = log_acceptance(log_w[state], log_w[proposed])
            state = torch.where(threshold < log_accept, proposed, state)
            acceptance = acceptance + log_accept.exp() / length
            visited.append(state)
        return Walk(torch.stack(visited), acceptance)

    def apply(self, draws: Draws, num_samples: int, generator: torch.Generator | None = None) -> Tensor:
        """Indices (num_samples,) into ``draws``, evenly spaced along the chains, in random order.

        Raises:
            ValueError: as :meth:`walk`; fewer draws than ``num_samples``, or fewer that fill all chains equally.
        """
        _check_pool(draws, num_samples)
        visited = self.walk(draws.log_weight, generator).visited.T.flatten()
        if len(visited) < num_samples:
            raise ValueError(
                f"expected at most {len(visited)} samples from {self.num_chains} chains of equal length through "
                f"{draws.z.shape[0]} draws, found num_samples={num_samples}"
            )
        position = (torch.arange(num_samples, device=visited.device) + 1) * len(visited) // num_samples - 1
        order = torch.randperm(num_samples, generator=generator, device=visited.device)
        return visited[position][order]
