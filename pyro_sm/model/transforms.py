# SPDX-License-Identifier: Apache-2.0
r"""Bijections that PyTorch lacks: from R^m, ``m = n(n+1)/2``, onto Cholesky factors and positive matrices.

    L = tril(u, -1) + diag(exp u_ii),          log |∂L/∂u| = Σ_i log L_ii
    S = L Lᵀ,                                  log |∂S/∂L| = n log 2 + Σ_i (n − i) log L_ii,   i = 0 … n−1

with ``S`` measured by its ``m`` distinct entries, as in the density of a Wishart law. (``transform_to`` knows
these supports, but by maps from R^(n×n), which are not bijections and have no Jacobian.)
"""

from __future__ import annotations

import math

import torch
from torch import Size, Tensor
from torch.distributions import biject_to, constraints
from torch.distributions.transforms import IndependentTransform, Transform


def _order(entries: int) -> int:
    """``n`` with ``n(n+1)/2 = entries``."""
    return (math.isqrt(8 * entries + 1) - 1) // 2


class CholeskyBijection(Transform):
    """Vectors (..., m) to lower triangular matrices (..., n, n) with a positive diagonal."""

    domain = constraints.real_vector
    codomain = constraints.lower_cholesky
    bijective = True

    def __eq__(self, other: object) -> bool:
        return type(self) is type(other)

    __hash__ = Transform.__hash__

    def _call(self, x: Tensor) -> Tensor:
        n = _order(x.shape[-1])
        rows, columns = torch.tril_indices(n, n, device=x.device)
        zeros = x.new_zeros(*x.shape[:-1], n * n)
        matrix = torch.index_copy(zeros, -1, rows * n + columns, x).reshape(*x.shape[:-1], n, n)
        return matrix.tril(-1) + torch.diag_embed(matrix.diagonal(dim1=-2, dim2=-1).exp())

    def _inverse(self, y: Tensor) -> Tensor:
        n = y.shape[-1]
        rows, columns = torch.tril_indices(n, n, device=y.device)
        matrix = y.tril(-1) + torch.diag_embed(y.diagonal(dim1=-2, dim2=-1).log())
        return matrix[..., rows, columns]

    def log_abs_det_jacobian(self, x: Tensor, y: Tensor) -> Tensor:
        """``Σ log L_ii``; ``x``: (..., m), returns (...)."""
        return y.diagonal(dim1=-2, dim2=-1).log().sum(-1)

    def forward_shape(self, shape: Size) -> Size:
        """(..., m) to (..., n, n)."""
        n = _order(shape[-1])
        return Size((*shape[:-1], n, n))

    def inverse_shape(self, shape: Size) -> Size:
        """(..., n, n) to (..., m)."""
        n = shape[-1]
        return Size((*shape[:-2], n * (n + 1) // 2))


class PositiveDefiniteBijection(CholeskyBijection):
    """Vectors (..., m) to positive definite matrices (..., n, n)."""

    codomain = constraints.positive_definite  # type: ignore[assignment]

    def _call(self, x: Tensor) -> Tensor:
        factor = super()._call(x)
        return factor @ factor.mT

    def _inverse(self, y: Tensor) -> Tensor:
        return super()._inverse(torch.linalg.cholesky(y))

    def log_abs_det_jacobian(self, x: Tensor, y: Tensor) -> Tensor:
        """``n log 2 + Σ (n − i + 1) log L_ii``; ``x``: (..., m), returns (...)."""
        n = y.shape[-1]
        diagonal = torch.arange(n, device=x.device)
        log_diagonal = x[..., diagonal * (diagonal + 3) // 2]  # position of (i, i) in the rows of a triangle
        weight = torch.arange(n + 1, 1, -1, device=x.device, dtype=x.dtype)
        return n * math.log(2) + (weight * log_diagonal).sum(-1)


def bijection_onto(support: constraints.Constraint) -> Transform:
    """``biject_to``, completed by the two above; also inside ``constraints.independent``.

    Raises:
        NotImplementedError: nothing is known about the support.
    """
    if isinstance(support, constraints.independent):
        return IndependentTransform(bijection_onto(support.base_constraint), support.reinterpreted_batch_ndims)
    if isinstance(support, type(constraints.positive_definite)):
        return PositiveDefiniteBijection()
    if isinstance(support, type(constraints.lower_cholesky)):
        return CholeskyBijection()
    return biject_to(support)
