# SPDX-License-Identifier: Apache-2.0
r"""Metrics of a score divergence: ``E_q ‖m(z)ᵀ (s_q − s_p)‖²`` for a diffusion matrix ``m(z)``, (D, D).

* :class:`Identity`: ``m = I``, the plain Fisher divergence.
* :class:`MatrixMetric`: any ``m(z)``. Only ``m mᵀ`` matters; it is the inverse of a Riemannian metric ``G``.
* ``RiemannianMetric`` (``diffusion_matrices.py``): by G itself.
* :class:`FlowMetric`: ``m = J_T⁻¹`` for a flow ``y = T(z)``: the Fisher divergence in y-space, where
  ``∇_y log p = J_T⁻ᵀ ∇_z log p`` and the log-determinants of p and q cancel.
* :class:`BaseSpace`: ``m = J_F`` for the guide's own ``z = F(u)``: the flow is the guide's, read backwards.

Source: "Interpreting diffusion score matching using normalizing flow" https://arxiv.org/abs/2107.10072 .
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, Protocol

import torch
from torch import Tensor


class Metric(Protocol):
    """Turns score differences in latent space into those whose squared length is measured."""

    def __call__(self, z: Tensor, difference: Tensor) -> Tensor:
        """``mᵀ Δ`` (N, D) at latents ``z`` (N, D) for ``difference`` Δ (N, D); differentiable in both."""
        ...


@dataclass(frozen=True)
class BaseSpace:
    """Whitened space: the guide's own noise (``FisherDivergence``), or the mixing density's Gaussian (MFD)."""


@dataclass(frozen=True)
class Identity:
    """``m = I``: unconstrained latent space as it is."""

    def __call__(self, z: Tensor, difference: Tensor) -> Tensor:
        """``Δ`` (N, D) as it is: ``m`` is the identity."""
        return difference


@dataclass(frozen=True)
class MatrixMetric:
    """``mᵀ Δ`` with a user's matrix.

    Args:
        matrix: maps latents (N, D) to ``m``, (N, D, D) or (D, D); differentiable, as ``m(z)`` is part of the
            path gradient.

    Raises:
        ValueError: on use, if the matrix has another shape.
    """

    matrix: Callable[[Tensor], Tensor]

    def __call__(self, z: Tensor, difference: Tensor) -> Tensor:
        """``m(z)ᵀ Δ`` (N, D), ``m`` evaluated at the latents."""
        m = self.matrix(z)
        dim = z.shape[-1]
        if m.shape not in ((dim, dim), (z.shape[0], dim, dim)):
            raise ValueError(
                f"expected a metric matrix of shape {(z.shape[0], dim, dim)} or {(dim, dim)}, found {tuple(m.shape)}"
            )
        return (difference[:, None, :] @ m)[:, 0, :]


@dataclass(frozen=True)
class FlowMetric:
    """The Fisher divergence in the space of ``y = T(z)``: ``m = J_T⁻¹``, so ``mᵀ Δ = J_T⁻ᵀ Δ``.

    Args:
        transform: any Pyro or torch transform of real vectors, such as a ``ContinuousFlow``. Its inverse is not
            needed; its parameters are not trained (the divergence of a metric that is trained too has its infimum at
            a degenerate metric).

    Raises:
        ValueError: on use, if the transform changes the shape.
    """

    transform: Any

    def __call__(self, z: Tensor, difference: Tensor) -> Tensor:
        """``J_T(z)⁻ᵀ Δ``, from D backward passes through the transform."""
        if not z.requires_grad:
            z = z.detach().requires_grad_(True)
        y = self.transform(z)
        if y.shape != z.shape:
            raise ValueError(f"expected a flow of shape {tuple(z.shape)}, found {tuple(y.shape)}")
        return torch.linalg.solve(jacobian(y, z).mT, difference[..., None])[..., 0]


def jacobian(y: Tensor, x: Tensor) -> Tensor:
    """``J_nij = ∂y_ni/∂x_nj`` (N, E, D), differentiable, of rows that do not mix; ``y``: (N, E), ``x``: (N, D)."""
    rows = [
        torch.autograd.grad(y[:, i].sum(), x, create_graph=True, retain_graph=True, materialize_grads=True)[0]
        for i in range(y.shape[1])
    ]
    return torch.stack(rows, 1)
