# SPDX-License-Identifier: Apache-2.0
r"""Several guides trained apart, for the same posterior: what their pools say together.

The pools have equal sizes and are laid one after the other. Every weight has ``E[w] = Z`` under its own guide, so

* the evidence is that of the whole, ``Ẑ = (1/C) Σ_c Ẑ_c``;
* draws are chosen from every pool by itself, the same number of each: chain c is what replica c alone says, which is
  what R̂ compares. Weighing replicas by their ``Ẑ_c`` would hide that they disagree.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from pyro_sm.base import Draws
from pyro_sm.corrections.importance import Correction


def joined(pools: Sequence[Draws]) -> Draws:
    """One pool (C·N, D) of C equally long ones (N, D); the score is left out unless all have one."""
    scores = [pool.score for pool in pools if pool.score is not None]
    return Draws(
        torch.cat([pool.z for pool in pools]),
        torch.cat([pool.log_p for pool in pools]),
        torch.cat([pool.log_weight for pool in pools]),
        torch.cat(scores) if len(scores) == len(pools) else None,
    )


@dataclass(frozen=True)
class PerReplica:
    """A correction of each replica's part of a joined pool by itself.

    Args:
        correction: what is done to each.
        num_replicas: C.
    """

    correction: Correction
    num_replicas: int

    @property
    def name(self) -> str:
        """What was done, in words."""
        return f"{self.correction.name}, in each of {self.num_replicas} replicas"

    def apply(self, draws: Draws, num_samples: int, generator: torch.Generator | None = None) -> Tensor:
        """Indices (num_samples,) into the joined ``draws``, the first replica's first.

        Raises:
            ValueError: C does not divide the number of draws or of samples, or a part cannot be corrected.
        """
        size, rest = divmod(len(draws.z), self.num_replicas)
        each, left = divmod(num_samples, self.num_replicas)
        if rest or left:
            raise ValueError(
                f"expected multiples of the {self.num_replicas} replicas, found {len(draws.z)} draws and "
                f"num_samples={num_samples}"
            )
        parts = []
        for start in range(0, len(draws.z), size):
            rows = slice(start, start + size)
            part = Draws(draws.z[rows], draws.log_p[rows], draws.log_weight[rows])
            parts.append(start + self.correction.apply(part, each, generator))
        return torch.cat(parts)
