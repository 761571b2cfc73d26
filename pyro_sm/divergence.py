# SPDX-License-Identifier: Apache-2.0
r"""Divergence ``tr ∂f/∂x`` of a vector field ``f: R^D -> R^D``, exactly or by random probes.

For a probe ``v`` with ``E[v vᵀ] = I``: ``E[vᵀ (∂f/∂x) v] = tr ∂f/∂x``. Rademacher probes have the least variance
and are exact where the Jacobian is diagonal.

Source: "A Stochastic Estimator of the Trace of the Influence Matrix" https://doi.org/10.1080/03610919008812866 .
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Protocol

import torch
from torch import Tensor

Field = Callable[[Tensor], Tensor]


class Divergence(Protocol):
    """A way to get the divergence of a field along with its value."""

    def probes(self, x: Tensor) -> Tensor:
        """Directions (P, B, D) for a batch ``x`` (B, D); the random part of the estimate."""
        ...

    def __call__(self, field: Field, x: Tensor, probes: Tensor) -> tuple[Tensor, Tensor]:
        """``f(x)`` (B, D) and the divergence (B,), by forward-mode products along ``probes``."""
        ...


def _products(field: Field, x: Tensor, probes: Tensor) -> tuple[Tensor, Tensor]:
    """``f(x)`` and ``vᵀ (∂f/∂x) v`` for every probe: (B, D) and (P, B)."""

    def along(v: Tensor) -> tuple[Tensor, Tensor]:
        value, product = torch.func.jvp(field, (x,), (v,))[:2]
        return value, (product * v).sum(-1)

    values, products = torch.func.vmap(along, randomness="error")(probes)
    return values[0], products


@dataclass(frozen=True)
class Exact:
    """Sum over the D coordinate directions; D forward-mode products."""

    def probes(self, x: Tensor) -> Tensor:
        """The coordinate frame, (D, B, D)."""
        eye = torch.eye(x.shape[-1], dtype=x.dtype, device=x.device)
        return eye[:, None, :].expand(-1, x.shape[0], -1)

    def __call__(self, field: Field, x: Tensor, probes: Tensor) -> tuple[Tensor, Tensor]:
        """``f(x)`` and the exact divergence."""
        value, products = _products(field, x, probes)
        return value, products.sum(0)


@dataclass(frozen=True)
class Hutchinson:
    """Mean over ``num_probes`` Rademacher probes; unbiased.

    Raises:
        ValueError: ``num_probes`` is not positive.
    """

    num_probes: int = 1

    def __post_init__(self) -> None:
        if self.num_probes < 1:
            raise ValueError(f"expected num_probes >= 1, found {self.num_probes}")

    def probes(self, x: Tensor) -> Tensor:
        """Signs, (num_probes, B, D)."""
        return torch.randint(0, 2, (self.num_probes, *x.shape), device=x.device).to(x.dtype) * 2 - 1

    def __call__(self, field: Field, x: Tensor, probes: Tensor) -> tuple[Tensor, Tensor]:
        """``f(x)`` and the estimated divergence."""
        value, products = _products(field, x, probes)
        return value, products.mean(0)
