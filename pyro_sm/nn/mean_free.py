# SPDX-License-Identifier: Apache-2.0
r"""Particles without their centre: n particles in R^s as D = (n−1)s unconstrained latents.

The energy of a particle system does not see where its centre is, so ``exp(−E)`` on all ``ns`` coordinates has no
finite integral. On the mean-free subspace it has. With ``H`` (n, n−1) the Helmert matrix, whose orthonormal columns

    ``H_{·k} = (1, …, 1, −k, 0, …, 0)ᵀ / √(k(k+1))``   (k ones, k = 1 … n−1)

are orthogonal to ``(1, …, 1)``, positions are ``x = H z`` for latents ``z`` (n−1, s), and ``z = Hᵀ x``. Lengths are
kept, so densities need no Jacobian and ``x · ∇_x E = z · ∇_z E`` for mean-free x.

The virial identity. Integration by parts gives ``E[z · ∇_z E] = D`` at temperature 1: a check of an energy, and of
draws, without reference.
"""

from __future__ import annotations

import torch
from torch import Tensor


def helmert(num_bodies: int) -> Tensor:
    """``H`` (n, n−1), float64."""
    k = torch.arange(1, num_bodies, dtype=torch.float64)
    row = torch.arange(num_bodies)[:, None]
    shape = torch.where(row < k, 1.0, torch.where(row == k, -k, 0.0))
    return shape / torch.sqrt(k * (k + 1))


class MeanFree:
    """The two views of n particles in R^s.

    Args:
        num_bodies: n ≥ 2.
        space_dim: s ≥ 1.

    Raises:
        ValueError: a count out of its range.
    """

    def __init__(self, num_bodies: int, space_dim: int) -> None:
        if num_bodies < 2 or space_dim < 1:
            raise ValueError(f"expected num_bodies >= 2 and space_dim >= 1, found {num_bodies} and {space_dim}")
        self.num_bodies = num_bodies
        self.space_dim = space_dim
        self.dim = (num_bodies - 1) * space_dim
        self._basis = helmert(num_bodies)
        pairs = torch.combinations(torch.arange(num_bodies))
        self._first, self._second = pairs[:, 0], pairs[:, 1]

    def to_positions(self, z: Tensor) -> Tensor:
        """Positions (..., n·s), mean-free, of latents ``z`` (..., D)."""
        return (self._basis.to(z) @ z.unflatten(-1, (self.num_bodies - 1, self.space_dim))).flatten(-2)

    def to_latents(self, x: Tensor) -> Tensor:
        """Latents (..., D) of positions ``x`` (..., n·s), whose centre is forgotten."""
        return (self._basis.to(x).T @ x.unflatten(-1, (self.num_bodies, self.space_dim))).flatten(-2)

    def squared_distances(self, x: Tensor) -> Tensor:
        """``r²_ij`` of all pairs i < j, (..., n(n−1)/2), for positions ``x`` (..., n·s)."""
        points = x.unflatten(-1, (self.num_bodies, self.space_dim))
        first, second = self._first.to(x.device), self._second.to(x.device)
        return (points.index_select(-2, first) - points.index_select(-2, second)).square().sum(-1)

    def squared_radii(self, x: Tensor) -> Tensor:
        """``Σ_i |x_i − x̄|²`` (...) for positions ``x`` (..., n·s)."""
        points = x.unflatten(-1, (self.num_bodies, self.space_dim))
        return (points - points.mean(-2, keepdim=True)).square().sum((-2, -1))
